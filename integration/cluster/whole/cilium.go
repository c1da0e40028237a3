package whole

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// Cilium is what a node's Cilium is set to. `make e2e-cilium-binaries` builds it. It runs without an operator, IPv4 alone, and masquerades
// what leaves the node.
type Cilium struct {
	// KubeProxyReplacement: Cilium serves Services, and no kube-proxy runs.
	KubeProxyReplacement bool
	// BPFMasquerade: by eBPF and not by iptables.
	BPFMasquerade bool
	// LegacyHostRouting: through the node's network stack.
	LegacyHostRouting bool
	EndpointRoutes    bool
	// VXLAN: packets between nodes are tunnelled; else they are routed.
	VXLAN bool
	// CNIExclusive: Cilium removes from the CNI configuration what is not its own, as is the default of its Helm chart.
	CNIExclusive bool
	// LocalRedirectPolicy: Cilium serves objects of that kind.
	LocalRedirectPolicy bool
}

// CiliumAgent is a component of nodes with Cilium.
const CiliumAgent = "cilium-agent"

// ciliumConflist is the file that Cilium writes.
const ciliumConflist = CNIConfDir + "/05-cilium.conflist"

func (c *Cluster) ciliumFile(name ...string) string {
	return filepath.Join(append([]string{c.bin, "cilium"}, name...)...)
}

// ciliumCommand is how Cilium's agent is started.
func (n *Node) ciliumCommand() []string {
	c := n.options.Cilium
	command := []string{
		"--k8s-kubeconfig-path=" + keys + "/cilium.kubeconfig", "--k8s-api-server-urls=" + apiEndpoint, "--lib-dir=" + n.cluster.ciliumFile(),
		"--state-dir=/run/cilium", "--bpf-root=/sys/fs/bpf", "--cgroup-root=/run/cilium/cgroupv2", "--ipam=kubernetes", "--enable-ipv6=false",
		"--cluster-name=e2e", "--identity-allocation-mode=crd", "--enable-hubble=false", "--enable-l7-proxy=false", "--enable-health-checking=false",
		"--enable-endpoint-health-checking=false", "--devices=eth0", "--write-cni-conf-when-ready=" + ciliumConflist,
	}
	for flag, value := range map[string]bool{
		"kube-proxy-replacement": c.KubeProxyReplacement, "enable-bpf-masquerade": c.BPFMasquerade,
		"enable-host-legacy-routing": c.LegacyHostRouting, "enable-endpoint-routes": c.EndpointRoutes, "cni-exclusive": c.CNIExclusive,
		"enable-local-redirect-policy": c.LocalRedirectPolicy,
	} {
		command = append(command, fmt.Sprintf("--%s=%t", flag, value))
	}
	if c.VXLAN {
		command = append(command, "--routing-mode=tunnel", "--tunnel-protocol=vxlan")
	} else {
		command = append(command, "--routing-mode=native", "--ipv4-native-routing-cidr="+podRange, "--auto-direct-node-routes=true")
	}
	slices.Sort(command)
	path := "PATH=" + n.cluster.ciliumFile() + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
	return append([]string{"env", path, "K8S_NODE_NAME=" + n.Name, n.cluster.ciliumFile(CiliumAgent)}, command...)
}

// prepareCilium makes what Cilium needs of the API.
func (c *Cluster) prepareCilium(ctx context.Context) error {
	if !slices.ContainsFunc(c.Nodes, func(n *Node) bool { return n.options.Cilium != nil }) {
		return nil
	}
	definitions, err := filepath.Glob(c.ciliumFile("crds", "*.yaml"))
	if err != nil || len(definitions) == 0 {
		return fmt.Errorf("Cilium's definitions are not in %s (%w): run `make e2e-cilium-binaries`", c.ciliumFile("crds"), err)
	}
	_, err = c.Kubectl(ctx, "create", "-f", strings.Join(definitions, ","))
	return err
}

// startCilium waits for kubelet to have registered the node, gives the node its range of addresses, and starts Cilium's agent.
func (n *Node) startCilium(ctx context.Context) error {
	if err := n.assignPods(ctx); err != nil {
		return err
	}
	_, err := n.Exec(ctx, "sh", "-ec", `mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/cilium
[ -e /run/cilium/netns ] || ln -s /run/netns /run/cilium/netns`) // where the agent looks for the network namespaces of pods
	if err != nil {
		return err
	}
	if err := n.CopyFile(n.cluster.ciliumFile("cilium-cni"), CNIBinDir+"/cilium-cni"); err != nil {
		return err
	}
	return n.Start(CiliumAgent)
}

// SetCilium gives the node's Cilium other settings: kube-proxy with its rules goes or comes, and the agent is started again. Pods that
// are there keep what they were attached with: remove them before.
func (n *Node) SetCilium(ctx context.Context, settings Cilium) error {
	n.options.Cilium = &settings
	if settings.KubeProxyReplacement {
		n.kill(KubeProxy)
		_, err := n.Exec(ctx, "sh", "-c", "for family in ip ip6; do nft delete table $family kube-proxy; done 2>/dev/null || true")
		if err != nil {
			return err
		}
	} else if n.Component(KubeProxy) == nil {
		if err := n.Start(KubeProxy); err != nil {
			return err
		}
	}
	return n.RestartCilium(ctx)
}

// RestartCilium ends Cilium's agent at once, and starts it again.
func (n *Node) RestartCilium(ctx context.Context) error {
	n.kill(CiliumAgent)
	if err := n.Start(CiliumAgent); err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		_, err := n.Exec(ctx, n.cluster.ciliumFile("cilium-dbg"), "status")
		return errors.Join(err, n.ended())
	})
}

// kill ends a component at once, if it runs.
func (n *Node) kill(component string) {
	if process := n.Component(component); process != nil {
		n.forget(component)
		process.Kill()
		<-process.Exited()
	}
}

// forget: the end of the component is no failure.
func (n *Node) forget(component string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.components, component)
}
