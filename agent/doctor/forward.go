package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

// procNet is a sysctl below /proc/sys/net of the calling thread's network namespace.
func procNet(path ...string) (int, error) {
	data, err := os.ReadFile(filepath.Join(append([]string{"/proc/sys/net"}, path...)...))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// families are those that the agents have magic IPs of.
func (e *examination) families() (all []plan.Family) {
	for _, family := range plan.Families() {
		if slices.ContainsFunc(e.addresses(), func(a netip.Addr) bool { return plan.FamilyOf(a) == family }) {
			all = append(all, family)
		}
	}
	return all
}

// forwarding sees that the kernel forwards packets that come in by the links of pods (Documentation/networking/ip-sysctl.rst:
// for IPv4 each link has a switch of its own, for IPv6 the one of all links decides).
func (e *examination) forwarding(network node.Network) {
	const check = "forwarding"
	const cost = "packets of pods to an endpoint, and its answers, are dropped in silence"
	looked := 0
	for _, family := range e.families() {
		if family == plan.IPv6 {
			on, err := procNet("ipv6", "conf", "all", "forwarding")
			switch {
			case err != nil:
				e.add(Hidden, check, "IPv6: "+err.Error(), "run this as root in the network namespace of the node")
			case on == 0:
				e.add(Fail, check, "net.ipv6.conf.all.forwarding is 0: IPv6 "+cost, "sysctl net.ipv6.conf.all.forwarding=1, and see what sets it to 0")
			default:
				looked++
			}
			continue
		}
		all, err := procNet("ipv4", "ip_forward")
		switch {
		case err != nil:
			e.add(Hidden, check, "IPv4: "+err.Error(), "run this as root in the network namespace of the node")
			continue
		case all == 0:
			e.add(Fail, check, "net.ipv4.ip_forward is 0: "+cost, "sysctl net.ipv4.ip_forward=1, and see what sets it to 0")
			continue
		}
		var off []string
		for _, link := range network.PodInterfaces {
			on, err := procNet("ipv4", "conf", link, "forwarding")
			switch {
			case errors.Is(err, fs.ErrNotExist): // the link has gone
			case err != nil:
				e.add(Hidden, check, link+": "+err.Error(), "")
			case on == 0:
				off = append(off, link)
			default:
				looked++
			}
		}
		if len(off) > 0 {
			e.add(Fail, check, fmt.Sprintf("forwarding of IPv4 is off on %s: %s", few(off), cost),
				setOf(off[0], "forwarding", 1)+", and see what sets it to 0")
		}
	}
	if looked > 0 && !e.failed(check) {
		e.add(OK, check, "the kernel forwards what comes in by the links of pods", "")
	}
}

// setOf is the command that sets a link's IPv4 sysctl. In the names of sysctl(8) a dot in a link's name is a slash.
func setOf(link, key string, value int) string {
	return quote.Shell("sysctl", fmt.Sprintf("net.ipv4.conf.%s.%s=%d", strings.ReplaceAll(link, ".", "/"), key, value))
}

// failed reports whether a check has failed.
func (e *examination) failed(check string) bool {
	return slices.ContainsFunc(e.found, func(f Finding) bool { return f.Check == check && f.Level == Fail })
}

// filters sees that no filter in the forward hook drops what pods send to the endpoints.
func (e *examination) filters(ctx context.Context) {
	const check = "filters"
	looked := 0
	for _, family := range e.families() {
		packet, ok := e.packetToEndpoint(family)
		if !ok {
			continue
		}
		for _, table := range savedTables(ctx, family, "filter") {
			if table.err != nil {
				e.add(Hidden, check, fmt.Sprintf("%s: %v", table.name, table.err), "run this as root in the network namespace of the node")
				continue
			}
			looked++
			verdict, by := ruleset.ParseIPTables(table.rules, nil).BuiltIn("FORWARD", packet)
			switch verdict {
			case ruleset.Drop:
				e.add(Fail, check, fmt.Sprintf("%s, table filter: a packet of a pod to endpoint %s is dropped by %s", table.name, packet.Destination, by),
					"accept what pods send to each other, for example: "+table.accept(packet))
			case ruleset.Unknown:
				e.add(Warn, check, fmt.Sprintf("%s, table filter: whether a packet of a pod to endpoint %s is accepted depends on what this command does not evaluate; otherwise it is dropped by %s",
					table.name, packet.Destination, by), "see what the probe says")
			}
		}
	}
	found, err := nftForward(ctx)
	switch {
	case err != nil:
		e.add(Hidden, check, err.Error(), "run this as root in the network namespace of the node, with nft")
	default:
		looked++
		e.aheadInNFTables(ctx)
		for _, c := range found {
			if c.drops {
				e.filtersOfOthers = append(e.filtersOfOthers, c.nftName)
			}
			if c.policy != "drop" {
				continue
			}
			level, text := Fail, "no rule of it accepts anything"
			if c.accepts {
				level, text = Warn, "this command does not evaluate its rules"
			}
			e.add(level, check, fmt.Sprintf("nftables chain %s drops what it forwards by its policy, and %s", c.nftName, text), "see that it accepts what pods send to each other: "+c.list())
		}
	}
	e.aheadInIPTables(ctx)
	if looked > 0 && !slices.ContainsFunc(e.found, func(f Finding) bool { return f.Check == check }) {
		e.add(OK, check, "none in the forward hook drops what pods send to the endpoints, and none ahead of the translation what they send to magic IPs", "")
	}
}

// aheadInIPTables sees that no rule of others in the tables raw and mangle stops what pods send to the magic IPs before it is translated. What
// this command cannot evaluate is left to the probe.
func (e *examination) aheadInIPTables(ctx context.Context) {
	for _, family := range e.families() {
		packets := e.packetsToMagicIPs(family)
		for _, name := range []string{"raw", "mangle"} {
			for _, table := range savedTables(ctx, family, name) {
				if table.err != nil {
					e.add(Hidden, "filters", fmt.Sprintf("%s, table %s: %v", table.name, name, table.err), "run this as root in the network namespace of the node")
					continue
				}
				var others strings.Builder // without the rules of agents
				for line := range strings.Lines(table.rules) {
					if !strings.Contains(line, " "+iptables.ChainPrefix) {
						others.WriteString(line)
					}
				}
				parsed := ruleset.ParseIPTables(others.String(), nil)
				for _, packet := range packets {
					if verdict, by := parsed.BuiltIn("PREROUTING", packet); verdict == ruleset.Drop {
						e.stops(packet, table.name+", table "+name, by, fmt.Sprintf("accept it before that rule: %s -t %s -I PREROUTING -d %s -j ACCEPT", table.name, name, packet.Destination.Addr()))
						break // one packet is enough
					}
				}
			}
		}
	}
}

// aheadInNFTables is aheadInIPTables for the other tables of nftables, and names flowtables.
func (e *examination) aheadInNFTables(ctx context.Context) {
	out, err := exec.CommandContext(ctx, "nft", "--json", "--stateless", "list", "ruleset").Output()
	var tables *ruleset.NFTables
	if err == nil {
		tables, err = ruleset.ParseNFTables(out)
	}
	if err != nil {
		e.add(Hidden, "filters", fmt.Sprintf("nft list ruleset: %v", err), "run this as root in the network namespace of the node, with nft")
		return
	}
	if len(tables.Flowtables) > 0 {
		e.add(Warn, "flowtables", few(tables.Flowtables)+": packets of standing flows in it pass no rules, so that a UDP client may stay with a former pod until that is gone",
			"where that matters, keep flows to magic IPs out of it")
	}
	saved := present("iptables-nft-save")
	passed := func(family, table, _ string) bool {
		ofIPTables := (family == "ip" || family == "ip6") && (table == "raw" || table == "mangle")
		return ofIPTables && saved || strings.HasPrefix(table, nftables.TablePrefix)
	}
	var seen []ruleset.NFTRule
	for _, family := range e.families() {
		for _, packet := range e.packetsToMagicIPs(family) {
			for _, rule := range tables.Stopping(packet, nftables.TranslationPriority, passed) {
				if !slices.Contains(seen, rule) {
					seen = append(seen, rule)
					chain := nftName{rule.Family, rule.Table, rule.Chain}
					e.stops(packet, fmt.Sprintf("nftables chain %s", chain), fmt.Sprintf("its rule with handle %d", rule.Handle), "see what it is for: "+chain.list("--handle"))
				}
			}
		}
	}
}

func (e *examination) stops(packet ruleset.Packet, where, by, next string) {
	e.add(Fail, "filters", fmt.Sprintf("%s: a packet of a pod to %s/%s is dropped, or kept from being tracked and so from being translated, by %s", where, packet.Destination, packet.Protocol, by), next)
}

// packetsToMagicIPs are what a pod's first packets to the magic IPs of this family look like in the prerouting hook.
func (e *examination) packetsToMagicIPs(family plan.Family) (all []ruleset.Packet) {
	packet, ok := e.packetToEndpoint(family)
	if !ok && len(e.network.PodInterfaces) > 0 {
		packet.In = e.network.PodInterfaces[0]
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

// packetToEndpoint is what a pod's first packet to an endpoint of this family looks like in the forward hook: from another pod
// of the endpoint's network.
func (e *examination) packetToEndpoint(family plan.Family) (ruleset.Packet, bool) {
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
		if err != nil || link.Attrs().Name == "lo" {
			continue // a process of the node: nothing is forwarded
		}
		return ruleset.Packet{In: link.Attrs().Name, Out: link.Attrs().Name, Source: endpoint.Addr(), Destination: endpoint, Protocol: string(target.Protocol), Translated: true}, true
	}
	return ruleset.Packet{}, false
}

type savedTable struct {
	name  string // the command without -save
	rules string // as iptables-save prints them
	err   error
}

// accept is the command that lets packets such as this one through.
func (t savedTable) accept(p ruleset.Packet) string {
	return quote.Shell(t.name, "-I", "FORWARD", "-i", p.In, "-o", p.Out, "-j", "ACCEPT")
}

// savedTables are the tables of this name of both kinds of iptables that are in use.
func savedTables(ctx context.Context, family plan.Family, name string) (tables []savedTable) {
	command := "iptables"
	if family == plan.IPv6 {
		command = "ip6tables"
	}
	for _, kind := range []string{"-nft", "-legacy"} {
		legacy := kind == "-legacy"
		if legacy && !iptables.LegacyTable(family, name) {
			continue
		}
		out, err := exec.CommandContext(ctx, command+kind+"-save", "-t", name).Output()
		if errors.Is(err, exec.ErrNotFound) && !legacy {
			continue // its chains are among those of nft
		}
		tables = append(tables, savedTable{command + kind, string(out), err})
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

type nftChain struct {
	nftName
	policy string
	// Whether any rule accepts, and whether the chain drops or rejects anything.
	accepts, drops bool
}

// nftForward are the base chains in the forward hook, but those of iptables-nft and of the agents.
func nftForward(ctx context.Context) ([]nftChain, error) {
	out, err := exec.CommandContext(ctx, "nft", "--json", "list", "chains").Output()
	if err != nil {
		return nil, fmt.Errorf("nft list chains: %w", err)
	}
	var listing struct {
		NFTables []struct {
			Chain struct{ Family, Table, Name, Hook, Policy string }
		}
	}
	if err := json.Unmarshal(out, &listing); err != nil {
		return nil, fmt.Errorf("nft list chains: %w", err)
	}
	var found []nftChain
	for _, object := range listing.NFTables {
		c := object.Chain
		ofIPTables := c.Table == "filter" && c.Name == "FORWARD" && (c.Family == "ip" || c.Family == "ip6")
		if c.Hook != "forward" || ofIPTables && present("iptables-nft-save") || strings.HasPrefix(c.Table, nftables.TablePrefix) {
			continue
		}
		name := nftName{c.Family, c.Table, c.Name}
		rules, err := exec.CommandContext(ctx, "nft", "--stateless", "list", "chain", c.Family, c.Table, c.Name).Output()
		if err != nil {
			return nil, fmt.Errorf("nft list chain %s: %w", name, err)
		}
		words := strings.Fields(strings.NewReplacer(";", " ", ",", " ").Replace(string(rules)))
		has := func(verdicts ...string) bool {
			behind := slices.Index(words, "policy") + 2 // the rules come after the policy
			return slices.ContainsFunc(words[min(behind, len(words)):], func(w string) bool { return slices.Contains(verdicts, w) })
		}
		found = append(found, nftChain{name, c.Policy, has("accept", "jump", "goto", "vmap"), c.Policy == "drop" || has("drop", "reject", "jump", "goto", "vmap")})
	}
	return found, nil
}

func present(command string) bool {
	_, err := exec.LookPath(command)
	return err == nil
}

// connections sees that the kernel's connection table has room: where it is full, new connections are dropped.
func (e *examination) connections() {
	const check = "conntrack"
	count, err := procNet("netfilter", "nf_conntrack_count")
	limit, limitErr := procNet("netfilter", "nf_conntrack_max")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.add(Hidden, check, "the kernel shows no connection table here", "")
	case err != nil || limitErr != nil:
		e.add(Hidden, check, errors.Join(err, limitErr).Error(), "run this as root in the network namespace of the node")
	case limit > 0 && count >= limit-limit/1000: // an entry that expires makes room for a moment
		e.add(Fail, check, fmt.Sprintf("the connection table is full (%d of %d entries): new connections are dropped in silence", count, limit),
			"sysctl net.netfilter.nf_conntrack_max, and see what opens them: conntrack -S; conntrack -L")
	case limit > 0 && count >= limit/10*9:
		e.add(Warn, check, fmt.Sprintf("the connection table is nearly full (%d of %d entries): when it is, new connections are dropped", count, limit), "sysctl net.netfilter.nf_conntrack_max")
	default:
		e.add(OK, check, fmt.Sprintf("%d of %d entries", count, limit), "")
	}
}
