package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Role is what a link is to the agent.
type Role string

// The roles.
const (
	// Served: pods of this node are behind the link.
	Served Role = "served"
	// Uplink: the node's way out.
	Uplink Role = "uplink"
	// Other: there is evidence for neither, and packets that come in by the link are not served.
	Other Role = "other"
)

// Link is a link of the node with its role.
type Link struct {
	Index  int
	Name   string // at that moment
	Kind   string // the kernel's (IFLA_INFO_KIND), or tap, or device for hardware
	Role   Role
	Reason string
	// Port: the link is a port of a bridge, bond or Open vSwitch datapath: IP packets come in by that one.
	Port bool
}

// Known is what Classify has to know beside the kernel's view.
type Known struct {
	Attachments []Attachment
	// Uplinks are Network.Keep of the previous classification: the ifindexes of links that stay uplinks until they are gone.
	Uplinks []int
}

// Attachment is the node's side of a recorded attachment of a pod.
type Attachment struct {
	// HostInterface is the link that the CNI result names, HostIfIndex its ifindex; empty and 0 where not known.
	HostInterface string
	HostIfIndex   int
	Addresses     []netip.Addr
}

// Classify decides which links are served. It is pure; the package comment has the rules.
func Classify(s Snapshot, known Known) Network {
	c := &classifier{byIndex: map[int]*link{}, uplinkTo: map[int]*link{}, known: known}
	for _, state := range s.Links {
		c.links = append(c.links, &link{LinkState: state})
	}
	slices.SortFunc(c.links, func(a, b *link) int { return a.Index - b.Index })
	for _, l := range c.links {
		c.byIndex[l.Index] = l
	}
	for _, l := range c.links {
		// A slave of a VRF stays a link of its own to IP.
		if master := c.byIndex[l.Master]; master != nil && master.Kind != "vrf" {
			l.master = master
			master.ports = append(master.ports, l)
		}
	}
	c.addresses(s.Addresses)
	c.routes(s.Routes)
	c.uplinks()
	for _, l := range c.links {
		c.classify(l)
	}
	return c.network(s)
}

// link is a link with its evidence.
type link struct {
	LinkState
	master *link
	ports  []*link
	// defaultTable is the table of a default route by the link, the main table's before others; 0: there is none.
	defaultTable int
	// address is an address of the node on the link, link-local ones aside; subnet is one with an on-link subnet.
	address, subnet netip.Prefix
	// recorded is a recorded address to which the node's route goes by the link.
	recorded netip.Addr

	role   Role
	reason string
	keep   bool // an uplink until it is gone
}

type classifier struct {
	links   []*link // by ifindex, in order
	byIndex map[int]*link
	// uplinkTo are uplinks by the network namespace that their other end is in.
	uplinkTo map[int]*link
	known    Known
}

func (c *classifier) addresses(addresses []Address) {
	for _, a := range addresses {
		l := c.byIndex[a.Link]
		if l == nil || a.Prefix.Addr().IsLinkLocalUnicast() {
			continue // anybody may take a link-local address: dhcpcd takes one on pods' veths
		}
		if !l.address.IsValid() {
			l.address = a.Prefix
		}
		if !l.subnet.IsValid() && !a.Prefix.IsSingleIP() {
			l.subnet = a.Prefix.Masked()
		}
	}
}

// routes notes which links default routes and routes to recorded addresses go by. The longest prefix of all tables
// counts: which table a packet is looked up in depends on rules, and the route to a pod is a longer one than any other.
func (c *classifier) routes(routes []Route) {
	byPrefix := make(map[netip.Prefix][]*link, len(routes))
	for _, r := range routes {
		l := c.byIndex[r.Link]
		switch {
		case l == nil:
		case !r.Default():
			byPrefix[r.Destination] = append(byPrefix[r.Destination], l)
		case l.defaultTable != mainTable:
			l.defaultTable = r.Table
		}
	}
	for _, attachment := range c.known.Attachments {
		for _, address := range attachment.Addresses {
			for bits := address.BitLen(); bits > 0; bits-- {
				prefix, _ := address.Prefix(bits)
				if links := byPrefix[prefix]; len(links) > 0 {
					for _, l := range links {
						l.recorded = address
					}
					break
				}
			}
		}
	}
}

