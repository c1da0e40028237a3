package iptables

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// table is what we have in one iptables table: chains of our own, and one jump to one of them from each
// built-in chain that we need.
type table struct {
	name   string
	jumps  []jump
	chains []chain
}

// jump leads from a built-in chain to one of ours.
type jump struct{ hook, chain, comment string }

func (j jump) String() string {
	return fmt.Sprintf("%s -m comment --comment %q -j %s", j.hook, j.comment, j.chain)
}

// chain is a chain and its rules in the words of iptables, without "-A <chain>".
type chain struct {
	name  string
	rules []string
}

// The roles of our chains: what each of them is in the tables that have it.
const (
	fromNetwork   = "pre"    // mangle PREROUTING: who may use a magic IP at all
	fromPods      = "pods"   // mangle: the interfaces of this node's pods
	fromMagic     = "src"    // mangle: no flow begins at a magic IP
	fromServers   = "srv"    // mangle: out-of-window segments of servers
	toNetwork     = "post"   // mangle POSTROUTING
	sent          = "sent"   // mangle: a translated packet does not leave by an uplink
	leaving       = "leave"  // filter: the same for a forwarded one
	answered      = "answer" // mangle: no answer of an endpoint comes in by an uplink
	forwarded     = "fwd"    // filter FORWARD and INPUT: what was not translated is rejected
	fromHost      = "out"    // filter OUTPUT: the same for processes of this node
	rejected      = "reject" // filter
	held          = "hold"   // filter
	sameBridge    = "bridge" // filter, nat: replies that would not find their way back
	translated    = "dnat"   // nat PREROUTING
	translatedOut = "local"  // nat OUTPUT
	masqueraded   = "snat"   // nat POSTROUTING
	detoured      = "detour" // nat: flows of pods whose replies would bypass this node
	zoned         = "zone"   // raw PREROUTING: each endpoint has a zone of its own
	zonedOut      = "zoneo"  // raw OUTPUT
)

// rawTable is in use only where there are UDP ports.
const rawTable = "raw"

// ChainPrefix begins the name of every chain of every agent of this kind.
const ChainPrefix = "MIP-"

// Prefix begins the names of one agent's chains. A name holds 28 characters (XT_EXTENSION_MAXNAMELEN),
// an agent's name up to 117: hence a hash.
func Prefix(agentName string) string { return ChainPrefix + shortHash(agentName, 8) + "-" }

func shortHash(text string, digits int) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:digits]
}

// bridgeMark is the one bit of the packet mark that we use. POSTROUTING does not know where a packet came
// in by, and FORWARD cannot masquerade, so the bit carries one fact from there to here: this is the first
// packet of a flow through a magic IP that goes out by the bridge it came in by, whose frames do not pass
// netfilter. It is set on no other packet, and only where there is such a bridge; POSTROUTING takes it off.
// Neighbours known to use marks have other bits: kube-proxy 0xc000, portmap 0x2000, Calico 0xffff0000,
// Cilium 0x0f00, AWS VPC CNI 0x00c0.
const bridgeMark = "0x1000/0x1000"

// mostInChain is how many addresses share a chain before it is split; a packet to any other address
// meets at most sixteen rules for each four bits that the addresses differ in.
const mostInChain = 8

