package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// BenchmarkChange is a pass of the agent in which one of two pods takes the endpoint of one magic IP from the other, among so many.
func BenchmarkChange(b *testing.B) {
	for _, size := range []int{1, 100, 10000} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			var text strings.Builder
			text.WriteString("name: a\nmagicIPs:\n")
			address := netip.MustParseAddr("198.18.0.1")
			for i := range size {
				fmt.Fprintf(&text, "- {ipAddress: %s, namespace: default, selector: \"app in (all, s%d)\", ports: [{port: 80}]}\n", address, i)
				address = address.Next()
			}
			a, err := newAgent(Options{
				RuntimeDir: b.TempDir(), Backend: nullBackend{nftables.NewFake("a")}, Flows: nullFlows{}, Node: ownedNode{}, Zones: true,
				Load:   func() (config.Config, error) { return config.Parse(strings.NewReader(text.String()), true) },
				Uptime: func() time.Duration { return time.Hour },
				Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
			})
			if err != nil {
				b.Fatal(err)
			}
			a.restore(context.Background())
			pods := make([]runtimedir.Attachment, 2)
			for i := range pods {
				pods[i] = runtimedir.Attachment{
					ContainerID: fmt.Sprint("c", i), IfName: "eth0", Namespace: "default", Name: fmt.Sprint("pod", i), UID: fmt.Sprint("uid", i),
					Labels: map[string]string{"app": fmt.Sprint("s", size-1)}, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)})}, AddedAt: time.Now(),
				}
			}
			change := func(i int) {
				if _, err := a.dir.Update(time.Second, []runtimedir.Key{pods[0].Key(), pods[1].Key()}, pods[i%2]); err != nil {
					b.Fatal(err)
				}
			}
			change(1)
			if _, ok := a.pass(context.Background(), allSources); !ok {
				b.Fatalf("the first pass: %v", a.logged)
			}
			b.ResetTimer()
			for i := range b.N {
				change(i)
				a.pass(context.Background(), Records)
				if s := a.services.inOrder[size-1]; s.endpoints[0].Address.Addr() != pods[i%2].IPs[0] {
					b.Fatalf("the endpoint is %v", s.endpoints)
				}
			}
		})
	}
}

// TestSweepAlone: a pass that only time has woken sweeps what is due and looks at nothing else, unless the sweep fails.
func TestSweepAlone(t *testing.T) {
	flows, passes := &countedFlows{}, 0
	a, err := newAgent(Options{
		RuntimeDir: t.TempDir(), Backend: nullBackend{nftables.NewFake("a")}, Flows: flows, Node: ownedNode{}, Zones: true,
		Load: func() (config.Config, error) {
			return config.Parse(strings.NewReader("{name: a, magicIPs: [{ipAddress: 169.254.210.210, namespace: default, selector: app=x, ports: [{port: 80}]}]}"), true)
		},
		Uptime: func() time.Duration { return time.Hour },
		Notes:  []func() []Note{func() []Note { passes++; return nil }},
		Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	a.restore(context.Background())
	pod := runtimedir.Attachment{
		ContainerID: "c", IfName: "eth0", Namespace: "default", Name: "pod", UID: "uid", Labels: map[string]string{"app": "x"},
		IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, AddedAt: time.Now(),
	}
	pass := func(what string, changed Source, wantOK bool, wantSweeps, wantPasses int) (next time.Duration) {
		t.Helper()
		flows.sweeps, passes = 0, 0
		next, ok := a.pass(context.Background(), changed)
		if ok != wantOK || flows.sweeps != wantSweeps || passes != wantPasses {
			t.Fatalf("%s: ok %v, %d sweeps, %d whole passes, want %v, %d, %d; %v", what, ok, flows.sweeps, passes, wantOK, wantSweeps, wantPasses, a.logged)
		}
		return next
	}
	change := func(gone []runtimedir.Key, added ...runtimedir.Attachment) {
		if _, err := a.dir.Update(time.Second, gone, added...); err != nil {
			t.Fatal(err)
		}
	}
	change(nil, pod)
	pass("the first one", allSources, true, 1, 1)
	pass("nothing is due", 0, true, 0, 0)
	change([]runtimedir.Key{pod.Key()})
	a.kernel.sweptAt = time.Now().Add(-sweepPause)
	pass("the pod is gone, and the endpoint with it", Records, true, 1, 1)
	now := time.Now()
	a.kernel.due, a.kernel.sweptAt = plan.Change{Gone: pod.IPs}, now
	if next := a.kernel.sweepDue(context.Background(), now.Add(sweepPause/2)); next != sweepPause/2 {
		t.Errorf("the sweep is to be in %s", next)
	}
	a.kernel.sweptAt = now.Add(-sweepPause)
	pass("it has waited", 0, true, 1, 0)
	pass("it is done", 0, true, 0, 0)

	a.kernel.due, a.kernel.sweptAt = plan.Change{Gone: pod.IPs}, time.Time{}
	flows.err = errors.New("no buffer space")
	pass("the sweep fails", 0, false, 2, 1)
	if status, err := a.own.ReadStatus(); err != nil || !strings.Contains(status.LastError, "no buffer space") {
		t.Errorf("status: %v, %+v", err, status)
	}
	flows.err = nil
	pass("it is tried again", 0, true, 1, 1)
	if status, err := a.own.ReadStatus(); err != nil || status.LastError != "" {
		t.Errorf("status: %v, %+v", err, status)
	}
	pass("all is well", 0, true, 0, 0)
	a.decideAt = time.Now()
	pass("a decision changes by time", 0, true, 0, 1)
	pass("the backstop", Poll, true, 1, 1) // the sweep once more
}

type countedFlows struct {
	sweeps int
	err    error
}

func (f *countedFlows) Sweep(context.Context, *plan.Plan, plan.Change) (int, error) {
	f.sweeps++
	return 0, f.err
}

type nullBackend struct{ *nftables.Fake }

func (nullBackend) Sync(context.Context, *plan.Plan) error { return nil }

type nullFlows struct{}

func (nullFlows) Sweep(context.Context, *plan.Plan, plan.Change) (int, error) { return 0, nil }

// ownedNode is a node with an uplink and local routes.
type ownedNode struct{ noNode }

func (n ownedNode) SnapshotWithoutLocalRoutes() (node.Snapshot, error) { return n.Snapshot() }

func (ownedNode) Snapshot() (node.Snapshot, error) {
	return node.Snapshot{
		Links:     []node.LinkState{{Index: 1, Name: "eth0"}},
		Addresses: []node.Address{{Link: 1, Prefix: netip.MustParsePrefix("192.0.2.1/24")}},
		Routes:    []node.Route{{Link: 1, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 254}},
	}, nil
}
