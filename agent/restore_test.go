package agent

import (
	"net/netip"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// TestRestoredEndpoints: until the API has spoken after a restart, the endpoints from before stay, also those
// whose port only the API can name; not those of another target port or another selector.
func TestRestoredEndpoints(t *testing.T) {
	frontend := plan.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: plan.TCP, Port: 80}
	before := published.MagicIP{
		Address: frontend.Address, Port: frontend.Port, Protocol: string(frontend.Protocol), Namespace: "default", Selector: "app=echo",
		Endpoints: []published.Endpoint{{Address: netip.MustParseAddrPort("10.244.1.2:8080"), Pod: "default/echo", UID: "u"}},
	}
	a := &Agent{
		restored:   &published.Agent{MagicIPs: []published.MagicIP{before}},
		restoredOf: map[plan.Frontend][]published.MagicIP{frontend: {before}},
	}
	for _, tt := range []struct {
		name string
		port config.Port
		want int
	}{
		{"the same number", config.Port{Selection: endpoint.Selection{TargetPort: 8080}, SelectorText: "app=echo"}, 1},
		{"a name", config.Port{Selection: endpoint.Selection{TargetPortName: "http"}, SelectorText: "app=echo"}, 1},
		{"another number", config.Port{Selection: endpoint.Selection{TargetPort: 8081}, SelectorText: "app=echo"}, 0},
		{"another selector", config.Port{Selection: endpoint.Selection{TargetPort: 8080}, SelectorText: "app=other"}, 0},
	} {
		tt.port.Frontend, tt.port.Namespace = frontend, "default"
		if got := a.restoredEndpoints(tt.port); len(got) != tt.want {
			t.Errorf("%s: %d endpoints, want %d", tt.name, len(got), tt.want)
		}
	}
}
