package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// noNFT is an nft that cannot change anything.
type noNFT struct{ knftables.Interface }

func (noNFT) Run(context.Context, *knftables.Transaction) error { return errors.New("nft was started") }

// TestElementsWithoutNFT changes elements of all sets, in both families, and has nft say what is in them.
func TestElementsWithoutNFT(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "kube-system.a-1")
	// Two states that differ in each set, with the same chains: what one adds the other deletes.
	input := func(second bool) plan.Input {
		in := plan.Input{
			Zones:         true,
			PodInterfaces: []string{"veth0"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"veth9"},
			Bridges:       []plan.Bridge{{Name: "cni0", Unfiltered4: true, Unfiltered6: true}},
			HostAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("fd00::3")},
			Sandboxes:     []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		}
		for _, ip := range []struct{ first, magic, other, last, endpoint, another string }{
			{"169.254.210.200", "169.254.210.210", "169.254.210.211", "169.254.210.212", "10.0.0.2:8080", "10.0.0.3:8081"},
			{"fd00:a::", "fd00:a::1", "fd00:a::2", "fd00:a::9", "[fd00::2]:8080", "[fd00::3]:8081"},
		} {
			// The chains say which addresses the magic IPs are between.
			for _, address := range []string{ip.first, ip.last} {
				in.Services = append(in.Services, plan.Service{Frontend: frontend(address, plan.TCP, 80), HostClients: true, WithoutEndpoint: plan.Reject})
			}
			datagrams := plan.Service{Frontend: frontend(ip.first, plan.UDP, 53), HostClients: true, Endpoints: []netip.AddrPort{netip.MustParseAddrPort(ip.endpoint)}}
			if second {
				datagrams.Endpoints[0] = netip.MustParseAddrPort(ip.another)
			}
			in.Services = append(in.Services, datagrams)
			served := plan.Service{Frontend: frontend(ip.magic, plan.TCP, 80), HostClients: true, ExcludeTarget: true, Endpoints: []netip.AddrPort{netip.MustParseAddrPort(ip.endpoint)}}
			held := plan.Service{Frontend: frontend(ip.magic, plan.UDP, 65535), HostClients: false, WithoutEndpoint: plan.Hold}
			if second {
				served.Endpoints[0] = netip.MustParseAddrPort(ip.another)
				held = plan.Service{Frontend: frontend(ip.other, plan.SCTP, 1), HostClients: true, WithoutEndpoint: plan.Pass}
				in.Services = append(in.Services, plan.Service{Frontend: frontend(ip.other, plan.UDP, 1), WithoutEndpoint: plan.Hold, HoldUntil: time.Now().Add(time.Hour)})
			}
			in.Services = append(in.Services, served, held)
		}
		if second {
			in.PodInterfaces = []string{"fifteen-letters", "cni0"}
			in.UnservedPairs = nil
			in.Bridges[0].Name = "docker0"
			in.Sandboxes = nil
		}
		return in
	}
	first, second := plan.Build(input(false)), plan.Build(input(true))
	if err := backend.Sync(t.Context(), &first); err != nil {
		t.Fatal(err)
	}
	for _, table := range backend.tables {
		table.nft = noNFT{table.nft}
		changed := map[string]bool{"spreads": true} // never without its chains
		for _, change := range changes(&first, &second, table.family).sets {
			changed[change.wanted.name] = true
		}
		for _, s := range sets(&second, table.family) {
			if !changed[s.name] {
				t.Errorf("%s: this test does not change the elements of %s", table.family, s.name)
			}
		}
	}
	for i, p := range []*plan.Plan{&second, &first} {
		if err := backend.Sync(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("after change %d: %v, %v", i, differs, err)
		}
		for _, table := range backend.tables {
			rules := render(p, table.family)
			listed, err := table.list(rules.sets)
			if err != nil {
				t.Fatal(err)
			}
			if missing := listed.differs(&rules, table.structure); len(missing) > 0 {
				t.Errorf("after change %d: %v", i, missing)
			}
		}
	}
}

