package nftables

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// chain is a base chain where hook is set.
type chain struct {
	name     string
	comment  string
	kind     knftables.BaseChainType
	hook     knftables.BaseChainHook
	priority knftables.BaseChainPriority
	rules    []string
}

func (c chain) equal(d chain) bool { return c.name == d.name && slices.Equal(c.rules, d.rules) }

// The priorities of our chains: nft's dstnat is -100 and srcnat 100 (the names are not allowed in the
// output hook). Ours come before those of others, and the filters before any translation.
const (
	beforeDNAT knftables.BaseChainPriority = "-110"
	// After the rules of others that exempt packets from connection tracking or put them into zones (raw is -300), before
	// connection tracking (-200).
	beforeTracking knftables.BaseChainPriority = "-290"
	// The chains of forward and input come before the filters of others.
	beforeFilter knftables.BaseChainPriority = "-10"
	beforeSNAT   knftables.BaseChainPriority = "90"
	ownSNAT      knftables.BaseChainPriority = "95"
)

// TranslationPriority is that of the chains that translate magic IPs.
const TranslationPriority = -105

// rejectChain rejects every packet. A chain cannot be called reject, which is a keyword of nft.
const rejectChain = "reject-packet"

// servedKinds are the kinds of links that serve pods without being named: a routed veth is there before the agent has seen
// it, and also while no agent runs. A bridge or a tap of which nothing is known may lead to another network.
const servedKinds = `{ "veth", "netkit" }`