// render writes the rules of p for one family, in the order in which the tables are to be loaded.
//
// Why these hooks. REJECT works in the filter table alone, after destination NAT, so rejecting takes three
// steps. What is added to a table, and what is deleted from it, is one transaction each, but the three tables are not:
//
//   - mangle PREROUTING runs before any NAT and before routing: packets that do not come from pods are dropped.
//   - nat PREROUTING and OUTPUT translate packets to frontends with an endpoint. ACCEPT, for the rest, ends the walk through
//     the nat table: a leftover DNAT rule of another tool behind our jump does not see the packet.
//   - filter FORWARD and OUTPUT: a packet that is still addressed to a magic IP was not translated, so it
//     is rejected. Translated flows, established ones included, carry their endpoint's address here, which
//     is why no rule has to exempt them.
//
// A served frontend is held in the filter table: not translated are only packets of flows from before its
// rule, which are about to be deleted, and those on their way between two of the three transactions. Hence
// the order: with filter before nat, a frontend that gains or loses its endpoint never lets a packet out,
// and never rejects one that the rules before or after would have answered or held. Where endpoints are gained alone, nat comes
// first, and no SYN is held meanwhile.
//
// The zones of connection tracking come last: a datagram that finds its new zone makes a flow, which must lead to the new endpoint. One
// that comes earlier goes to the old endpoint by its flow of before. There is no table raw without a UDP port.
//
// A packet that the node has no route for does not get as far as FORWARD or OUTPUT: its sender is told
// that the network is unreachable. A translated packet whose endpoint's route is gone follows the default route: filter
// FORWARD rejects it, and mangle POSTROUTING drops it where a process of this node has sent it.
func render(p *plan.Plan, family plan.Family, agentName string) []table {
	b := &builder{plan: p, family: family, agent: agentName, prefix: Prefix(agentName)}
	for _, rule := range p.Rules {
		if plan.FamilyOf(rule.Address) != family {
			continue
		}
		if n := len(b.addresses); n == 0 || b.addresses[n-1].address != rule.Address {
			b.addresses = append(b.addresses, addressRules{address: rule.Address})
		}
		last := &b.addresses[len(b.addresses)-1]
		last.rules = append(last.rules, rule)
		last.hostClients = last.hostClients || !rule.Foreign() && rule.HostClients
	}
	return []table{b.mangle(), b.filter(), b.nat(), b.raw()}
}

type builder struct {
	plan      *plan.Plan
	family    plan.Family
	agent     string
	prefix    string
	addresses []addressRules // in order
	table     table          // under construction
	index     map[string]int // of its chains, by name
}

// addressRules are the rules of the frontends of one magic IP.
type addressRules struct {
	address     netip.Addr
	rules       []plan.Rule
	hostClients bool // of any of them
}

func (b *builder) begin(name string) {
	b.table, b.index = table{name: name}, map[string]int{}
}

// hook begins a chain that a built-in chain jumps to.
func (b *builder) hook(hook, role string) string {
	chain := b.chain(role)
	b.table.jumps = append(b.table.jumps, jump{hook, chain, "magic IPs of " + b.agent})
	return chain
}

// chain begins a chain and returns its name.
func (b *builder) chain(role string) string {
	name := b.prefix + role
	b.index[name] = len(b.table.chains)
	b.table.chains = append(b.table.chains, chain{name: name})
	return name
}

// add appends a rule to a chain; empty words are left out.
func (b *builder) add(chain string, words ...string) {
	i := b.index[chain]
	words = slices.DeleteFunc(slices.Clone(words), func(word string) bool { return word == "" })
	b.table.chains[i].rules = append(b.table.chains[i].rules, strings.Join(words, " "))
}

// note is a rule's comment: which magic IP it serves, and who put it there.
func (b *builder) note(what string) string {
	return fmt.Sprintf("-m comment --comment %q", b.agent+": "+what)
}

// one is the prefix of a single address, as iptables-save words it.
func one(address netip.Addr) string {
	return netip.PrefixFrom(address, address.BitLen()).String()
}

