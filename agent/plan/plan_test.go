package plan_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestProtocolOf: the numbers are IANA's.
func TestProtocolOf(t *testing.T) {
	for number, want := range map[uint8]plan.Protocol{6: plan.TCP, 17: plan.UDP, 132: plan.SCTP, 0: "", 1: "", 58: ""} {
		if got := plan.ProtocolOf(number); got != want {
			t.Errorf("protocol %d is %q, want %q", number, got, want)
		}
	}
}

// TestFamilies: a family has rules where a frontend is of it, and the settings of one family say nothing of the other.
func TestFamilies(t *testing.T) {
	for _, tt := range []struct {
		name      string
		addresses []string
		want      map[plan.Family]bool
	}{
		{"no service", nil, map[plan.Family]bool{}},
		{"IPv4", []string{"169.254.210.210"}, map[plan.Family]bool{plan.IPv4: true}},
		{"IPv6", []string{"fd00::1"}, map[plan.Family]bool{plan.IPv6: true}},
		{"both", []string{"169.254.210.210", "fd00::1"}, map[plan.Family]bool{plan.IPv4: true, plan.IPv6: true}},
	} {
		var in plan.Input
		for _, address := range tt.addresses {
			in.Services = append(in.Services, plan.Service{Frontend: frontend(address, plan.TCP), WithoutEndpoint: plan.Reject})
		}
		p := plan.Build(in)
		for _, family := range plan.Families() {
			if got := p.Has(family); got != tt.want[family] {
				t.Errorf("%s: rules of %s: %t", tt.name, family, got)
			}
		}
	}
	for _, family := range plan.Families() {
		is4, is6 := family == plan.IPv4, family == plan.IPv6
		if !(plan.Detour{Masquerade4: is4, Masquerade6: is6}).Masquerade(family) || !(plan.Bridge{Unfiltered4: is4, Unfiltered6: is6}).Unfiltered(family) {
			t.Errorf("what is set for %s does not hold for it", family)
		}
		if (plan.Detour{Masquerade4: is6, Masquerade6: is4}).Masquerade(family) || (plan.Bridge{Unfiltered4: is6, Unfiltered6: is4}).Unfiltered(family) {
			t.Errorf("what is set for the other family holds for %s", family)
		}
	}
}