// chains are those of p for one family, but for the ones of spreadChains.
//
// Why these hooks. The filter chains of prerouting and output run before any destination NAT, of ours or of others (priority
// dstnat), so that a leftover DNAT rule of another tool cannot take a packet that is to be rejected, and so that packets of
// other clients never reach routing. Reject in prerouting needs Linux 5.9. These chains see every packet of a flow with the
// magic IP still as its destination. A packet of a translated flow that comes in by a client's link is accepted: the flow's
// first packet was, and the flow ends when its sandbox does (see plan.Stale).
//
// The nat chains see the first packet of a flow only. What they have not translated, because the flow is older than the rule
// or conntrack calls the packet invalid, is rejected or dropped in the forward chain; in the input chain where the magic IP is an
// address of the node (see plan.Detour), whose TCP would answer with a reset; and for processes of the node in the postrouting
// chain. The chains of forward and postrouting are the guard that needs no endpoint: a translated packet whose endpoint's route is
// gone follows the default route, with the agent dead too, and would leave the node; so would one that another tool has translated
// to a magic IP, which no chain of ours has seen before. Its sender gets an answer at once where that is possible (reject does
// not work in postrouting).
//
// What a packet costs. State and status of its connection are in memory that the packet has brought along, so they are compared
// before any address is looked up: each packet of an established flow passes three of these chains, and the answers of a server
// need no lookup at all. Rules that serve a setting that p does not have are not there.
func chains(p *plan.Plan, family plan.Family) []chain {
	ip := string(family)
	const (
		translated = "ct status & dnat == dnat"
		// A transport has to be named before nft takes a flow's port for one.
		ofFlow = "ct protocol { tcp, udp, sctp } "
		// A segment that conntrack calls invalid, but for those that begin or reset a connection: asymmetric routes and sockets
		// that are gone make them rightly.
		outOfWindow = "ct state invalid tcp flags & (syn | rst) == 0"
		// What conntrack calls invalid is of an association whose flow was deleted.
		noAssociation = "meta l4proto sctp goto " + rejectChain
		// The output chain has let it pass, as not of a client, and a local route leads it here.
		byLoopback = `iifname "lo" accept`
		notByName  = "iifname != @pod-interfaces jump unknown-links"
	)
	translation := knftables.BaseChainPriority(strconv.Itoa(TranslationPriority))
	var (
		addresses     = addressesOf(p, family, func(*plan.Rule) bool { return true })
		hostAddresses = addressesOf(p, family, func(r *plan.Rule) bool { return r.HostClients })
		from          = among(ip+" saddr", addressesSet, addresses)
		to            = among(ip+" daddr", addressesSet, addresses)
		hostTo        = among(ip+" daddr", hostAddressesSet, hostAddresses)
		first         = among("ct original "+ip+" daddr", addressesSet, addresses)
		hostFirst     = among("ct original "+ip+" daddr", hostAddressesSet, hostAddresses)
		inByUplink    = byLink("iifname", p.Uplinks)
		outByUplink   = byLink("oifname", p.Uplinks)
		excluded      = when(p.Exempts, ip+" saddr . "+frontendKey(ip)+" @excluded")
		someExcluded  = hostAddresses.count > 0 && slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return !r.HostClients && !r.Foreign() })
		hostExcluded  = when(someExcluded, frontendKey(ip)+" @host-excluded")

		// The same of a translated flow. An error among its packets is of another transport.
		firstPassed       = ofFlow + firstKey(ip) + " @passed"
		firstExcluded     = when(p.Exempts, ofFlow+"ct original "+ip+" saddr . "+firstKey(ip)+" @excluded")
		firstHostExcluded = when(someExcluded, ofFlow+firstKey(ip)+" @host-excluded")
	)
	all := []chain{
		{name: "filter-prerouting", kind: knftables.FilterType, hook: knftables.PreroutingHook, priority: beforeDNAT,
			rules: rules(
				"ct state established goto ongoing",
				// No flow begins at a magic IP: otherwise a host on the network could have conntrack take a client's packets for
				// replies, which are not translated.
				rule("ct state new,related ct direction original", from, "drop"),
				"ct state related "+translated+" ct direction reply jump answered",
				"ct state invalid,untracked jump irregular",
				rule(to, "goto from-network"),
			)},
		{name: "filter-output", kind: knftables.FilterType, hook: knftables.OutputHook, priority: beforeDNAT,
			rules: rules(
				rule(hostTo, "goto from-host"),
				outOfWindow+" "+ip+" saddr . tcp sport @host-endpoints drop",
			)},
		{name: "nat-prerouting", kind: knftables.NATType, hook: knftables.PreroutingHook, priority: translation,
			rules: rules(rule(to, "goto translate"))},
		{name: "nat-output", kind: knftables.NATType, hook: knftables.OutputHook, priority: translation,
			rules: rules(rule(hostTo, "goto translate-host"))},
		{name: "nat-postrouting", kind: knftables.NATType, hook: knftables.PostroutingHook, priority: ownSNAT,
			rules: rules(rule(translated, first, "goto masquerade-replies"))},
		{name: "filter-forward", kind: knftables.FilterType, hook: knftables.ForwardHook, priority: beforeFilter,
			rules: rules(
				translated+" goto forwarded",
				rule(to, "goto untranslated-forward"),
			)},
		// What comes in by the loopback is of processes of the node: the postrouting chain has seen it.
		{name: "filter-input", kind: knftables.FilterType, hook: knftables.InputHook, priority: beforeFilter,
			rules: rules(rule(`iifname != "lo"`, to, "goto untranslated-input"))},
		{name: "filter-postrouting", kind: knftables.FilterType, hook: knftables.PostroutingHook, priority: beforeSNAT,
			rules: rules(
				"iif != 0 accept", // forwarded, so the forward chain has seen it
				"ct state related,invalid,untracked jump sent-irregular",
				translated+" goto sent-translated",
				rule(hostTo, "goto sent-untranslated"),
			)},

		{name: "ongoing", comment: "packets of established flows", rules: rules(
			translated+" ct direction reply goto answered",
			rule(to, "goto from-network"),
		)},
		{name: "answered", comment: "answers of endpoints, of magic IPs and others", rules: rules(
			// Endpoints are on this node: an answer, or an ICMP error among answers, that comes in by an uplink is forged.
			rule(inByUplink, "goto answered-outside"),
		)},
		{name: "irregular", comment: "packets of no flow", rules: rules(
			// It would reach a client as if the service had sent it; those of the loopback are resets of our own for processes of
			// this node.
			rule(`iifname != "lo"`, from, "drop"),
			// The client would get it untranslated and reset the server's connection (kubernetes/kubernetes 74839).
			outOfWindow+" "+ip+" saddr @servers drop",
		)},
		{name: "from-network", comment: "packets that come in by an interface", rules: []string{
			translated + " iifname @pod-interfaces accept",
			frontendKey(ip) + " vmap @actions",
			notByName,
			"goto reject-new",
		}},
		{name: "answered-outside", comment: "no answer of a magic IP comes from outside", rules: rules(
			rule(first, "goto forged"),
		)},
		{name: "forged", rules: rules(
			firstPassed+" accept", // another tool has translated it, and so for the two that are next
			rule(firstExcluded, "accept"),
			rule(firstHostExcluded, "fib daddr type local accept"),
			rule(hostFirst, "drop"),
			"fib daddr type != local drop",
		)},
		{name: "unknown-links", comment: "drops packets that do not come from pods", rules: []string{
			byLoopback,
			"iifname @unserved-pairs drop",
			"meta iifkind " + servedKinds + " return",
			"drop",
		}},
		{name: "from-host", comment: "packets of processes of this node", rules: []string{
			translated + " accept",
			"ct state invalid goto invalid-from-host",
			frontendKey(ip) + " vmap @host-actions",
			"goto " + rejectChain,
		}},
		{name: "invalid-from-host", rules: rules(
			frontendKey(ip)+" @passed accept",
			rule(hostExcluded, "accept"),
			rule(excluded, "accept"),
			"goto invalid",
		)},
		{name: "invalid", comment: "a live flow goes on without the segment"},
		{name: "reject-new", rules: []string{
			translated + " accept",
			"goto " + rejectChain,
		}},
		{name: rejectChain, comment: "an answer at once", rules: rules(
			// The reset of a frame that has come in by a bridge's port bypasses translation (nf_send_reset), and its sender would ignore
			// one that does not come from where it has connected to. With an ICMP error instead, a connect by IPv6 takes a second.
			`meta iifkind "bridge" meta l4proto tcp `+translated+" "+ip+" daddr set ct original "+ip+" daddr tcp dport set ct original proto-dst reject with tcp reset",
			"meta l4proto tcp reject with tcp reset",
			// SCTP heeds no error for a port (RFC 9260, section 10). IPv6 has its error for a protocol (a parameter problem), but reject has not.
			when(family == plan.IPv4, "meta l4proto sctp reject with icmp type prot-unreachable"),
			"reject",
		)},
		{name: "hold", rules: []string{
			translated + " accept",
			frontendKey(ip) + " @held goto hold-packet",
			"goto " + rejectChain,
		}},
		{name: "hold-packet", comment: "wait for the next endpoint", rules: []string{
			"tcp flags & (fin | syn | rst | ack) == syn drop",
			"meta l4proto { udp, sctp } drop",
			"goto " + rejectChain,
		}},

		{name: "translate", rules: rules(
			rule(excluded, "accept"),
			"dnat "+ip+" addr . port to "+frontendKey(ip)+" map @destinations",
			frontendKey(ip)+" vmap @spreads",
		)},
		{name: "translate-host", rules: rules(
			rule(hostExcluded, "accept"),
			"goto translate",
		)},
		{name: "masquerade-replies", comment: "replies that would bypass this node", rules: rules(
			ip+" saddr . "+ip+" daddr @hairpins masquerade",
			when(slices.ContainsFunc(p.Bridges, func(b plan.Bridge) bool { return b.Unfiltered(family) }), "iifname . oifname @unfiltered-bridges masquerade"),
			when(p.Detour.Masquerade(family), "fib saddr type != local masquerade"), // processes of this node get their replies anyway
		)},

		{name: "forwarded", comment: "no translated packet to a magic IP leaves the node", rules: rules(
			rule(outByUplink, "goto forwarded-outside"),
		)},
		{name: "forwarded-outside", rules: rules(
			rule(to, "goto untranslated-forward"), // by another tool
			rule(first, "goto leaving"),
		)},
		{name: "leaving", comment: "translated, but no route leads to the endpoint", rules: rules(
			firstPassed+" accept", // another tool has translated it, and so for an exempt client's
			rule("ct direction original", firstExcluded, "fib saddr . iif oif missing drop"), // see untranslated-forward
			rule(firstExcluded, "accept"),
			"ct direction reply drop",
			"goto "+rejectChain,
		)},
		{name: "untranslated-forward", rules: rules(
			// A target's own packet comes in by the link that leads to it, not by that of another pod with the target's address.
			rule(excluded, "fib saddr . iif oif missing drop"),
			"goto untranslated",
		)},
		{name: "untranslated-input", rules: []string{
			// The node's SCTP aborts the association, which it does not know, or the node has none and says so.
			"meta l4proto sctp ct state invalid accept",
			"goto untranslated",
		}},
		{name: "untranslated", rules: rules(
			frontendKey(ip)+" @passed accept",
			rule(excluded, "accept"),
			"ct state invalid goto invalid",
			"goto "+rejectChain,
		)},
		{name: "sent-irregular", rules: rules(
			// The reset of a packet that a pod has sent with a source outside.
			rule(outByUplink, from, "drop"),
		)},
		{name: "sent-translated", comment: "no packet of the node to a magic IP leaves it", rules: rules(
			rule(outByUplink, "goto sent-outside"),
		)},
		{name: "sent-outside", rules: rules(
			rule(hostTo, "goto sent-untranslated"),
			rule(hostFirst, "goto sent-leaving"),
		)},
		{name: "sent-leaving", rules: rules(
			firstPassed+" accept",
			rule(firstHostExcluded, "accept"),
			rule(firstExcluded, "accept"),
			"drop",
		)},
		{name: "sent-untranslated", rules: rules(
			frontendKey(ip)+" @passed accept",
			rule(hostExcluded, "accept"),
			rule(excluded, "accept"),
			"drop",
		)},
	}
	if slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return r.Zoned && plan.FamilyOf(r.Address) == family }) {
		all = append(all, zoneChains(ip, to, hostTo, excluded, hostExcluded)...)
	}
	for i := range all {
		c := &all[i]
		switch {
		case c.name == "unknown-links" && p.NamedOnly:
			c.rules = []string{byLoopback, "drop"}
		case c.name == "invalid" && p.StrictTCP:
			// The segment may be of a connection whose flow was deleted: only a reset spares its client a timeout.
			c.rules = []string{noAssociation, "tcp flags & rst == 0 goto " + rejectChain, "drop"}
		case c.name == "invalid":
			// A FIN begins no flow either, and its client may wait for an answer.
			c.rules = []string{noAssociation, "tcp flags & (fin | syn | rst) == fin goto " + rejectChain, "drop"}
		}
	}
	for i, clients := range p.Clients {
		for _, action := range []plan.Action{plan.Serve, plan.Reject, plan.Hold, plan.Pass} {
			all = append(all, clientChain(action, i, clients, notByName))
		}
	}
	return all
}

