package nftables

import (
	"context"
	"errors"
	"net/netip"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

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
		_, err = backend.Trial(t.Context())
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
		{"delete element " + table + " destinations { 169.254.210.210 . tcp . 80 }", "missing from destinations: 169.254.210.210 . tcp . 80"},
		{"add element " + table + " pod-interfaces { eth1 }", "foreign in pod-interfaces: eth1"},
		{"flush chain " + table + " reject-packet", "missing rules reject-packet"},
		{"add chain " + table + " theirs", "foreign chain theirs"},
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
	for _, detour := range []plan.Detour{{LocalRoutes: true, Masquerade4: true}, {}} {
		input.Detour = detour
		if !sync(input) || sync(input) {
			t.Errorf("%+v: want a change by the first sync and none by the second", detour)
		}
		for _, family := range plan.Families() {
			chain := nodetest.Run(t, "nft", "list", "chain", string(family), "magic-ip-kube-system.a-1", "masquerade-replies")
			if got := strings.Contains(chain, "fib saddr type != local masquerade"); got != detour.Masquerade(family) {
				t.Errorf("%+v: family %s: %s", detour, family, chain)
			}
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
			listing = regexp.MustCompile(`\n\t*comment ".*"`).ReplaceAllString(listing, "") // objects keep theirs
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

// TestSetOfAnotherType: a table with a set of the same name and another type is made anew, in one transaction.
func TestSetOfAnotherType(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	nodetest.Run(t, "nft", "add table ip magic-ip-a; add set ip magic-ip-a addresses { type ifname; elements = { eth0 }; }; add chain ip magic-ip-a old")
	backend := newBackend(t, "a")
	if err := backend.Sync(t.Context(), oneEndpoint("10.0.0.2:1")); err != nil {
		t.Fatal(err)
	}
	nodetest.Run(t, "nft", "add table ip unrelated")
	if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
		t.Errorf("%v, %v", differs, err)
	}
}

// TestHoldEndsInKernel: the kernel removes what is held when its time is over, with nobody there; another hold of the same
// frontend begins anew, whether the last one is over or not.
func TestHoldEndsInKernel(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "a")
	sync := func(until time.Time) {
		t.Helper()
		p := plan.Build(plan.Input{Services: []plan.Service{
			{Frontend: frontend("169.254.210.210", plan.TCP, 80), HostClients: true, WithoutEndpoint: plan.Hold, HoldUntil: until},
		}})
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
	}
	expires := func() time.Duration { // 0: not there
		t.Helper()
		_, rest, there := strings.Cut(nodetest.Run(t, "nft", "list", "set", "ip", "magic-ip-a", "held"), " expires ")
		if !there {
			return 0
		}
		expires, err := time.ParseDuration(strings.Fields(rest)[0])
		if err != nil {
			t.Fatal(err)
		}
		return expires
	}
	intact := func() {
		t.Helper()
		nodetest.Run(t, "nft", "add", "table", "ip", "unrelated") // so that verify has to list
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("verify: %v, %v", differs, err)
		}
		nodetest.Run(t, "nft", "delete", "table", "ip", "unrelated")
	}
	const long, short = time.Hour, 300 * time.Millisecond
	sync(time.Now().Add(long)) // by nft, with the whole table
	if got := expires(); got < long/2 {
		t.Errorf("the hold ends in %v, want an hour", got)
	}
	intact()
	sync(time.Now().Add(short)) // by netlink from here on
	for expires() > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	intact()
	sync(time.Now().Add(2 * long))
	if got := expires(); got < long {
		t.Errorf("the next hold ends in %v, want two hours", got)
	}
	sync(time.Now().Add(4 * long))
	if got := expires(); got < 3*long {
		t.Errorf("the hold was prolonged to four hours, and ends in %v", got)
	}
	intact()
	sync(time.Now().Add(-time.Second)) // it is over before it is known: nothing is added
	nodetest.Run(t, "nft", "flush", "set", "ip", "magic-ip-a", "held")
	intact()
}

