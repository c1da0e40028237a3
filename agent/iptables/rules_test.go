package iptables

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

var update = flag.Bool("update", false, "write the golden files anew")

func frontend(address string, protocol plan.Protocol, port uint16) plan.Frontend {
	return plan.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: port}
}

func addrPorts(texts ...string) []netip.AddrPort {
	var all []netip.AddrPort
	for _, text := range texts {
		all = append(all, netip.MustParseAddrPort(text))
	}
	return all
}

// cases are plans that between them use every rule there is. Magic IPs are in 169.254.210.0/24 and
// fd00:a91c::/64, pods in 10.244.1.0/24 and fd00:10:244::/64.
func cases() map[string]plan.Input {
	many := plan.Input{Zones: true, PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}}
	for i := range 20 {
		many.Services = append(many.Services, plan.Service{
			Frontend:  plan.Frontend{Address: netip.AddrFrom4([4]byte{169, 254, 210, byte(10 * i)}), Protocol: plan.UDP, Port: 8125},
			Endpoints: addrPorts("10.244.1.7:8125"), HostClients: i%2 == 0,
		})
	}
	return map[string]plan.Input{
		"one": {
			Services: []plan.Service{{
				Frontend: frontend("169.254.210.210", plan.TCP, 9200), HostClients: true,
				Endpoints: addrPorts("10.244.1.7:8200"),
			}},
			PodInterfaces: []string{"cni0", "veth1"},
		},
		"every-policy": {
			Services: []plan.Service{
				{Frontend: frontend("169.254.210.1", plan.TCP, 1), HostClients: true, WithoutEndpoint: plan.Reject},
				{Frontend: frontend("169.254.210.1", plan.UDP, 2), HostClients: true, WithoutEndpoint: plan.Hold},
				{Frontend: frontend("169.254.210.1", plan.SCTP, 3), HostClients: true, WithoutEndpoint: plan.Pass},
				{Frontend: frontend("169.254.210.2", plan.TCP, 1), ExcludeTarget: true, Endpoints: addrPorts("10.244.1.7:1")},
				{Frontend: frontend("169.254.210.3", plan.TCP, 1), HostClients: true, HostInterface: []string{"cali+", "cni0"},
					ExcludeTarget: true, Endpoints: addrPorts("10.244.1.7:1")},
				{Frontend: frontend("169.254.210.3", plan.UDP, 2), HostClients: true, HostInterface: []string{"cali+", "cni0"}, WithoutEndpoint: plan.Hold},
				{Frontend: frontend("169.254.210.3", plan.UDP, 3), ExcludeTarget: true, Endpoints: addrPorts("10.244.1.7:1")},
				{Frontend: frontend("169.254.210.4", plan.TCP, 1), HostClients: true, Endpoints: addrPorts("10.244.1.7:1", "10.244.1.8:1", "10.244.1.9:2")},
				{Frontend: frontend("fd00:a91c::1", plan.TCP, 1), HostClients: true, Endpoints: addrPorts("[fd00:10:244::7]:2")},
			},
			Foreign:       []plan.Frontend{frontend("169.254.210.1", plan.TCP, 4), frontend("169.254.210.200", plan.TCP, 4)},
			PodInterfaces: []string{"cni0", "veth1"},
			Uplinks:       []string{"eth0", "wan0"},
			StrictTCP:     true,
			Zones:         true,
			HostAddresses: []netip.Addr{netip.MustParseAddr("10.244.1.9")},
			Bridges:       []plan.Bridge{{Name: "cni0", Unfiltered4: true, Unfiltered6: true}, {Name: "docker0", Unfiltered4: true}},
		},
		"many": many,
		"detour": {
			Services: []plan.Service{
				{Frontend: frontend("169.254.210.210", plan.TCP, 9200), HostClients: true, Endpoints: addrPorts("10.244.1.7:8200")},
				{Frontend: frontend("fd00:a91c::1", plan.TCP, 1), HostClients: true, Endpoints: addrPorts("[fd00:10:244::7]:2")},
			},
			PodInterfaces: []string{"lxc1"},
			Detour:        plan.Detour{LocalRoutes: true, Masquerade4: true},
		},
	}
}

