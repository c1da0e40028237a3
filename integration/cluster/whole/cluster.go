// Package whole brings up a whole Kubernetes cluster on one machine: etcd, API server, controller manager and
// scheduler on the first node, and on each node containerd, kubelet and kube-proxy, with pods that are real
// containers. `make e2e-binaries` builds what it runs; `make cluster` keeps one for experiments.
//
// A node is a set of namespaces (network, mount, process, UTS, cgroup) on the machine's own root file system, with
// /run, /etc/cni, /opt/cni, /etc/kubernetes and the folders of kubelet and containerd of its own, and what else is
// written to /etc, /opt and /var kept apart. Nothing listens in the machine's network namespace, and nothing
// of the machine is changed. Processes and namespaces are gone when the process that made the cluster ends,
// however it ends; folders and cgroups with Close, or when the next cluster is made.
//
// Limits: it needs root. The nodes share the machine's kernel, clock and cgroup limits. There is no DNS and no
// registry: images are loaded into the nodes, with imagePullPolicy Never. Seen on cgroup v1 alone.
package whole

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/integration/cluster"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The plan: nodes are 192.0.2.11 and 2001:db8::11, .12 and ::12 and so on, the network between them is 192.0.2.1 and 2001:db8::1, the pods
// of the first node 10.244.1.0/24 and fd00:10:244:1::/64, of the second 10.244.2.0/24 and fd00:10:244:2::/64, and Services 10.96.0.0/16
// and fd00:10:96::/112.
const (
	networkAddress  = "192.0.2.1"
	networkAddress6 = "2001:db8::1"
	apiAddress      = "192.0.2.11"
	apiEndpoint     = "https://" + apiAddress + ":6443"
	apiService      = "10.96.0.1"
	podRange        = "10.244.0.0/16"
	podRange6       = "fd00:10:244::/48"
	serviceRange    = "10.96.0.0/16"
	serviceRange6   = "fd00:10:96::/112"
)

func nodeAddress(i int) string { return fmt.Sprintf("192.0.2.%d", 11+i) }

func nodeAddress6(i int) string { return fmt.Sprintf("2001:db8::%d", 11+i) }

func nodePods(i int) netip.Prefix { return netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i+1)) }

func nodePods6(i int) netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", i+1))
}

// Runtime is what runs the containers of a node.
type Runtime string

// The runtimes: Debian's containerd 1.6 with its plugins and a conflist of CNI 1.0.0, and containerd 2 with those
// of CNI 1.1.0.
const (
	Containerd1 Runtime = "containerd1"
	Containerd2 Runtime = "containerd2"
)

// The ways in which kube-proxy makes rules.
const (
	NFTables = "nftables"
	IPTables = "iptables"
)

// Options are the things that clusters differ in.
type Options struct {
	// Name is that of the folder of the logs, bin/logs/<name>; "cluster" where empty.
	Name string
	// Nodes are called node1, node2 and so on; one with containerd 1 and one with containerd 2 where empty.
	Nodes []NodeOptions
	// Images are archives that are loaded into each node, besides those of ImageEcho and the sandboxes.
	Images []string
}

// Mixed are a node with containerd 1 and a kube-proxy in iptables mode, and one with containerd 2 and nftables mode.
func Mixed() []NodeOptions {
	return []NodeOptions{{Runtime: Containerd1, ProxyMode: IPTables}, {Runtime: Containerd2, ProxyMode: NFTables}}
}

// NodeOptions are the things that nodes differ in.
type NodeOptions struct {
	Runtime Runtime
	// ProxyMode is kube-proxy's; nftables where empty.
	ProxyMode string
	// Cilium or Flannel is the primary CNI where it is set; else the bridge plugin.
	Cilium  *Cilium
	Flannel *Flannel
}