func (b *builder) mangle() table {
	b.begin("mangle")
	entry := b.hook("PREROUTING", fromNetwork)
	pods := b.chain(fromPods)
	b.add(pods, "-i lo -j RETURN") // the output chain has let it pass, as not of a client, and a local route leads it here
	for _, name := range b.plan.PodInterfaces {
		b.add(pods, "-i", name, "-j RETURN")
	}
	b.add(pods, b.note("not for the network"), "-j DROP")
	clients := make([]string, len(b.plan.Clients))
	for i, c := range b.plan.Clients {
		clients[i] = pods
		if len(c.Interfaces) == 0 {
			continue
		}
		clients[i] = b.chain(fmt.Sprintf("%s-%d", fromPods, i))
		for _, name := range c.Interfaces {
			b.add(clients[i], "-i", name, "-j RETURN")
		}
		b.add(clients[i], "-g", pods)
	}
	// Otherwise a host on the network could have conntrack take a client's packets for replies, which are not translated. An
	// invalid packet would reach a client as if the service had sent it; those of the loopback are resets of our own for processes
	// of this node.
	senders := b.chain(fromMagic)
	b.add(entry, "-m conntrack --ctstate NEW,RELATED --ctdir ORIGINAL -j", senders)
	b.add(entry, "! -i lo -m conntrack --ctstate INVALID,UNTRACKED -j", senders)
	dispatch(b, senders, "-s %s", b.addresses, byAddress, func(chain string, a addressRules) {
		b.add(chain, "-s", one(a.address), b.note("no flow begins at "+a.address.String()), "-j DROP")
	})
	if remote := b.servers(); len(remote) > 0 {
		// The client would get it untranslated and reset the server's connection (kubernetes/kubernetes 74839). Segments that
		// begin or reset a connection are made rightly by asymmetric routes and sockets that are gone.
		servers := b.chain(fromServers)
		b.add(entry, "-p tcp --tcp-flags SYN,RST NONE -m conntrack --ctstate INVALID -j", servers)
		dispatch(b, servers, "-s %s", remote, identity, func(chain string, a netip.Addr) {
			b.add(chain, "-s", one(a), b.note("a segment out of the window of a client of "+a.String()), "-j DROP")
		})
	}
	// Endpoints are on this node: an answer, or an ICMP error, that comes in by an uplink is forged.
	b.guard(entry, "-i %s -m conntrack --ctstate DNAT --ctdir REPLY -j", answered, b.addresses, func(chain, origin string, a addressRules) {
		if a.hostClients {
			b.notForHost(chain, "-m addrtype --dst-type LOCAL", a)
			b.add(chain, origin, "-j DROP")
		} else {
			b.add(chain, origin, "-m addrtype ! --dst-type LOCAL -j DROP")
		}
	})
	dispatch(b, entry, "-d %s", b.addresses, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			for _, source := range rule.Excluded {
				// A target's own packet comes in by the link that leads to it, not by that of another pod with its address.
				b.add(chain, "-s", one(source), match(rule), "-m rpfilter --invert", b.note(rule.String()), "-j DROP")
			}
			switch {
			case rule.Foreign():
				b.add(chain, match(rule), b.note(rule.String()+" of another agent"), "-j RETURN")
			case clients[rule.Clients] != pods:
				b.add(chain, match(rule), b.note(rule.String()), "-g", clients[rule.Clients])
			}
		}
		b.add(chain, "-d", one(a.address), b.note(a.address.String()), "-g", pods)
	})
	// What the forward chain has not seen: packets of processes of this node.
	if post := b.hook("POSTROUTING", toNetwork); len(b.plan.Uplinks) > 0 {
		// The reset of a packet that a pod has sent with a source outside.
		for _, name := range b.plan.Uplinks {
			b.add(post, "-o", name, "-m conntrack --ctstate INVALID,RELATED,UNTRACKED -j", senders)
		}
		b.guard(post, outTranslated, sent, b.forHost(), func(chain, origin string, a addressRules) {
			b.notForHost(chain, "", a)
			b.add(chain, origin, "-j DROP")
		})
	}
	return b.table
}

// outTranslated matches a translated packet that would leave by a link.
const outTranslated = "-o %s -m conntrack --ctstate DNAT -j"

