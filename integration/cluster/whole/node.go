package whole

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// Node is a node of a cluster.
type Node struct {
	Name              string
	Address, Address6 netip.Addr // of its eth0

	cluster *Cluster
	index   int
	options NodeOptions
	disk    string // the folder of what it writes, but for /run
	cgroups []hierarchy
	boots   int

	mu         sync.Mutex
	lab        *lab.Node
	components map[string]*lab.Process
}

// Pods is the range that the node's pods have their IPv4 addresses from.
func (n *Node) Pods() netip.Prefix { return nodePods(n.index) }

// Runtime is what runs the node's containers.
func (n *Node) Runtime() Runtime { return n.options.Runtime }

// Lab is the node as long as it is not booted again. Its clients and servers are of use here, its methods for CNI and
// agents are not: those expect nodes that package lab has made.
func (n *Node) Lab() *lab.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lab
}

// Exec runs a command inside the node and returns what it printed; its standard error is in the error.
func (n *Node) Exec(ctx context.Context, name string, args ...string) (string, error) {
	return n.Lab().Run(ctx, name, args...)
}

// Path is where this process finds a file of the node. See lab.Node.
func (n *Node) Path(name string) string { return n.Lab().Path(name) }

// ReadFile reads a file of the node.
func (n *Node) ReadFile(name string) ([]byte, error) { return os.ReadFile(n.Path(name)) }

// WriteFile writes a file of the node, by a rename, and makes its folder.
func (n *Node) WriteFile(name string, data []byte, mode os.FileMode) error {
	temp := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".new")
	if err := n.Lab().WriteFile(temp, data); err != nil {
		return err
	}
	return errors.Join(os.Chmod(n.Path(temp), mode), os.Rename(n.Path(temp), n.Path(name)))
}

// CopyFile copies a program of the machine into the node.
func (n *Node) CopyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return n.WriteFile(to, data, 0o755)
}

// LoadImage gives an image archive, as of `docker save`, to the node's runtime.
func (n *Node) LoadImage(ctx context.Context, archive []byte) error {
	cmd := n.Lab().Command(ctx, n.program("ctr"), "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = bytes.NewReader(archive)
	if printed, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: loading an image: %w: %s", n.Name, err, printed)
	}
	return nil
}

// TagImage gives an image of the node's runtime another name.
func (n *Node) TagImage(ctx context.Context, name, as string) error {
	if _, err := n.Exec(ctx, n.program("ctr"), "--namespace", "k8s.io", "images", "tag", "--force", name, as); err != nil {
		return fmt.Errorf("%s: naming image %s: %w", n.Name, name, err)
	}
	return nil
}

// program is one of the node's runtime.
func (n *Node) program(name string) string {
	return filepath.Join(n.cluster.bin, string(n.options.Runtime), name)
}

// boot makes the namespaces of the node and connects it.
func (n *Node) boot(ctx context.Context) (err error) {
	cgroup := filepath.Join(filepath.Base(n.cluster.work.path), n.Name)
	if n.cgroups, err = findHierarchies(); err != nil {
		return err
	}
	for _, h := range n.cgroups {
		if err := makeCgroup(h, cgroup); err != nil {
			return err
		}
	}
	join, boot := initScripts(n.disk, n.Name, n.cgroups, cgroup)
	if err := os.WriteFile(filepath.Join(n.disk, "boot"), []byte(boot), 0o644); err != nil {
		return err
	}
	made, err := lab.NewNode(ctx, lab.NodeOptions{Name: n.Name, Init: join})
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.lab, n.components = made, map[string]*lab.Process{}
	n.mu.Unlock()
	return n.connect(ctx)
}

// connect plugs the node in. The link of an earlier boot may still be there.
func (n *Node) connect(ctx context.Context) error {
	n.boots++
	name := fmt.Sprintf("%s-%d", n.Name, n.boots)
	err := n.cluster.network.In(lab.Host, func() error {
		handle, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer handle.Close()
		bridge, err := handle.LinkByName("nodes")
		if err != nil {
			return err
		}
		inside, err := netns.GetFromPath(fmt.Sprintf("/proc/%d/ns/net", n.Lab().PID()))
		if err != nil {
			return err
		}
		defer func() { _ = inside.Close() }()
		attributes := netlink.NewLinkAttrs()
		attributes.Name, attributes.MasterIndex, attributes.Flags = name, bridge.Attrs().Index, net.FlagUp
		return handle.LinkAdd(&netlink.Veth{LinkAttrs: attributes, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside)})
	})
	if err != nil {
		return fmt.Errorf("connecting the node: %w", err)
	}
	script := fmt.Sprintf("ip address add %s/24 dev eth0\nip address add %s/64 dev eth0 nodad\nip link set eth0 up\n", n.Address, n.Address6)
	script += fmt.Sprintf("ip route add default via %s\nip route add default via %s\n", networkAddress, networkAddress6)
	for i := range n.cluster.options.Nodes {
		if i != n.index && n.options.Flannel == nil {
			script += fmt.Sprintf("ip route add %s via %s\nip route add %s via %s\n", nodePods(i), nodeAddress(i), nodePods6(i), nodeAddress6(i))
		}
	}
	_, err = n.Exec(ctx, "sh", "-ec", script)
	return err
}

