package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// readNetwork reads the node's network, which most checks need.
func (e *examination) readNetwork() {
	e.snapshot, e.unread = node.Kernel{}.Snapshot()
	if e.unread == nil {
		e.network = node.Classify(e.snapshot, e.known())
	}
}

// nodeNetwork looks at links, routes and filters of the node.
func (e *examination) nodeNetwork(ctx context.Context) {
	if e.unread != nil {
		e.add(Hidden, "links", e.unread.Error(), "run this as root in the network namespace of the node")
	} else {
		e.links()
		e.forwarding()
		e.bridges(e.network)
		e.bridgePorts(e.network)
	}
	e.reversePath()
	e.filters(ctx)
	e.connections()
	e.hostRoutes()
}

// bridges names those whose frames do not pass netfilter: there the source address is not kept.
func (e *examination) bridges(network node.Network) {
	const check = "bridges"
	addresses := e.addresses()
	if len(addresses) == 0 {
		return
	}
	four, six := false, false
	for _, address := range addresses {
		four, six = four || address.Is4(), six || address.Is6()
	}
	unfiltered := func(b plan.Bridge) bool { return four && b.Unfiltered4 || six && b.Unfiltered6 }
	means, next := "", "if servers are to see it: modprobe br_netfilter; sysctl net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1"
	if len(network.Unfilterable) > 0 { // the sysctls are of all bridges
		means, next = "; leave it so: if frames passed netfilter, "+strings.Join(network.Unfilterable, "; "), ""
	}
	count := 0
	for _, bridge := range network.Bridges {
		if unfiltered(bridge) {
			count++
			e.add(Warn, check, "frames of "+bridge.Name+" do not pass netfilter, so that between its own pods the source address is masqueraded"+means, next)
		}
	}
	if count == 0 {
		e.add(OK, check, fmt.Sprintf("%d, all of whose frames pass netfilter", len(network.Bridges)), "")
	}
}

// bridgePorts says what keeps the pods of a bridge from being served, instead of the agents that have noted it.
func (e *examination) bridgePorts(network node.Network) {
	for _, note := range network.Notes {
		e.found = slices.DeleteFunc(e.found, func(f Finding) bool { return f.Text == note })
		e.add(Fail, "bridge ports", note, "")
	}
}

// reversePath finds pods whose packets a strict rp_filter drops: the route back to them leads elsewhere than to
// the interface that they come in by.
func (e *examination) reversePath() {
	const check = "rp_filter"
	if !e.stateRead {
		return
	}
	looked, dropped := 0, 0
	for _, record := range e.records {
		link, err := netlink.LinkByName(record.HostInterface)
		if record.HostInterface == "" || err != nil {
			continue
		}
		if master, err := netlink.LinkByIndex(link.Attrs().MasterIndex); err == nil && master.Type() == "bridge" {
			link = master
		}
		name := link.Attrs().Name
		if rpFilter("all") != 1 && rpFilter(name) != 1 || rpFilter("all") == 2 || rpFilter(name) == 2 {
			continue // the larger of the two counts: 2 is loose (Documentation/networking/ip-sysctl.rst)
		}
		for _, ip := range record.IPs {
			if !ip.Is4() {
				continue
			}
			looked++
			if by, ok := routeTo(ip); ok && by != link.Attrs().Index {
				dropped++
				if dropped <= most {
					e.add(Fail, check, fmt.Sprintf("it is strict on %s, and the route to pod %s/%s (%s) leads elsewhere: what the pod sends is dropped",
						name, record.Namespace, record.Name, ip), setOf(name, "rp_filter", 2)+", or correct the route")
				}
			}
		}
	}
	if dropped == 0 {
		e.add(OK, check, fmt.Sprintf("it drops nothing of the recorded pods (strict for %d of their addresses)", looked), "")
	}
}

func rpFilter(name string) int {
	data, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/rp_filter")
	if err != nil {
		return 0
	}
	value, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return value
}

// routeTo is the index of the link that packets of this node to ip leave by.
func routeTo(ip netip.Addr) (index int, ok bool) {
	routes, err := netlink.RouteGet(net.IP(ip.AsSlice()))
	if err != nil || len(routes) == 0 {
		return 0, false
	}
	return routes[0].LinkIndex, true
}

// hostRoutes sees that processes of the node can send to the magic IPs at all: routing comes before translation.
func (e *examination) hostRoutes() {
	const check = "route"
	var without []string
	addresses := e.addresses()
	for _, address := range addresses {
		_, err := netlink.RouteGet(net.IP(address.AsSlice()))
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			without = append(without, address.String())
		}
	}
	switch {
	case len(without) > 0:
		e.add(Warn, check, fmt.Sprintf("this node has no route to %s: its own processes, and hostNetwork pods, get ENETUNREACH; pods are served all the same",
			few(without)), "any route will do, a default route or: ip route add "+without[0]+" dev an-interface-with-an-address")
	case len(addresses) > 0:
		e.add(OK, check, "processes of this node have a route to every magic IP", "")
	}
}

func few(names []string) string {
	const most = 3
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}
