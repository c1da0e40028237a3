package event

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: 169.254.210.210:80/tcp and :81/tcp lead to pods of 10.244.1.0/24, whose names are one letter.

// world is a reporter, what was published last, and what it has sent.
type world struct {
	*Reporter
	current *runtimedir.Status

	mu   sync.Mutex
	sent []Event
}

// run runs test with a reporter, in a bubble whose clock is moved by sleeping.
func run(t *testing.T, options Options, test func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{}
		options.Send = func(e Event) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.sent = append(w.sent, e)
		}
		w.Reporter = New(options)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go w.Run(ctx)
		test(t, w)
	})
}

// is publishes that the magic IP leads to these pods from now on.
func (w *world) is(pods ...string) {
	now := &runtimedir.Status{}
	for port := range 2 {
		m := runtimedir.MagicIP{
			Frontend:  runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Port: uint16(80 + port), Protocol: "tcp"},
			Namespace: "default", Selector: "app=echo", Action: "serve",
		}
		for _, pod := range pods {
			m.Endpoints = append(m.Endpoints, runtimedir.Endpoint{Pod: "default/" + pod, Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, pod[0] - 'a' + 1}), 8080)})
		}
		if len(pods) == 0 {
			m.Action = "reject"
		}
		now.MagicIPs = append(now.MagicIPs, m)
	}
	w.publish(now)
}

func (w *world) publish(now *runtimedir.Status) {
	w.Observe(w.current, now)
	w.current = now
}

// wait lets time pass, and returns what was sent meanwhile.
func (w *world) wait(d time.Duration) []string {
	w.mu.Lock()
	begun := len(w.sent)
	w.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	var all []string
	for _, e := range w.sent[begun:] {
		kind := "Normal"
		if e.Warning {
			kind = "Warning"
		}
		all = append(all, kind+" "+e.Reason+": "+e.Message)
	}
	return all
}

func equal(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

const (
	both = "169.254.210.210:80/tcp, 169.254.210.210:81/tcp: "
	look = "kubectl get pods -o wide -n default -l 'app=echo' --field-selector spec.nodeName=node1"
)

func TestStartIsReportedOnce(t *testing.T) {
	t.Parallel()
	run(t, Options{Node: "node1"}, func(t *testing.T, w *world) {
		w.is()
		time.Sleep(3 * time.Second)
		w.is("a")
		equal(t, "before it has settled", w.wait(Settle-time.Second))
		equal(t, "settled", w.wait(time.Minute), "Normal EndpointGained: "+both+"traffic goes to pod default/a (10.244.1.1)")
		equal(t, "later", w.wait(24*time.Hour))
	})
}

func TestRolloutIsOneEvent(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.is("a")
		w.wait(time.Hour)
		w.is()
		equal(t, "between the pods", w.wait(50*time.Second))
		w.is("b")
		equal(t, "replaced", w.wait(time.Hour),
			"Normal EndpointGained: "+both+"traffic goes to pod default/b (10.244.1.2) instead of default/a (10.244.1.1)")
	})
}

func TestSurgeIsOneEvent(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.is("a")
		w.wait(time.Hour)
		w.is("b")
		equal(t, "replaced", w.wait(time.Hour),
			"Normal EndpointGained: "+both+"traffic goes to pod default/b (10.244.1.2) instead of default/a (10.244.1.1)")
	})
}

func TestLostAndFound(t *testing.T) {
	t.Parallel()
	run(t, Options{Node: "node1"}, func(t *testing.T, w *world) {
		w.is("a")
		w.wait(time.Hour)
		w.is()
		equal(t, "at first", w.wait(NoneFor-time.Second))
		equal(t, "then", w.wait(24*time.Hour),
			"Warning EndpointLost: "+both+"no endpoint for a minute, the last was pod default/a (10.244.1.1); new connections are rejected. "+look)
		w.is("a")
		equal(t, "and back", w.wait(time.Hour),
			"Normal EndpointGained: "+both+"traffic goes to pod default/a (10.244.1.1)")
	})
}

func TestNeverAny(t *testing.T) {
	t.Parallel()
	run(t, Options{Node: "node1"}, func(t *testing.T, w *world) {
		w.is()
		equal(t, "none", w.wait(24*time.Hour),
			"Warning NoEndpoint: "+both+"no endpoint for a minute, and none since the agent started; new connections are rejected. "+look)
	})
}

// before is what an agent published before it was restarted.
func before(pods ...string) *runtimedir.Status {
	w := &world{Reporter: New(Options{})}
	w.is(pods...)
	return w.current
}

// TestRestart: after a restart of the agent a fault is reported again, and an endpoint that is the same is not.
func TestRestart(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.current = before("a")
		w.is("a")
		equal(t, "the same", w.wait(time.Hour))
		w.is("b")
		if got := w.wait(time.Hour); len(got) != 1 || !strings.HasPrefix(got[0], "Normal EndpointGained") {
			t.Errorf("another: %q", got)
		}
	})
	run(t, Options{}, func(t *testing.T, w *world) {
		w.current = before()
		w.is()
		if got := w.wait(time.Hour); len(got) != 1 || !strings.HasPrefix(got[0], "Warning NoEndpoint") {
			t.Errorf("none still: %q", got)
		}
	})
}

