package node

import (
	"fmt"
	"net/netip"
	"strings"
)

// Snapshot is the kernel's view of the node's network at one moment: the input of Classify.
type Snapshot struct {
	Links     []LinkState
	Addresses []Address
	// Routes are the unicast routes of all tables but the local one.
	Routes []Route
	// LocalRoutes are those of the agents of this node.
	LocalRoutes []LocalRoute
	// IPv6 reports whether the node routes IPv6 at all: whether any route leads beyond a link.
	IPv6 bool
	// StrictTCP: net.netfilter.nf_conntrack_tcp_loose is 0.
	StrictTCP bool
	// Namespace identifies the network namespace since the node was started: ifindexes mean nothing in another.
	Namespace string
	// Torn names the dumps that changes interrupted in every attempt. What they list is there; what they do not list
	// may be there as well.
	Torn []string
}

// Complete returns an error where Torn names any.
func (s Snapshot) Complete() error {
	if len(s.Torn) == 0 {
		return nil
	}
	return fmt.Errorf("changes interrupted the reading of %s each time", strings.Join(s.Torn, ", "))
}

// LinkState is a link as rtnetlink describes it.
type LinkState struct {
	Index int
	Name  string // bytes; the kernel forbids only '/', ':' and white space
	Kind  string // IFLA_INFO_KIND; empty for hardware
	// Master is the ifindex of the bridge, bond, VRF or Open vSwitch datapath that the link is enslaved to; 0: none.
	Master int
	// Lower is the ifindex of the parent of a VLAN or macvlan link, or of the other end of a veth or netkit link; 0: none.
	Lower int
	// Elsewhere: the link Lower is in another network namespace, whose ID in this one is NetNS (rtnetlink
	// IFLA_LINK_NETNSID; negative where the kernel has assigned none).
	Elsewhere bool
	NetNS     int
	Tap       bool // of a link of kind tun: tap (IFLA_TUN_TYPE), not tun
	Loopback  bool
	Hairpin   bool // of a port of a Linux bridge
	Isolated  bool // of a port of a Linux bridge: what comes in by it is not bridged to another such port
	// Unfiltered4 and Unfiltered6 say of a bridge that its IPv4 and IPv6 frames do not pass netfilter.
	Unfiltered4, Unfiltered6 bool
}

// Address is an address of the node.
type Address struct {
	Link   int          // ifindex
	Prefix netip.Prefix // the address, with the length of its on-link subnet
}

// Route is one next hop of a route.
type Route struct {
	Link        int // ifindex
	Destination netip.Prefix
	Table       int
}

// mainTable is RT_TABLE_MAIN.
const mainTable = 254

// Default reports whether the route is a default route in whatever form: the default prefix, its halves, and other prefixes
// too short for any one network (those of VPNs that leave private networks out; 2000::/3). The shortest private
// prefixes are 10.0.0.0/8 and fc00::/7.
func (r Route) Default() bool {
	if r.Destination.Addr().Is4() {
		return r.Destination.Bits() < 8
	}
	return r.Destination.Bits() < 7
}
