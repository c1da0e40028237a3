package doctor

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/agent/foreign"
	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

const filtersCheck = "filters"

// leg is a part of the way of a packet: the hooks in which it has these addresses.
type leg struct {
	ruleset.Packet
	name  string // the packet's, for people
	hooks []ruleset.Hook
	// perhaps: whether the packet passes these hooks is not known.
	perhaps bool
}

// The parts of the way that a packet passes as it was sent, and those after its translation.
func before(hook string) ruleset.Hook {
	return ruleset.Hook{Name: hook, From: math.MinInt, Before: nftables.TranslationPriority}
}

func after(hook string) ruleset.Hook {
	return ruleset.Hook{Name: hook, From: nftables.TranslationPriority, Before: math.MaxInt}
}

func whole(hook string) ruleset.Hook {
	return ruleset.Hook{Name: hook, From: math.MinInt, Before: math.MaxInt}
}

// legs are the ways of the first packets of this family that pods and processes of the node send to magic IPs.
func (e *examination) legs(family plan.Family) (legs []leg) {
	for _, packet := range e.packetsToMagicIPs(family) {
		legs = append(legs, leg{Packet: packet, name: fmt.Sprintf("a packet of a pod to %s/%s", packet.Destination, packet.Protocol),
			hooks: []ruleset.Hook{whole("ingress"), before("prerouting")}})
	}
	if packet, ok := e.packetToEndpoint(family); ok {
		hooks := []ruleset.Hook{after("prerouting"), whole("forward"), whole("postrouting"), whole("egress")}
		if packet.Out == "" { // a process of the node
			hooks = []ruleset.Hook{after("prerouting"), whole("input")}
		}
		legs = append(legs, leg{Packet: packet, name: fmt.Sprintf("a packet of a pod to endpoint %s", packet.Destination), hooks: hooks})
	}
	return slices.Concat(legs, e.portLegs(legs), e.nodeLegs(family))
}

// nodeLegs are the ways of those that processes of the node send, where these are clients.
func (e *examination) nodeLegs(family plan.Family) (legs []leg) {
	const who = "a packet of a process of the node to "
	for _, target := range e.targets() {
		m, _ := e.served(target.Frontend)
		if !m.HostClients || plan.FamilyOf(target.Address) != family || len(legs) == most {
			continue
		}
		out, source := wayTo(target.Address)
		packet := ruleset.Packet{Out: out, Source: source, Destination: target.AddrPort(), Protocol: string(target.Protocol)}
		legs = append(legs, leg{Packet: packet, name: fmt.Sprintf("%s%s/%s", who, packet.Destination, packet.Protocol), hooks: []ruleset.Hook{before("output")}})
	}
	packet, ok := e.packetToEndpoint(family)
	if len(legs) == 0 || !ok {
		return legs
	}
	packet.In = ""
	_, packet.Source = wayTo(packet.Destination.Addr())
	sent := packet
	sent.Out = "" // in the output hook it is that of the route to the magic IP still
	name := fmt.Sprintf("%sendpoint %s", who, packet.Destination)
	return append(legs,
		leg{Packet: sent, name: name, hooks: []ruleset.Hook{after("output")}},
		leg{Packet: packet, name: name, hooks: []ruleset.Hook{whole("postrouting"), whole("egress")}})
}

// wayTo is the link that the node sends to an address by, and the source address; empty and invalid where there is no route.
func wayTo(address netip.Addr) (link string, source netip.Addr) {
	routes, err := netlink.RouteGet(net.IP(address.AsSlice()))
	if err != nil || len(routes) == 0 {
		return "", netip.Addr{}
	}
	if found, err := netlink.LinkByIndex(routes[0].LinkIndex); err == nil {
		link = found.Attrs().Name
	}
	source, _ = netip.AddrFromSlice(routes[0].Src)
	return link, source.Unmap()
}

// portLegs are the ways of the same packets through the ports of the pods' bridge.
func (e *examination) portLegs(legs []leg) (ports []leg) {
	// brNetfilter is the priority at which a bridge hands frames to the prerouting hook of IP (NF_BR_PRI_BRNF).
	const brNetfilter = 0
	for _, l := range legs {
		if !slices.ContainsFunc(e.network.Bridges, func(b plan.Bridge) bool { return b.Name == l.In }) {
			continue
		}
		bridge := func(hook string, from int) ruleset.Hook {
			return ruleset.Hook{Name: hook, From: from, Before: math.MaxInt, Bridge: true}
		}
		port := leg{Packet: l.Packet, name: l.name}
		port.In, port.Out = "", "" // any of them
		first, rest := port, port
		first.hooks = []ruleset.Hook{{Name: "prerouting", From: math.MinInt, Before: brNetfilter + 1, Bridge: true}}
		rest.hooks, rest.perhaps = []ruleset.Hook{bridge("prerouting", brNetfilter+1), bridge("input", math.MinInt), bridge("forward", math.MinInt), bridge("output", math.MinInt), bridge("postrouting", math.MinInt)}, true
		if !l.Translated {
			ports = append(ports, first)
		}
		ports = append(ports, rest)
		for _, link := range e.network.Links {
			if _, isPort := e.network.PodPorts[link.Index]; !isPort {
				continue
			}
			one := port
			if l.Translated {
				one.Out, one.hooks, one.perhaps = link.Name, []ruleset.Hook{whole("egress")}, !e.behind(link.Name, l.Destination.Addr())
			} else {
				one.In, one.hooks = link.Name, []ruleset.Hook{whole("ingress")}
			}
			ports = append(ports, one)
		}
	}
	return ports
}

