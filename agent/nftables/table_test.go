package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// oneEndpoint is the plan of one frontend.
func oneEndpoint(endpoint string) *plan.Plan {
	p := plan.Build(plan.Input{Services: []plan.Service{
		{Frontend: frontend("169.254.210.210", plan.TCP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort(endpoint)}},
	}})
	return &p
}

// countingNFT counts transactions, and fails them while err is set.
type countingNFT struct {
	knftables.Interface
	runs int
	err  error
}

func (n *countingNFT) Run(ctx context.Context, tx *knftables.Transaction) error {
	n.runs++
	if n.err != nil {
		return n.err
	}
	return n.Interface.Run(ctx, tx)
}

// TestOwnFailures: what fails for a reason of our own is an error with its cause, and no modification by others.
func TestOwnFailures(t *testing.T) {
	fake := NewFake("a")
	ip := fake.Backend.tables[0]
	nft := &countingNFT{Interface: ip.nft}
	ip.nft = nft
	sync := func(endpoint string) error { return fake.Sync(t.Context(), oneEndpoint(endpoint)) }
	verify := func(want string) {
		t.Helper()
		differs, err := fake.Verify(t.Context())
		if got := strings.Join(differs, "; "); err != nil || (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("verify says %q, %v; want %q", got, err, want)
		}
	}
	if err := sync("10.0.0.2:1"); err != nil {
		t.Fatal(err)
	}
	var byNetlink error
	ip.elements = func([]setChange) error { return byNetlink }
	for i, cause := range []error{unix.ENOBUFS, unix.EPERM, unix.ENOMEM, unix.EBUSY, unix.EINVAL} {
		byNetlink, nft.err = fmt.Errorf("nftables transaction: %w", cause), errors.New("exit status 1")
		err := sync(fmt.Sprintf("10.0.0.3:%d", 100+i))
		if !errors.Is(err, cause) || !strings.Contains(fmt.Sprint(err), "exit status 1") {
			t.Errorf("%v: sync says %v, want both causes", cause, err)
		}
		verify("")
		byNetlink, nft.err = nil, nil
		if err := sync("10.0.0.2:1"); err != nil {
			t.Errorf("after %v: %v", cause, err)
		}
		verify("")
	}

	// netlink never works, and nft does: said for as long as it is so.
	byNetlink = unix.EPERM
	first := sync("10.0.0.3:1")
	var degraded *DegradedError
	for i, err := range []error{first, sync("10.0.0.3:1"), sync("10.0.0.4:1")} {
		if !errors.As(err, &degraded) || !degraded.InPlace() || !errors.Is(err, unix.EPERM) || err.Error() != first.Error() {
			t.Errorf("sync %d without netlink: %v, want the same error each time, with its cause", i, err)
		}
		verify("")
	}
	byNetlink = nil
	if err := sync("10.0.0.5:1"); err != nil {
		t.Errorf("netlink works again: %v", err)
	}

	// Somebody else has changed the table: the rules are loaded anew, and verify has the cause.
	for _, cause := range []error{unix.ENOENT, unix.EEXIST} {
		byNetlink = cause
		before := nft.runs
		if err := sync("10.0.0.6:1"); err != nil || nft.runs == before {
			t.Errorf("%v: %v, %d loads", cause, err, nft.runs-before)
		}
		verify(cause.Error())
		verify("")
		byNetlink = nil
		if err := sync("10.0.0.2:1"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGenerationMovedByOthers: rules of others change all the time. The table is loaded once and listed again.
func TestGenerationMovedByOthers(t *testing.T) {
	fake := NewFake("a")
	ip := fake.Backend.tables[0]
	nft := &countingNFT{Interface: ip.nft}
	ip.nft = nft
	moved := uint32(0)
	own := ip.generation
	ip.generation = func() (uint32, error) {
		moved++
		generation, err := own()
		return generation + moved, err
	}
	lists := 0
	list := ip.list
	ip.list = func(known []set) (*listing, error) { lists++; return list(known) }
	for i := range 5 {
		if err := fake.Sync(t.Context(), oneEndpoint(fmt.Sprintf("10.0.0.%d:1", i+2))); err != nil {
			t.Fatal(err)
		}
		if differs, err := fake.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("verify: %v, %v", differs, err)
		}
		if want := i + 1; nft.runs != want { // each later one changes elements
			t.Errorf("sync %d: %d transactions so far, want %d", i, nft.runs, want)
		}
	}
	if lists > 20 {
		t.Errorf("listed %d times", lists)
	}
}

// TestBesideABusyWriter: 10,000 magic IPs, and somebody who changes rules of others all the time.
func TestBesideABusyWriter(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "a")
	nft := &countingNFT{Interface: backend.tables[0].nft}
	backend.tables[0].nft = nft
	input := plan.Input{}
	for i := range 10_000 {
		input.Services = append(input.Services, plan.Service{
			Frontend:  plan.Frontend{Address: netip.AddrFrom4([4]byte{169, 254, byte(i >> 8), byte(i)}), Protocol: plan.TCP, Port: 80},
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:80")},
		})
	}
	// A socket belongs to the network namespace of the thread that opens it.
	writer, err := nftables.New(nftables.AsLasting())
	if err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		table := writer.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyIPv4})
		for i := 0; ; i++ {
			writer.AddChain(&nftables.Chain{Name: fmt.Sprintf("c%d", i%100), Table: table})
			if err := writer.Flush(); err != nil {
				t.Error(err)
			}
			select {
			case <-stop:
				stopped <- i
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	began := time.Now()
	for i := range 3 {
		input.Services[i].Endpoints = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.3:80")}
		p := plan.Build(input)
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("verify: %v, %v", differs, err)
		}
	}
	close(stop)
	if writes := <-stopped; writes < 10 {
		t.Errorf("%d writes of others in %v: this test shows nothing", writes, time.Since(began))
	}
	if nft.runs != 1 {
		t.Errorf("%d transactions by nft, want the one that loads the table", nft.runs)
	}
	t.Logf("loaded and changed in %v", time.Since(began))
}