// uplinks finds the uplinks, those of kinds that pods are never behind first.
func (c *classifier) uplinks() {
	for _, l := range c.links {
		if l.defaultTable != 0 && !c.forPods(l) {
			c.uplink(l, true, defaultRoute(l)+" goes by it")
		}
	}
	before := func(l *link) bool { return slices.Contains(c.known.Uplinks, l.Index) }
	for _, l := range c.links {
		if before(l) && l.defaultTable != 0 {
			c.uplink(l, true, wayOut(l))
		}
	}
	for _, l := range c.links {
		if before(l) {
			c.uplink(l, true, "it was an uplink of the node before")
		}
	}
	// What is left may be an uplink of a kind that pods are behind as well, as in a node that is a container, or a pods'
	// link with a default route that is not the node's own: to a pod that is a gateway.
	another := slices.ContainsFunc(c.links, func(l *link) bool { return joins(l.Kind) && !l.Loopback && l.address.IsValid() && !c.forPods(l) })
	inMain := slices.ContainsFunc(c.links, func(l *link) bool { return l.defaultTable == mainTable && !tunnel(l.Kind) })
	another = another || c.certain()
	var left []*link
	for _, l := range c.links {
		switch {
		case l.role == Uplink || l.defaultTable == 0:
		case l.defaultTable != mainTable && (inMain || l.recorded.IsValid() || !l.address.IsValid()):
		// Routed veths have the address of a gateway in common, without a subnet.
		case !l.recorded.IsValid() && (!another || l.subnet.IsValid()):
			c.uplink(l, !another, wayOut(l))
		default:
			left = append(left, l)
		}
	}
	if another || c.certain() {
		return
	}
	for _, l := range left {
		c.uplink(l, true, wayOut(l))
	}
}

// certain reports whether an uplink was found that does not need another one.
func (c *classifier) certain() bool {
	return slices.ContainsFunc(c.links, func(l *link) bool { return l.role == Uplink && !tunnel(l.Kind) })
}

// uplink makes l an uplink, and the links that it stands on. With keep they stay uplinks until they are gone.
func (c *classifier) uplink(l *link, keep bool, reason string) {
	if l.role == Uplink {
		return
	}
	l.role, l.reason, l.keep = Uplink, reason, keep
	if l.Elsewhere && l.NetNS >= 0 {
		c.uplinkTo[l.NetNS] = l
	}
	if lower := c.byIndex[l.Lower]; lower != nil && !l.Elsewhere && !paired(l.Kind) {
		c.uplink(lower, keep, "it carries the uplink "+l.Name)
	}
	for _, port := range l.ports {
		if !c.forPods(port) {
			c.uplink(port, keep, "it is a port of the uplink "+l.Name)
		}
	}
}

// paired are the kinds whose links come in pairs.
func paired(kind string) bool { return kind == "veth" || kind == "netkit" }

// joins are the kinds of links by which a node is part of a network outside.
func joins(kind string) bool {
	return slices.Contains([]string{"", "bond", "team", "bridge", "vlan", "macvlan", "ipvlan"}, kind)
}

// tunnel are the kinds that need another link to carry their packets, and those that carry none.
func tunnel(kind string) bool {
	return slices.Contains([]string{"tun", "wireguard", "ipip", "ip6tnl", "sit", "gre", "gretap", "ip6gre", "ip6gretap", "vti", "vti6", "xfrm",
		"vxlan", "geneve", "dummy"}, kind)
}

// forPods reports whether pods may be behind a link, its kind and its ports considered: whether there is no more than pods
// and the node itself.
func (c *classifier) forPods(l *link) bool {
	switch {
	case paired(l.Kind) && l.Elsewhere, l.Tap:
		return true
	case paired(l.Kind):
		end := c.byIndex[l.Lower]
		return end != nil && (end.master == nil || c.stranger(end.master) == "")
	case l.Kind == "bridge":
		return c.stranger(l) == ""
	case l.Kind == "vlan":
		lower := c.byIndex[l.Lower]
		return lower != nil && !l.Elsewhere && lower.Kind == "bridge" && c.stranger(lower) == ""
	}
	return false
}