// behind reports whether the pod with an address is recorded behind a link.
func (e *examination) behind(link string, address netip.Addr) bool {
	for _, record := range e.records {
		if record.HostInterface == link && slices.Contains(record.IPs, address) {
			return true
		}
	}
	return false
}

// filters sees that no rule of others drops what is sent to the magic IPs, on its way to the translation or from there to the endpoints,
// or keeps it from being translated.
func (e *examination) filters(ctx context.Context) {
	var all []leg
	var undecided []string
	for _, family := range e.families() {
		legs := e.legs(family)
		all = append(all, legs...)
		undecided = append(undecided, e.filtersOfIPTables(ctx, family, legs)...)
	}
	undecided = append(undecided, e.filtersOfNFTables(ctx, all)...)
	if len(undecided) > 0 {
		e.add(Warn, filtersCheck, "whether what is sent to magic IPs and endpoints is accepted depends on what this command does not evaluate; otherwise it is dropped by "+few(undecided),
			"see what the probe says; kubectl get networkpolicy -A")
	}
	if len(all) > 0 && !slices.ContainsFunc(e.found, func(f Finding) bool { return f.Check == filtersCheck }) {
		e.add(OK, filtersCheck, "none drops what is sent to the magic IPs, ahead of the translation or behind it", "")
	}
}

// filtersOfIPTables looks at the tables of both kinds of iptables. undecided are the rules that may drop something.
func (e *examination) filtersOfIPTables(ctx context.Context, family plan.Family, legs []leg) (undecided []string) {
	for _, kind := range []struct {
		table    string
		priority int // NF_IP_PRI_RAW and so on
	}{{"raw", -300}, {"mangle", -150}, {"filter", 0}, {"security", 50}} {
		for _, table := range savedTables(ctx, family, kind.table) {
			if table.err != nil {
				e.add(Hidden, filtersCheck, fmt.Sprintf("%s, table %s: %v", table.name, kind.table, table.err), "run this as root in the network namespace of the node")
				continue
			}
			place := fmt.Sprintf("%s, table %s", table.name, kind.table)
			parsed := ruleset.ParseIPTables(withoutAgents(table.rules), nil)
			var seen []string
			for _, l := range legs {
				for _, hook := range l.hooks {
					if hook.Bridge || kind.priority < hook.From || hook.Before <= kind.priority {
						continue
					}
					chain := strings.ToUpper(hook.Name)
					verdict, by := parsed.BuiltIn(chain, l.Packet)
					if verdict == ruleset.Accept || slices.Contains(seen, by) {
						continue
					}
					seen = append(seen, by)
					if verdict == ruleset.Unknown {
						undecided = append(undecided, place+": "+by)
						continue
					}
					e.stops(l, place, by, "accept it before that, for example: "+acceptBefore(table.name, kind.table, chain, l.Packet))
				}
			}
		}
	}
	return undecided
}

// withoutAgents are the rules of a table but those of agents.
func withoutAgents(saved string) string {
	var others strings.Builder
	for line := range strings.Lines(saved) {
		if !strings.Contains(line, " "+iptables.ChainPrefix) {
			others.WriteString(line)
		}
	}
	return others.String()
}

// acceptBefore is the command that lets packets such as this one through.
func acceptBefore(command, table, chain string, p ruleset.Packet) string {
	words := []string{command, "-t", table, "-I", chain}
	if p.Translated && chain == "FORWARD" {
		words = append(words, "-i", p.In, "-o", p.Out)
	} else {
		words = append(words, "-d", p.Destination.Addr().String())
	}
	return quote.Shell(append(words, "-j", "ACCEPT")...)
}

