package nftables

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestCounts: connections are counted where they lead to an endpoint, packets where there is none, over changes of both and over a restoration.
// With too many rules nothing is counted.
func TestCounts(t *testing.T) {
	nodetest.Namespace(t, "link set lo up\naddress add 10.0.0.1/32 dev lo\naddress add 10.0.0.2/32 dev lo\nroute add 169.254.210.0/24 dev lo")
	listener, err := net.Listen("tcp", "0.0.0.0:8080")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	backend := newBackend(t, "counts")
	served, other := frontend("169.254.210.210", plan.TCP, 80), frontend("169.254.210.211", plan.TCP, 80)
	build := func(without plan.Action, endpoints ...string) plan.Plan {
		service := plan.Service{Frontend: served, HostClients: true, WithoutEndpoint: without, HoldUntil: time.Now().Add(time.Hour), Spread: true}
		for _, e := range endpoints {
			service.Endpoints = append(service.Endpoints, netip.MustParseAddrPort(e))
		}
		return plan.Build(plan.Input{HostAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}, Services: []plan.Service{
			service, {Frontend: other, HostClients: true, WithoutEndpoint: plan.Reject},
		}})
	}
	sync := func(p plan.Plan) {
		t.Helper()
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
	}
	connect := func(times int, fails bool) {
		t.Helper()
		for range times {
			connection, err := net.DialTimeout("tcp", "169.254.210.210:80", time.Minute)
			if err == nil {
				_ = connection.Close()
			}
			if (err != nil) != fails {
				t.Fatal(err)
			}
		}
	}
	want := func(opened, refused uint64) {
		t.Helper()
		got, err := backend.Counts()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(map[plan.Frontend]plan.Count{served: {Opened: opened, Refused: refused}, other: {}}, got); diff != "" {
			t.Errorf("counts (-want +got):\n%s", diff)
		}
	}
	if got, err := backend.Counts(); len(got) > 0 || err != nil {
		t.Errorf("without rules: %v, %v", got, err)
	}
	sync(build(plan.Reject, "10.0.0.1:8080"))
	connect(3, false)
	want(3, 0)
	sync(build(plan.Reject, "10.0.0.2:8080"))
	connect(2, false)
	want(5, 0)
	sync(build(plan.Reject))
	connect(4, true)
	want(5, 4)
	sync(build(plan.Reject, "10.0.0.1:8080", "10.0.0.2:8080"))
	connect(2, false)
	want(7, 4)
	sync(build(plan.Reject))
	connect(1, true)
	nodetest.Run(t, "nft", "add element ip magic-ip-counts pod-interfaces { foreign }")
	if differs, err := backend.Verify(t.Context()); len(differs) != 1 || err != nil {
		t.Fatal(differs, err)
	}
	sync(build(plan.Reject, "10.0.0.1:8080"))
	connect(1, false)
	want(8, 5)
	// A change that the kernel refuses replaces nothing, and what is loaded again after it is counted once.
	for _, table := range backend.tables {
		table.elements, table.nft = func([]setChange) error { return unix.EPERM }, noNFT{table.nft}
	}
	refused := build(plan.Reject, "10.0.0.2:8080")
	if err := backend.Sync(t.Context(), &refused); !errors.Is(err, unix.EPERM) {
		t.Fatalf("a change that cannot be made: %v", err)
	}
	want(8, 5)
	for _, table := range backend.tables {
		table.elements, table.nft = nil, table.nft.(noNFT).Interface
	}
	sync(build(plan.Reject, "10.0.0.2:8080"))
	want(8, 5)
	nodetest.Run(t, "nft", "delete table ip magic-ip-counts") // what it has counted is gone with it
	if differs, err := backend.Verify(t.Context()); len(differs) != 1 || err != nil {
		t.Fatal(differs, err)
	}
	sync(build(plan.Reject, "10.0.0.1:8080"))
	connect(1, false)
	want(9, 5)

	many := plan.Input{}
	for i := range 501 {
		many.Services = append(many.Services, plan.Service{Frontend: frontend("169.254.210.210", plan.TCP, uint16(i+1)), WithoutEndpoint: plan.Reject})
	}
	sync(plan.Build(many))
	if got, err := backend.Counts(); got != nil || err != nil {
		t.Errorf("of 501 rules: %d counts, %v", len(got), err)
	}
}
