package whole

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// Flannel is what a node's flannel is set to. `make e2e-flannel-binaries` builds it. It has IPv4 alone, and masquerades what leaves the pods'
// networks.
type Flannel struct {
	// VXLAN: packets between nodes are tunnelled; else they are routed (host-gw).
	VXLAN bool
	// Unfiltered: frames that bridges forward do not pass netfilter, as without br_netfilter.
	Unfiltered bool
}

// Flanneld is a component of nodes with flannel.
const Flanneld = "flanneld"

const (
	flannelConflist = CNIConfDir + "/10-flannel.conflist"
	flannelConfig   = "/etc/kube-flannel/net-conf.json"
	flannelSubnet   = "/run/flannel/subnet.env" // which flanneld writes once it is ready, and its CNI plugin reads
)

func (c *Cluster) flannelFile(name string) string { return filepath.Join(c.bin, "flannel", name) }

// flannelCommand is how flanneld is started.
func (n *Node) flannelCommand() []string {
	return []string{
		"env", "PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin", "NODE_NAME=" + n.Name, n.cluster.flannelFile(Flanneld), "--kube-subnet-mgr",
		"--kubeconfig-file=" + keys + "/flannel.kubeconfig", "--net-config-path=" + flannelConfig, "--ip-masq", "--iface=eth0",
	}
}

// startFlannel waits for kubelet to have registered the node, gives the node its range of addresses, and starts flanneld.
func (n *Node) startFlannel(ctx context.Context) error {
	if err := n.assignPods(ctx); err != nil {
		return err
	}
	if err := n.CopyFile(n.cluster.flannelFile("flannel"), CNIBinDir+"/flannel"); err != nil {
		return err
	}
	return n.runFlannel(ctx)
}

// runFlannel starts flanneld with the settings of the node, and waits until pods can be made.
func (n *Node) runFlannel(ctx context.Context) error {
	backend, filtered := "host-gw", 1
	if n.options.Flannel.VXLAN {
		backend = "vxlan"
	}
	if n.options.Flannel.Unfiltered {
		filtered = 0
	}
	config, err := json.Marshal(map[string]any{"Network": podRange, "Backend": map[string]string{"Type": backend}})
	if err != nil {
		return err
	}
	if err := n.WriteFile(flannelConfig, config, 0o644); err != nil {
		return err
	}
	_, err = n.Exec(ctx, "sh", "-ec", fmt.Sprintf("rm -f %s\nfor tables in iptables ip6tables; do echo %d >/proc/sys/net/bridge/bridge-nf-call-$tables; done", flannelSubnet, filtered))
	if err != nil {
		return err
	}
	return n.RestartFlannel(ctx)
}

// RestartFlannel ends flanneld at once, where it runs, and starts it again.
func (n *Node) RestartFlannel(ctx context.Context) error {
	n.kill(Flanneld)
	if err := n.Start(Flanneld); err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		_, err := os.Stat(n.Path(flannelSubnet))
		return errors.Join(err, n.ended())
	})
}

// SetFlannel gives flannel other settings on all nodes. What it has made for those of before is removed, the pods' bridge too: remove all
// pods that are on it before.
func (c *Cluster) SetFlannel(ctx context.Context, settings Flannel) error {
	return c.each(func(n *Node) error {
		n.options.Flannel = &settings
		n.kill(Flanneld)
		script := []string{"for link in flannel.1 cni0; do ! ip link show $link >/dev/null 2>&1 || ip link delete $link; done"}
		for i := range c.Nodes {
			if i != n.index {
				script = append(script, "ip route flush exact "+nodePods(i).String()) // also where there is none
			}
		}
		if _, err := n.Exec(ctx, "sh", "-ec", strings.Join(script, "\n")); err != nil {
			return err
		}
		return n.runFlannel(ctx)
	})
}