// zoneChains put the datagrams of clients into the zone of the present endpoint. When that changes, the next datagram belongs to no
// flow that there is, however many there are, and makes one that leads to the new endpoint; and answers of the old one, which are in no
// zone, still find the flow that they belong to and come from the magic IP.
//
// Connection tracking has not seen these packets yet, hence invalid: others are of a zone already, or not to be tracked at all.
// What is not translated stays in no zone, since its answers have the same addresses whichever zone it is in.
func zoneChains(ip, to, hostTo, excluded, hostExcluded string) []chain {
	return []chain{
		{name: "zone-prerouting", kind: knftables.FilterType, hook: knftables.PreroutingHook, priority: beforeTracking,
			rules: rules(rule("meta l4proto udp", to, "goto zone"))},
		{name: "zone-output", kind: knftables.FilterType, hook: knftables.OutputHook, priority: beforeTracking,
			rules: rules(rule("meta l4proto udp", hostTo, "goto zone-host"))},
		{name: "zone", comment: "each endpoint has a zone of its own", rules: rules(
			rule(excluded, "accept"),
			"ct state invalid ct original zone set "+ip+" daddr . udp dport map @zones",
		)},
		{name: "zone-host", rules: rules(
			rule(hostExcluded, "accept"),
			"goto zone",
		)},
	}
}

