// Package lab makes Linux "nodes" out of namespaces and drives real CNI plugins, agents and traffic in
// them. Tests, demo and bench share it.
//
// A node has its own network, mount and process namespaces: it sees the machine's files, but /run and
// /var/lib are its own, so that conflists, `ip netns` and the default paths are used as they stand and
// nothing outside is touched. All of it is gone when the process that made it ends, however it ends.
//
// Limits: it needs root, and kernel modules (br_netfilter, nf_tables) are the machine's.
package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// Where things are on every node and on the network it is attached to. Host is the node's own network
// namespace, Uplink the one that plays the network: it holds the far end of the node's eth0 and routes
// everything else to the node, as a hostile neighbour may.
const (
	Host   = ""
	Uplink = "uplink"

	RuntimeDir = "/run/magic-ip-address"

	NodeIPv4   = "192.0.2.2"
	NodeIPv6   = "2001:db8::2"
	UplinkIPv4 = "192.0.2.1"
	UplinkIPv6 = "2001:db8::1"

	confDir = "/run/cni/net.d"
)

// holder is what the first process of a node runs. It ends, and with it every process and namespace of
// the node, when its standard input does. Duplicate address detection is off: nothing waits for it.
const holder = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -p /run/lock ` + confDir + `
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip link set lo up
ip netns add ` + Uplink + `
echo 0 | ip netns exec ` + Uplink + ` tee /proc/sys/net/ipv6/conf/default/accept_dad >/dev/null
ip link add eth0 type veth peer name eth0 netns ` + Uplink + `
ip -n uplink link set lo up
ip -n uplink link set eth0 up
ip -n uplink address add ` + UplinkIPv4 + `/24 dev eth0
ip -n uplink address add ` + UplinkIPv6 + `/64 dev eth0 nodad
ip link set eth0 up
ip address add ` + NodeIPv4 + `/24 dev eth0
ip address add ` + NodeIPv6 + `/64 dev eth0 nodad
ip route add default via ` + UplinkIPv4 + `
ip route add default via ` + UplinkIPv6 + `
ip -n uplink route add default via ` + NodeIPv4 + `
ip -n uplink route add default via ` + NodeIPv6 + `
echo ready
exec cat >/dev/null`

// NodeOptions are the things that nodes differ in.
type NodeOptions struct {
	Name     string // what the agent is told; "node" where empty
	Binaries Binaries
	// Init is a shell script for the first process instead of the one that makes what the methods here expect.
	// It begins in namespaces of its own, with the machine's mounts, says "ready" when it is, and ends with its
	// standard input.
	Init string
}

// Node is one node. Its methods may be called from several goroutines.
type Node struct {
	// AgentPrefix is a command before that of each agent, such as one that gives it mounts of its own.
	AgentPrefix []string

	Name string
	// Env are variables ("KEY=value") of every command, beside those of this process.
	Env      []string
	binaries Binaries
	pid      int // of the holder, which is process 1 inside
	close    func() error

	mu     sync.Mutex
	agents int // started so far
	routed int // pods attached by AddRouted so far
}

// NewNode makes a node; the caller closes it.
func NewNode(ctx context.Context, options NodeOptions) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: making a node out of namespaces needs root: run this with sudo")
	}
	binaries, err := options.Binaries.resolve()
	if err != nil {
		return nil, err
	}

	script := holder
	if options.Init != "" {
		script = options.Init
	}
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
	}
	// The kernel closes the writing end when this process ends, even by SIGKILL.
	lifeline, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("lab: making the namespaces of a node: %w", err)
	}
	end := sync.OnceValue(func() error {
		_ = lifeline.Close()
		_ = cmd.Process.Kill()
		if err := cmd.Wait(); err != nil && stderr.Len() > 0 {
			return fmt.Errorf("lab: node: %w: %s", err, &stderr)
		}
		return nil
	})
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	ready, err := bufio.NewReader(stdout).ReadString('\n')
	if !stop() || err != nil || ready != "ready\n" {
		return nil, errors.Join(fmt.Errorf("lab: the node did not get ready: said %q", ready), context.Cause(ctx), end())
	}

	name := options.Name
	if name == "" {
		name = "node"
	}
	return &Node{Name: name, binaries: binaries, pid: cmd.Process.Pid, close: end}, nil
}

// Close ends all processes of the node and its namespaces. Sockets that this process holds in one of
// them keep that one alive until they are closed.
func (n *Node) Close() error { return n.close() }

// environment is this process's, with the folders of nft and ip, which are not in every user's PATH.
func environment() []string {
	return append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
}

// Command prepares a command that runs inside the node, in its root folder. Cancelling ctx kills it.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(n.pid), "--net", "--mount", "--pid", "--uts", "--cgroup", "--", name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.Env = append(environment(), n.Env...)
	cmd.Cancel = func() error { return signal(cmd.Process, syscall.SIGKILL) }
	// It bounds what a hanging child may cost. A busy machine needs seconds to read what a process that has ended has printed.
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// Run runs a command inside the node and returns what it printed; its standard error is in the error.
func (n *Node) Run(ctx context.Context, name string, args ...string) (string, error) {
	return output(n.Command(ctx, name, args...))
}

// output runs cmd. Both streams are in the error: CNI plugins explain themselves on standard output.
func output(cmd *exec.Cmd) (string, error) {
	stdout, _, err := outputs(cmd)
	return stdout, err
}

// outputs is output, with what the command printed to its standard error.
func outputs(cmd *exec.Cmd) (printed, said string, err error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), stderr.String(), fmt.Errorf("%s: %w: %s%s", cmd, err, &stdout, &stderr)
	}
	return stdout.String(), stderr.String(), nil
}

// signal sends sig to the process that nsenter has made: nsenter itself stays outside of the node's
// process namespace and passes nothing on.
func signal(nsenter *os.Process, sig syscall.Signal) error {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", nsenter.Pid))
	if err != nil || len(bytes.TrimSpace(children)) == 0 {
		return nsenter.Signal(sig)
	}
	pid, err := strconv.Atoi(strings.Fields(string(children))[0])
	if err != nil {
		return err
	}
	return syscall.Kill(pid, sig)
}

// In runs f inside a network namespace of the node: Host, Uplink, one by its name in /run/netns, or one by the path
// that the node's own processes know it by.
// Sockets that f opens stay there. Only f's own goroutine is inside: others that f starts are not.
func (n *Node) In(namespace string, f func() error) (err error) {
	target, err := netns.GetFromPath(n.namespacePath(namespace))
	if err != nil {
		return fmt.Errorf("lab: network namespace %q: %w", namespace, err)
	}
	defer func() { _ = target.Close() }()

	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() {
		// A thread that cannot go back stays locked: it dies with its goroutine.
		if restore := netns.Set(origin); restore != nil {
			err = errors.Join(err, fmt.Errorf("lab: leaving network namespace %q: %w", namespace, restore))
		} else {
			runtime.UnlockOSThread()
		}
		_ = origin.Close()
	}()
	if err := netns.Set(target); err != nil {
		return fmt.Errorf("lab: entering network namespace %q: %w", namespace, err)
	}
	return f()
}

func (n *Node) namespacePath(namespace string) string {
	switch {
	case namespace == Host:
		return fmt.Sprintf("/proc/%d/ns/net", n.pid)
	case filepath.IsAbs(namespace):
		return n.Path(namespace)
	}
	return n.Path(netnsPath(namespace))
}

// PID is the process that is number 1 inside.
func (n *Node) PID() int { return n.pid }

// netnsPath is the path that a node's own processes know a network namespace by.
func netnsPath(namespace string) string { return "/run/netns/" + namespace }

// Sysctl sets a net.… sysctl, written with slashes below /proc/sys/net, in a network namespace of the node.
func (n *Node) Sysctl(namespace, key, value string) error {
	return n.In(namespace, func() error {
		// The kernel resolves /proc/sys/net by the namespace of the thread that asks.
		return os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0o644)
	})
}

// AllICMPErrors has the node send every ICMP error. A kernel limits those of the types in its masks: for each destination, and in all, where
// it loses one whenever two processors find the credit used up at the same time, as it is in the beginning (icmp_global_allow).
func (n *Node) AllICMPErrors() error {
	const noneOfThese = "255" // the list of limited types cannot be empty
	return errors.Join(n.Sysctl(Host, "ipv4/icmp_ratemask", "0"), n.Sysctl(Host, "ipv6/icmp/ratemask", noneOfThese))
}

// Path is where this process finds a file of the node, to read it. Symbolic links with absolute targets lead out
// of it, so callers name /run and not /var/run.
func (n *Node) Path(name string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", n.pid), name)
}

// WriteFile writes a file of the node and makes its folder. It refuses /proc, because sysctls would be
// the machine's: see Sysctl.
func (n *Node) WriteFile(name string, data []byte) error {
	if strings.HasPrefix(name, "/proc/") {
		return fmt.Errorf("lab: writing %s of a node from outside would reach the machine", name)
	}
	if err := os.MkdirAll(filepath.Dir(n.Path(name)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(n.Path(name), data, 0o644)
}

// Eventually calls condition until it returns nil, and returns its last error when ctx ends before
// that. It is for what neither the kernel nor a process announces.
func Eventually(ctx context.Context, condition func() error) error {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := condition()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-ticker.C:
		}
	}
}
