// Package node knows the network of the node that the agent runs on: which links its pods are behind, which are its
// uplinks, its own addresses, and what its bridges keep from netfilter.
//
// Kernel.Snapshot reads links, addresses and routes, Watch reports their changes, and Classify decides, by evidence, what
// each link is. A link is identified by its ifindex; its name is what it is called at the moment.
//
// Uplinks, which are never served:
//   - a link that a default route goes by, in whatever form and of any table, and that is of a kind that pods are never
//     behind, as network interfaces, bonds, VLANs and tunnels are, or that is a bridge with such a port;
//   - a link of another kind that a default route of the main table goes by and that carries an address of the node. That is
//     the uplink of a node that is a container. Where the route to a recorded pod goes by it and the node has another uplink or
//     network interface, the default route leads to a pod, and the link is none;
//   - what was an uplink, until it is gone; the ports and the parent of an uplink.
//
// Served links:
//   - a veth or netkit link whose other end is in another network namespace than the node's and those that uplinks lead to.
//     One that carries an address with an on-link subnet connects the node with a network: it is served only where the route
//     to a recorded address goes by it;
//   - a veth or tap link that the route to a recorded address goes by;
//   - a bridge all of whose ports are such veth or netkit links, tap links that records name, or lead to the node itself or
//     to a bridge like it; and the links by which the node is in such a bridge: a VLAN of it, or a veth whose other end is a
//     port (the bridge plugin's gateway, with its option vlan). A default route by such a bridge, of any table, leads to a pod
//     where the route to a recorded address goes by the bridge; where none does, the bridge is not served.
//
// Every other link has the role other, and a reason.
//
// Limits. A network namespace is not a pod: containers of Docker or systemd are served like pods where their links look like
// pods' (systemd's carry a subnet, and are not). Links that make no difference between the node's pods and other hosts are not
// served although pods may be behind them: a bridge with a network interface (Azure CNI in bridge mode), macvlan, ipvlan,
// and Open vSwitch, which forwards past netfilter. An uplink of a kind that pods are behind is not known as such while its default
// route is away, until it has been seen with it once; a bridge whose only ports are veths is served until then. VRFs: a link
// enslaved to one counts for itself. Pods of a bridge with a gateway beside it are served only where the bridge's frames do not
// pass netfilter: else each packet passes it twice, and is not translated back. So are pods behind isolated ports of a bridge: a frame that was
// translated as a frame stays one, and no other isolated port gets it. Network.Notes says so. Rules (ip-rule(8)) are not read: routes count in
// whatever table they are.
package node

import (
	"net/netip"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Network is what the node's network looks like at one moment: the output of Classify.
type Network struct {
	// Links are all links but the loopback, by ifindex.
	Links []Link
	// PodInterfaces are the names of the links by which IP packets of pods come in: the served links less the ports, whose
	// packets come in by their bridge.
	PodInterfaces []string
	// Uplinks are the names of the uplinks, the links that they stand on included.
	Uplinks []string
	// Outward are the names of the links that lead out of the node: the uplinks, and network interfaces, tunnels and the like that
	// no default route goes by. No endpoint is behind them.
	Outward []string
	// UnservedPairs are the veth and netkit links that are not served. A rule that serves these kinds has to except them.
	UnservedPairs []string
	// Keep are the ifindexes of the uplinks that stay uplinks until they are gone: Known.Uplinks of the next classification.
	Keep []int
	// PodPorts are the bridge ports that lead to pods, by ifindex, and whether their hairpin mode is on. Hairpin is for no
	// others: an uplink's port would send the network's broadcasts back.
	PodPorts map[int]bool
	// IfIndex are the ifindexes of all links by name.
	IfIndex map[string]int
	// Addresses are the node's own. Those of LocalRoutes are not among them.
	Addresses []netip.Addr
	// Sources are what processes of the node connect from to addresses outside, by family: where there is none, the node has no
	// uplink with an address of it.
	Sources map[plan.Family]netip.Addr
	// LocalRoutes are those of the agents of this node.
	LocalRoutes []LocalRoute
	// IPv6 reports whether the node routes IPv6 at all: whether any route leads beyond a link.
	IPv6 bool
	// Bridges are the node's Linux bridges, and under their own names the links by which the node is in a bridge beside it.
	Bridges []plan.Bridge
	// Notes are the conditions that keep pods from being served, one sentence each.
	Notes []string
	// Unfilterable are the reasons why frames of bridges must not pass netfilter, one clause each: where they do, it is one of Notes.
	Unfilterable []string
	// StrictTCP: conntrack picks up no TCP connection that it has not seen from its start.
	StrictTCP bool
	// Torn are the dumps that changes interrupted in every attempt: a link that is not listed may be there all the same.
	Torn []string
}

// Kernel reads and changes the network of the calling process.
type Kernel struct{}
