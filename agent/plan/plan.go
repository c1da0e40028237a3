// Package plan turns magic IPs and their endpoints into what the node's kernel shall do with packets.
//
// It is pure: no clock, no I/O, no logger. A Plan is the whole desired state; packages
// nftables and iptables translate it, and the same packets must meet the same fate behind each of them.
package plan

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Protocol is a transport protocol.
type Protocol = runtimedir.Protocol

// Frontend is what clients connect to, and the key of everything, the files in the runtime directory included.
type Frontend = runtimedir.Frontend

// The protocols that a magic IP can serve.
const (
	TCP  = runtimedir.TCP
	UDP  = runtimedir.UDP
	SCTP = runtimedir.SCTP
)

// ProtocolOf is the protocol with this number, empty for one that frontends do not have.
func ProtocolOf(number uint8) Protocol {
	for _, p := range [...]Protocol{TCP, UDP, SCTP} {
		if p.Number() == number {
			return p
		}
	}
	return ""
}

// Family is an IP version, as nft names it.
type Family string

// The IP versions.
const (
	IPv4 Family = "ip"
	IPv6 Family = "ip6"
)

// Families are both IP versions, in the order in which backends load them.
func Families() [2]Family { return [...]Family{IPv4, IPv6} }

// FamilyOf is the IP version of an address.
func FamilyOf(address netip.Addr) Family {
	if address.Is6() {
		return IPv6
	}
	return IPv4
}

// Has reports whether the plan has any rule of a family.
func (p *Plan) Has(family Family) bool {
	for i := range p.Rules {
		if FamilyOf(p.Rules[i].Address) == family {
			return true
		}
	}
	return false
}

// Action is what becomes of a new packet of a served client.
type Action string

// The actions.
const (
	// Serve: DNAT to an endpoint.
	Serve Action = "serve"
	// Reject: TCP reset, ICMP port unreachable for the rest.
	Reject Action = "reject"
	// Hold: SYNs and datagrams are dropped silently so that a connect waits; all else is rejected.
	Hold Action = "hold"
	// Pass: left alone, because noEndpoint says so or another agent on this node claims the frontend.
	Pass Action = "pass"
)

// Service is one frontend with its policy and its endpoints: the input of Build.
type Service struct {
	Frontend
	// HostInterface is empty for auto, else interface names; a trailing + matches any rest.
	HostInterface []string
	HostClients   bool
	ExcludeTarget bool
	// WithoutEndpoint is Reject, Hold or Pass; it does not count where there are endpoints.
	WithoutEndpoint Action
	// HoldUntil is when Hold becomes Reject, by the kernel's clock where the backend can.
	HoldUntil time.Time
	// Endpoints all have the family of the frontend. More than one: new flows spread over them evenly.
	Endpoints []netip.AddrPort
	// Spread: there may be more than one.
	Spread bool
}

// Bridge is a Linux bridge whose frames do not all pass netfilter.
type Bridge struct {
	Name string
	// Unfiltered4 and Unfiltered6 reports whether its IPv4 and IPv6 frames go from port to port unseen.
	Unfiltered4, Unfiltered6 bool
	// Prefixes are the on-link prefixes of the node's addresses on it: its pods have their addresses in these.
	Prefixes []netip.Prefix
}

// Unfiltered reports whether frames of this family go from port to port unseen.
func (b Bridge) Unfiltered(family Family) bool {
	return family == IPv4 && b.Unfiltered4 || family == IPv6 && b.Unfiltered6
}

// has reports whether an address is that of a pod behind the bridge.
func (b Bridge) has(address netip.Addr) bool {
	return slices.ContainsFunc(b.Prefixes, func(p netip.Prefix) bool { return p.Contains(address) })
}

func (b Bridge) equal(c Bridge) bool {
	return b.Name == c.Name && b.Unfiltered4 == c.Unfiltered4 && b.Unfiltered6 == c.Unfiltered6 && slices.Equal(b.Prefixes, c.Prefixes)
}