// everything is the input of iptables-restore for an empty table.
func everything(p *plan.Plan, family plan.Family, agentName string) string {
	var all strings.Builder
	for _, t := range render(p, family, agentName) {
		if len(t.jumps) > 0 {
			all.WriteString(t.write(&listing{}, Prefix(agentName), nil))
		}
	}
	return all.String()
}

func TestRender(t *testing.T) {
	for name, input := range cases() {
		t.Run(name, func(t *testing.T) {
			p := plan.Build(input)
			got := everything(&p, plan.IPv4, "kube-system.apm")
			if name == "every-policy" || name == "detour" { // of which IPv6 is not masqueraded
				got += everything(&p, plan.IPv6, "kube-system.apm")
			}
			golden := filepath.Join("testdata", name+".rules")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
			for _, table := range render(&p, plan.IPv4, strings.Repeat("a", 117)) {
				for _, c := range table.chains {
					if len(c.name) > 28 {
						t.Errorf("chain %s has %d characters, allowed: 28", c.name, len(c.name))
					}
				}
			}
		})
	}
}

// TestOrder: nat comes before filter where frontends gain an endpoint and none loses its own, and first of all where the same have one.
func TestOrder(t *testing.T) {
	a, b := frontend("169.254.210.210", plan.TCP, 80), frontend("169.254.210.211", plan.TCP, 80)
	natLater, natBeforeFilter, natFirst := []int{0, 1, 2, 3}, []int{0, 2, 1, 3}, []int{2, 3, 0, 1}
	f := &chains{family: plan.IPv4}
	for i, step := range []struct {
		served []plan.Frontend
		want   []int
	}{
		{[]plan.Frontend{a}, natBeforeFilter}, {[]plan.Frontend{a}, natFirst}, {[]plan.Frontend{a, b}, natBeforeFilter}, {[]plan.Frontend{b}, natLater},
		{[]plan.Frontend{a}, natLater}, {nil, natLater}, {[]plan.Frontend{b}, natBeforeFilter}, {[]plan.Frontend{frontend("fd00::1", plan.TCP, 80), b}, natFirst},
	} {
		var in plan.Input
		for _, s := range step.served {
			in.Services = append(in.Services, plan.Service{Frontend: s, Endpoints: addrPorts(map[bool]string{true: "[fd00::2]:80", false: "10.244.1.7:80"}[s.Address.Is6()])})
		}
		p := plan.Build(in)
		served := f.endpointsOf(&p)
		if diff := cmp.Diff(step.want, f.order(served)); diff != "" {
			t.Errorf("step %d (-want +got):\n%s", i, diff)
		}
		f.served = served
	}
}

// TestAdditionsDeleteNothing: a rule that is made after one was deleted waits for a grace period of the kernel.
func TestAdditionsDeleteNothing(t *testing.T) {
	for from, before := range cases() {
		for to, after := range cases() {
			b, a := plan.Build(before), plan.Build(after)
			olds, news := render(&b, plan.IPv4, testAgent), render(&a, plan.IPv4, testAgent)
			for i, now := range news {
				additions, deletions := now.changes(olds[i])
				for line := range strings.Lines(additions) {
					if !strings.HasPrefix(line, "-A ") && !strings.HasPrefix(line, "-I ") && !strings.HasPrefix(line, ":") {
						t.Errorf("from %s to %s: an addition: %s", from, to, line)
					}
					if name, declared := strings.CutPrefix(line, ":"); declared && slices.ContainsFunc(olds[i].chains, func(c chain) bool { return c.name == strings.Fields(name)[0] }) {
						t.Errorf("from %s to %s: a chain is emptied: %s", from, to, line)
					}
				}
				for line := range strings.Lines(deletions) {
					if !strings.HasPrefix(line, "-D ") && !strings.HasPrefix(line, "-F ") && !strings.HasPrefix(line, "-X ") {
						t.Errorf("from %s to %s: a deletion: %s", from, to, line)
					}
				}
			}
		}
	}
}

