package plan_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestWhatChanged: of which frontends flows may have become stale, where one setting changes and all others stay. Untranslated are those
// whose clients may have reached something else.
func TestWhatChanged(t *testing.T) {
	address := frontend("169.254.210.210", plan.TCP)
	changed := []plan.Frontend{address}
	other := []netip.AddrPort{netip.MustParseAddrPort("10.0.0.3:8080")}
	for _, tt := range []struct {
		name          string
		before, after func(*plan.Service)
		want          plan.Change
	}{
		{"nothing", nil, nil, plan.Change{}},
		{"the endpoint", nil, func(s *plan.Service) { s.Endpoints = other }, plan.Change{Moved: changed}},
		{"the endpoint goes", nil, func(s *plan.Service) { s.Endpoints = nil }, plan.Change{Moved: changed}},
		{"the endpoint comes", func(s *plan.Service) { s.Endpoints = nil }, nil, plan.Change{Moved: changed}},
		{
			"the endpoint comes, and packets passed", func(s *plan.Service) { s.Endpoints, s.WithoutEndpoint = nil, plan.Pass }, nil,
			plan.Change{Frontends: changed, Untranslated: changed},
		},
		{
			"hold ends", func(s *plan.Service) { s.Endpoints, s.WithoutEndpoint = nil, plan.Hold }, func(s *plan.Service) { s.Endpoints = nil },
			plan.Change{Moved: changed},
		},
		{"processes of the node are clients", nil, func(s *plan.Service) { s.HostClients = true }, plan.Change{Frontends: changed, Untranslated: changed}},
		{"the target is exempt", nil, func(s *plan.Service) { s.ExcludeTarget = true }, plan.Change{Frontends: changed, Untranslated: changed}},
		{
			"when hold ends", func(s *plan.Service) { s.Endpoints, s.WithoutEndpoint = nil, plan.Hold },
			func(s *plan.Service) { s.Endpoints, s.WithoutEndpoint, s.HoldUntil = nil, plan.Hold, time.Unix(1, 0) }, plan.Change{},
		},
	} {
		build := func(edit func(*plan.Service)) plan.Plan {
			service := plan.Service{Frontend: address, WithoutEndpoint: plan.Reject, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:8080")}}
			if edit != nil {
				edit(&service)
			}
			return plan.Build(plan.Input{Services: []plan.Service{service}, Synced: true})
		}
		before, after := build(tt.before), build(tt.after)
		if diff := cmp.Diff(tt.want, after.Since(&before), cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// TestPlus: what is in either change, once and in order; each list by itself, and whichever of two is empty.
func TestPlus(t *testing.T) {
	first, second := frontend("169.254.210.210", plan.TCP), frontend("169.254.210.211", plan.TCP)
	gone, alsoGone := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	of := func(addresses []netip.Addr, frontends ...plan.Frontend) plan.Change {
		return plan.Change{Frontends: frontends, Removed: frontends, Moved: frontends, Untranslated: frontends, Gone: addresses}
	}
	all := of([]netip.Addr{gone, alsoGone}, first, second)
	for name, tt := range map[string]struct{ a, b, want plan.Change }{
		"nothing and something": {plan.Change{}, all, all},
		"something and nothing": {all, plan.Change{}, all},
		"one and the other":     {of([]netip.Addr{gone}, first), of([]netip.Addr{alsoGone}, second), all},
		"in order":              {of([]netip.Addr{alsoGone}, second), of([]netip.Addr{gone}, first), all},
		"both twice":            {all, all, all},
	} {
		if diff := cmp.Diff(tt.want, tt.a.Plus(tt.b), cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestEmptyChange: a change is empty where nothing of it is, and not where two of its lists have something.
func TestEmptyChange(t *testing.T) {
	changes := map[string]plan.Change{
		"frontends":    {Frontends: []plan.Frontend{frontend("169.254.210.210", plan.TCP)}},
		"removed":      {Removed: []plan.Frontend{frontend("169.254.210.211", plan.TCP)}},
		"moved":        {Moved: []plan.Frontend{frontend("169.254.210.210", plan.UDP)}},
		"untranslated": {Untranslated: []plan.Frontend{frontend("169.254.210.210", plan.TCP)}},
		"gone":         {Gone: []netip.Addr{netip.MustParseAddr("10.0.0.2")}},
		"bridges":      {Bridges: []plan.Bridge{{Name: "cni0", Unfiltered4: true}}},
		"bypassed":     {Bypassed: plan.Detour{Masquerade4: true}},
	}
	if !(plan.Change{}).Empty() {
		t.Error("nothing is not empty")
	}
	for one, a := range changes {
		for another, b := range changes {
			if a.Plus(b).Empty() {
				t.Errorf("%s and %s are empty", one, another)
			}
		}
	}
}