// Input is all that a plan depends on.
type Input struct {
	Services []Service
	// Foreign are frontends that other agents on this node claim.
	Foreign []Frontend
	// PodInterfaces are the links that auto serves, less those of Uplinks.
	PodInterfaces []string
	// Uplinks are the node's ways out, with a default route or without. No packet to a magic IP leaves by one, translated or not, unless a HostInterface
	// names it.
	Uplinks []string
	// UnservedPairs are the veth and netkit links that are not served. Other links of these kinds, which come up while nobody
	// looks, are.
	UnservedPairs []string
	Bridges       []Bridge
	// StrictTCP: the node picks up no TCP connection that it has not seen from its start (net.netfilter.nf_conntrack_tcp_loose
	// is 0), so that segments of a connection whose flow was deleted are invalid.
	StrictTCP bool
	// HostAddresses are the node's own; Sandboxes those of all sandboxes known to stand.
	HostAddresses, Sandboxes []netip.Addr
	// Synced: every source is synced, so that a sandbox that is not among Sandboxes is not live.
	Synced bool
	Detour Detour
	// Zones: the rules can put the flows of a frontend into a connection tracking zone.
	Zones bool
}

// Clients is a distinct hostInterface setting.
type Clients struct {
	// Interfaces is empty for auto: the plan's PodInterfaces.
	Interfaces []string
}

// Rule is the fate of the packets to one frontend.
type Rule struct {
	Frontend
	Action Action
	// Clients is an index into Plan.Clients; -1 where another agent claims the frontend.
	Clients   int
	Endpoints []netip.AddrPort
	// HostClients reports whether processes of this node are treated like pods or left alone.
	HostClients bool
	// Excluded are sources (the targets themselves) that are exempt; ExcludeTarget: there may be some.
	Excluded      []netip.Addr
	ExcludeTarget bool
	// HoldUntil is when Hold becomes Reject; zero for other actions.
	HoldUntil time.Time
	// Zoned: what clients send is put into zones of connection tracking. Zone is the one of the present endpoint; 0, in which all
	// other flows are, where there is none.
	Zoned bool
	Zone  uint16
}

// Plan is the whole desired state of one agent. Two plans from equal input are equal.
type Plan struct {
	Rules         []Rule    // by Frontend, in order
	Clients       []Clients // in order
	PodInterfaces []string  // in order
	// Uplinks are those that no packet to a magic IP leaves by; UnservedPairs has the Uplinks of its kinds too. In order.
	Uplinks, UnservedPairs []string
	// Unnamed are links that cannot be named in rules, for status: they are not served by name.
	Unnamed []string
	// NamedOnly: a veth or netkit link that must not be served is among Unnamed, so that no link is served by its kind.
	NamedOnly bool
	// Bridges are those with unfiltered frames, AllBridges the names of all. In order.
	Bridges    []Bridge
	AllBridges []string
	// Exempts: some service exempts its targets.
	Exempts   bool
	StrictTCP bool
	// Servers are the addresses to which translated flows may lead, in order: those of the endpoints, and see Inherit.
	Servers []netip.Addr
	// HostAddresses, Sandboxes (both in order) and Synced decide which flows are stale; see Stale.
	HostAddresses, Sandboxes []netip.Addr
	Synced                   bool
	Detour                   Detour
	Zones                    bool
	// LocalAddresses are the magic IPs that are to be addresses of the node; see localAddresses.
	LocalAddresses []netip.Addr
}

// Count is how often a frontend was asked for.
type Count = runtimedir.Count

// mostCounted is how many rules a plan may have whose packets are counted by frontend: reading the counters costs time.
const mostCounted = 500

// Counted reports whether packets are counted by frontend.
func (p *Plan) Counted() bool { return len(p.Rules) <= mostCounted }