// TestDispatchFindsEveryAddress walks the tree of chains as the kernel does.
func TestDispatchFindsEveryAddress(t *testing.T) {
	for _, family := range plan.Families() {
		var addresses []netip.Addr
		for i := range 3000 {
			if family == plan.IPv4 {
				addresses = append(addresses, netip.AddrFrom4([4]byte{10, byte(i % 7), byte(i / 256), byte(i)}))
			} else {
				addresses = append(addresses, netip.AddrFrom16([16]byte{0: 0xfd, 7: byte(i % 7), 14: byte(i / 256), 15: byte(i)}))
			}
		}
		var in plan.Input
		for _, address := range addresses {
			in.Services = append(in.Services, plan.Service{Frontend: plan.Frontend{Address: address, Protocol: plan.TCP, Port: 1}, WithoutEndpoint: plan.Reject})
		}
		p := plan.Build(in)
		table := render(&p, family, "a")[2]
		chains := map[string][]string{}
		for _, c := range table.chains {
			if _, twice := chains[c.name]; twice {
				t.Fatalf("two chains called %s", c.name)
			}
			chains[c.name] = c.rules
		}
		most := 0
		for _, address := range addresses {
			met, found := 0, false
			for chain := table.jumps[0].chain; chain != "" && !found; {
				rules := chains[chain]
				chain = ""
				for _, rule := range rules {
					met++
					words := strings.Fields(rule)
					if !netip.MustParsePrefix(words[1]).Contains(address) {
						continue
					}
					if next := target(rule); next == "ACCEPT" {
						found = true
					} else {
						chain = next
					}
					break
				}
			}
			if !found {
				t.Fatalf("%s leads nowhere", address)
			}
			most = max(most, met)
		}
		if most > 64 {
			t.Errorf("up to %d rules for a packet, want few", most)
		}
	}
}

// TestNothingFollowsDispatch: a goto does not come back to the chain that it is in, so a rule behind those of a dispatch is met by few
// packets or none. Each list of addresses is long enough to be dispatched.
func TestNothingFollowsDispatch(t *testing.T) {
	for _, family := range plan.Families() {
		addr := func(network, n int) netip.Addr {
			if family == plan.IPv4 {
				return netip.AddrFrom4([4]byte{10, byte(network), 0, byte(n)})
			}
			return netip.AddrFrom16([16]byte{0: 0xfd, 1: byte(network), 15: byte(n)})
		}
		in := plan.Input{
			Zones: true, PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}, Detour: plan.Detour{Masquerade4: true, Masquerade6: true},
			Bridges: []plan.Bridge{{Name: "cni0", Unfiltered4: true, Unfiltered6: true}},
		}
		for i := range mostInChain + 1 {
			for _, protocol := range []plan.Protocol{plan.TCP, plan.UDP} {
				in.Services = append(in.Services, plan.Service{
					Frontend:  plan.Frontend{Address: addr(1, i), Protocol: protocol, Port: 1},
					Endpoints: []netip.AddrPort{netip.AddrPortFrom(addr(2, i), 1)}, HostClients: true,
				})
			}
		}
		p := plan.Build(in)
		p.Inherit(nil)
		var dispatching []string
		for _, table := range render(&p, family, "a") {
			for _, c := range table.chains {
				dispatched := false
				for _, rule := range c.rules {
					leads := strings.Contains(rule, " -g "+strings.Split(c.name, ".")[0]+".")
					if dispatched && !leads {
						t.Errorf("%s, table %s, chain %s: after a dispatch: %s", family, table.name, c.name, rule)
					}
					dispatched = dispatched || leads
				}
				if dispatched {
					dispatching = append(dispatching, table.name+" "+strings.TrimPrefix(c.name, Prefix("a")))
				}
			}
		}
		want := []string{
			"mangle pre", "mangle src", "mangle srv", "mangle answer", "mangle sent", "filter fwd", "filter out", "filter bridge", "filter leave",
			"nat dnat", "nat local", "nat detour", "nat snat", "raw zone", "raw zoneo",
		}
		slices.Sort(want)
		slices.Sort(dispatching)
		if diff := cmp.Diff(want, dispatching); diff != "" {
			t.Errorf("%s: chains that dispatch (-want +got):\n%s", family, diff)
		}
	}
}