// Cluster is a cluster that is up. Its methods may be called from several goroutines.
type Cluster struct {
	Nodes []*Node
	// Admin may do everything.
	Admin kubernetes.Interface
	// AdminConfig is what Admin was made with.
	AdminConfig *rest.Config
	// Kubeconfig is a file of the machine for Admin; its address is reached from within the nodes.
	Kubeconfig string
	// Took is how long it took until all nodes were ready.
	Took time.Duration

	work    *workDir
	bin     string
	logs    string
	options Options
	ca      *cluster.Authority

	network *lab.Node // the namespaces that the nodes' eth0 are plugged into
}

// New brings up a cluster; the caller closes it.
func New(ctx context.Context, options Options) (c *Cluster, err error) {
	began := time.Now()
	if os.Geteuid() != 0 {
		return nil, errors.New("cluster: making nodes out of namespaces needs root")
	}
	root, err := lab.ModuleRoot()
	if err != nil {
		return nil, err
	}
	if options.Name == "" {
		options.Name = "cluster"
	}
	if len(options.Nodes) == 0 {
		options.Nodes = []NodeOptions{{Runtime: Containerd1}, {Runtime: Containerd2}}
	}
	c = &Cluster{options: options, bin: filepath.Join(root, "bin"), logs: filepath.Join(root, "bin", "logs", options.Name)}
	if c.work, err = newWorkDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cluster: %w", err), errors.New(c.LogTails()), c.Close())
			c = nil
		}
	}()
	if err := os.RemoveAll(c.logs); err != nil {
		return c, err
	}
	if err := c.prepare(); err != nil {
		return c, err
	}
	if c.network, err = lab.NewNode(ctx, lab.NodeOptions{Name: "network", Init: networkInit}); err != nil {
		return c, err
	}
	if err := c.each(func(n *Node) error { return n.boot(ctx) }); err != nil {
		return c, err
	}
	if err := c.each(func(n *Node) error { return n.startAll(ctx) }); err != nil {
		return c, err
	}
	if err := c.ready(ctx); err != nil {
		return c, err
	}
	c.Took = time.Since(began)
	return c, nil
}

// prepare makes what the nodes find on their disks.
func (c *Cluster) prepare() (err error) {
	if c.ca, err = cluster.NewAuthority(); err != nil {
		return err
	}
	admin, err := c.ca.Client("admin", "system:masters")
	if err != nil {
		return err
	}
	c.AdminConfig = &rest.Config{
		Host: apiEndpoint, QPS: -1,
		// The node may have been booted again since.
		Dial:            c.dialFromFirst,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.ca.Cert, CertData: admin.Cert, KeyData: admin.Key},
	}
	if c.Admin, err = kubernetes.NewForConfig(c.AdminConfig); err != nil {
		return err
	}
	c.Kubeconfig = filepath.Join(c.work.path, "admin.kubeconfig")
	if err := os.WriteFile(c.Kubeconfig, c.ca.Kubeconfig(apiEndpoint, admin), 0o600); err != nil {
		return err
	}
	serviceAccounts, err := c.ca.Client("service-accounts")
	if err != nil {
		return err
	}
	for i, options := range c.options.Nodes {
		n := &Node{cluster: c, index: i, options: options, Name: fmt.Sprintf("node%d", i+1), Address: netip.MustParseAddr(nodeAddress(i)), Address6: netip.MustParseAddr(nodeAddress6(i))}
		if err := n.prepare(serviceAccounts.Key); err != nil {
			return err
		}
		c.Nodes = append(c.Nodes, n)
	}
	return nil
}

// KubeconfigFor is a kubeconfig file for a user of the API in these groups.
func (c *Cluster) KubeconfigFor(user string, groups ...string) ([]byte, error) {
	pair, err := c.ca.Client(user, groups...)
	if err != nil {
		return nil, err
	}
	return c.ca.Kubeconfig(apiEndpoint, pair), nil
}

// each does something for all nodes at once.
func (c *Cluster) each(do func(*Node) error) error {
	failed := make([]error, len(c.Nodes))
	var all sync.WaitGroup
	for i, n := range c.Nodes {
		all.Go(func() {
			if err := do(n); err != nil {
				failed[i] = fmt.Errorf("%s: %w", n.Name, err)
			}
		})
	}
	all.Wait()
	return errors.Join(failed...)
}

