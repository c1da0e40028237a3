package plan_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestLocalAddresses: those of which no frontend passes now, each once.
func TestLocalAddresses(t *testing.T) {
	service := func(address string, port uint16, without plan.Action, endpoints ...netip.AddrPort) plan.Service {
		return plan.Service{
			Frontend:        plan.Frontend{Address: netip.MustParseAddr(address), Protocol: plan.TCP, Port: port},
			WithoutEndpoint: without, Endpoints: endpoints,
		}
	}
	endpoint := netip.MustParseAddrPort("10.244.1.2:80")
	in := plan.Input{
		Services: []plan.Service{
			service("169.254.210.1", 1, plan.Reject), service("169.254.210.1", 2, plan.Reject, endpoint),
			service("169.254.210.2", 1, plan.Hold), service("169.254.210.3", 1, plan.Pass), service("169.254.210.3", 2, plan.Reject, endpoint),
			service("169.254.210.4", 1, plan.Pass, endpoint), service("fd00::1", 1, plan.Reject),
		},
		Foreign: []plan.Frontend{
			{Address: netip.MustParseAddr("169.254.210.1"), Protocol: plan.TCP, Port: 3}, {Address: netip.MustParseAddr("169.254.210.9"), Protocol: plan.TCP, Port: 1},
		},
		Detour: plan.Detour{LocalRoutes: true},
	}
	p := plan.Build(in)
	if got := fmt.Sprint(p.LocalAddresses); got != "[169.254.210.1 169.254.210.2 169.254.210.4 fd00::1]" {
		t.Errorf("local addresses %s", got)
	}
	// As a backstop, those are not addresses of the node either that processes of the node, or targets, are to reach elsewhere.
	in.Detour = plan.Detour{Backstop: true}
	in.Services[1].HostClients, in.Services[0].HostClients, in.Services[2].HostClients, in.Services[5].HostClients = true, true, true, true
	in.Services[2].ExcludeTarget = true
	p = plan.Build(in)
	if got := fmt.Sprint(p.LocalAddresses); got != "[169.254.210.1 169.254.210.4]" {
		t.Errorf("local addresses as a backstop %s", got)
	}
	in.Detour = plan.Detour{Masquerade4: true}
	if p = plan.Build(in); p.LocalAddresses != nil {
		t.Errorf("local addresses %s without local routes", p.LocalAddresses)
	}
}

// TestDetourBegins: the replies to pods have begun to bypass netfilter, for IPv4. Flows that are not masqueraded end; those of processes
// of the node go on.
func TestDetourBegins(t *testing.T) {
	before, now := example(true), example(true)
	now.Detour = plan.Detour{LocalRoutes: true, Masquerade4: true}
	change := now.Since(&before)
	if change.Bypassed != (plan.Detour{Masquerade4: true}) || change.Empty() || now.Equal(&before) {
		t.Fatalf("change %+v, want that of IPv4", change)
	}
	if again := now.Since(&now); !again.Empty() {
		t.Errorf("change without one: %+v", again)
	}
	if back := before.Since(&now); !back.Empty() {
		t.Errorf("replies pass netfilter again, and flows change: %+v", back)
	}
	if sum := (plan.Change{Bypassed: plan.Detour{Masquerade6: true}}).Plus(change); sum.Bypassed != (plan.Detour{Masquerade4: true, Masquerade6: true}) {
		t.Errorf("the sum of two changes is %+v", sum)
	}
	for _, tt := range []struct {
		name                    string
		protocol                plan.Protocol
		source, replyTo, server string
		want                    bool
	}{
		{"UDP of a pod", plan.UDP, "10.0.0.9:999", "10.0.0.9", "10.0.0.2:8080", true},
		{"TCP of a pod", plan.TCP, "10.0.0.9:999", "10.0.0.9", "10.0.0.2:8080", true},
		{"masqueraded", plan.TCP, "10.0.0.9:999", "10.0.0.1", "10.0.0.2:8080", false},
		{"the node itself", plan.UDP, "192.0.2.2:999", "192.0.2.2", "10.0.0.2:8080", false},
	} {
		flow := plan.Flow{
			Protocol: tt.protocol, Source: netip.MustParseAddrPort(tt.source), Destination: netip.MustParseAddrPort("169.254.210.210:80"),
			Server: netip.MustParseAddrPort(tt.server), ReplyTo: netip.MustParseAddr(tt.replyTo),
		}
		if got := now.Stale(flow, change); got != tt.want {
			t.Errorf("%s: stale %t, want %t", tt.name, got, tt.want)
		}
	}
}