// TestWriteMendsJumps: whatever is in the built-in chains, afterwards there is one jump.
func TestWriteMendsJumps(t *testing.T) {
	table := table{name: "nat", jumps: []jump{{"PREROUTING", "MIP-1-dnat", "magic IPs of a"}}, chains: []chain{{"MIP-1-dnat", []string{"-j ACCEPT"}}}}
	const ours = "-A PREROUTING -m comment --comment \"magic IPs of a\" -j MIP-1-dnat\n"
	const insert = "-I PREROUTING -m comment --comment \"magic IPs of a\" -j MIP-1-dnat\n"
	del := strings.Replace(ours, "-A", "-D", 1)
	for name, c := range map[string]struct {
		there, want string
		stay        bool
	}{
		"none":                                  {there: "", want: insert},
		"right":                                 {there: ours + "-A PREROUTING -j OTHER\n", want: ""},
		"twice":                                 {there: ours + ours, want: del + del + insert},
		"behind another":                        {there: "-A PREROUTING -j OTHER\n" + ours, want: del + insert},
		"behind another, moved today":           {there: "-A PREROUTING -j OTHER\n" + ours, want: "", stay: true},
		"behind another agent":                  {there: "-A PREROUTING -j MIP-2-dnat\n" + ours, want: ""},
		"conditional":                           {there: "-A PREROUTING -p tcp -j MIP-1-dnat\n", want: "-D PREROUTING -p tcp -j MIP-1-dnat\n" + insert},
		"another agent whose name begins alike": {there: ours + "-A PREROUTING -j MIP-12-dnat\n", want: ""},
	} {
		t.Run(name, func(t *testing.T) {
			there, err := parseListing("*nat\n:PREROUTING ACCEPT [0:0]\n"+c.there+"COMMIT\n", "MIP-1-", []string{"nat"})
			if err != nil {
				t.Fatal(err)
			}
			want := "*nat\n:MIP-1-dnat - [0:0]\n" + c.want + "-A MIP-1-dnat -j ACCEPT\nCOMMIT\n"
			if diff := cmp.Diff(want, table.write(there["nat"], "MIP-1-", func(string) bool { return !c.stay })); diff != "" {
				t.Errorf("restore (-want +got):\n%s", diff)
			}
		})
	}
}

// TestListing: each table has its own chains, one that is not shown is empty, and what was not asked for does not matter.
func TestListing(t *testing.T) {
	const saved = `# Generated by iptables-nft-save
# Table ` + "`security'" + ` is incompatible, use 'nft' tool.
*raw
:PREROUTING ACCEPT [0:0]
:MIP-1-a - [0:0]
-A MIP-1-a -j ACCEPT
COMMIT
*mangle
:MIP-1-b - [0:0]
-A PREROUTING -j MIP-1-b
-A MIP-1-a -j DROP
COMMIT
*nat
:MIP-1-a - [0:0]
-A MIP-1-a -j RETURN
COMMIT
`
	listings, err := parseListing(saved, "MIP-1-", []string{"nat", "mangle", "filter"})
	want := map[string]*listing{
		"nat":    {chains: []chain{{"MIP-1-a", []string{"-j RETURN"}}}, others: map[string][]string{}},
		"mangle": {chains: []chain{{name: "MIP-1-b"}}, others: map[string][]string{"PREROUTING": {"-A PREROUTING -j MIP-1-b"}, "MIP-1-a": {"-A MIP-1-a -j DROP"}}},
		"filter": {others: map[string][]string{}},
	}
	if diff := cmp.Diff(want, listings, cmp.AllowUnexported(listing{}, chain{})); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestListingRefusesTableEditedWithNft(t *testing.T) {
	if _, err := parseListing("# Table `nat' is incompatible, use 'nft' tool.\n", "MIP-1-", []string{"nat"}); err == nil {
		t.Error("no error")
	}
}
