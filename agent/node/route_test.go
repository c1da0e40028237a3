package node_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestLocalRoutes: the node is 192.0.2.2 and 2001:db8::2 on its uplink, beside another address of it, a tunnel with a default route in
// another table, and an address of the loopback.
func TestLocalRoutes(t *testing.T) {
	nodetest.Namespace(t, `
		link set lo up
		link add eth0 type ifb
		link set eth0 up
		addr add 203.0.113.1/32 dev lo
		addr add 192.0.2.2/24 dev eth0
		addr add 192.0.2.3/24 dev eth0
		addr add 2001:db8::2/64 dev eth0 nodad
		route add default via 192.0.2.1
		-6 route add default via 2001:db8::1
		link add wg0 type ifb
		link set wg0 up
		addr add 198.51.100.9/32 dev wg0
		route add default dev wg0 table 51820
	`)
	sources := map[plan.Family]netip.Addr{plan.IPv4: netip.MustParseAddr("192.0.2.2"), plan.IPv6: netip.MustParseAddr("2001:db8::2")}
	check := func(when string, want ...node.LocalRoute) {
		t.Helper()
		network := read(t)
		if diff := cmp.Diff(want, network.LocalRoutes, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s: local routes (-want +got):\n%s", when, diff)
		}
		if diff := cmp.Diff(sources, network.Sources, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s: sources (-want +got):\n%s", when, diff)
		}
		all, err := node.Kernel{}.Snapshot()
		rest, errRest := node.Kernel{}.SnapshotWithoutLocalRoutes()
		if all.LocalRoutes = nil; errors.Join(err, errRest) != nil {
			t.Fatal(err, errRest)
		}
		if diff := cmp.Diff(all, rest, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Errorf("%s: without local routes (-all +rest):\n%s", when, diff)
		}
		for _, address := range network.Addresses {
			if address.String() == "169.254.210.210" {
				t.Errorf("%s: %s is taken for an address of the node", when, address)
			}
		}
	}
	var kernel node.Kernel
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	four := node.LocalRoute{Address: netip.MustParseAddr("169.254.210.210"), Source: sources[plan.IPv4]}
	six := node.LocalRoute{Address: netip.MustParseAddr("fd00:a9fe:d2d2::1"), Source: sources[plan.IPv6]}
	check("at first")
	must(kernel.AddLocalRoute(four))
	must(kernel.AddLocalRoute(six))
	check("added", four, six)
	for address, want := range map[string]string{
		"169.254.210.210":   "local 169.254.210.210 dev lo src 192.0.2.2",
		"fd00:a9fe:d2d2::1": "local fd00:a9fe:d2d2::1 from :: dev lo table local proto 109 src 2001:db8::2",
	} {
		if got := strings.Join(strings.Fields(nodetest.Run(t, "ip", "route", "get", address)), " "); !strings.HasPrefix(got, want) {
			t.Errorf("ip route get: %q, want %q", got, want)
		}
	}

	// Another source: there is never no route.
	events := watch(t)
	if !events.next() {
		t.Error("at the start, local routes may have changed")
	}
	four.Source = netip.MustParseAddr("192.0.2.3")
	must(kernel.AddLocalRoute(four))
	if !events.next() {
		t.Error("local routes have changed")
	}
	check("with another source", four, six)

	// Somebody removes one, and takes the address.
	nodetest.IP(t, "route del local 169.254.210.210 dev lo table local")
	events.next()
	check("one removed", six)
	events.stop()
	nodetest.IP(t, "route add local 169.254.210.210 dev lo table local proto static")
	if err := kernel.AddLocalRoute(four); err == nil || !strings.Contains(err.Error(), "another program has made one") {
		t.Errorf("a local route of another program: %v", err)
	}
	check("that of another program is not ours", six)

	for range 2 { // one that is gone is not an error
		must(kernel.RemoveLocalRoute(six))
		must(kernel.RemoveLocalRoute(four))
	}
	check("removed")
	if left := nodetest.Run(t, "ip", "route", "show", "table", "local", "169.254.210.210"); !strings.Contains(left, "proto static") {
		t.Errorf("the route of another program is %q", left)
	}
}
