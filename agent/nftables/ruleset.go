package nftables

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// ruleset is the content of one table: chains that hardly ever change, and sets and maps that hold the
// data. A packet to any other address costs one set lookup in each hook, however many magic IPs there are.
type ruleset struct {
	chains []chain
	sets   []set
}

// chain is a base chain where hook is set.
type chain struct {
	name     string
	comment  string
	kind     knftables.BaseChainType
	hook     knftables.BaseChainHook
	priority knftables.BaseChainPriority
	rules    []string
}

// set is a map where value is set.
type set struct {
	name     string
	comment  string
	key      string
	value    string
	elements map[string]string // key to value, as nft lists them
}

// The priorities of our chains: nft's dstnat is -100 and srcnat 100 (the names are not allowed in the
// output hook). Ours come before those of others, and rejects before any translation.
const (
	beforeDNAT knftables.BaseChainPriority = "-110"
	ownDNAT    knftables.BaseChainPriority = "-105"
	ownSNAT    knftables.BaseChainPriority = "95"
	// The forward chain comes before the filters of others.
	beforeFilter knftables.BaseChainPriority = "-10"
)

// The sets in which rules may share elements; see changes.
const (
	addressesSet     = "addresses"
	hostAddressesSet = "host-addresses"
	hairpinsSet      = "hairpins"
)

// rejectChain answers at once. A chain cannot be called reject, which is a word of nft's.
const rejectChain = "reject-packet"

// concat joins the parts of a key or a value as nft writes them.
func concat(parts ...string) string { return strings.Join(parts, " . ") }

// render writes the rules of p for one family ("ip" or "ip6").
func render(p *plan.Plan, family plan.Family) ruleset {
	return ruleset{chains: chains(p, family), sets: elements(p, family)}
}

// chains are those of p for one family.
//
// Why these hooks. The filter chains run before any destination NAT of ours or of others (priority
// dstnat), so that a leftover DNAT rule of another tool cannot take a packet that is to be rejected, and
// so that what is not for this client never reaches routing. Reject in prerouting needs Linux 5.9. They
// see every packet of a flow with the magic IP still as its destination. A translated flow is let through
// before anything else is looked at: its first packet was allowed, and it ends when its sandbox does (see
// plan.Stale). The nat chains see the first packet of a flow only; what they have not translated, because
// the flow is older than the rule or conntrack calls the packet invalid, ends in the forward chain.
func chains(p *plan.Plan, family plan.Family) []chain {
	ip := string(family)
	const translated = "ct status & dnat == dnat accept"
	all := []chain{
		{name: "filter-prerouting", kind: knftables.FilterType, hook: knftables.PreroutingHook, priority: beforeDNAT,
			rules: []string{
				ip + " daddr @addresses goto from-network",
				// Nobody begins a flow from a magic IP: an answer that is late, or somebody on the network who would
				// have conntrack take a client's packets for answers and leave them untranslated.
				"ct direction original " + ip + " saddr @addresses drop",
			}},
		{name: "filter-output", kind: knftables.FilterType, hook: knftables.OutputHook, priority: beforeDNAT,
			rules: []string{ip + " daddr @host-addresses goto from-host"}},
		{name: "nat-prerouting", kind: knftables.NATType, hook: knftables.PreroutingHook, priority: ownDNAT,
			rules: []string{ip + " daddr @addresses goto translate"}},
		{name: "nat-output", kind: knftables.NATType, hook: knftables.OutputHook, priority: ownDNAT,
			rules: []string{ip + " daddr @host-addresses goto translate-host"}},
		{name: "nat-postrouting", kind: knftables.NATType, hook: knftables.PostroutingHook, priority: ownSNAT,
			rules: []string{"ct status & dnat == dnat ct original " + ip + " daddr @addresses goto masquerade-replies"}},

		{name: "filter-forward", kind: knftables.FilterType, hook: knftables.ForwardHook, priority: beforeFilter,
			rules: []string{ip + " daddr @addresses goto untranslated"}},

		{name: "untranslated", comment: "what translation has left out does not leave the node", rules: []string{
			"ct state invalid drop",
			frontendKey(ip) + " @passed accept",
			ip + " saddr . " + frontendKey(ip) + " @excluded accept",
			"goto " + rejectChain,
		}},
		{name: "from-network", comment: "what to do with a packet that comes in by an interface", rules: []string{
			translated,
			frontendKey(ip) + " vmap @services",
			"iifname @pod-interfaces goto " + rejectChain,
			"drop",
		}},
		{name: "from-host", comment: "what to do with a packet of a process of this node", rules: []string{
			translated,
			frontendKey(ip) + " vmap @host-services",
			"goto " + rejectChain,
		}},
		{name: rejectChain, comment: "an answer at once", rules: []string{
			"meta l4proto tcp reject with tcp reset",
			"reject",
		}},
		{name: "hold", comment: "wait for the next endpoint", rules: []string{
			"tcp flags & (fin | syn | rst | ack) == syn drop",
			"meta l4proto { udp, sctp } drop",
			"goto " + rejectChain,
		}},
		{name: "translate", rules: []string{
			ip + " saddr . " + frontendKey(ip) + " @excluded accept",
			"dnat " + ip + " addr . port to " + frontendKey(ip) + " map @endpoints",
			frontendKey(ip) + " vmap @spread",
		}},
		{name: "translate-host", rules: []string{
			frontendKey(ip) + " @host-excluded accept",
			"goto translate",
		}},
		{name: "masquerade-replies", comment: "replies that would not find their way back", rules: []string{
			ip + " saddr . " + ip + " daddr @hairpins masquerade",
			"iifname . oifname @unfiltered-bridges masquerade",
		}},
	}
	for i, clients := range p.Clients {
		all = append(all, clientChains(i, clients)...)
	}
	for _, rule := range p.Rules {
		if len(rule.Endpoints) > 1 && plan.FamilyOf(rule.Address) == family {
			all = append(all, spreadChain(rule, ip))
		}
	}
	return all
}