// ready waits for what the first pods need.
func (c *Cluster) ready(ctx context.Context) error {
	if err := c.each(func(n *Node) error { return n.AwaitReady(ctx, time.Time{}) }); err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		_, err := c.Admin.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// Test makes what the tests of a package find in the cluster, runs them and closes the cluster, whatever has failed. It returns the
// exit status; errors, and the ends of the logs where there are any, go to standard error.
func (c *Cluster) Test(furnish func() error, run func() int) int {
	fmt.Printf("the cluster was up after %v\n", c.Took.Round(100*time.Millisecond))
	code, err := 1, furnish()
	if err == nil {
		code = run()
	}
	if code != 0 {
		err = errors.Join(err, errors.New(c.LogTails()))
	}
	if err = errors.Join(err, c.Close()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// AwaitNamespaces waits until pods can be made in these namespaces.
func (c *Cluster) AwaitNamespaces(ctx context.Context, namespaces ...string) error {
	return lab.Eventually(ctx, func() error {
		for _, namespace := range namespaces {
			_, err := c.Admin.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
			_, errRoot := c.Admin.CoreV1().ConfigMaps(namespace).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
			if err := errors.Join(err, errRoot); err != nil {
				return err
			}
		}
		return nil
	})
}

// Close ends all processes of the cluster and removes its folders and cgroups. The logs stay in bin/logs.
func (c *Cluster) Close() error {
	var failed []error
	for _, n := range c.Nodes {
		failed = append(failed, n.halt())
	}
	if c.network != nil {
		failed = append(failed, c.network.Close())
	}
	if c.work != nil {
		failed = append(failed, c.work.remove())
	}
	return errors.Join(failed...)
}

// Node is a node by its name.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Network is where the nodes' eth0 are plugged in: lab.Host is the namespace of a neighbour, 192.0.2.1, that routes
// to them.
func (c *Cluster) Network() *lab.Node { return c.network }

// Kubectl runs kubectl as administrator, in the working directory of this process, and returns what it printed.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, nil, "kubectl", args)
}

// Apply is `kubectl apply` of these manifests.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.run(ctx, []byte(manifests), "kubectl", []string{"apply", "-f", "-"})
	return err
}

// Helm runs helm as administrator, in the working directory of this process, and returns what it printed.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, nil, "helm", args)
}

// Command prepares kubectl or helm, as administrator.
func (c *Cluster) Command(ctx context.Context, program string, args ...string) *exec.Cmd {
	net := fmt.Sprintf("--net=/proc/%d/ns/net", c.Nodes[0].Lab().PID())
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{net, filepath.Join(c.bin, "e2e", program)}, args...)...)
	home := filepath.Join(c.work.path, "home")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig, "HOME="+home,
		"HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	return cmd
}

// WriteCommands makes a directory with programs that are kubectl and helm, as administrator, for as long as the cluster is up. kubectl's plugin
// of this module is the one in bin/.
func (c *Cluster) WriteCommands(dir string) error {
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o750)); err != nil {
		return err
	}
	for _, program := range []string{"kubectl", "helm"} {
		command := c.Command(context.Background(), program)
		script := "#!/bin/sh\nPATH=" + quote.Shell(c.bin) + ":$PATH\n"
		for _, variable := range command.Env[len(os.Environ()):] {
			name, value, _ := strings.Cut(variable, "=")
			script += "export " + name + "=" + quote.Shell(value) + "\n"
		}
		script += "exec " + quote.Shell(command.Args...) + ` "$@"` + "\n"
		if err := os.WriteFile(filepath.Join(dir, program), []byte(script), 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) run(ctx context.Context, stdin []byte, program string, args []string) (string, error) {
	cmd := c.Command(ctx, program, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %q: %w: %s%s", program, args, err, &stdout, &stderr)
	}
	return stdout.String(), nil
}