// Build makes the plan. Services must be distinct in their frontends.
func Build(in Input) Plan {
	p := Plan{
		StrictTCP:     in.StrictTCP,
		HostAddresses: sortedSet(in.HostAddresses, netip.Addr.Compare),
		Sandboxes:     sortedSet(in.Sandboxes, netip.Addr.Compare),
		Synced:        in.Synced,
		Detour:        in.Detour,
		Zones:         in.Zones,
	}
	for _, bridge := range in.Bridges {
		if !Nameable(bridge.Name) {
			p.Unnamed = append(p.Unnamed, bridge.Name)
			continue
		}
		p.AllBridges = append(p.AllBridges, bridge.Name)
		if bridge.Unfiltered4 || bridge.Unfiltered6 {
			bridge.Prefixes = sortedSet(bridge.Prefixes, netip.Prefix.Compare)
			p.Bridges = append(p.Bridges, bridge)
		}
	}
	slices.SortFunc(p.Bridges, func(a, b Bridge) int { return strings.Compare(a.Name, b.Name) })
	p.AllBridges = sortedSet(p.AllBridges, strings.Compare)
	for i := range in.Services {
		c := Clients{Interfaces: sortedSet(in.Services[i].HostInterface, strings.Compare)}
		if p.indexOf(c) < 0 {
			p.Clients = append(p.Clients, c)
		}
	}
	slices.SortFunc(p.Clients, func(a, b Clients) int { return slices.Compare(a.Interfaces, b.Interfaces) })
	p.links(in)

	p.Rules = make([]Rule, len(in.Services), len(in.Services)+len(in.Foreign))
	claimed := map[Frontend]bool{}
	addresses := map[netip.Addr]bool{}
	for i := range in.Services {
		service, rule := &in.Services[i], &p.Rules[i]
		if len(in.Foreign) > 0 {
			claimed[service.Frontend], addresses[service.Address] = true, true
		}
		*rule = Rule{
			Frontend:    service.Frontend,
			Action:      Serve,
			Clients:     p.indexOf(Clients{Interfaces: sortedSet(service.HostInterface, strings.Compare)}),
			Endpoints:   sortedSet(service.Endpoints, netip.AddrPort.Compare),
			HostClients: service.HostClients, ExcludeTarget: service.ExcludeTarget,
		}
		if len(rule.Endpoints) == 0 {
			rule.Action = service.WithoutEndpoint
		}
		if rule.Action == Hold {
			rule.HoldUntil = service.HoldUntil
		}
		if service.ExcludeTarget {
			p.Exempts = true
			for _, endpoint := range rule.Endpoints {
				rule.Excluded = append(rule.Excluded, endpoint.Addr())
			}
			rule.Excluded = slices.Compact(rule.Excluded)
		}
		// Flows that are spread have different endpoints, of which one may go and the others stay. TCP connections stay with theirs. Of
		// SCTP, a new endpoint knows no association.
		rule.Zoned = in.Zones && service.Protocol == UDP && !service.Spread
		if rule.Zoned && len(rule.Endpoints) == 1 {
			rule.Zone = ZoneOf(rule.Endpoints[0].Addr())
		}
		for _, endpoint := range rule.Endpoints {
			p.Servers = append(p.Servers, endpoint.Addr())
		}
	}
	p.Servers = sortedSet(p.Servers, netip.Addr.Compare)
	// A port that another agent serves on one of our addresses is not ours to reject.
	for _, frontend := range sortedSet(in.Foreign, Frontend.Compare) {
		if addresses[frontend.Address] && !claimed[frontend] {
			p.Rules = append(p.Rules, Rule{Frontend: frontend, Action: Pass, Clients: -1})
		}
	}
	slices.SortFunc(p.Rules, func(a, b Rule) int { return a.Compare(b.Frontend) })
	p.LocalAddresses = p.localAddresses()
	return p
}

// indexOf is the position of c among the clients; -1 where it is not among them.
func (p *Plan) indexOf(c Clients) int {
	return slices.IndexFunc(p.Clients, func(d Clients) bool { return slices.Equal(c.Interfaces, d.Interfaces) })
}

// Inherit adds to the servers of p those of the plan before it whose sandbox is live: established connections lead there.
func (p *Plan) Inherit(servers []netip.Addr) {
	for _, server := range servers {
		if contains(p.Sandboxes, server) {
			p.Servers = append(p.Servers, server)
		}
	}
	p.Servers = sortedSet(p.Servers, netip.Addr.Compare)
}

