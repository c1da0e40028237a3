package event

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// The plan: 169.254.210.210:80/tcp and :81/tcp lead to pods of 10.244.1.0/24, whose names are one letter.

// world is a recorder, what it was told last, and what it has sent.
type world struct {
	*Recorder
	last *published.Agent

	mu   sync.Mutex
	sent []Event
	err  error
}

func (w *world) send(_ context.Context, e Event) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, e)
	return w.err
}

// run runs test with a recorder, in a bubble whose clock is moved by sleeping.
func run(t *testing.T, options Options, test func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{}
		options.Log = slog.New(slog.DiscardHandler)
		options.Send = w.send
		w.Recorder = New(options)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go w.Run(ctx)
		test(t, w)
	})
}

// is publishes that the magic IP leads to these pods from now on.
func (w *world) is(pods ...string) {
	now := &published.Agent{}
	for port := range 2 {
		m := published.MagicIP{
			Address: netip.MustParseAddr("169.254.210.210"), Port: uint16(80 + port), Protocol: "tcp",
			Namespace: "default", Selector: "app=echo", Action: "serve",
		}
		for _, pod := range pods {
			m.Endpoints = append(m.Endpoints, published.Endpoint{Pod: "default/" + pod, Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, pod[0] - 'a' + 1}), 8080)})
		}
		if len(pods) == 0 {
			m.Action = "refuse"
		}
		now.MagicIPs = append(now.MagicIPs, m)
	}
	w.publish(now)
}

func (w *world) publish(now *published.Agent) {
	w.Published(w.last, now)
	w.last = now
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
		all = append(all, fmt.Sprintf("%s %s x%d: %s", kind, e.Reason, e.Count, e.Message))
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

func TestStartIsToldOnce(t *testing.T) {
	t.Parallel()
	run(t, Options{Node: "node1"}, func(t *testing.T, w *world) {
		w.is()
		time.Sleep(3 * time.Second)
		w.is("a")
		equal(t, "before it has settled", w.wait(Settle-time.Second))
		equal(t, "settled", w.wait(time.Minute), "Normal EndpointGained x1: "+both+"traffic goes to pod default/a (10.244.1.1)")
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
			"Normal EndpointGained x2: "+both+"traffic goes to pod default/b (10.244.1.2), and no more to default/a (10.244.1.1), after 50s without an endpoint")
	})
}

func TestSurgeIsOneEvent(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.is("a")
		w.wait(time.Hour)
		w.is("b")
		equal(t, "replaced", w.wait(time.Hour),
			"Normal EndpointGained x1: "+both+"traffic goes to pod default/b (10.244.1.2), and no more to default/a (10.244.1.1)")
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
			"Warning EndpointLost x1: "+both+"no endpoint for 1m0s, the last was pod default/a (10.244.1.1); new connections are refused. "+look)
		w.is("a")
		equal(t, "and back", w.wait(time.Hour),
			"Normal EndpointGained x1: "+both+"traffic goes to pod default/a (10.244.1.1), after 24h0m59s without an endpoint")
	})
}

func TestNeverAny(t *testing.T) {
	t.Parallel()
	run(t, Options{Node: "node1"}, func(t *testing.T, w *world) {
		w.is()
		equal(t, "none", w.wait(24*time.Hour),
			"Warning NoEndpoint x1: "+both+"no endpoint for 1m0s, and none since the agent knows of it; new connections are refused. "+look)
	})
}

// before is what an agent has published that was then restarted.
func before(pods ...string) *published.Agent {
	w := &world{Recorder: New(Options{})}
	w.is(pods...)
	return w.last
}

// TestRestart: what was so before the agent was restarted is no news; what is wrong is.
func TestRestart(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.last = before("a")
		w.is("a")
		equal(t, "the same", w.wait(time.Hour))
		w.is("b")
		if got := w.wait(time.Hour); len(got) != 1 || !strings.HasPrefix(got[0], "Normal EndpointGained") {
			t.Errorf("another: %q", got)
		}
	})
	run(t, Options{}, func(t *testing.T, w *world) {
		w.last = before()
		w.is()
		if got := w.wait(time.Hour); len(got) != 1 || !strings.HasPrefix(got[0], "Warning NoEndpoint") {
			t.Errorf("none still: %q", got)
		}
	})
}

// TestFlapping: 200 changes are a few Events, whose counts are of all changes.
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
			count := 0
			for _, e := range w.sent {
				count += e.Count
			}
			if most := 2*perReason.burst + int(took/perReason.every) + 1; len(w.sent) > most || len(w.sent) < 1 {
				t.Errorf("every %s: %d events, want 1 to %d: %+v", every, len(w.sent), most, w.sent)
			}
			if count < 200 || count > 201 { // the last one may tell that nothing has changed
				t.Errorf("every %s: the events stand for %d changes, want 200", every, count)
			}
			if last := w.sent[len(w.sent)-1]; last.Reason != EndpointLost {
				t.Errorf("every %s: the last is %+v, want %s", every, last, EndpointLost)
			}
		})
	}
}

// TestSeldomFlaps: a pod that is not ready for a moment once an hour is no news.
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