// stranger names a port of a bridge by which more than pods may come in; empty where there is none.
func (c *classifier) stranger(bridge *link) string { return c.strangerBeyond(bridge, nil) }

func (c *classifier) strangerBeyond(bridge *link, seen []*link) string {
	if bridge.Kind != "bridge" {
		return bridge.Name
	}
	for _, port := range bridge.ports {
		end := c.byIndex[port.Lower]
		switch {
		case paired(port.Kind) && port.Elsewhere:
			if c.uplinkTo[port.NetNS] != nil { // both lead to the same, which is no pod
				return port.Name
			}
		case paired(port.Kind) && end != nil && end.master == nil: // the node's own way into the bridge
		case paired(port.Kind) && end != nil && slices.Contains(append(seen, bridge), end.master): // seen from its other side
		case paired(port.Kind) && end != nil:
			if beyond := c.strangerBeyond(end.master, append(seen, bridge)); beyond != "" {
				return beyond
			}
		case port.Tap && c.names(port):
		default:
			return port.Name
		}
	}
	return ""
}

// names reports whether a recorded attachment names the link.
func (c *classifier) names(l *link) bool {
	return slices.ContainsFunc(c.known.Attachments, func(a Attachment) bool {
		if a.HostIfIndex != 0 {
			return a.HostIfIndex == l.Index
		}
		return a.HostInterface == l.Name
	})
}

// classify gives l a role, unless it is an uplink, and a reason.
func (c *classifier) classify(l *link) {
	if l.role != "" {
		return
	}
	l.role, l.reason = Other, ""
	if l.master != nil {
		c.classifyPort(l)
		return
	}
	pods, reason := c.pods(l)
	if pods {
		l.role = Served
	}
	l.reason = reason
}

func (c *classifier) classifyPort(l *link) {
	c.classify(l.master)
	switch {
	case l.master.Kind == "openvswitch":
		l.reason = "a port of Open vSwitch, which forwards past netfilter"
	case l.master.role == Served:
		l.role, l.reason = Served, "a port of "+l.master.Name
	default:
		l.reason = "a port of " + l.master.Name + ", which is not served"
	}
}

// pods reports whether pods are behind a link that is neither an uplink nor a port, and why.
func (c *classifier) pods(l *link) (pods bool, reason string) {
	route := fmt.Sprintf("the route to pod address %s goes by it", l.recorded)
	stray := ""
	if l.defaultTable != 0 && !l.recorded.IsValid() {
		stray = defaultRoute(l) + " goes by it, and no recorded pod is behind it"
	}
	end := c.byIndex[l.Lower]
	switch {
	case paired(l.Kind) && l.Elsewhere:
		switch up := c.uplinkTo[l.NetNS]; {
		case up != nil:
			return false, "its other end is in the network namespace that the uplink " + up.Name + " leads to"
		case l.recorded.IsValid():
			return true, route
		case l.subnet.IsValid():
			return false, fmt.Sprintf("it connects the node with the network %s, and no recorded pod is behind it", l.subnet)
		}
		return true, "its other end is in another network namespace"
	case paired(l.Kind) && (end == nil || end.master == nil):
		if l.recorded.IsValid() {
			return true, route
		}
		return false, "both of its ends are on the node"
	case paired(l.Kind):
		return c.gateway(end.master, stray)
	case l.Kind == "vlan" && end != nil && !l.Elsewhere && end.Kind == "bridge":
		return c.gateway(end, stray)
	case l.Tap:
		if l.recorded.IsValid() {
			return true, route
		}
		return false, "the process behind a tap is not known, and no recorded pod is behind it"
	case l.Kind == "bridge":
		return c.bridge(l, stray)
	}
	return false, c.unfit(l)
}