// never is a match of no packet: a rule with it is not loaded.
const never = ""

// rule joins matches and what is done; it is never where one of the matches is.
func rule(parts ...string) string {
	if slices.Contains(parts, never) {
		return never
	}
	return strings.Join(parts, " ")
}

func rules(all ...string) []string {
	return slices.DeleteFunc(all, func(r string) bool { return r == never })
}

func when(wanted bool, rule string) string {
	if wanted {
		return rule
	}
	return never
}

// extent is how many addresses there are, the first and the last.
type extent struct {
	count       int
	first, last netip.Addr
}

// addressesOf are the magic IPs of a family of which a rule is wanted.
func addressesOf(p *plan.Plan, family plan.Family, wanted func(*plan.Rule) bool) (addresses extent) {
	for i := range p.Rules { // in order
		r := &p.Rules[i]
		if addresses.last == r.Address || plan.FamilyOf(r.Address) != family || r.Foreign() || !wanted(r) {
			continue
		}
		if addresses.count++; addresses.count == 1 {
			addresses.first = r.Address
		}
		addresses.last = r.Address
	}
	return addresses
}

// among matches packets of which a field is among addresses, the elements of a set. A packet with an address outside of their
// common prefix costs no lookup.
func among(field, set string, addresses extent) string {
	match := field + " @" + set
	switch addresses.count {
	case 0:
		return match
	case 1:
		return field + " " + addresses.first.String()
	}
	if prefix := commonPrefix(addresses.first, addresses.last); prefix.Bits() > 0 {
		match = field + " " + prefix.String() + " " + match
	}
	return match
}

