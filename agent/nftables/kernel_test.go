package nftables

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

func frontend(address string, protocol plan.Protocol, port uint16) plan.Frontend {
	return plan.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: port}
}

// newBackend is one that this kernel can load.
func newBackend(t *testing.T, agentName string) *Backend {
	t.Helper()
	backend, err := New(agentName)
	if err == nil {
		err = backend.Trial(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return backend
}

// TestNFTablesInKernel loads what the scenarios check as text, twice, and sees every kind of damage.
func TestNFTablesInKernel(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "kube-system.a-1")
	input := plan.Input{
		Services: []plan.Service{
			{Frontend: frontend("169.254.210.210", plan.TCP, 80), HostClients: true, ExcludeTarget: true,
				Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:8080")}},
			{Frontend: frontend("169.254.210.210", plan.UDP, 80), WithoutEndpoint: plan.Hold, HostInterface: []string{"cali+", "eth0"}},
			{Frontend: frontend("169.254.210.210", plan.SCTP, 80), WithoutEndpoint: plan.Pass},
			{Frontend: frontend("fd00:a::1", plan.TCP, 80), WithoutEndpoint: plan.Reject,
				Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00::2]:80"), netip.MustParseAddrPort("[fd00::3]:80")}},
		},
		Foreign:       []plan.Frontend{frontend("169.254.210.210", plan.UDP, 53)},
		PodInterfaces: []string{"cni0", "veth0"},
		Bridges:       []plan.Bridge{{Name: "cni0", Unfiltered4: true, Unfiltered6: true}},
	}
	generation := NewGeneration()
	sync := func(in plan.Input) (changed bool) {
		t.Helper()
		before, err := generation()
		if err != nil {
			t.Fatal(err)
		}
		p := plan.Build(in)
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		after, err := generation()
		if err != nil {
			t.Fatal(err)
		}
		return after != before
	}
	verify := func() []string {
		t.Helper()
		differs, err := backend.Verify(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return differs
	}
	if !sync(input) || sync(input) {
		t.Error("want a change by the first sync and none by the second")
	}
	if differs := verify(); len(differs) > 0 {
		t.Errorf("just loaded, and differs: %v", differs)
	}
	input.Services[0].Endpoints = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.3:8080")}
	if !sync(input) || sync(input) {
		t.Error("another endpoint: want a change by the first sync and none by the second")
	}
	const table = "ip magic-ip-kube-system.a-1"
	for _, damage := range []struct{ command, want string }{
		{"add table ip unrelated", ""},
		{"delete table " + table, "the whole table"},
		{"delete element " + table + " endpoints { 169.254.210.210 . tcp . 80 }", "missing from endpoints: 169.254.210.210 . tcp . 80"},
		{"add element " + table + " pod-interfaces { eth1 }", "foreign in pod-interfaces: eth1"},
		{"flush chain " + table + " reject-packet", "missing rule in chain reject-packet"},
		{"add chain " + table + " theirs", "foreign or changed chain theirs"},
		{"delete table ip6 magic-ip-kube-system.a-1", "table ip6 magic-ip-kube-system.a-1: the whole table"},
	} {
		nodetest.Run(t, "nft", damage.command)
		got := strings.Join(verify(), "; ")
		if damage.want == "" && got != "" || !strings.Contains(got, damage.want) {
			t.Errorf("after %q: verify says %q, want %q", damage.command, got, damage.want)
		}
		sync(input)
		if differs := verify(); len(differs) > 0 {
			t.Errorf("after %q and a sync: %v", damage.command, differs)
		}
	}
	if !sync(plan.Input{}) || sync(plan.Input{}) {
		t.Error("no magic IP left: want a change by the first sync and none by the second")
	}
	if got := nodetest.Run(t, "nft", "list", "tables"); strings.Contains(got, "magic-ip") {
		t.Errorf("tables left without a magic IP: %s", got)
	}
	sync(input)
	if err := backend.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := nodetest.Run(t, "nft", "list", "tables"); got != "table ip unrelated\n" {
		t.Errorf("tables left after Remove: %s", got)
	}
}

// TestUpgrade: a table that an older version has loaded, with chains by other names, becomes the wanted one and keeps
// nothing of its own.
func TestUpgrade(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	nodetest.Run(t, "nft", "-f", "testdata/1.0.0.nft")
	p := plan.Build(plan.Input{Services: []plan.Service{
		{Frontend: frontend("169.254.210.1", plan.TCP, 1), HostClients: true, WithoutEndpoint: plan.Reject},
		{Frontend: frontend("fd00:a91c::1", plan.TCP, 1), HostClients: true, Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00:10:244::7]:2")}},
	}})
	list := func() (blocks []string) { // in order: that of chains and sets means nothing
		for _, family := range []string{"ip", "ip6"} {
			listing := nodetest.Run(t, "nft", "--stateless", "list", "table", family, "magic-ip-kube-system.apm")
			for block := range strings.SplitSeq(listing, "\n\n") {
				blocks = append(blocks, family+strings.Trim(block, "\n}"))
			}
		}
		slices.Sort(blocks)
		return blocks
	}
	upgraded := newBackend(t, "kube-system.apm")
	if err := upgraded.Sync(t.Context(), &p); err != nil {
		t.Fatal(err)
	}
	if differs, err := upgraded.Verify(t.Context()); len(differs) > 0 || err != nil {
		t.Errorf("after the upgrade: %v, %v", differs, err)
	}
	got := list()
	nodetest.Run(t, "nft", "flush", "ruleset")
	fresh := newBackend(t, "kube-system.apm")
	if err := fresh.Sync(t.Context(), &p); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(list(), got); diff != "" {
		t.Errorf("tables (-fresh +upgraded):\n%s", diff)
	}
}
