package nftables

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestInspect: whatever is emptied is named, by a plan of which status has the parts; nothing is where nothing is.
func TestInspect(t *testing.T) {
	services := []plan.Service{
		{Frontend: frontend("169.254.210.210", plan.TCP, 80), HostClients: true, ExcludeTarget: true, WithoutEndpoint: plan.Reject,
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.244.1.5:8080")}},
		{Frontend: frontend("169.254.210.210", plan.UDP, 80), HostInterface: []string{"cali+", "eth1"}, WithoutEndpoint: plan.Hold},
		{Frontend: frontend("169.254.210.210", plan.SCTP, 80), HostClients: true, WithoutEndpoint: plan.Pass},
		{Frontend: frontend("169.254.210.211", plan.TCP, 80), HostClients: true, WithoutEndpoint: plan.Reject,
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.244.1.5:8080"), netip.MustParseAddrPort("192.0.2.2:8080")}},
	}
	noHostClients := slices.Clone(services)
	for i := range noHostClients {
		noHostClients[i].HostClients = false
	}
	const table = "ip magic-ip-a "
	for name, test := range map[string]struct {
		services []plan.Service
		damage   string
		want     []string
	}{
		"intact":                 {services, "list ruleset", nil},
		"intact, no host client": {noHostClients, "list ruleset", nil},
		"a chain of a hook":      {services, "flush chain " + table + "nat-prerouting", []string{"chain nat-prerouting has 0 rules instead of 1"}},
		"translate":              {services, "flush chain " + table + "translate", []string{"chain translate has no rules"}},
		"from-network":           {services, "flush chain " + table + "from-network", []string{"chain from-network has no rules"}},
		"reject-packet":          {services, "flush chain " + table + "reject-packet", []string{"chain reject-packet has no rules"}},
		"hold":                   {services, "flush chain " + table + "hold", []string{"chain hold has no rules"}},
		"clients":                {services, "flush chain " + table + "serve-1", []string{"chain serve-1 has no rules"}},
		"the guard":              {services, "flush chain " + table + "forwarded", []string{"chain forwarded has no rules"}},
		"spread":                 {services, "flush chain " + table + "spread-169.254.210.211-tcp-80", []string{"chain spread-169.254.210.211-tcp-80 has no rules"}},
		"actions": {services, "flush map " + table + "actions", []string{
			"missing from actions: 169.254.210.210 . sctp . 80, 169.254.210.210 . tcp . 80, 169.254.210.210 . udp . 80 and 1 more"}},
		"an action":      {services, "delete element " + table + "host-actions { 169.254.210.210 . udp . 80 }", []string{"missing from host-actions: 169.254.210.210 . udp . 80"}},
		"pod-interfaces": {services, "flush set " + table + "pod-interfaces", []string{"missing from pod-interfaces: cni0"}},
		"unserved-pairs": {services, "flush set " + table + "unserved-pairs", []string{"missing from unserved-pairs: eth0"}},
		"host-addresses": {services, "flush set " + table + "host-addresses", []string{"missing from host-addresses: 169.254.210.210, 169.254.210.211"}},
		"hairpins":       {services, "flush set " + table + "hairpins", []string{"missing from hairpins: 10.244.1.5 . 10.244.1.5"}},
		"servers":        {services, "flush set " + table + "servers", []string{"missing from servers: 10.244.1.5"}},
		"held":           {services, "flush set " + table + "held", nil}, // the kernel removes what is in it
		"destinations":   {services, "flush map " + table + "destinations", []string{"missing from destinations: 169.254.210.210 . tcp . 80"}},
	} {
		t.Run(name, func(t *testing.T) {
			nodetest.Namespace(t, "link set lo up")
			in := plan.Input{
				Services: test.services, Foreign: []plan.Frontend{frontend("169.254.210.210", plan.UDP, 53)},
				PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"veth9"}, Bridges: []plan.Bridge{{Name: "cni0", Unfiltered4: true}},
				HostAddresses: []netip.Addr{netip.MustParseAddr("192.0.2.2")}, StrictTCP: true, Zones: true, Detour: plan.Detour{Masquerade4: true},
			}
			p := plan.Build(in)
			if err := newBackend(t, "a").Sync(t.Context(), &p); err != nil {
				t.Fatal(err)
			}
			nodetest.Run(t, "nft", test.damage)
			var want []string
			for _, w := range test.want {
				want = append(want, "table ip magic-ip-a: "+w)
			}
			known := plan.Build(plan.Input{Services: test.services, PodInterfaces: in.PodInterfaces, Uplinks: in.Uplinks, HostAddresses: in.HostAddresses})
			differs, err := Inspect("a", &known)
			if diff := cmp.Diff(want, differs); err != nil || diff != "" {
				t.Errorf("error %v (-want +got):\n%s", err, diff)
			}
		})
	}
}