// TestSpreadIsOneChain: another endpoint of a frontend with several changes that frontend's chain, and loads nothing else.
func TestSpreadIsOneChain(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "a")
	endpoints := func(ports ...int) (all []netip.AddrPort) {
		for _, port := range ports {
			all = append(all, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 2}), uint16(port)))
		}
		return all
	}
	in := plan.Input{}
	for i := range 100 {
		in.Services = append(in.Services, plan.Service{Frontend: frontend("169.254.210.210", plan.TCP, uint16(1000+i)), Endpoints: endpoints(1, 2)})
	}
	events := func(f func()) (count int) { // messages of the kernel: one for each object that changed
		t.Helper()
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err == nil {
			defer func() { _ = conn.Close() }()
			err = errors.Join(conn.SetReadBuffer(1<<24), conn.JoinGroup(unix.NFNLGRP_NFTABLES))
		}
		if err != nil {
			t.Fatal(err)
		}
		f()
		raw, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var received error
		err = raw.Control(func(socket uintptr) {
			// The kernel queues them before it acknowledges a transaction.
			for data := make([]byte, 1<<17); received == nil; {
				var n int
				if n, _, received = unix.Recvfrom(int(socket), data, unix.MSG_DONTWAIT); received == nil {
					var messages []syscall.NetlinkMessage
					messages, received = syscall.ParseNetlinkMessage(data[:n])
					count += len(messages)
				}
			}
		})
		if err != nil || !errors.Is(received, unix.EAGAIN) {
			t.Fatal(err, received)
		}
		return count
	}
	sync := func() {
		t.Helper()
		p := plan.Build(in)
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("verify: %v, %v", differs, err)
		}
	}
	if count := events(sync); count < 500 {
		t.Errorf("the first load makes %d events: this test shows nothing", count)
	}
	for _, step := range []struct {
		name      string
		endpoints []netip.AddrPort
	}{
		{"another endpoint", endpoints(1, 3)}, {"one more", endpoints(1, 2, 3)}, {"only one left", endpoints(1)}, {"two again", endpoints(1, 2)},
	} {
		in.Services[50].Endpoints = step.endpoints
		if count := events(sync); count == 0 || count > 12 {
			t.Errorf("%s: %d objects changed, want a few", step.name, count)
		}
		nodetest.Run(t, "nft", "add table ip unrelated; delete table ip unrelated")
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("%s, listed: %v, %v", step.name, differs, err)
		}
	}
}

// TestModifiedBy: the kernel names the process that changed our rules, and events of other tables go unreported.
func TestModifiedBy(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "a")
	changed := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	watching := make(chan error, 2)
	namespace, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(namespace); err != nil {
			watching <- err
			return
		}
		backend.Watch(ctx, func() { changed <- struct{}{} }, func(err error) { watching <- err })
		watching <- nil
	}()
	defer func() {
		cancel()
		if err := <-watching; err != nil {
			t.Error(err)
		}
	}()
	<-changed // it watches
	if err := backend.Sync(t.Context(), oneEndpoint("10.0.0.2:2")); err != nil {
		t.Fatal(err)
	}
	<-changed
	if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil || backend.ModifiedBy() != "" {
		t.Errorf("by ourselves: %v, %v, by %q", differs, err, backend.ModifiedBy())
	}
	nodetest.Run(t, "nft", "add table ip unrelated")
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-N", "UNRELATED")
	for len(changed) > 0 {
		<-changed
	}
	nodetest.Run(t, "nft", "flush chain ip magic-ip-a from-network")
	for backend.ModifiedBy() == "" {
		<-changed
	}
	if differs, err := backend.Verify(t.Context()); len(differs) != 1 || err != nil || backend.ModifiedBy() != "nft" {
		t.Errorf("by nft: %v, %v, by %q", differs, err, backend.ModifiedBy())
	}
	if err := backend.Sync(t.Context(), oneEndpoint("10.0.0.2:1")); err != nil {
		t.Fatal(err)
	}
	if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
		t.Errorf("restored: %v, %v", differs, err)
	}
}