// TestManyAtOnce: a thousand magic IPs of a thousand pods are told of within the agent's rate.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		now := &published.Agent{}
		for i := range 1000 {
			now.MagicIPs = append(now.MagicIPs, published.MagicIP{
				Address: netip.AddrFrom4([4]byte{169, 254, byte(i / 256), byte(i)}), Port: 80, Protocol: "tcp", Namespace: "default", Selector: fmt.Sprintf("app=%d", i),
				Action: "refuse",
			})
		}
		w.publish(now)
		if got, most := len(w.wait(time.Hour)), perAgent.burst+int(time.Hour/perAgent.every); got > most || got < perAgent.burst {
			t.Errorf("%d events in an hour, want %d to %d", got, perAgent.burst, most)
		}
	})
}

func TestRefusedClaims(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		now := &published.Agent{}
		for port := range 9 {
			now.MagicIPs = append(now.MagicIPs, published.MagicIP{
				Address: netip.MustParseAddr("169.254.210.210"), Port: uint16(80 + port), Protocol: "udp", Refused: "it is claimed by agent b",
			})
		}
		w.publish(now)
		equal(t, "all of them", w.wait(time.Hour),
			"Warning ClaimRefused x1: 169.254.210.210:80/udp is not served: it is claimed by agent b; neither are 8 others: `magic-ip-agent status` names them")
		w.is("a")
		w.wait(time.Hour)
		w.publish(now)
		if got := w.wait(time.Hour); len(got) != 1 {
			t.Errorf("refused again: %q", got)
		}
	})
}

func TestFallback(t *testing.T) {
	t.Parallel()
	run(t, Options{Fallback: "nftables cannot be used: no nft", Delay: 20 * time.Second}, func(t *testing.T, w *world) {
		equal(t, "this agent's turn", w.wait(Settle+19*time.Second))
		equal(t, "told", w.wait(time.Hour), "Warning BackendFallback x1: the rules are made with iptables: nftables cannot be used: no nft. "+
			"Mend that and restart the agent, or say --backend iptables if it is meant to be so")
	})
}

// TestPass: without an endpoint nothing is refused, and so it is no warning.
func TestPass(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.publish(&published.Agent{MagicIPs: []published.MagicIP{{Address: netip.MustParseAddr("fd00::1"), Port: 80, Protocol: "tcp", Namespace: "*", Action: "pass"}}})
		equal(t, "none", w.wait(time.Hour), "Normal NoEndpoint x1: [fd00::1]:80/tcp: no endpoint for 1m0s, and none since the agent knows of it; "+
			"new connections go where they would go without a magic IP. kubectl get pods -o wide -A")
	})
}

// TestOutage: what cannot be sent is dropped and said in the problem; nobody waits for it.
func TestOutage(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		w.err = errors.New("refused")
		w.is("a")
		w.wait(time.Hour)
		w.is("b")
		w.wait(time.Hour)
		if len(w.sent) != 2 || w.Problem() != "refused" {
			t.Errorf("%d attempts, problem %q; want 2, refused", len(w.sent), w.Problem())
		}
		w.err = nil
		w.is("c")
		w.wait(time.Hour)
		if len(w.sent) != 3 || w.Problem() != "" {
			t.Errorf("%d attempts, problem %q; want 3 and none", len(w.sent), w.Problem())
		}
	})
}

// TestHanging: while an API server does not answer, publishing does not wait, and the attempt ends.
func TestHanging(t *testing.T) {
	t.Parallel()
	run(t, Options{}, func(t *testing.T, w *world) {
		attempts := 0
		w.Send = func(ctx context.Context, _ Event) error {
			attempts++
			<-ctx.Done()
			return ctx.Err()
		}
		w.is("a")
		time.Sleep(Settle + time.Second)
		before := time.Now()
		w.is("b")
		w.is("a")
		if took := time.Since(before); took != 0 {
			t.Errorf("publishing took %s", took)
		}
		w.wait(sendTimeout)
		if attempts != 1 || w.Problem() == "" {
			t.Errorf("%d attempts, problem %q; want 1 that has failed", attempts, w.Problem())
		}
	})
}

// BenchmarkPublished is what the agent's loop pays for one change among 10,000 magic IPs.
func BenchmarkPublished(b *testing.B) {
	r := New(Options{Log: slog.New(slog.DiscardHandler)})
	view := func(last byte) *published.Agent {
		now := &published.Agent{}
		for i := range 10000 {
			now.MagicIPs = append(now.MagicIPs, published.MagicIP{
				Address: netip.AddrFrom4([4]byte{169, 254, byte(i / 256), byte(i)}), Port: 80, Protocol: "tcp", Namespace: "default", Selector: "app=echo",
				Endpoints: []published.Endpoint{{Pod: "default/echo", Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, 1}), 80)}},
			})
		}
		now.MagicIPs[0].Endpoints[0].Address = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, last}), 80)
		return now
	}
	views := []*published.Agent{view(1), view(2)}
	for i := 0; b.Loop(); i++ {
		r.Published(views[(i+1)%2], views[i%2])
	}
}
