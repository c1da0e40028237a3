package node

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// instead is what to take where netfilter is bypassed.
const instead = "Cilium's Local Redirect Policy does the same there, and else a Service with internalTrafficPolicy: Local"

// Bypasses names, one sentence each, the eBPF data planes of this node that may take packets past netfilter, and
// so past the rules. What cannot be looked at is not named. It reads the network namespace of the calling thread.
func Bypasses() []string {
	var links []netlink.Link
	err := whole(func() (err error) {
		links, err = netlink.LinkList()
		return err
	})
	if err != nil {
		return nil
	}
	names := map[string]bool{}
	for _, link := range links {
		names[link.Attrs().Name] = true
	}
	maps, _ := filepath.Glob("/sys/fs/bpf/tc/globals/cilium_*")
	var found []string
	switch {
	case names["cilium_host"] || names["cilium_net"] || len(maps) > 0:
		found = append(found, "Cilium is on this node: with eBPF host routing (the default of its kube-proxy replacement) packets of pods bypass the rules. "+
			"Set bpf.hostLegacyRouting=true, or take something else: "+instead)
	case names["bpfin.cali"] || names["bpfout.cali"]:
		found = append(found, "Calico runs in eBPF mode on this node: packets of pods bypass the rules. Use its iptables or nftables mode, or take something else: "+instead)
	}
	if len(found) > 0 {
		return found // whose programs those are is known
	}
	uplinks, _, err := readRoutes()
	if err != nil {
		return nil
	}
	var programs []string
	for _, link := range links {
		if podLinkType(link.Type()) && !uplinks[link.Attrs().Index] {
			programs = append(programs, programsOf(link)...)
		}
	}
	if len(programs) > 0 {
		slices.Sort(programs)
		found = append(found, fmt.Sprintf("eBPF programs take the packets of pods first (%s): where they redirect, the rules are bypassed. "+
			"If magic IPs are not reached, that is why: %s", fewOf(programs), instead))
	}
	return found
}

func fewOf(names []string) string {
	const most = 3
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}

// programsOf are the eBPF programs that see what comes in by a link: of the classic tc, of tcx and of netkit.
func programsOf(link netlink.Link) (programs []string) {
	name := link.Attrs().Name
	if filters, err := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS); err == nil {
		for _, filter := range filters {
			if bpf, ok := filter.(*netlink.BpfFilter); ok {
				programs = append(programs, fmt.Sprintf("%s: tc %s", name, bpf.Name))
			}
		}
	}
	for kind, attach := range map[string]uint32{"tcx": unix.BPF_TCX_INGRESS, "netkit": bpfNetkitPeer} {
		if kind == "netkit" && link.Type() != kind {
			continue
		}
		if count := attached(link.Attrs().Index, attach); count > 0 {
			programs = append(programs, fmt.Sprintf("%s: %d by %s", name, count, kind))
		}
	}
	return programs
}

// bpfNetkitPeer is BPF_NETKIT_PEER (linux/bpf.h): what comes from the pod.
const bpfNetkitPeer = 55

// attached asks how many programs are attached to a link (bpf(2), BPF_PROG_QUERY; linux/bpf.h). Kernels that do not
// know the kind of attachment, and those that forbid to ask, have none to tell of.
func attached(index int, attach uint32) uint32 {
	query := struct {
		target, attachType, flags, attachFlags uint32
		ids                                    uint64
		count, _                               uint32
		programFlags, linkIDs, linkFlags       uint64
		revision                               uint64
	}{target: uint32(index), attachType: attach}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&query)), unsafe.Sizeof(query))
	if errno != 0 {
		return 0
	}
	return query.count
}