// filtersOfNFTables looks at the other tables of nftables, and names flowtables. undecided are the rules that may drop something.
func (e *examination) filtersOfNFTables(ctx context.Context, legs []leg) (undecided []string) {
	saved := present("iptables-nft-save")
	ofIPTables := func(family, table string) bool {
		return saved && (family == "ip" || family == "ip6") && slices.Contains([]string{"raw", "mangle", "nat", "filter", "security"}, table)
	}
	tables, err := foreign.NFTables(ctx, ofIPTables)
	if err != nil {
		e.add(Hidden, filtersCheck, err.Error(), "run this as root in the network namespace of the node, with nft")
		return nil
	}
	if len(tables.Flowtables) > 0 {
		e.add(Warn, "flowtables", few(tables.Flowtables)+": packets of standing flows in it pass no rules, so that a UDP client may stay with a former pod until that is gone",
			"where that matters, keep flows to magic IPs out of it")
	}
	passed := func(family, table, chain string) bool {
		return ofIPTables(family, table) && chain == strings.ToUpper(chain) || strings.HasPrefix(table, nftables.TablePrefix) || strings.HasPrefix(chain, iptables.ChainPrefix)
	}
	var seen []ruleset.NFTRule
	for _, l := range legs {
		for _, hook := range l.hooks {
			for _, stop := range tables.Stopping(l.Packet, hook, passed) {
				if slices.Contains(seen, stop.NFTRule) {
					continue
				}
				seen = append(seen, stop.NFTRule)
				chain := nftName{stop.Family, stop.Table, stop.Chain}
				place, by := fmt.Sprintf("nftables chain %s", chain), fmt.Sprintf("its rule with handle %d", stop.Handle)
				if stop.Handle == 0 {
					by = "its policy"
				}
				if !stop.Sure || l.perhaps {
					undecided = append(undecided, place+": "+by)
					continue
				}
				e.stops(l, place, by, "see what it is for: "+chain.list("--handle"))
			}
		}
	}
	return undecided
}

// stops adds that a rule in a place stops a packet for certain.
func (e *examination) stops(l leg, place, by, next string) {
	untracked := ""
	if !l.Translated {
		untracked = ", or kept from being tracked and so from being translated,"
	}
	e.add(Fail, filtersCheck, fmt.Sprintf("%s: %s is dropped%s by %s", place, l.name, untracked, by), next)
}

// packetsToMagicIPs are what a pod's first packets to the magic IPs of this family look like in the prerouting hook.
func (e *examination) packetsToMagicIPs(family plan.Family) (all []ruleset.Packet) {
	packet, ok := e.packetToEndpoint(family)
	if !ok {
		packet.In = e.podLink()
	}
	if packet.In == "" {
		return nil
	}
	for _, target := range e.targets() {
		if plan.FamilyOf(target.Address) == family && len(all) < most {
			all = append(all, ruleset.Packet{In: packet.In, Source: packet.Source, Destination: target.AddrPort(), Protocol: string(target.Protocol)})
		}
	}
	return all
}

// packetToEndpoint is what a pod's first packet to an endpoint of this family looks like behind the translation: from another pod
// of the endpoint's network. Out is empty where the only endpoints are processes of the node.
func (e *examination) packetToEndpoint(family plan.Family) (packet ruleset.Packet, found bool) {
	for _, target := range e.targets() {
		if plan.FamilyOf(target.Address) != family || len(target.Endpoints) == 0 {
			continue
		}
		endpoint := target.Endpoints[0]
		index, ok := routeTo(endpoint.Addr())
		if !ok {
			continue
		}
		link, err := netlink.LinkByIndex(index)
		if err != nil {
			continue
		}
		packet = ruleset.Packet{In: link.Attrs().Name, Out: link.Attrs().Name, Source: endpoint.Addr(), Destination: endpoint, Protocol: string(target.Protocol), Translated: true}
		if packet.Out != "lo" {
			return packet, true
		}
		packet.In, packet.Out, packet.Source, found = e.podLink(), "", netip.Addr{}, true
	}
	return packet, found
}

// podLink is a link by which packets of pods come in; empty where there is none.
func (e *examination) podLink() string {
	if len(e.network.PodInterfaces) == 0 {
		return ""
	}
	return e.network.PodInterfaces[0]
}

type savedTable struct {
	name  string // the command without -save
	rules string // as iptables-save prints them
	err   error
}

// savedTables are the tables of this name of both kinds of iptables that are in use.
func savedTables(ctx context.Context, family plan.Family, name string) (tables []savedTable) {
	command := "iptables"
	if family == plan.IPv6 {
		command = "ip6tables"
	}
	for _, kind := range []string{"-nft", "-legacy"} {
		legacy := kind == "-legacy"
		if legacy {
			inUse, err := iptables.LegacyTable(family, name)
			if err != nil {
				tables = append(tables, savedTable{command + kind, "", err})
			}
			if !inUse {
				continue
			}
		}
		out, err := program.Output(ctx, program.Timeout, "", command+kind+"-save", "-t", name)
		if errors.Is(err, exec.ErrNotFound) && !legacy {
			continue // its chains are among those of nft
		}
		tables = append(tables, savedTable{command + kind, out, err})
	}
	return tables
}

// nftName is the family, the table and the name of a chain of nftables.
type nftName [3]string

func (n nftName) String() string { return strings.Join(n[:], " ") }

// list is the command that shows the chain.
func (n nftName) list(flags ...string) string {
	return quote.Shell(slices.Concat([]string{"nft"}, flags, []string{"list", "chain"}, n[:])...)
}

func present(command string) bool {
	_, err := exec.LookPath(command)
	return err == nil
}
