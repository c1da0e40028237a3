package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// CiliumLink is a link that Cilium has on each node, whatever its settings are.
const CiliumLink = "cilium_host"

// instead is what to use where netfilter is bypassed.
const instead = "use a Service with internalTrafficPolicy: Local"

// Bypasses names, one sentence each, the data planes of this node that may forward packets of pods past netfilter, and so
// past the rules: not Cilium, of which package dataplane knows more. With an error nothing is known of them. It reads the network namespace of
// the calling thread. Programs attached by tcx or netkit may be hidden, see ProgramsHidden.
func Bypasses() ([]string, error) {
	snapshot, err := Kernel{}.SnapshotWithoutLocalRoutes()
	if err = errors.Join(err, snapshot.Complete()); err != nil {
		return nil, err
	}
	network := Classify(snapshot, Known{})
	certain, possible, err := network.Bypasses()
	return append(certain, possible...), err
}

// Bypasses is the same of a network that has been read: apart from those that may do so, those that certainly do, for all pods.
func (n *Network) Bypasses() (certain, possible []string, err error) {
	certain, possible = dataPlanes(n)
	if len(certain)+len(possible) > 0 || n.IfIndex[CiliumLink] != 0 {
		return certain, possible, nil // the programs below are theirs
	}
	var programs []string
	for _, link := range n.Links {
		if link.Role != Served {
			continue
		}
		found, err := programsOf(link)
		if err != nil {
			return nil, nil, err
		}
		programs = append(programs, found...)
	}
	if len(programs) == 0 {
		return nil, nil, nil
	}
	slices.Sort(programs)
	return nil, []string{fmt.Sprintf("eBPF programs see the packets of pods before netfilter (%s): where they redirect, packets bypass the rules. "+
		"If clients do not reach magic IPs, this is why: %s", fewOf(programs), instead)}, nil
}

// dataPlanes names the known ones by their links.
func dataPlanes(network *Network) (certain, possible []string) {
	if network.IfIndex["bpfin.cali"] != 0 || network.IfIndex["bpfout.cali"] != 0 {
		certain = append(certain, "Calico runs in eBPF mode on this node: packets of pods bypass the rules. Use its iptables or nftables mode, or something else: "+instead)
	}
	for _, link := range network.Links {
		switch product := ovsProduct(link.Name); {
		case link.Name == "ovs-netdev" && link.Kind == "tap": // of the data path in user space, whatever its bridges are called
			possible = append(possible, "Open vSwitch runs a data path in user space (ovs-netdev): packets of the pods that it connects bypass the rules, and these pods do not reach magic IPs. "+
				"Use something else: a Service with internalTrafficPolicy: Local")
		case link.Kind != "openvswitch" || product == "":
			continue
		case product == "OVN-Kubernetes":
			certain = append(certain, fmt.Sprintf("%s forwards the packets of pods in Open vSwitch (%s): they bypass the rules, and pods do not reach magic IPs. "+
				"With routingViaHost: true they pass this node's network stack, but the replies do not. Use something else: a Service with internalTrafficPolicy: Local", product, link.Name))
		default:
			certain = append(certain, fmt.Sprintf("%s forwards the packets of pods in Open vSwitch (%s): replies bypass the rules, and pods do not reach magic IPs. "+
				"Use something else: a Service with internalTrafficPolicy: Local", product, link.Name))
		}
	}
	return certain, possible
}

func fewOf(names []string) string {
	const most = 3
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}

// programsOf are the eBPF programs that see what comes in by a link: those of classic tc, of tcx and of netkit.
func programsOf(link Link) (programs []string, err error) {
	filters, err := netlink.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: link.Index}}, netlink.HANDLE_MIN_INGRESS)
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) { // it is gone, or the kernel has no classifiers
		return nil, fmt.Errorf("tc filters of %s: %w", link.Name, err)
	}
	for _, filter := range filters {
		if bpf, ok := filter.(*netlink.BpfFilter); ok {
			programs = append(programs, fmt.Sprintf("%s: tc %s", link.Name, bpf.Name))
		}
	}
	for kind, attach := range map[string]uint32{"tcx": unix.BPF_TCX_INGRESS, "netkit": bpfNetkitPeer} {
		if kind == "netkit" && link.Kind != kind {
			continue
		}
		count, err := attached(link.Index, attach)
		if err != nil {
			return nil, fmt.Errorf("programs of %s by %s: %w", link.Name, kind, err)
		}
		if count > 0 {
			programs = append(programs, fmt.Sprintf("%s: %d by %s", link.Name, count, kind))
		}
	}
	return programs, nil
}

// bpfNetkitPeer is BPF_NETKIT_PEER (linux/bpf.h): what comes from the pod.
const bpfNetkitPeer = 55

// attached asks how many programs are attached to a link: none where the link is gone, where the kernel does not know the kind of attachment,
// and where it does not permit the query, see ProgramsHidden.
func attached(index int, attach uint32) (uint32, error) {
	count, errno := queryPrograms(index, attach)
	switch errno {
	case 0, unix.ENOENT, unix.ENODEV, unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS, unix.EPERM, unix.EACCES:
		return count, nil
	}
	return 0, errno
}

// ProgramsHidden is why programs attached by tcx or netkit, which came with Linux 6.6, cannot be seen by this process: in a container with the
// usual seccomp profile bpf(2) is not permitted. Nil where they can be, or there are none.
func ProgramsHidden() error {
	var name unix.Utsname
	var major, minor int
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err == nil && (major < 6 || major == 6 && minor < 6) {
		return nil
	}
	if _, errno := queryPrograms(loopback, unix.BPF_TCX_INGRESS); errno == unix.EPERM || errno == unix.EACCES {
		return fmt.Errorf("bpf(2): %w", errno)
	}
	return nil
}

// queryPrograms asks how many programs are attached to a link (bpf(2), BPF_PROG_QUERY; linux/bpf.h).
func queryPrograms(index int, attach uint32) (count uint32, errno unix.Errno) {
	query := struct {
		target, attachType, flags, attachFlags uint32
		ids                                    uint64
		count, _                               uint32
		programFlags, linkIDs, linkFlags       uint64
		revision                               uint64
	}{target: uint32(index), attachType: attach}
	_, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&query)), unsafe.Sizeof(query))
	if errno != 0 {
		return 0, errno
	}
	return query.count, 0
}