// guard adds to chain what becomes of the packets of translated flows that match on an uplink. A packet that would leave by one does
// because no route leads to its endpoint, unless another tool has translated it: that of a frontend that passes, or of an exempt client.
func (b *builder) guard(chain, match, role string, addresses []addressRules, leaf func(chain, origin string, a addressRules)) {
	if len(addresses) == 0 || len(b.plan.Uplinks) == 0 {
		return
	}
	next := b.chain(role)
	for _, name := range b.plan.Uplinks {
		b.add(chain, fmt.Sprintf(match, name), next)
	}
	dispatch(b, next, "-m conntrack --ctorigdst %s", addresses, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if passes(rule) {
				b.add(chain, firstTo(rule), b.note(rule.String()), "-j RETURN")
				continue
			}
			for _, source := range rule.Excluded {
				b.add(chain, firstTo(rule), "--ctorigsrc", source.String(), b.note(rule.String()), "-j RETURN")
			}
		}
		leaf(chain, "-m conntrack --ctorigdst "+a.address.String(), a)
	})
}

// passes: another agent decides about the frontend's packets, or whoever translates them.
func passes(rule plan.Rule) bool { return rule.Foreign() || rule.Action == plan.Pass }

// notForHost exempts packets of flows of frontends that are not for processes of this node. match says which of them may be theirs.
func (b *builder) notForHost(chain, match string, a addressRules) {
	for _, rule := range a.rules {
		if !passes(rule) && !rule.HostClients {
			b.add(chain, firstTo(rule), match, b.note(rule.String()+" is not for processes of this node"), "-j RETURN")
		}
	}
}

// firstTo matches the packets of flows whose first packet was sent to a frontend, in both directions, and the errors among them.
func firstTo(rule plan.Rule) string {
	return fmt.Sprintf("-m conntrack --ctproto %s --ctorigdst %s --ctorigdstport %d", rule.Protocol, rule.Address, rule.Port)
}

// servers are the addresses of this family that translated flows lead to, without those of the node.
func (b *builder) servers() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(b.plan.Servers), func(a netip.Addr) bool {
		return plan.FamilyOf(a) != b.family || slices.Contains(b.plan.HostAddresses, a)
	})
}

func identity(a netip.Addr) netip.Addr { return a }

func (b *builder) filter() table {
	b.begin("filter")
	entry := b.hook("FORWARD", forwarded)
	// Where a magic IP is an address of the node, what was not translated goes to the node itself.
	b.table.jumps = append(b.table.jumps, jump{"INPUT", entry, "magic IPs of " + b.agent})
	out := b.hook("OUTPUT", fromHost)
	reject := b.chain(rejected)
	unreachable := "icmp-port-unreachable"
	if b.family == plan.IPv6 {
		unreachable = "icmp6-port-unreachable"
	}
	// Another tool's translation, or ours where no route leads to the endpoint. The reset of a frame that has come in by a bridge's
	// port bypasses translation (nf_send_reset): its sender would ignore it, for it does not come from where it has connected to. A
	// connect ends by the ICMP error too; by IPv6, that of its second SYN.
	for _, name := range b.plan.AllBridges {
		b.add(reject, "-i", name, "-p tcp -m conntrack --ctstate DNAT -j REJECT --reject-with", unreachable)
	}
	b.add(reject, "-p tcp -j REJECT --reject-with tcp-reset")
	if b.family == plan.IPv4 {
		// SCTP heeds no error for a port (RFC 9260, section 10). IPv6 has its error for a protocol (a parameter problem), but REJECT has not.
		b.add(reject, "-p sctp -j REJECT --reject-with icmp-proto-unreachable")
	}
	b.add(reject, "-j REJECT --reject-with", unreachable)
	hold := b.chain(held)
	// No rule of nat will take what another tool has translated to a magic IP.
	b.add(hold, "-m conntrack --ctstate DNAT -g", reject)
	b.add(hold, "-p tcp --tcp-flags FIN,SYN,RST,ACK SYN -j DROP")
	b.add(hold, "-p udp -j DROP")
	b.add(hold, "-p sctp -j DROP")
	b.add(hold, "-g", reject)

	if bridges := b.bridges(); len(bridges) > 0 {
		mark := b.chain(sameBridge)
		for _, name := range bridges {
			b.add(entry, "-i", name, "-o", name, "-m conntrack --ctstate NEW", "-g", mark)
		}
		dispatch(b, mark, "-m conntrack --ctorigdst %s", b.addresses, byAddress, func(chain string, a addressRules) {
			b.add(chain, "-m conntrack --ctstate DNAT --ctorigdst", a.address.String(), b.note(a.address.String()), "-j MARK --set-xmark", bridgeMark)
		})
	}
	b.guard(entry, outTranslated, leaving, b.addresses, func(chain, origin string, _ addressRules) {
		b.add(chain, origin, "--ctdir ORIGINAL -g", reject)
		b.add(chain, origin, "-j DROP")
	})
	for _, rule := range b.plan.Rules {
		for _, endpoint := range rule.Endpoints {
			if rule.Protocol == plan.TCP && plan.FamilyOf(rule.Address) == b.family && slices.Contains(b.plan.HostAddresses, endpoint.Addr()) {
				b.add(out, "-s", one(endpoint.Addr()), "-p tcp --sport", fmt.Sprint(endpoint.Port()), "--tcp-flags SYN,RST NONE -m conntrack --ctstate INVALID",
					b.note("a segment out of the window of a client"), "-j DROP")
			}
		}
	}
	b.add(entry, "-i lo -j RETURN") // of a process of this node, so the output chain has seen it
	dispatch(b, entry, "-d %s", b.addresses, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if rule.Foreign() {
				b.add(chain, match(rule), b.note(rule.String()+" of another agent"), "-j RETURN")
				continue
			}
			for _, in := range incoming(b.plan.Clients[rule.Clients]) {
				b.untranslated(chain, in, rule)
			}
		}
		b.add(chain, "-d", one(a.address), b.note(a.address.String()), "-g", reject)
	})
	dispatch(b, out, "-d %s", b.forHost(), byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if rule.Foreign() || !rule.HostClients {
				b.add(chain, match(rule), b.note(rule.String()+" is not for processes of this node"), "-j RETURN")
				continue
			}
			b.untranslated(chain, "", rule)
		}
		b.add(chain, "-d", one(a.address), b.note(a.address.String()), "-g", reject)
	})
	return b.table
}