// TestChanges: between any two plans, what is gone and what is added make the elements of the one those of the other, and
// nothing is deleted that is not there, or added that is.
func TestChanges(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	// Few addresses, so that many rules have one in common.
	input := func() plan.Input {
		in := plan.Input{
			PodInterfaces: []string{one("veth0", "veth1")}, Uplinks: []string{one("eth0", "eth1")}, Synced: random.IntN(2) == 0,
			Sandboxes: []netip.Addr{netip.MustParseAddr(one("10.0.0.1", "10.0.0.2"))},
		}
		if random.IntN(4) == 0 {
			in.HostAddresses = []netip.Addr{netip.MustParseAddr("10.0.0.1")}
		}
		seen := map[plan.Frontend]bool{}
		for range random.IntN(6) {
			f := frontend(one("169.254.210.210", "169.254.210.211", "fd00:a::1"), plan.Protocol(one("tcp", "udp")), uint16(1+random.IntN(2)))
			if seen[f] {
				continue
			}
			seen[f] = true
			if random.IntN(8) == 0 {
				in.Foreign = append(in.Foreign, f)
				continue
			}
			service := plan.Service{
				Frontend: f, HostClients: random.IntN(2) == 0, ExcludeTarget: random.IntN(4) == 0,
				WithoutEndpoint: plan.Action(one(string(plan.Reject), string(plan.Hold), string(plan.Pass))),
				HoldUntil:       time.Unix(int64(1+random.IntN(2)), 0),
			}
			for range random.IntN(3) {
				pod := one("10.0.0.1", "10.0.0.2", "10.0.0.3")
				if f.Address.Is6() {
					pod = one("fd00::1", "fd00::2")
				}
				service.Endpoints = append(service.Endpoints, netip.AddrPortFrom(netip.MustParseAddr(pod), uint16(8080+random.IntN(2))))
			}
			in.Services = append(in.Services, service)
		}
		return in
	}
	changed, spread := 0, 0
	for range 2000 {
		before, after := plan.Build(input()), plan.Build(input())
		for _, family := range plan.Families() {
			d := changes(&before, &after, family)
			got := sets(&before, family)
			for _, change := range d.sets {
				changed++
				i := slices.IndexFunc(got, func(s set) bool { return s.name == change.wanted.name })
				for _, key := range change.gone {
					if _, there := got[i].elements[key]; !there {
						t.Fatalf("%s of %s is gone, and was never there\nbefore: %+v\nafter:  %+v", key, got[i].name, before, after)
					}
					delete(got[i].elements, key)
				}
				for _, key := range change.added {
					if _, there := got[i].elements[key]; there && got[i].until == nil {
						t.Fatalf("%s of %s is added, and is there\nbefore: %+v\nafter:  %+v", key, got[i].name, before, after)
					}
					got[i].elements[key] = change.wanted.elements[key]
					if got[i].until != nil {
						got[i].until[key] = change.wanted.until[key]
					}
				}
			}
			want := sets(&after, family)
			for i, s := range got { // timeouts remove what is not wanted
				maps.DeleteFunc(s.elements, func(key, _ string) bool { _, wanted := want[i].elements[key]; return s.until != nil && !wanted })
				maps.DeleteFunc(s.until, func(key string, _ time.Time) bool { _, wanted := want[i].until[key]; return !wanted })
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(set{})); diff != "" {
				t.Fatalf("elements (-want +got):\n%s\nbefore: %+v\nafter:  %+v", diff, before, after)
			}
			gotChains := render(&before, family).chains
			for _, c := range slices.Concat(d.chains, d.gone) {
				if strings.HasPrefix(c.name, "spread-") {
					spread++
				}
				gotChains = slices.DeleteFunc(gotChains, func(other chain) bool { return other.name == c.name })
			}
			gotChains = append(gotChains, d.chains...)
			byName := func(a, b chain) int { return strings.Compare(a.name, b.name) }
			slices.SortFunc(gotChains, byName)
			wantChains := render(&after, family).chains
			slices.SortFunc(wantChains, byName)
			if diff := cmp.Diff(wantChains, gotChains, cmp.AllowUnexported(chain{}), cmpopts.EquateEmpty()); diff != "" {
				t.Fatalf("chains (-want +got):\n%s\nbefore: %+v\nafter:  %+v", diff, before, after)
			}
		}
	}
	if changed < 2000 || spread < 200 {
		t.Errorf("only %d changes of sets and %d of chains: this test shows nothing", changed, spread)
	}
}