// Equal reports whether nothing differs.
func (p *Plan) Equal(q *Plan) bool {
	ofP, ofQ := Diff(p, q)
	return p.Synced == q.Synced && p.Detour == q.Detour && p.Zones == q.Zones && len(ofP)+len(ofQ) == 0 &&
		slices.EqualFunc(p.Clients, q.Clients, func(a, b Clients) bool { return slices.Equal(a.Interfaces, b.Interfaces) }) &&
		slices.Equal(p.PodInterfaces, q.PodInterfaces) && slices.Equal(p.Uplinks, q.Uplinks) && slices.Equal(p.UnservedPairs, q.UnservedPairs) &&
		slices.Equal(p.Unnamed, q.Unnamed) && slices.EqualFunc(p.Bridges, q.Bridges, Bridge.equal) && slices.Equal(p.AllBridges, q.AllBridges) &&
		p.NamedOnly == q.NamedOnly && p.Exempts == q.Exempts && p.StrictTCP == q.StrictTCP &&
		slices.Equal(p.HostAddresses, q.HostAddresses) && slices.Equal(p.Servers, q.Servers) && slices.Equal(p.Sandboxes, q.Sandboxes) &&
		slices.Equal(p.LocalAddresses, q.LocalAddresses)
}

func (r *Rule) equal(s *Rule) bool {
	return r.Frontend == s.Frontend && r.Action == s.Action && r.Clients == s.Clients && r.HostClients == s.HostClients && r.ExcludeTarget == s.ExcludeTarget &&
		r.HoldUntil.Equal(s.HoldUntil) && r.Zoned == s.Zoned && r.Zone == s.Zone && slices.Equal(r.Endpoints, s.Endpoints) && slices.Equal(r.Excluded, s.Excluded)
}

// Diff are the rules of two plans without those that are equal in both, in order.
func Diff(p, q *Plan) (ofP, ofQ []Rule) {
	i, j := 0, 0
	for i < len(p.Rules) || j < len(q.Rules) {
		order := 0
		switch {
		case i == len(p.Rules):
			order = 1
		case j == len(q.Rules):
			order = -1
		case p.Rules[i].Frontend != q.Rules[j].Frontend:
			order = p.Rules[i].Compare(q.Rules[j].Frontend)
		}
		if order != 0 || !p.Rules[i].equal(&q.Rules[j]) {
			if order <= 0 {
				ofP = append(ofP, p.Rules[i])
			}
			if order >= 0 {
				ofQ = append(ofQ, q.Rules[j])
			}
		}
		if order <= 0 {
			i++
		}
		if order >= 0 {
			j++
		}
	}
	return ofP, ofQ
}

// Foreign reports whether another agent claims the frontend of r.
func (r *Rule) Foreign() bool { return r.Clients < 0 }

// Find returns the rule of a frontend.
func (p *Plan) Find(f Frontend) (Rule, bool) { return find(p.Rules, f) }

func find(rules []Rule, f Frontend) (Rule, bool) {
	i, found := slices.BinarySearchFunc(rules, f, func(r Rule, f Frontend) int { return r.Compare(f) })
	if !found {
		return Rule{}, false
	}
	return rules[i], true
}

// ZoneOf is the zone of flows to an endpoint: the same at each start of the agent, and never 0. Pods of a node have different low
// bits in their addresses; for two endpoints of a frontend that have not, see Since.
func ZoneOf(endpoint netip.Addr) (zone uint16) {
	bytes := endpoint.AsSlice()
	for _, pair := range slices.Collect(slices.Chunk(bytes[max(2, len(bytes)-8):], 2)) {
		zone ^= uint16(pair[0])<<8 | uint16(pair[1])
	}
	return max(zone, 1)
}

func sortedSet[E any](in []E, compare func(E, E) int) []E {
	out := slices.Clone(in)
	if len(out) < 2 {
		return out
	}
	slices.SortFunc(out, compare)
	return slices.CompactFunc(out, func(a, b E) bool { return compare(a, b) == 0 })
}