// untranslated adds what becomes of a served client's packet that no nat rule has taken. What these
// rules do not match is rejected.
func (b *builder) untranslated(chain, in string, rule plan.Rule) {
	note := b.note(rule.String())
	for _, source := range rule.Excluded {
		b.add(chain, "-s", one(source), match(rule), in, note, "-j RETURN")
	}
	switch rule.Action {
	case plan.Pass:
		b.add(chain, match(rule), in, note, "-j RETURN")
	case plan.Hold:
		b.add(chain, match(rule), in, note, "-g", b.prefix+held)
	case plan.Serve:
		if rule.Protocol == plan.TCP {
			// It may be of a connection whose flow was deleted: only a reset spares its client a timeout. A FIN begins no flow.
			flags := "--tcp-flags FIN,SYN,RST FIN"
			if b.plan.StrictTCP {
				flags = "--tcp-flags RST NONE"
			}
			b.add(chain, match(rule), in, flags, "-m conntrack --ctstate INVALID", note, "-g", b.prefix+rejected)
		}
		if rule.Protocol == plan.SCTP {
			// It is of an association whose flow was deleted. The node's SCTP aborts it, or the node has none and says so; what would be
			// forwarded is answered by an ICMP error.
			b.add(chain, match(rule), in, "-m conntrack --ctstate INVALID -m addrtype --dst-type LOCAL", note, "-j RETURN")
			b.add(chain, match(rule), in, "-m conntrack --ctstate INVALID", note, "-g", b.prefix+rejected)
		}
		// conntrack does not translate a segment that it calls invalid. A reset would end a live flow.
		b.add(chain, match(rule), in, "-m conntrack --ctstate INVALID", note, "-j DROP")
		b.add(chain, match(rule), in, note, "-g", b.prefix+held)
	}
}