// interruptedListings has the kernel skip a chain in so many of the next listings of a table, as it does where another program deletes a
// chain during a dump (it does not filter chains by table). It says in each that rules have changed meanwhile.
func interruptedListings(ip *table, chain string, count *int) {
	list := ip.list
	ip.list = func(known []set) (*listing, error) {
		l, err := list(known)
		if err != nil || *count == 0 || !l.exists {
			return l, err
		}
		*count--
		l.interrupted = true
		l.objects = slices.DeleteFunc(l.objects, func(o object) bool { return strings.HasPrefix(o.name, chain) })
		maps.DeleteFunc(l.structure, func(name, _ string) bool { return strings.HasPrefix(name, "chain "+chain) })
		return l, nil
	}
}

// TestInterruptedListing: a chain that an interrupted listing lacks is looked for again. Nothing is loaded again because of it, and nobody
// is said to have modified the table.
func TestInterruptedListing(t *testing.T) {
	spread := func(endpoints ...string) *plan.Plan {
		s := plan.Service{Frontend: frontend("169.254.210.210", plan.TCP, 80)}
		for _, e := range endpoints {
			s.Endpoints = append(s.Endpoints, netip.MustParseAddrPort(e))
		}
		p := plan.Build(plan.Input{Services: []plan.Service{s}})
		return &p
	}
	nodetest.Namespace(t, "link set lo up")
	backend := newBackend(t, "a")
	ip := backend.tables[0]
	nft := &countingNFT{Interface: ip.nft}
	ip.nft = nft
	interrupted := 0
	interruptedListings(ip, "spread-", &interrupted)
	sync := func(what string, interruptions, transactions int, p *plan.Plan) {
		t.Helper()
		interrupted, nft.runs = interruptions, 0
		if err := backend.Sync(t.Context(), p); err != nil || nft.runs != transactions || interrupted != 0 {
			t.Errorf("%s: %v, %d transactions instead of %d, %d interruptions were not met", what, err, nft.runs, transactions, interrupted)
		}
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("%s: verify says %v, %v", what, differs, err)
		}
	}
	sync("the first load", 0, 1, spread("10.0.0.2:1"))
	sync("a chain is added", 4, 1, spread("10.0.0.2:1", "10.0.0.3:1"))
	sync("a chain is changed", 1, 1, spread("10.0.0.2:1", "10.0.0.3:1", "10.0.0.4:1"))

	// A load lists what is there before it, and what it has loaded after it.
	ip.known = false
	sync("a load", 3, 1, spread("10.0.0.2:1", "10.0.0.3:1"))
	ip.known = false
	nodetest.Run(t, "nft", "add chain ip magic-ip-a spread-left")
	sync("a load that deletes a chain", 1, 2, spread("10.0.0.2:1", "10.0.0.3:1"))

	// No listing has the chain: that may be so for as long as others go on.
	interrupted = 5
	if err := backend.Sync(t.Context(), spread("10.0.0.2:1", "10.0.0.4:1")); !errors.Is(err, errInterrupted) {
		t.Errorf("interrupted for too long: %v", err)
	}
	sync("and then not", 0, 1, spread("10.0.0.2:1", "10.0.0.4:1"))
}

