package lab

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Pod is what a runtime tells CNI about a pod. A pod without a name has no identity: CNI_ARGS is not set.
type Pod struct {
	Name      string
	Namespace string            // "default" where empty
	UID       string            // "uid-<namespace>-<name>" where empty
	Labels    map[string]string // nil: the runtime does not pass labels
	IfName    string            // "eth0" where empty
	NetNS     string            // name of its network namespace; Name where empty
}

func (p Pod) netNS() string {
	if p.NetNS != "" {
		return p.NetNS
	}
	return p.Name
}

// ContainerID is the one that cnitool derives from the path of the network namespace.
func (p Pod) ContainerID() string {
	sum := sha512.Sum512([]byte(netnsPath(p.netNS())))
	return fmt.Sprintf("cnitool-%x", sum[:10])
}

// env is how cnitool takes the pod's identity and labels.
func (p Pod) env() ([]string, error) {
	var env []string
	if p.IfName != "" {
		env = append(env, "CNI_IFNAME="+p.IfName)
	}
	env = append(env, p.args()...)
	if p.Labels != nil {
		labels, err := json.Marshal(map[string]any{"labels": p.Labels})
		if err != nil {
			return nil, err
		}
		env = append(env, "CAP_ARGS="+string(labels))
	}
	return env, nil
}

// args is CNI_ARGS as containerd gives it; nothing for a pod without identity.
func (p Pod) args() []string {
	if p.Name == "" {
		return nil
	}
	namespace, uid := p.Namespace, p.UID
	if namespace == "" {
		namespace = "default"
	}
	if uid == "" {
		uid = "uid-" + namespace + "-" + p.Name
	}
	return []string{fmt.Sprintf("CNI_ARGS=K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;"+
		"K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=%s;IgnoreUnknown=1", namespace, p.Name, p.ContainerID(), uid)}
}

// Attached is what ADD returned.
type Attached struct {
	ContainerID string
	NetNS       string       // its name
	IPs         []netip.Addr // of the pod
	Result      []byte       // as printed
}

// Conflist reads a conflist of cni-conf/ by its file name.
func Conflist(file string) ([]byte, error) {
	root, err := ModuleRoot()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(root, "cni-conf", file))
}

// AddConf puts a conflist into the node's configuration folder; cnitool finds it by the name inside.
func (n *Node) AddConf(file string, conflist []byte) error {
	return n.WriteFile(filepath.Join(confDir, file), conflist)
}

// Add does what a runtime does for a new pod: it makes the pod's network namespace, where that is
// missing, and calls ADD.
func (n *Node) Add(ctx context.Context, network string, pod Pod) (Attached, error) {
	if err := n.addNetNS(ctx, pod.netNS()); err != nil {
		return Attached{}, err
	}
	printed, err := n.cnitool(ctx, "add", network, pod)
	if err != nil {
		return Attached{}, err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal([]byte(printed), &result); err != nil {
		return Attached{}, fmt.Errorf("lab: result of ADD for pod %s: %w: %s", pod.netNS(), err, printed)
	}
	attached := Attached{ContainerID: pod.ContainerID(), NetNS: pod.netNS(), Result: []byte(printed)}
	for _, ip := range result.IPs {
		attached.IPs = append(attached.IPs, ip.Address.Addr())
	}
	return attached, nil
}

// Del calls DEL and then removes the pod's network namespace. Both may be gone already. Sockets of
// this process in there lose their interface without a word to their peers, as in a pod whose sandbox
// is torn down before its process has closed them.
func (n *Node) Del(ctx context.Context, network string, pod Pod) error {
	if _, err := n.cnitool(ctx, "del", network, pod); err != nil {
		return err
	}
	if _, err := os.Stat(n.namespacePath(pod.netNS())); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	_, err := n.Run(ctx, "ip", "netns", "delete", pod.netNS())
	return err
}

// Check calls CHECK.
func (n *Node) Check(ctx context.Context, network string, pod Pod) error {
	_, err := n.cnitool(ctx, "check", network, pod)
	return err
}

// GC calls GC with an empty list of valid attachments, as cnitool does: everything of the network goes.
func (n *Node) GC(ctx context.Context, network string) error {
	_, err := n.cnitool(ctx, "gc", network, Pod{NetNS: "none"})
	return err
}

// Status calls STATUS.
func (n *Node) Status(ctx context.Context, network string) error {
	_, err := n.cnitool(ctx, "status", network, Pod{NetNS: "none"})
	return err
}

func (n *Node) addNetNS(ctx context.Context, name string) error {
	if name == "" {
		return errors.New("lab: a pod needs a name or a network namespace")
	}
	if _, err := os.Stat(n.namespacePath(name)); err == nil {
		return nil
	}
	if _, err := n.Run(ctx, "ip", "netns", "add", name); err != nil {
		return err
	}
	if _, err := n.Run(ctx, "ip", "-n", name, "link", "set", "lo", "up"); err != nil {
		return err
	}
	return n.Sysctl(name, "ipv6/conf/default/accept_dad", "0")
}

func (n *Node) cnitool(ctx context.Context, command, network string, pod Pod) (string, error) {
	if err := present(n.binaries.CNITool); err != nil {
		return "", err
	}
	env, err := pod.env()
	if err != nil {
		return "", err
	}
	call := func(command string) (printed, said string, err error) {
		cmd := n.Command(ctx, n.binaries.CNITool, command, network, netnsPath(pod.netNS()))
		cmd.Env = append(cmd.Env, append(env, "NETCONFPATH="+confDir, "CNI_PATH="+n.cniPath())...)
		return outputs(cmd)
	}
	return unlessItHadNoTime(func(again bool) (printed, said string, err error) {
		if again && command == "add" { // other plugins of the list refuse to do it twice
			if printed, said, err := call("del"); err != nil {
				return printed, said, err
			}
		}
		return call(command)
	})
}

// unlessItHadNoTime executes the plugin again where it has given up, as it does after a while by the clock, and the machine has not
// worked for that long: it stood still, and nobody would record the pod.
func unlessItHadNoTime(execute func(again bool) (printed, said string, err error)) (string, error) {
	const fileWait = 1500 * time.Millisecond // the plugin's
	for passed, again := Stopwatch(), false; ; again = true {
		printed, said, err := execute(again)
		if err != nil || !strings.Contains(said, "the runtime directory does not respond") || passed() >= fileWait {
			return printed, err
		}
		fmt.Fprintf(os.Stderr, "lab: the machine stood still, so the plugin is executed again: %s", said)
	}
}

func (n *Node) cniPath() string { return n.binaries.CNIDir + ":" + filepath.Dir(n.binaries.Plugin) }

// ExecPlugin calls the plugin itself, for what cnitool cannot say: a DEL without prevResult or network
// namespace, for example. env is in the form "CNI_COMMAND=DEL". It returns what the plugin printed.
func (n *Node) ExecPlugin(ctx context.Context, config []byte, env ...string) (string, error) {
	if err := present(n.binaries.Plugin); err != nil {
		return "", err
	}
	return unlessItHadNoTime(func(bool) (printed, said string, err error) {
		cmd := n.Command(ctx, n.binaries.Plugin)
		cmd.Stdin = bytes.NewReader(config)
		cmd.Env = append(cmd.Env, append(env, "CNI_PATH="+n.cniPath())...)
		return outputs(cmd)
	})
}
