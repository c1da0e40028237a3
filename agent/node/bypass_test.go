package node_test

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

func bypasses(t *testing.T) string {
	t.Helper()
	found, err := node.Bypasses()
	if err != nil {
		t.Error(err)
	}
	return strings.Join(found, "\n")
}

// TestBypassesUnseen: that nothing could be read is not that there is nothing.
func TestBypassesUnseen(t *testing.T) {
	nodetest.Namespace(t, "link add bpfin.cali type veth peer name bpfout.cali")
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	found, err := node.Bypasses()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) || len(found) > 0 {
		t.Errorf("found %q, %v, want %v", found, err, unix.EMFILE)
	}
}

func TestBypasses(t *testing.T) {
	for _, test := range []struct {
		name, commands, want string
	}{
		{"a bridge and pods", "link add cni0 type bridge\nlink add veth-a type veth peer name pod", ""},
		{"Cilium", "link add cilium_net type veth peer name cilium_host", ""},
		{"Calico", "link add bpfin.cali type veth peer name bpfout.cali", "Calico runs in eBPF mode"},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodetest.Namespace(t, test.commands)
			got := bypasses(t)
			if test.want == "" && got != "" || !strings.Contains(got, test.want) {
				t.Errorf("found %q, want %q", got, test.want)
			}
		})
	}
}

// TestDataPlanes: those that this kernel cannot make.
func TestDataPlanes(t *testing.T) {
	for _, test := range []struct{ name, links, certain, possible string }{
		{"OVN-Kubernetes", "link ovn-k8s-mp0 openvswitch", "OVN-Kubernetes forwards the packets of pods in Open vSwitch (ovn-k8s-mp0): they bypass", ""},
		{"Antrea", "link antrea-gw0 openvswitch", "Antrea forwards the packets of pods in Open vSwitch (antrea-gw0): replies bypass", ""},
		{"Kube-OVN", "link ovn0 openvswitch", "Kube-OVN forwards the packets of pods in Open vSwitch (ovn0): replies bypass", ""},
		{"Open vSwitch in user space", "link ovs-netdev tap", "", "Open vSwitch runs a data path in user space (ovs-netdev)"},
		{"Open vSwitch of something else", "link br0 openvswitch", "", ""},
		{"a name is not enough", "link antrea-gw0 device", "", ""},
		{"a name is not enough, in user space", "link ovs-netdev veth", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			snapshot, known, _ := nodetest.Layout(t, test.links)
			network := node.Classify(snapshot, known)
			certain, possible := node.DataPlanes(&network)
			found := func(text []string, want string) bool {
				return len(text) == 0 && want == "" || len(text) == 1 && want != "" && strings.HasPrefix(text[0], want)
			}
			if !found(certain, test.certain) || !found(possible, test.possible) {
				t.Errorf("certain: %q, want %q; possible: %q, want %q", certain, test.certain, possible, test.possible)
			}
		})
	}
}

// TestProgramsOfPods: attached by classic tc and by tcx.
func TestProgramsOfPods(t *testing.T) {
	nodetest.Namespace(t, fmt.Sprintf(`
		link add eth0 type veth peer name far netns %[1]s
		link set eth0 up
		addr add 192.0.2.2/24 dev eth0
		route add default via 192.0.2.1
		link add veth-a type veth peer name pod-a netns %[2]s
		link add veth-b type veth peer name pod-b netns %[2]s
	`, nodetest.Another(t), nodetest.Another(t)))
	program := loadProgram(t)
	attachTC(t, "eth0", program) // not a pod's
	if found := bypasses(t); found != "" {
		t.Errorf("found %q at an uplink", found)
	}
	attachTC(t, "veth-a", program)
	attachTCX(t, "veth-b", program)
	found := bypasses(t)
	for _, want := range []string{"veth-a: tc from_pod", "veth-b: 1 by tcx", "internalTrafficPolicy"} {
		if !strings.Contains(found, want) {
			t.Errorf("found %q, want %q in it", found, want)
		}
	}
}

// TestProgramsHidden: a process that may not use bpf(2) sees no programs, and says so.
func TestProgramsHidden(t *testing.T) {
	if err := node.ProgramsHidden(); err != nil {
		t.Error(err)
	}
	hidden := make(chan error)
	go func() {
		runtime.LockOSThread() // without its rights the thread ends with the goroutine
		data := [2]unix.CapUserData{}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			hidden <- err
		}
		hidden <- node.ProgramsHidden()
	}()
	if err := <-hidden; !errors.Is(err, unix.EPERM) {
		t.Errorf("without rights: %v, want %v", err, unix.EPERM)
	}
}

// loadProgram loads `return 0` as a classifier (BPF_PROG_LOAD).
func loadProgram(t *testing.T) int {
	t.Helper()
	instructions := []uint64{0x00000000_000000b7, 0x00000000_00000095} // r0 = 0; exit
	license := []byte("GPL\x00")
	load := struct {
		kind, count           uint32
		instructions, license uint64
		_                     [96]byte
	}{
		kind: unix.BPF_PROG_TYPE_SCHED_CLS, count: uint32(len(instructions)),
		instructions: uint64(uintptr(unsafe.Pointer(&instructions[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0]))),
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load)), unsafe.Sizeof(load))
	if errno != 0 {
		t.Fatalf("loading an eBPF program (needs root): %v", errno)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	return int(fd)
}

func attachTC(t *testing.T, name string, program int) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	index := link.Attrs().Index
	if err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}); err != nil {
		t.Fatal(err)
	}
	err = netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
		Fd:          program, Name: "from_pod", DirectAction: true,
	})
	if err != nil {
		t.Fatal(err)
	}
}

// attachTCX makes a link of the other kind (BPF_PROG_ATTACH).
func attachTCX(t *testing.T, name string, program int) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	attach := struct {
		target, program, attachType, flags, replace, relative uint32
		revision                                              uint64
	}{target: uint32(link.Attrs().Index), program: uint32(program), attachType: unix.BPF_TCX_INGRESS}
	if _, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach)), unsafe.Sizeof(attach)); errno != 0 {
		t.Fatalf("attaching by tcx: %v", errno)
	}
}