// frontendKey is the key of a packet's frontend; th dport is the destination port of any transport.
func frontendKey(ip string) string { return ip + " daddr . meta l4proto . th dport" }

// clientChains decide by the interface that a packet came in by: one chain for each action.
// Only interfaces of this node's pods are ever answered; for anybody else a magic IP does not exist.
func clientChains(index int, clients plan.Clients) []chain {
	var chains []chain
	for _, action := range []plan.Action{plan.Serve, plan.Reject, plan.Hold, plan.Pass} {
		verdict := map[plan.Action]string{plan.Serve: "accept", plan.Pass: "accept", plan.Reject: "goto " + rejectChain, plan.Hold: "goto hold"}[action]
		c := chain{name: clientChain(action, index)}
		if len(clients.Interfaces) == 0 {
			c.rules = append(c.rules, "iifname @pod-interfaces "+verdict)
		}
		for _, name := range clients.Interfaces {
			if prefix, wild := strings.CutSuffix(name, "+"); wild {
				name = prefix + "*"
			}
			c.rules = append(c.rules, fmt.Sprintf("iifname %q %s", name, verdict))
		}
		if len(clients.Interfaces) > 0 {
			c.rules = append(c.rules, "iifname @pod-interfaces goto "+rejectChain)
		}
		c.rules = append(c.rules, "drop")
		chains = append(chains, c)
	}
	return chains
}

func clientChain(action plan.Action, index int) string { return fmt.Sprintf("%s-%d", action, index) }

// spreadChain sends new flows of a frontend to its endpoints, each with the same chance.
func spreadChain(rule plan.Rule, ip string) chain {
	var endpoints []string
	for i, endpoint := range rule.Endpoints {
		endpoints = append(endpoints, fmt.Sprintf("%d : %s . %d", i, endpoint.Addr(), endpoint.Port()))
	}
	return chain{name: spreadName(rule.Frontend), rules: []string{fmt.Sprintf(
		"meta l4proto %s dnat %s addr . port to numgen random mod %d map { %s }",
		rule.Protocol, ip, len(endpoints), strings.Join(endpoints, ", "))}}
}

