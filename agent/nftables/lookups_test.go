package nftables

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// packet is one as rules see it.
type packet struct {
	from, to   netip.Addr
	first      netip.Addr // the destination of its flow's first packet; invalid: to
	state      string
	translated bool
	reply      bool
	in, out    string // links; empty for the node itself
}

var matches = []struct {
	form   *regexp.Regexp
	lookup bool
	met    func(p packet, argument []string) bool
}{
	{form: regexp.MustCompile(`^ct state ([a-z,]+)`), met: func(p packet, a []string) bool { return slices.Contains(strings.Split(a[1], ","), p.state) }},
	{form: regexp.MustCompile(`^ct status & dnat == dnat`), met: func(p packet, _ []string) bool { return p.translated }},
	{form: regexp.MustCompile(`^ct direction (original|reply)`), met: func(p packet, a []string) bool { return p.reply == (a[1] == "reply") }},
	{form: regexp.MustCompile(`^tcp flags & \(syn \| rst\) == 0`), met: func(packet, []string) bool { return true }},
	{form: regexp.MustCompile(`^meta l4proto udp`), met: func(packet, []string) bool { return true }},
	{form: regexp.MustCompile(`^iif != 0`), met: func(p packet, _ []string) bool { return p.in != "" }},
	{form: regexp.MustCompile(`^iifname != "lo"`), met: func(p packet, _ []string) bool { return p.in != "lo" }},
	{form: regexp.MustCompile(`^iifname "([a-z0-9]+)"`), met: func(p packet, a []string) bool { return p.in == a[1] }},
	{form: regexp.MustCompile(`^oifname "([a-z0-9]+)"`), met: func(p packet, a []string) bool { return p.out == a[1] }},
	// No address and no pair of this test is an element of any set.
	{form: regexp.MustCompile(`^(ct original )?ip (s|d)addr @[a-z-]+`), lookup: true, met: func(packet, []string) bool { return false }},
	{form: regexp.MustCompile(`^ip saddr \. (tcp sport|ip daddr) @[a-z-]+`), lookup: true, met: func(packet, []string) bool { return false }},
	{form: regexp.MustCompile(`^(ct original )?ip (s|d)addr ([0-9./]+)`), met: func(p packet, a []string) bool {
		address := p.from
		if a[2] == "d" {
			address = p.to
		}
		if a[1] != "" && p.first.IsValid() {
			address = p.first
		}
		prefix, err := netip.ParsePrefix(a[3])
		if err != nil {
			prefix = netip.PrefixFrom(netip.MustParseAddr(a[3]), 32)
		}
		return prefix.Contains(address)
	}},
}

// lookups walks a packet through a chain and counts.
func lookups(t *testing.T, all []chain, name string, p packet) (count int, ended bool) {
	t.Helper()
	i := slices.IndexFunc(all, func(c chain) bool { return c.name == name })
	if i < 0 {
		t.Fatalf("no chain %s", name)
	}
rules:
	for _, rule := range all[i].rules {
		rest := rule
	next:
		for {
			for _, match := range matches {
				argument := match.form.FindStringSubmatch(rest)
				if argument == nil {
					continue
				}
				if match.lookup {
					count++
				}
				if !match.met(p, argument) {
					continue rules
				}
				rest = strings.TrimSpace(rest[len(argument[0]):])
				continue next
			}
			break
		}
		verdict, to, _ := strings.Cut(rest, " ")
		switch verdict {
		case "accept":
			return count, true
		case "goto", "jump":
			inner, ended := lookups(t, all, to, p)
			count += inner
			if ended || verdict == "goto" {
				return count, ended
			}
		default:
			t.Fatalf("%q of a packet that is not ours: cannot tell what %q does", rule, rest)
		}
	}
	return count, false
}

// TestLookupsOfOthers: a packet that has nothing to do with magic IPs pays for no lookup in any hook unless an address of it has the
// common prefix of the magic IPs; then it pays for one in a hook, and for one of each such address if it is the first of a flow, or if
// another tool has translated it and it leaves the node. A packet of no flow may pay for one more: whether a server sent it.
func TestLookupsOfOthers(t *testing.T) {
	var (
		pod, service, outside = netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("203.0.113.1")
		near                  = netip.MustParseAddr("169.254.169.254")
		packets               []packet
	)
	for _, pair := range [][2]netip.Addr{{pod, outside}, {outside, pod}, {pod, near}, {near, pod}} {
		for _, links := range [][2]string{{"cni0", "eth0"}, {"eth0", "cni0"}, {"cni0", "cni0"}, {"", "eth0"}, {"eth0", ""}, {"", "lo"}} {
			for _, state := range []string{"new", "established", "related", "invalid", "untracked"} {
				for _, reply := range []bool{false, true} {
					for _, translated := range []bool{false, true} {
						p := packet{from: pair[0], to: pair[1], state: state, in: links[0], out: links[1], reply: reply, translated: translated}
						tracked := state != "invalid" && state != "untracked"
						if translated {
							p.first = service
						}
						if !tracked && (reply || translated) || state == "new" && reply {
							continue
						}
						packets = append(packets, p)
					}
				}
			}
		}
	}
	for _, test := range []struct {
		name       string
		addresses  []string
		first, any int // the most of the first packet of a flow, and of one of an established flow
	}{
		{"one magic IP", []string{"169.254.210.210"}, 0, 0},
		{"magic IPs elsewhere", []string{"198.18.0.1", "198.18.0.2"}, 0, 0},
		{"magic IPs around", []string{"169.254.1.1", "169.254.210.210"}, 1, 1},
		{"magic IPs with nothing in common", []string{"1.1.1.1", "169.254.210.210"}, 2, 2},
	} {
		in := plan.Input{Zones: true, PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}}
		for i, address := range test.addresses {
			in.Services = append(in.Services, plan.Service{
				Frontend: frontend(address, plan.UDP, 80), HostClients: true, ExcludeTarget: i == 0, Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 9}), uint16(80+i))},
			})
		}
		p := plan.Build(in)
		all := chains(&p, plan.IPv4)
		most := map[string]int{}
		for _, packet := range packets {
			passes := map[knftables.BaseChainHook]bool{
				knftables.PreroutingHook: packet.in != "", knftables.ForwardHook: packet.in != "" && packet.out != "",
				knftables.InputHook: packet.in != "" && packet.out == "", knftables.OutputHook: packet.in == "", knftables.PostroutingHook: packet.out != "",
			}
			for _, base := range all {
				if !passes[base.hook] || base.kind == knftables.NATType && packet.state != "new" {
					continue
				}
				count, _ := lookups(t, all, base.name, packet)
				most[packet.state] = max(most[packet.state], count)
			}
		}
		if most["new"] != test.first || most["established"] != test.any || max(most["related"], most["invalid"], most["untracked"]) > test.first+1 {
			t.Errorf("%s: %v lookups in a hook, want %d of the first packet of a flow, %d of an established one, and at most one more of others", test.name, most, test.first, test.any)
		}
	}
}
