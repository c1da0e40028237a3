package conntrack

import (
	"net/netip"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

func TestLookup(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	if err := (Table{}).Zones(); err != nil {
		t.Errorf("zones: %v", err)
	}
	addFlows(t)
	for _, test := range []struct {
		protocol            plan.Protocol
		source, destination string
		found               bool
		server              string
		replied, halfOpen   bool
		zone                uint16
	}{
		{plan.UDP, "10.0.0.9:1002", "169.254.210.210:80", true, "10.0.0.3:8080", false, false, 0},
		{plan.TCP, "10.0.0.9:1008", "169.254.210.210:80", true, "10.0.0.3:8080", true, false, 0},
		{plan.TCP, "10.0.0.9:1012", "169.254.210.210:80", true, "10.0.0.3:8080", false, true, 0},
		{plan.UDP, "[fd00::9]:2003", "[fd00:a::1]:80", true, "[fd00:a::1]:80", false, false, 0},
		{plan.UDP, "10.0.0.9:1015", "169.254.210.210:80", true, "10.0.0.2:8080", false, false, 2},
		{plan.UDP, "10.0.0.9:1015", "169.254.210.210:80", false, "", false, false, 0},
		{plan.UDP, "[fd00::9]:2011", "[fd00:a::1]:80", true, "[fd00::3]:8080", false, false, 3},
		{plan.TCP, "10.0.0.9:1002", "169.254.210.210:80", false, "", false, false, 0},
		{plan.TCP, "[fd00::9]:9", "[fd00:a::1]:80", false, "", false, false, 0},
	} {
		source, destination := netip.MustParseAddrPort(test.source), netip.MustParseAddrPort(test.destination)
		e, found, err := Table{}.Lookup(test.protocol, source, destination, test.zone)
		if err != nil || found != test.found {
			t.Errorf("%+v: found %t, %v", test, found, err)
		}
		if !found {
			continue
		}
		if e.Source != source || e.Destination != destination || e.ReplyTo != source || e.Server.String() != test.server || e.Replied != test.replied || e.HalfOpen != test.halfOpen {
			t.Errorf("%+v: got %+v", test, e)
		}
		for range 2 { // the second time it is gone
			if err := (Table{}).Delete(e); err != nil {
				t.Error(err)
			}
		}
		if _, found, err := (Table{}).Lookup(test.protocol, source, destination, test.zone); found || err != nil {
			t.Errorf("%+v: still there, %v", test, err)
		}
	}
}