func spreadName(f plan.Frontend) string {
	return fmt.Sprintf("spread-%s-%s-%d", strings.ReplaceAll(f.Address.String(), ":", "-"), f.Protocol, f.Port)
}

// elements is the data of the plan.
func elements(p *plan.Plan, family plan.Family) []set {
	address := "ipv4_addr"
	if family == plan.IPv6 {
		address = "ipv6_addr"
	}
	frontend := concat(address, "inet_proto", "inet_service")
	newSet := func(name, key, value, comment string) set {
		return set{name: name, key: key, value: value, comment: comment, elements: map[string]string{}}
	}
	addresses := newSet(addressesSet, address, "", "the magic IPs")
	hostAddresses := newSet(hostAddressesSet, address, "", "the magic IPs that processes of this node may use")
	interfaces := newSet("pod-interfaces", "ifname", "", "where this node's pods are")
	services := newSet("services", frontend, "verdict", "what becomes of a pod's packet")
	hostServices := newSet("host-services", frontend, "verdict", "what becomes of a packet of a process of this node")
	endpoints := newSet("endpoints", frontend, concat(address, "inet_service"), "where new flows go")
	spread := newSet("spread", frontend, "verdict", "frontends with several endpoints")
	excluded := newSet("excluded", concat(address, frontend), "", "sources that are left alone")
	passed := newSet("passed", frontend, "", "frontends whose packets may leave the node as they are")
	hostExcluded := newSet("host-excluded", frontend, "", "frontends that processes of this node do not use")
	hairpins := newSet(hairpinsSet, concat(address, address), "", "endpoints that talk to themselves")
	bridges := newSet("unfiltered-bridges", concat("ifname", "ifname"), "", "bridges whose frames do not pass netfilter")

	for _, rule := range p.Rules {
		if rule.Address.Is6() != (family == plan.IPv6) {
			continue
		}
		key := concat(rule.Address.String(), string(rule.Protocol), strconv.Itoa(int(rule.Port)))
		if rule.Foreign() {
			services.elements[key], hostServices.elements[key] = "accept", "accept"
			passed.elements[key] = ""
			continue
		}
		addresses.elements[rule.Address.String()] = ""
		services.elements[key] = "goto " + clientChain(rule.Action, rule.Clients)
		if rule.Action == plan.Pass {
			passed.elements[key] = ""
		}
		switch {
		case !rule.HostClients:
			hostServices.elements[key] = "accept"
			hostExcluded.elements[key] = ""
		case rule.Action == plan.Reject:
			hostServices.elements[key] = "goto " + rejectChain
		case rule.Action == plan.Hold:
			hostServices.elements[key] = "goto hold"
		default:
			hostServices.elements[key] = "accept"
		}
		if rule.HostClients {
			hostAddresses.elements[rule.Address.String()] = ""
		}
		for _, source := range rule.Excluded {
			excluded.elements[concat(source.String(), key)] = ""
		}
		for _, endpoint := range rule.Endpoints {
			if slices.Contains(p.HostAddresses, endpoint.Addr()) {
				continue // the node talks to itself without our help
			}
			hairpins.elements[concat(endpoint.Addr().String(), endpoint.Addr().String())] = ""
		}
		switch len(rule.Endpoints) {
		case 0:
		case 1:
			endpoints.elements[key] = concat(rule.Endpoints[0].Addr().String(), strconv.Itoa(int(rule.Endpoints[0].Port())))
		default:
			spread.elements[key] = "goto " + spreadName(rule.Frontend)
		}
	}
	for _, name := range p.PodInterfaces {
		interfaces.elements[name] = ""
	}
	for _, bridge := range p.Bridges {
		if family == plan.IPv4 && bridge.Unfiltered4 || family == plan.IPv6 && bridge.Unfiltered6 {
			bridges.elements[concat(bridge.Name, bridge.Name)] = ""
		}
	}
	// Frontends of other agents count only on addresses that are ours in this family.
	return []set{addresses, hostAddresses, interfaces, services, hostServices, endpoints, spread, excluded, hostExcluded, passed, hairpins, bridges}
}