func (b *builder) nat() table {
	b.begin("nat")
	entry := b.hook("PREROUTING", translated)
	local := b.hook("OUTPUT", translatedOut)
	replies := b.hook("POSTROUTING", masqueraded)

	endpoints := map[netip.Addr]bool{}
	for _, a := range b.addresses {
		for _, rule := range a.rules {
			for _, endpoint := range rule.Endpoints {
				endpoints[endpoint.Addr()] = true
			}
			if len(rule.Endpoints) > 1 {
				b.spread(rule)
			}
		}
	}
	dispatch(b, entry, "-d %s", b.addresses, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if rule.Foreign() {
				b.add(chain, match(rule), b.note(rule.String()+" of another agent"), "-j RETURN")
				continue
			}
			for _, in := range incoming(b.plan.Clients[rule.Clients]) {
				b.translate(chain, in, rule)
			}
		}
		b.add(chain, "-d", one(a.address), b.note(a.address.String()), "-j ACCEPT")
	})
	dispatch(b, local, "-d %s", b.forHost(), byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if rule.Foreign() || !rule.HostClients {
				b.add(chain, match(rule), b.note(rule.String()+" is not for processes of this node"), "-j RETURN")
				continue
			}
			b.translate(chain, "", rule)
		}
		b.add(chain, "-d", one(a.address), b.note(a.address.String()), "-j ACCEPT")
	})

	if len(b.bridges()) > 0 {
		same := b.chain(sameBridge)
		b.add(replies, "-m mark --mark", bridgeMark, "-g", same)
		b.add(same, "-j MARK --set-xmark 0x0/"+strings.Split(bridgeMark, "/")[1])
		b.add(same, b.note("replies that would not find their way back"), "-j MASQUERADE")
	}
	if b.plan.Detour.Masquerade(b.family) {
		detour := b.chain(detoured)
		b.add(replies, "-m conntrack --ctstate DNAT -m addrtype ! --src-type LOCAL -j", detour)
		dispatch(b, detour, "-m conntrack --ctorigdst %s", b.addresses, byAddress, func(chain string, a addressRules) {
			b.add(chain, "-m conntrack --ctorigdst", a.address.String(), b.note("replies of "+a.address.String()+" would bypass this node"), "-j MASQUERADE")
		})
	}
	// Whoever translated it: a pod cannot take a packet that bears its own address as its source.
	var hairpins []netip.Addr
	for address := range endpoints {
		if !slices.Contains(b.plan.HostAddresses, address) { // the node talks to itself without our help
			hairpins = append(hairpins, address)
		}
	}
	slices.SortFunc(hairpins, netip.Addr.Compare)
	dispatch(b, replies, "-d %s", hairpins, identity, func(chain string, a netip.Addr) {
		b.add(chain, "-s", one(a), "-d", one(a), "-m conntrack --ctstate DNAT", b.note(a.String()+" talks to itself"), "-j MASQUERADE")
	})
	return b.table
}

// raw puts the datagrams of clients into the zone of the present endpoint: see the zone chains of package nftables.
func (b *builder) raw() table {
	b.begin(rawTable)
	all := slices.DeleteFunc(slices.Clone(b.addresses), func(a addressRules) bool {
		return !slices.ContainsFunc(a.rules, func(r plan.Rule) bool { return r.Zoned })
	})
	if len(all) == 0 {
		return b.table
	}
	entry, out := b.hook("PREROUTING", zoned), b.hook("OUTPUT", zonedOut)
	zone := func(chain string, rule plan.Rule) {
		if rule.Zone == 0 {
			return
		}
		for _, source := range rule.Excluded {
			b.add(chain, "-s", one(source), match(rule), b.note(rule.String()), "-j RETURN")
		}
		b.add(chain, match(rule), b.note(rule.String()), "-j CT --zone-orig", fmt.Sprint(rule.Zone))
	}
	dispatch(b, entry, "-d %s", all, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			zone(chain, rule)
		}
	})
	dispatch(b, out, "-d %s", all, byAddress, func(chain string, a addressRules) {
		for _, rule := range a.rules {
			if rule.HostClients {
				zone(chain, rule)
			}
		}
	})
	return b.table
}