// TestAction: what becomes of packets with endpoints and without.
func TestAction(t *testing.T) {
	until := time.Unix(1000, 0)
	endpoints := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:80")}
	for _, tt := range []struct {
		name      string
		without   plan.Action
		endpoints []netip.AddrPort
		want      plan.Rule
	}{
		{"an endpoint", plan.Reject, endpoints, plan.Rule{Action: plan.Serve, Endpoints: endpoints}},
		{"an endpoint, and hold was", plan.Hold, endpoints, plan.Rule{Action: plan.Serve, Endpoints: endpoints}},
		{"reject", plan.Reject, nil, plan.Rule{Action: plan.Reject}},
		{"hold", plan.Hold, nil, plan.Rule{Action: plan.Hold, HoldUntil: until}},
		{"pass", plan.Pass, nil, plan.Rule{Action: plan.Pass}},
	} {
		p := plan.Build(plan.Input{Services: []plan.Service{{
			Frontend: frontend("169.254.210.210", plan.TCP), WithoutEndpoint: tt.without, HoldUntil: until, Endpoints: tt.endpoints,
		}}})
		tt.want.Frontend = frontend("169.254.210.210", plan.TCP)
		if diff := cmp.Diff([]plan.Rule{tt.want}, p.Rules, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// TestForeign: a port that another agent claims passes where the address is shared, and only there. What both claim is ours.
func TestForeign(t *testing.T) {
	ours, shared := frontend("169.254.210.210", plan.TCP), frontend("169.254.210.210", plan.UDP)
	p := plan.Build(plan.Input{
		Services: []plan.Service{{Frontend: ours, WithoutEndpoint: plan.Reject}},
		Foreign:  []plan.Frontend{frontend("169.254.210.211", plan.TCP), shared, ours, shared},
	})
	if len(p.Rules) != 2 {
		t.Fatalf("rules %+v, want ours and one that passes", p.Rules)
	}
	if rule, found := p.Find(ours); !found || rule.Foreign() || rule.Action != plan.Reject {
		t.Errorf("our rule is %+v", rule)
	}
	if rule, found := p.Find(shared); !found || !rule.Foreign() || rule.Action != plan.Pass {
		t.Errorf("the rule of the other agent's port is %+v", rule)
	}
}

// TestDiff: rules of one plan alone, and rules that differ in both.
func TestDiff(t *testing.T) {
	build := func(endpoints map[string]string) plan.Plan {
		var in plan.Input
		for address, endpoint := range endpoints {
			in.Services = append(in.Services, plan.Service{
				Frontend: frontend(address, plan.TCP), WithoutEndpoint: plan.Reject, Endpoints: []netip.AddrPort{netip.MustParseAddrPort(endpoint)},
			})
		}
		return plan.Build(in)
	}
	p := build(map[string]string{"169.254.210.1": "10.0.0.1:1", "169.254.210.2": "10.0.0.2:1", "169.254.210.3": "10.0.0.3:1", "169.254.210.9": "10.0.0.9:1"})
	q := build(map[string]string{"169.254.210.2": "10.0.0.2:1", "169.254.210.3": "10.0.0.3:2", "169.254.210.5": "10.0.0.5:1"})
	texts := func(rules []plan.Rule) (texts []string) {
		for _, rule := range rules {
			texts = append(texts, rule.Address.String()+" to "+rule.Endpoints[0].String())
		}
		return texts
	}
	ofP, ofQ := plan.Diff(&p, &q)
	if diff := cmp.Diff([]string{"169.254.210.1 to 10.0.0.1:1", "169.254.210.3 to 10.0.0.3:1", "169.254.210.9 to 10.0.0.9:1"}, texts(ofP)); diff != "" {
		t.Errorf("of the first plan (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"169.254.210.3 to 10.0.0.3:2", "169.254.210.5 to 10.0.0.5:1"}, texts(ofQ)); diff != "" {
		t.Errorf("of the second plan (-want +got):\n%s", diff)
	}
}

// TestEqualBridges: plans differ where a bridge does.
func TestEqualBridges(t *testing.T) {
	with := func(edit func(*plan.Bridge)) *plan.Plan {
		bridge := plan.Bridge{Name: "cni0", Unfiltered4: true, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
		edit(&bridge)
		p := plan.Build(plan.Input{})
		p.Bridges = []plan.Bridge{bridge}
		return &p
	}
	same := func(*plan.Bridge) {}
	if !with(same).Equal(with(same)) {
		t.Error("the same bridge twice is not equal")
	}
	for name, edit := range map[string]func(*plan.Bridge){
		"name": func(b *plan.Bridge) { b.Name = "cni1" }, "IPv4": func(b *plan.Bridge) { b.Unfiltered4 = false },
		"IPv6": func(b *plan.Bridge) { b.Unfiltered6 = true }, "prefixes": func(b *plan.Bridge) { b.Prefixes = nil },
	} {
		if with(same).Equal(with(edit)) {
			t.Errorf("another %s of a bridge goes unnoticed", name)
		}
	}
}

// TestClients: services whose clients come by the same interfaces, in whatever order these are written, share their clients.
func TestClients(t *testing.T) {
	var in plan.Input
	for i, interfaces := range [][]string{{"cni0", "cni1"}, {"cni1", "cni0", "cni1"}, {"cbr0"}, {"cni0", "cni1"}} {
		in.Services = append(in.Services, plan.Service{
			Frontend: frontend(fmt.Sprintf("169.254.210.%d", i), plan.TCP), WithoutEndpoint: plan.Reject, HostInterface: interfaces,
		})
	}
	p := plan.Build(in)
	want := []plan.Clients{{Interfaces: []string{"cbr0"}}, {Interfaces: []string{"cni0", "cni1"}}}
	if diff := cmp.Diff(want, p.Clients); diff != "" {
		t.Errorf("clients (-want +got):\n%s", diff)
	}
	for i, want := range []int{1, 1, 0, 1} {
		if p.Rules[i].Clients != want {
			t.Errorf("rule %d has the clients %d, want %d", i, p.Rules[i].Clients, want)
		}
	}
}

// TestCounted: packets are counted in plans of 500 rules, and of no more.
func TestCounted(t *testing.T) {
	for rules, want := range map[int]bool{0: true, 500: true, 501: false} {
		if p := (plan.Plan{Rules: make([]plan.Rule, rules)}); p.Counted() != want {
			t.Errorf("with %d rules, packets are counted: %t", rules, !want)
		}
	}
}