// sameChains says whether only elements differ.
func sameChains(p, q *plan.Plan, family plan.Family) bool {
	return slices.EqualFunc(chains(p, family), chains(q, family), func(a, b chain) bool {
		return a.name == b.name && slices.Equal(a.rules, b.rules)
	})
}

// write is the transaction that fills the table with rs, whatever was in it before.
//
// It empties what is there and fills it again, in one step, and never deletes the table to make it anew: a
// packet on its way through the old chains would meet deleted sets, find its address in none of them and
// be rejected (seen on Linux 6.18: a walk through the rules belongs to one generation, but each lookup in a
// set to the one that is current by then).
func (rs *ruleset) write(tx *knftables.Transaction, comment string) {
	table := &knftables.Table{Comment: knftables.PtrTo(comment)}
	tx.Add(table)
	tx.Flush(table)
	for _, c := range rs.chains {
		tx.Add(c.object())
	}
	for _, s := range rs.sets {
		tx.Add(s.object())
		tx.Flush(s.object())
		for _, key := range slices.Sorted(maps.Keys(s.elements)) {
			tx.Add(s.element(key))
		}
	}
	for _, c := range rs.chains {
		for _, rule := range c.rules {
			tx.Add(&knftables.Rule{Chain: c.name, Rule: rule})
		}
	}
}

// tidy is the transaction that deletes what rs does not have. It comes after write: what a chain was
// referred to by is gone by then.
func (rs *ruleset) tidy(tx *knftables.Transaction, there []object) {
	for _, o := range there {
		isChain := func(c chain) bool { return o.kind == "chain" && o.name == c.name }
		isSet := func(s set) bool { return o.kind == s.kind() && o.name == s.name }
		if slices.ContainsFunc(rs.chains, isChain) || slices.ContainsFunc(rs.sets, isSet) {
			continue
		}
		switch o.kind {
		case "chain":
			tx.Delete(&knftables.Chain{Name: o.name})
		case "set":
			tx.Delete(&knftables.Set{Name: o.name})
		case "map":
			tx.Delete(&knftables.Map{Name: o.name})
		}
	}
}

// writeChanges is the transaction that does these changes.
func writeChanges(tx *knftables.Transaction, changes []setChange) {
	for _, change := range changes {
		for _, key := range change.gone {
			tx.Delete(change.old.element(key))
		}
		for _, key := range change.added {
			tx.Add(change.wanted.element(key))
		}
	}
}

func (c chain) object() *knftables.Chain {
	object := &knftables.Chain{Name: c.name}
	if c.comment != "" {
		object.Comment = knftables.PtrTo(c.comment)
	}
	if c.hook != "" {
		object.Type, object.Hook, object.Priority = &c.kind, &c.hook, &c.priority
	}
	return object
}

func (s set) kind() string {
	if s.value != "" {
		return "map"
	}
	return "set"
}

func (s set) object() knftables.Object {
	if s.value != "" {
		return &knftables.Map{Name: s.name, Type: s.key + " : " + s.value, Comment: &s.comment}
	}
	return &knftables.Set{Name: s.name, Type: s.key, Comment: &s.comment}
}

func (s set) element(key string) *knftables.Element {
	element := &knftables.Element{Key: strings.Split(key, " . ")}
	if strings.Contains(s.key, "ifname") { // nft wants them in quotes, and lists them without
		for i := range element.Key {
			element.Key[i] = strconv.Quote(element.Key[i])
		}
	}
	if s.value == "" {
		element.Set = s.name
		return element
	}
	element.Map, element.Value = s.name, strings.Split(s.elements[key], " . ")
	return element
}