// translate adds the way of a served client's new flow to its endpoint.
func (b *builder) translate(chain, in string, rule plan.Rule) {
	note := b.note(rule.String())
	for _, source := range rule.Excluded {
		b.add(chain, "-s", one(source), match(rule), in, note, "-j RETURN")
	}
	switch {
	case len(rule.Endpoints) == 1:
		b.add(chain, match(rule), in, note, "-j DNAT --to-destination", rule.Endpoints[0].String())
	case len(rule.Endpoints) > 1:
		b.add(chain, match(rule), in, note, "-g", b.prefix+spreadRole(rule.Frontend))
	case rule.Action == plan.Pass:
		b.add(chain, match(rule), in, note, "-j RETURN")
	}
}

// spread adds a chain that sends new flows to the endpoints of rule, each with the same chance.
func (b *builder) spread(rule plan.Rule) {
	chain := b.chain(spreadRole(rule.Frontend))
	for i, endpoint := range rule.Endpoints {
		chance := ""
		if left := len(rule.Endpoints) - i; left > 1 {
			chance = fmt.Sprintf("-m statistic --mode random --probability %.10f", 1/float64(left))
		}
		b.add(chain, "-p", string(rule.Protocol), chance, b.note(rule.String()), "-j DNAT --to-destination", endpoint.String())
	}
}

func spreadRole(f plan.Frontend) string { return "to-" + shortHash(f.String(), 10) }

// match is the key of everything.
func match(rule plan.Rule) string {
	return fmt.Sprintf("-d %s -p %s --dport %d", one(rule.Address), rule.Protocol, rule.Port)
}

// incoming are the matches for the interfaces that a rule's clients are behind. For auto, mangle has let
// nobody else through.
func incoming(clients plan.Clients) []string {
	if len(clients.Interfaces) == 0 {
		return []string{""}
	}
	var matches []string
	for _, name := range clients.Interfaces {
		matches = append(matches, "-i "+name)
	}
	return matches
}

// forHost are the magic IPs that processes of this node may use.
func (b *builder) forHost() []addressRules {
	var all []addressRules
	for _, a := range b.addresses {
		if a.hostClients {
			all = append(all, a)
		}
	}
	return all
}

// bridges are the bridges whose frames of this family do not pass netfilter.
func (b *builder) bridges() []string {
	var names []string
	for _, bridge := range b.plan.Bridges {
		if bridge.Unfiltered(b.family) {
			names = append(names, bridge.Name)
		}
	}
	return names
}

func byAddress(a addressRules) netip.Addr { return a.address }

// dispatch adds to chain what leads to the rules of each item, which leaf adds. Items are in the order of
// their addresses. Many are spread over a tree of chains, as in a routing table. A packet that enters the tree does not come back to
// chain, so no rule can follow there.
func dispatch[T any](b *builder, chain, matchPrefix string, items []T, address func(T) netip.Addr, leaf func(chain string, item T)) {
	if len(items) <= mostInChain {
		for _, item := range items {
			leaf(chain, item)
		}
		return
	}
	const bits = 4
	length := min(commonBits(address(items[0]), address(items[len(items)-1]))+bits, address(items[0]).BitLen())
	for len(items) > 0 {
		prefix, _ := address(items[0]).Prefix(length)
		group := items
		if end := slices.IndexFunc(items, func(item T) bool { return !prefix.Contains(address(item)) }); end >= 0 {
			group = items[:end]
		}
		items = items[len(group):]
		role := strings.Split(strings.TrimPrefix(chain, b.prefix), ".")[0]
		next := b.chain(role + "." + shortHash(prefix.String(), 8))
		b.add(chain, fmt.Sprintf(matchPrefix, prefix), "-g", next)
		dispatch(b, next, matchPrefix, group, address, leaf)
	}
}

// commonBits is how many leading bits two addresses of one family share.
func commonBits(a, b netip.Addr) int {
	length := 0
	for length < a.BitLen() {
		if prefix, _ := a.Prefix(length + 1); !prefix.Contains(b) {
			break
		}
		length++
	}
	return length
}