// commonPrefix is the longest prefix that contains all addresses from one to another.
func commonPrefix(from, to netip.Addr) netip.Prefix {
	for bits := from.BitLen(); ; bits-- {
		if prefix := netip.PrefixFrom(from, bits).Masked(); bits == 0 || prefix.Contains(to) {
			return prefix
		}
	}
}

// byLink matches packets by their link. Uplinks are few and hardly ever change.
func byLink(field string, names []string) string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = strconv.Quote(name)
	}
	switch len(quoted) {
	case 0:
		return never
	case 1:
		return field + " " + quoted[0]
	}
	return field + " { " + strings.Join(quoted, ", ") + " }"
}

// frontendKey is the key of a packet's frontend; th dport is the destination port of any transport.
func frontendKey(ip string) string { return ip + " daddr . meta l4proto . th dport" }

// firstKey is the frontend that the first packet of a packet's flow was sent to.
func firstKey(ip string) string {
	return "ct original " + ip + " daddr . ct protocol . ct original proto-dst"
}

// clientChain decides by the interface that a packet came in by. Only links of this node's pods are ever answered; from any
// other a magic IP does not exist.
func clientChain(action plan.Action, index int, clients plan.Clients, notByName string) chain {
	verdict := map[plan.Action]string{plan.Serve: "accept", plan.Pass: "accept", plan.Reject: "goto reject-new", plan.Hold: "goto hold"}[action]
	c := chain{name: clientChainName(action, index)}
	if len(clients.Interfaces) == 0 {
		c.rules = []string{notByName, verdict}
		return c
	}
	for _, name := range clients.Interfaces {
		if prefix, wild := strings.CutSuffix(name, "+"); wild {
			name = prefix + "*"
		}
		c.rules = append(c.rules, fmt.Sprintf("iifname %q %s", name, verdict))
	}
	c.rules = append(c.rules, notByName, "goto "+rejectChain)
	return c
}

func clientChainName(action plan.Action, index int) string {
	return fmt.Sprintf("%s-%d", action, index)
}

// spreadChains send new flows of a frontend with several endpoints to each of them, with the same probability.
func spreadChains(rules []plan.Rule, family plan.Family) (all []chain) {
	for _, rule := range rules {
		if len(rule.Endpoints) < 2 || plan.FamilyOf(rule.Address) != family {
			continue
		}
		var endpoints []string
		for i, endpoint := range rule.Endpoints {
			endpoints = append(endpoints, fmt.Sprintf("%d : %s . %d", i, endpoint.Addr(), endpoint.Port()))
		}
		all = append(all, chain{name: spreadName(rule.Frontend), rules: []string{fmt.Sprintf(
			"meta l4proto %s dnat %s addr . port to numgen random mod %d map { %s }",
			rule.Protocol, family, len(endpoints), strings.Join(endpoints, ", "))}})
	}
	return all
}

func spreadName(f plan.Frontend) string {
	return fmt.Sprintf("spread-%s-%s-%d", strings.ReplaceAll(f.Address.String(), ":", "-"), f.Protocol, f.Port)
}
