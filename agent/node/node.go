// Package node knows the network of the node that the agent runs on: which links its pods are behind, which are its
// uplinks, its own addresses, and what its bridges keep from netfilter.
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
	// UnservedPairs are the veth and netkit links that are not served. A rule that serves these kinds has to except them.
	UnservedPairs []string
	// Keep are the ifindexes of the uplinks that stay uplinks until they are gone: Known.Uplinks of the next classification.
	Keep []int
	// PodPorts are the bridge ports that lead to pods, by ifindex, and whether their hairpin mode is on. Hairpin is for no
	// others: an uplink's port would send the network's broadcasts back.
	PodPorts map[int]bool
	// IfIndex are the ifindexes of all links by name.
	IfIndex map[string]int
	// Addresses are the node's own.
	Addresses []netip.Addr
	// IPv6 says whether the node routes IPv6 at all: whether any route leads beyond a link.
	IPv6 bool
	// Bridges are the node's Linux bridges, and under their own names the links by which the node is in a bridge beside it.
	Bridges []plan.Bridge
	// StrictTCP: conntrack picks up no TCP connection that it has not seen from its start.
	StrictTCP bool
	// Torn are the dumps that changes interrupted in every attempt: a link that is not listed may be there all the same.
	Torn []string
}

// Kernel reads and changes the network of the calling process.
type Kernel struct{}