// halt ends everything that runs in the node, at once.
func (n *Node) halt() error {
	running := n.Lab()
	if running == nil {
		return nil
	}
	err := running.Close()
	for _, process := range n.components {
		<-process.Exited()
	}
	for _, h := range n.cgroups {
		err = errors.Join(err, removeCgroup(filepath.Join(h.dir, filepath.Base(n.cluster.work.path), n.Name)))
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lab = nil
	return err
}

// Reboot is a power failure: all processes of the node end at once, /run, links, rules and flows are gone, and what is
// on its disk stays. It returns when kubelet has said that the node is ready again; containers follow.
func (n *Node) Reboot(ctx context.Context) error {
	if err := n.halt(); err != nil {
		return err
	}
	began := time.Now()
	if err := n.boot(ctx); err != nil {
		return err
	}
	if err := n.startAll(ctx); err != nil {
		return err
	}
	return n.AwaitReady(ctx, began)
}

// AwaitReady waits until kubelet has said, after that time, that the node is ready.
func (n *Node) AwaitReady(ctx context.Context, after time.Time) error {
	err := lab.Eventually(ctx, func() error {
		if err := n.ended(); err != nil {
			return nil // said below
		}
		node, err := n.cluster.Admin.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range node.Status.Conditions {
			// The time stamp has whole seconds.
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue && condition.LastHeartbeatTime.Add(time.Second).After(after) {
				return nil
			}
		}
		return fmt.Errorf("not ready: %+v", node.Status.Conditions)
	})
	return errors.Join(err, n.ended())
}

// PodNetNS is the network namespace of a pod of this node that has a running container, for the clients and servers
// of Lab.
func (n *Node) PodNetNS(ctx context.Context, pod *corev1.Pod) (string, error) {
	for _, status := range pod.Status.ContainerStatuses {
		if status.State.Running == nil {
			continue
		}
		_, id, _ := bytes.Cut([]byte(status.ContainerID), []byte("://"))
		printed, err := n.Exec(ctx, n.program("ctr"), "--namespace", "k8s.io", "tasks", "list")
		if err != nil {
			return "", err
		}
		for line := range bytes.Lines([]byte(printed)) {
			if fields := bytes.Fields(line); len(fields) > 1 && bytes.Equal(fields[0], id) {
				return fmt.Sprintf("/proc/%s/ns/net", fields[1]), nil
			}
		}
	}
	return "", fmt.Errorf("pod %s/%s has no running container on %s", pod.Namespace, pod.Name, n.Name)
}

// assignPods waits for kubelet to have registered the node, and gives the node its range of IPv4 addresses in the API.
func (n *Node) assignPods(ctx context.Context) error {
	prefix := n.Pods().String()
	patch, err := json.Marshal(corev1.Node{Spec: corev1.NodeSpec{PodCIDR: prefix, PodCIDRs: []string{prefix}}})
	if err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		_, err := n.cluster.Admin.CoreV1().Nodes().Patch(ctx, n.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
		return err
	})
}

// Conflist is the file of the node's primary CNI.
func (n *Node) Conflist() string {
	switch {
	case n.options.Cilium != nil:
		return ciliumConflist
	case n.options.Flannel != nil:
		return flannelConflist
	}
	return ConflistFile
}

// conflist is the node's network configuration without the plugin, as the primary CNI's installer would write it.
func (n *Node) conflist() ([]byte, error) {
	type object = map[string]any
	version := "1.0.0"
	if n.options.Runtime == Containerd2 {
		version = "1.1.0"
	}
	portmap := object{"type": "portmap", "capabilities": object{"portMappings": true}}
	if n.options.Flannel != nil { // as in its manifest when the plugin was of this version
		return json.MarshalIndent(object{
			"cniVersion": "0.3.1", "name": "cbr0",
			"plugins": []object{{"type": "flannel", "delegate": object{"hairpinMode": true, "isDefaultGateway": true}}, portmap},
		}, "", "  ")
	}
	return json.MarshalIndent(object{
		"cniVersion": version, "name": "pods",
		"plugins": []object{
			{
				"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
				"ipam": object{"type": "host-local", "ranges": [][]object{{{"subnet": n.Pods()}}, {{"subnet": nodePods6(n.index)}}}, "routes": []object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}}},
			},
			portmap,
		},
	}, "", "  ")
}