// TestFlapping: 200 changes are a few Events, which name all changes, and the last of which is what holds.
func TestFlapping(t *testing.T) {
	t.Parallel()
	for _, every := range []time.Duration{50 * time.Millisecond, time.Second, 9 * time.Second, 25 * time.Second, 59 * time.Second} {
		run(t, Options{}, func(t *testing.T, w *world) {
			begun := time.Now()
			for i := range 200 {
				w.is([]string{"a"}[i%2:]...)
				time.Sleep(every)
			}
			took := time.Since(begun)
			w.wait(time.Hour)
			changes := 0
			for _, e := range w.sent {
				if _, rest, found := strings.Cut(e.Message, "has changed "); found {
					var n int
					if _, err := fmt.Sscan(rest, &n); err != nil {
						t.Error(err)
					}
					changes += n
				}
			}
			if most := 3 + int(took/NoneFor); len(w.sent) > most || len(w.sent) < 1 {
				t.Errorf("every %s: %d events, want 1 to %d: %+v", every, len(w.sent), most, w.sent)
			}
			if changes < 190 || changes > 200 { // a few at either end are no more than a rollout
				t.Errorf("every %s: the events name %d changes, want about 200", every, changes)
			}
			if last := w.sent[len(w.sent)-1]; last.Reason != EndpointLost {
				t.Errorf("every %s: the last is %+v, want %s", every, last, EndpointLost)
			}
		})
	}
}

// TestSeldomFlaps: a pod that is not ready for a moment once an hour is not reported.
func TestSeldomFlaps(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.is("a")
		w.wait(time.Hour)
		for range 50 {
			w.is()
			time.Sleep(5 * time.Second)
			w.is("a")
			equal(t, "flap", w.wait(time.Hour))
		}
	})
}

// TestManyAtOnce: a thousand magic IPs of a thousand pods are reported at the agent's rate, and none is forgotten.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		now := &runtimedir.Status{}
		for i := range 1000 {
			now.MagicIPs = append(now.MagicIPs, runtimedir.MagicIP{
				Frontend: runtimedir.Frontend{Address: netip.AddrFrom4([4]byte{169, 254, byte(i / 256), byte(i)}), Port: 80, Protocol: "tcp"}, Namespace: "default", Selector: fmt.Sprintf("app=%d", i),
				Action: "reject",
			})
		}
		w.publish(now)
		if got, most := len(w.wait(time.Hour)), Burst+int(time.Hour/Interval); got > most || got < most-1 {
			t.Errorf("%d events in an hour, want %d", got, most)
		}
		w.wait(24 * time.Hour)
		if got := len(w.sent); got != 1000 {
			t.Errorf("%d events in the end, want 1000", got)
		}
	})
}

func TestUnserved(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		now := &runtimedir.Status{}
		for port := range 9 {
			now.MagicIPs = append(now.MagicIPs, runtimedir.MagicIP{
				Frontend: runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Port: uint16(80 + port), Protocol: "udp"}, Reason: "it is claimed by agent b",
			})
		}
		w.publish(now)
		equal(t, "all of them", w.wait(time.Hour),
			"Warning Unserved: 169.254.210.210:80/udp is not served: it is claimed by agent b; not served either: 8 more, see `magic-ip-agent status`")
		w.is("a")
		w.wait(time.Hour)
		w.publish(now)
		if got := w.wait(time.Hour); len(got) != 1 {
			t.Errorf("again: %q", got)
		}
	})
}

func TestFallback(t *testing.T) {
	t.Parallel()
	run(t, Options{Fallback: "nftables cannot be used: no nft", Delay: 20 * time.Second}, func(t *testing.T, w *world) {
		equal(t, "this agent's turn", w.wait(Settle+19*time.Second))
		equal(t, "reported", w.wait(time.Hour), "Warning BackendFallback: the rules are made with iptables: nftables cannot be used: no nft. "+
			"Correct that and restart the agent, or set --backend iptables if iptables is wanted")
	})
}

// TestPass: without an endpoint nothing is rejected, and so it is no warning.
func TestPass(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.publish(&runtimedir.Status{MagicIPs: []runtimedir.MagicIP{{Frontend: runtimedir.Frontend{Address: netip.MustParseAddr("fd00::1"), Port: 80, Protocol: "tcp"}, Namespace: "*", Action: "pass"}}})
		equal(t, "none", w.wait(time.Hour), "Normal NoEndpoint: [fd00::1]:80/tcp: no endpoint for a minute, and none since the agent started; "+
			"new connections go where they go without a magic IP. kubectl get pods -o wide -A")
	})
}

// BenchmarkPublished is what the agent's loop pays for one change among 10,000 magic IPs.
func BenchmarkPublished(b *testing.B) {
	r := New(Options{})
	view := func(last byte) *runtimedir.Status {
		now := &runtimedir.Status{}
		for i := range 10000 {
			now.MagicIPs = append(now.MagicIPs, runtimedir.MagicIP{
				Frontend: runtimedir.Frontend{Address: netip.AddrFrom4([4]byte{169, 254, byte(i / 256), byte(i)}), Port: 80, Protocol: "tcp"}, Namespace: "default", Selector: "app=echo",
				Endpoints: []runtimedir.Endpoint{{Pod: "default/echo", Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 1}), 80)}},
			})
		}
		now.MagicIPs[0].Endpoints[0].Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, last}), 80)
		return now
	}
	views := []*runtimedir.Status{view(1), view(2)}
	for i := 0; b.Loop(); i++ {
		r.Observe(views[(i+1)%2], views[i%2])
	}
}