// TestManyElementsWithoutNFT: more than one message holds.
func TestManyElementsWithoutNFT(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "many")
	many := func(endpoint string) *plan.Plan {
		var in plan.Input
		for port := range uint16(5000) {
			in.Services = append(in.Services, plan.Service{Frontend: frontend("169.254.210.210", plan.TCP, port+1), Endpoints: []netip.AddrPort{netip.MustParseAddrPort(endpoint)}})
		}
		p := plan.Build(in)
		return &p
	}
	if err := backend.Sync(t.Context(), many("10.0.0.2:8080")); err != nil {
		t.Fatal(err)
	}
	for _, table := range backend.tables {
		table.nft = noNFT{table.nft}
	}
	if err := backend.Sync(t.Context(), many("10.0.0.3:8080")); err != nil {
		t.Fatal(err)
	}
	if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
		t.Errorf("%d differences, %v", len(differs), err)
	}
	if got := strings.Count(nodetest.Run(t, "nft", "list", "map", "ip", "magic-ip-many", "destinations"), "10.0.0.3 . 8080"); got != 5000 {
		t.Errorf("%d elements lead to the new endpoint, want 5000", got)
	}
}

// TestElementsAllOrNone: a transaction that the kernel refuses changes nothing, and the next one is not taken in by
// its answer.
func TestElementsAllOrNone(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	nodetest.Run(t, "nft", "add table ip t; add set ip t s { type ipv4_addr; }; add set ip t v { type inet_service; }; add element ip t s { 10.0.0.1 }")
	var socket elementSocket
	s, v := set{name: "s", key: "ipv4_addr"}, set{name: "v", key: "inet_service"}
	for _, tt := range []struct {
		name    string
		changes []setChange
		want    string
		listed  string
	}{
		{"deleted twice", []setChange{{old: s, wanted: s, gone: []string{"10.0.0.1", "10.0.0.9"}, added: []string{"10.0.0.2"}}}, "no such file or directory", "10.0.0.1"},
		{"no such set", []setChange{{old: s, wanted: s, added: []string{"10.0.0.2"}}, {old: set{}, wanted: set{name: "t", key: "ipv4_addr"}, added: []string{"10.0.0.2"}}}, "no such file or directory", "10.0.0.1"},
		{"no address", []setChange{{old: s, wanted: s, added: []string{"10.0.0"}}}, `"10.0.0" as ipv4_addr`, "10.0.0.1"},
		{"other parts", []setChange{{old: s, wanted: s, added: []string{"10.0.0.1 . 80"}}}, "is no ipv4_addr", "10.0.0.1"},
		{"both", []setChange{{old: s, wanted: s, gone: []string{"10.0.0.1"}, added: []string{"10.0.0.2"}}, {old: v, wanted: v, added: []string{"80"}}}, "", "10.0.0.2 80"},
	} {
		err := socket.apply(plan.IPv4, "t", tt.changes)
		if tt.want == "" && err != nil || tt.want != "" && !strings.Contains(fmt.Sprint(err), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
		var elements []string
		for line := range strings.Lines(nodetest.Run(t, "nft", "--numeric", "list", "table", "ip", "t")) {
			if _, rest, found := strings.Cut(line, "elements = { "); found {
				elements = append(elements, strings.TrimSuffix(strings.TrimSpace(rest), " }"))
			}
		}
		if got := strings.Join(elements, " "); got != tt.listed {
			t.Errorf("%s: the sets hold %q, want %q", tt.name, got, tt.listed)
		}
	}
}