// TestUnreadGeneration: an endpoint is changed although the generation cannot be read, and without a load of the whole table.
func TestUnreadGeneration(t *testing.T) {
	fake := NewFake("a")
	ip := fake.Backend.tables[0]
	if err := fake.Sync(t.Context(), oneEndpoint("10.0.0.2:1")); err != nil {
		t.Fatal(err)
	}
	generation, failing := ip.generation, true
	ip.generation = func() (uint32, error) {
		if failing {
			return 0, unix.ENOBUFS
		}
		return generation()
	}
	lists, list := 0, ip.list
	ip.list = func(known []set) (*listing, error) { lists++; return list(known) }
	err := fake.Sync(t.Context(), oneEndpoint("10.0.0.3:1"))
	if err != nil || lists > 0 || !strings.Contains(fake.Dump(), "10.0.0.3") {
		t.Errorf("sync: %v, listed %d times:\n%s", err, lists, fake.Dump())
	}
	failing = false
	if differs, err := fake.Verify(t.Context()); len(differs) > 0 || err != nil || lists != 1 {
		t.Errorf("verify: %v, %v, listed %d times; want once, since it is not known what has changed", differs, err, lists)
	}
}

// TestHungProcess: an nft process that does not end is killed, and is an error that says so. Nobody has modified the table, which stays.
func TestHungProcess(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Fatal(err)
	}
	tools := t.TempDir()
	hangs := filepath.Join(tools, "hangs") // while it is there, whatever adds rules does
	script := fmt.Sprintf("#!/bin/sh\ninput=$(cat)\ncase $input in *add\\ rule*) [ -e %s ] && exec sleep 600 ;; esac\nprintf '%%s\\n' \"$input\" | %s \"$@\"\n", hangs, nft)
	if err := os.WriteFile(filepath.Join(tools, "nft"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	backend := newBackend(t, "a")
	ip := backend.tables[0]
	patient := ip.nft.(bounded)
	one, many := oneEndpoint("10.0.0.2:1"), plan.Build(plan.Input{Services: []plan.Service{{
		Frontend:  frontend("169.254.210.210", plan.TCP, 80),
		Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:1"), netip.MustParseAddrPort("10.0.0.3:1")},
	}}})
	if err := backend.Sync(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	for _, known := range []bool{true, false} { // a change, and a load
		ip.known = known
		if err := os.WriteFile(hangs, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		ip.nft = bounded{patient.Interface, time.Second}
		if err := backend.Sync(t.Context(), &many); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("known %t: %v", known, err)
		}
		if err := os.Remove(hangs); err != nil {
			t.Fatal(err)
		}
		ip.nft = patient
		if rules := nodetest.Run(t, "nft", "list", "table", "ip", "magic-ip-a"); !strings.Contains(rules, "10.0.0.2 . 1") {
			t.Errorf("known %t: the rules are gone:\n%s", known, rules)
		}
		if differs, err := backend.Verify(t.Context()); len(differs) > 0 || err != nil {
			t.Errorf("known %t: verify says %v, %v", known, differs, err)
		}
		if err := errors.Join(backend.Sync(t.Context(), &many), backend.Sync(t.Context(), one)); err != nil {
			t.Errorf("known %t: and then: %v", known, err)
		}
	}
}