// gateway reports whether pods are behind a link by which the node is in a bridge, beside the bridge itself.
func (c *classifier) gateway(bridge *link, stray string) (pods bool, reason string) {
	switch stranger := c.stranger(bridge); {
	case bridge.role == Uplink:
		return false, "it leads to " + bridge.Name + ", which is an uplink"
	case stranger != "":
		return false, fmt.Sprintf("it leads to %s, and more than pods may come in by %s", bridge.Name, stranger)
	case stray != "":
		return false, stray
	}
	return true, "it is the node's way into " + bridge.Name + ", whose ports are all pods'"
}

// bridge says the same of a bridge.
func (c *classifier) bridge(l *link, stray string) (pods bool, reason string) {
	outside := func(port *link) bool { return !paired(port.Kind) || port.Elsewhere }
	switch stranger := c.stranger(l); {
	case stranger != "":
		return false, "more than pods may come in by its port " + stranger
	case stray != "":
		return false, stray
	case !slices.ContainsFunc(l.ports, outside):
		return false, "no pod is connected to it"
	}
	return true, "all of its ports are pods'"
}

// unfit says why a link of a kind that pods are not behind is not served.
func (c *classifier) unfit(l *link) string {
	switch {
	case l.Kind == "openvswitch":
		return strings.TrimSpace(ovsProduct(l.Name)+" Open vSwitch") + " forwards packets between pods past netfilter: replies would not be translated back"
	case l.Kind == "tun":
		return "a tun, such as a VPN's"
	case l.recorded.IsValid():
		return fmt.Sprintf("the route to pod address %s goes by it, but more than pods may come in by a link of this kind", l.recorded)
	}
	return "no pods are behind links of this kind, and no default route goes by it"
}

// ovsProduct is the network plugin that an internal port of Open vSwitch of this name belongs to; empty where not known.
func ovsProduct(name string) string {
	switch {
	case strings.HasPrefix(name, "ovn-k8s-mp"):
		return "OVN-Kubernetes"
	case strings.HasPrefix(name, "antrea-gw"):
		return "Antrea"
	case name == "ovn0":
		return "Kube-OVN"
	}
	return ""
}

// describe is what people call a link's kind.
func describe(l LinkState) string {
	switch {
	case l.Tap:
		return "tap"
	case l.Kind == "":
		return "device"
	}
	return l.Kind
}

// wayOut is why a link of a kind that pods are behind is an uplink.
func wayOut(l *link) string {
	if !l.address.IsValid() {
		return defaultRoute(l) + " goes by it"
	}
	return fmt.Sprintf("%s goes by it, and it carries %s", defaultRoute(l), l.address.Addr())
}

func defaultRoute(l *link) string {
	if l.defaultTable == mainTable {
		return "a default route"
	}
	return fmt.Sprintf("a default route (table %d)", l.defaultTable)
}

// network collects what was decided.
func (c *classifier) network(s Snapshot) Network {
	n := Network{IfIndex: map[string]int{}, PodPorts: map[int]bool{}, IPv6: s.IPv6, StrictTCP: s.StrictTCP, Torn: s.Torn, LocalRoutes: s.LocalRoutes}
	for _, l := range c.links {
		n.IfIndex[l.Name] = l.Index
		if l.Loopback {
			continue
		}
		n.Links = append(n.Links, Link{Index: l.Index, Name: l.Name, Kind: describe(l.LinkState), Role: l.role, Reason: l.reason, Port: l.master != nil})
		switch {
		case l.role == Uplink:
			n.Uplinks = append(n.Uplinks, l.Name)
			n.Outward = append(n.Outward, l.Name)
			if l.keep {
				n.Keep = append(n.Keep, l.Index)
			}
		case l.role == Served && l.master == nil:
			n.PodInterfaces = append(n.PodInterfaces, l.Name)
		case l.role == Served && (l.Elsewhere || l.Tap):
			n.PodPorts[l.Index] = l.Hairpin
		case l.role == Other && c.outward(l):
			n.Outward = append(n.Outward, l.Name)
		}
		if paired(l.Kind) && l.role != Served {
			n.UnservedPairs = append(n.UnservedPairs, l.Name)
		}
		if bridge := c.bridgeOf(l); bridge != nil {
			const to0 = "Set net.bridge.bridge-nf-call-iptables and net.bridge.bridge-nf-call-ip6tables to 0"
			unfit := func(why, note string) {
				n.Unfilterable = append(n.Unfilterable, why)
				if !bridge.Unfiltered4 || !bridge.Unfiltered6 {
					n.Notes = append(n.Notes, "bridge "+bridge.Name+": "+note+". "+to0)
				}
			}
			if bridge != l && l.role == Served {
				unfit(fmt.Sprintf("packets of the pods of %s would pass it twice, the second time by %s", bridge.Name, l.Name),
					"its pods do not reach magic IPs, because its frames pass netfilter, and once more by "+l.Name+", the node's way into it")
			}
			// It matters where endpoints are: the bridge of others, such as of system containers, is left alone.
			matters := l.role == Served && (l.recorded.IsValid() || len(c.known.Attachments) == 0)
			if isolated := slices.IndexFunc(bridge.ports, func(port *link) bool { return port.Isolated }); isolated >= 0 && matters {
				port := bridge.ports[isolated].Name
				unfit(fmt.Sprintf("pods of %s behind isolated ports, such as %s, would not reach an endpoint behind another", bridge.Name, port),
					"pods behind isolated ports, such as "+port+", do not reach an endpoint behind another, because its frames pass netfilter: a translated packet goes from port to port, which isolation forbids")
			}
			n.Bridges = append(n.Bridges, plan.Bridge{
				Name: l.Name, Unfiltered4: bridge.Unfiltered4, Unfiltered6: bridge.Unfiltered6, Prefixes: onLink(s.Addresses, l.Index),
			})
		}
	}
	for _, a := range s.Addresses {
		n.Addresses = append(n.Addresses, a.Prefix.Addr())
	}
	n.Sources = c.sources(s.Addresses)
	return n
}

// outward reports whether a link that is neither an uplink nor served leads to others than this node and its pods: by its kind, unless
// it may lead to pods that are no clients. A packet goes out by a port only where it went out by what the port belongs to.
func (c *classifier) outward(l *link) bool {
	switch {
	case l.recorded.IsValid() || l.master != nil:
		return false
	case paired(l.Kind) && l.Elsewhere:
		return true
	case l.Tap: // of a VPN, or of a virtual machine
		return l.subnet.IsValid()
	}
	return !c.forPods(l) && !slices.Contains([]string{"openvswitch", "dummy", "vrf", "ifb", "nlmon"}, l.Kind)
}

// sources are the first address of each family on an uplink, those with a default route of the main table before others.
func (c *classifier) sources(addresses []Address) map[plan.Family]netip.Addr {
	sources := map[plan.Family]netip.Addr{}
	for _, inMain := range []bool{true, false} {
		for _, a := range addresses {
			l, family := c.byIndex[a.Link], plan.FamilyOf(a.Prefix.Addr())
			if l != nil && l.role == Uplink && (l.defaultTable == mainTable) == inMain && !a.Prefix.Addr().IsLinkLocalUnicast() && !sources[family].IsValid() {
				sources[family] = a.Prefix.Addr()
			}
		}
	}
	return sources
}

// onLink are the prefixes that the node's addresses on a link have in common with hosts there.
func onLink(addresses []Address, link int) (prefixes []netip.Prefix) {
	for _, a := range addresses {
		if a.Link == link && !a.Prefix.IsSingleIP() && !a.Prefix.Addr().IsLinkLocalUnicast() {
			prefixes = append(prefixes, a.Prefix.Masked())
		}
	}
	return prefixes
}

// bridgeOf is the bridge by whose frames IP packets come in by l: itself, or the one that it is a gateway of.
func (c *classifier) bridgeOf(l *link) *link {
	lower := c.byIndex[l.Lower]
	switch {
	case l.Kind == "bridge":
		return l
	case lower == nil || l.Elsewhere || l.master != nil:
	case l.Kind == "vlan" && lower.Kind == "bridge":
		return lower
	case paired(l.Kind) && lower.master != nil && lower.master.Kind == "bridge":
		return lower.master
	}
	return nil
}
