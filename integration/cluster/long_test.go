//go:build e2e

package cluster

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// What is longer than any time-out of the agent: where the API server says nothing, it takes 90 s to see that a watch
// is silent, and 45 s that a connection is dead; where it answers, or refuses, only the pauses between two
// attempts grow.
const (
	beyondSilence = 95 * time.Second
	beyondPauses  = 30 * time.Second
)

// apiOnly is a second magic IP, for a pod that the API alone knows.
var apiOnly = netip.MustParseAddr("169.254.210.211")

// longOutages are the ways an API server can be away for long; what the agent must say of each.
var longOutages = map[string]struct {
	lasts      time.Duration
	begin, end func(*world)
	says       string
}{
	"refusing": {
		lasts: beyondPauses,
		begin: func(w *world) { w.must(w.proxy.close()) },
		end:   func(w *world) { w.must(w.proxy.open()) },
		says:  "connection refused",
	},
	"hung": {
		lasts: beyondSilence,
		begin: func(w *world) { w.proxy.hang() },
		end:   func(w *world) { w.proxy.resume() },
		says:  "has not answered within",
	},
	"unreachable": { // connections stand, and their packets are lost
		lasts: beyondSilence,
		begin: func(w *world) {
			w.nft("add table inet lost",
				"add chain inet lost input { type filter hook input priority 0; }",
				"add rule inet lost input tcp dport 6443 drop", "add rule inet lost input tcp sport 6443 drop")
		},
		end:  func(w *world) { w.nft("delete table inet lost") },
		says: "has not answered within",
	},
	"unauthorized": {
		lasts: beyondPauses,
		begin: func(w *world) { w.answersOnly("", http.StatusUnauthorized, "Unauthorized") },
		end:   everythingPasses,
		says:  "Unauthorized",
	},
	"forbidden": { // as a restarting API server does that does not know its roles yet
		lasts: beyondPauses,
		begin: func(w *world) { w.answersOnly("", http.StatusForbidden, "Forbidden") },
		end:   everythingPasses,
		says:  "allow get, list and watch of pods there",
	},
	"too many requests": {
		lasts: beyondPauses,
		begin: func(w *world) { w.answersOnly("", http.StatusTooManyRequests, "TooManyRequests", "Retry-After", "1") },
		end:   everythingPasses,
		says:  "TooManyRequests",
	},
	"unavailable": { // and asks for more patience than anybody has
		lasts: beyondPauses,
		begin: func(w *world) {
			w.answersOnly("", http.StatusServiceUnavailable, "ServiceUnavailable", "Retry-After", "20")
		},
		end:  everythingPasses,
		says: "ServiceUnavailable",
	},
}

// answersOnly has the proxy answer so, to whoever watches too.
func (w *world) answersOnly(verb string, code int, reason string, headers ...string) {
	w.Helper()
	w.proxy.answer(verb, code, fmt.Sprintf(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"message":%q,"code":%d}`, reason, reason, code), headers...)
	w.must(w.proxy.cut())
}

func everythingPasses(w *world) { w.proxy.set(func() { w.proxy.fault = nil }) }

func (w *world) nft(commands ...string) {
	w.Helper()
	_, err := w.node.Run(context.WithoutCancel(w.Context()), "nft", strings.Join(commands, "; "))
	w.must(err)
}

// TestLongOutage: for as long as the API server is away, and longer than anybody's time-out, what CNI tells is acted
// on within a second; an agent that is restarted meanwhile keeps what it serves. Afterwards it catches up.
func TestLongOutage(t *testing.T) {
	t.Parallel()
	for name, outage := range longOutages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			namespace := strings.ReplaceAll(name, " ", "-")
			w := apart(t, namespace, namespace)
			second := w.servingAPIOnly()
			first := w.create("first").add().running(true)
			known := w.create("known")
			w.goesTo("first")
			w.settle()

			over := time.Now().Add(outage.lasts)
			outage.begin(w)
			back := w.whenBack(outage.end)
			w.cniGoesOn(first, second, over)
			w.problem(outage.says)
			known.add()
			w.goesToWithin(soon, "known")
			known.running(true)
			second.forceDelete()
			late := w.create("late").add().running(true)
			w.answers("known") // nobody has told the labels of the other

			watches := w.proxy.count("watch")
			back()
			ended := time.Now()
			w.goesTo("late")
			w.goesToOf(apiOnly, "")
			w.mended()
			caughtUp := time.Since(ended)
			late.running(false)
			w.goesTo("known")
			w.watchesThrough(watches)
			watching := time.Since(ended)
			flipped := time.Now()
			late.running(true)
			w.goesTo("late")
			t.Logf("caught up after %v, watching again after %v; then a change of readiness took %v",
				caughtUp.Round(time.Millisecond), watching.Round(time.Millisecond), time.Since(flipped).Round(time.Millisecond))
		})
	}
}

// servingTwo starts the agent with a second magic IP, for app=api-only in this namespace.
func (w *world) servingTwo(namespace string) {
	w.Helper()
	w.serve(fmt.Sprintf("namespace: %s, ports: [{port: %d}]}\n- {ipAddress: %s, selector: app=api-only, namespace: %s, ports: [{port: %[2]d}]",
		w.namespace, port, apiOnly, namespace))
}

// servingAPIOnly is servingTwo, and the second magic IP leads to a pod that the API alone knows.
func (w *world) servingAPIOnly() *pod {
	w.Helper()
	w.servingTwo(w.namespace)
	second := w.create("second", labelled("api-only")).addUnrecorded().running(true)
	w.goesToOf(apiOnly, "second")
	return second
}

// cniGoesOn adds and deletes pods, of which the API does not hear, until then, and restarts the agent meanwhile. At the
// end there are none of them, and no first one.
func (w *world) cniGoesOn(first, second *pod, until time.Time) {
	w.Helper()
	const pause = 3 * time.Second
	half := time.Now().Add(time.Until(until) / 2)
	restarted := false
	last := first
	for i := 0; time.Now().Before(until); i++ {
		next := w.unheardOf(fmt.Sprintf("cni-%d", i)).add()
		if last == first {
			w.answers(first.name) // it was ready when the API was last heard
		}
		last.del()
		last = next
		w.goesToWithin(soon, last.name)
		w.answersOf(apiOnly, second.name)
		if !restarted && time.Now().After(half) {
			restarted = true
			w.restarts(last.name, second.name)
		}
		select {
		case <-w.Context().Done():
		case <-time.After(min(pause, time.Until(until))):
		}
	}
	last.del()
	w.goesToWithin(soon, "")
	w.answersOf(apiOnly, second.name)
}

// restarts kills the agent and starts it again; no request to either magic IP meets anything else than before.
func (w *world) restarts(first, second string) {
	w.Helper()
	probes := map[string]*lab.Probe{
		first:  w.node.StartProbe(lab.Client{Kind: lab.NewConnection, From: "client", To: magic()}, 50*time.Millisecond),
		second: w.node.StartProbe(lab.Client{Kind: lab.NewConnection, From: "client", To: netip.AddrPortFrom(apiOnly, port)}, 50*time.Millisecond),
	}
	w.agent.Kill()
	w.start()
	w.problem("") // it has tried the API
	w.goesToWithin(soon, first)
	w.goesToOf(apiOnly, second)
	for want, probe := range probes {
		outcomes := probe.Stop()
		if len(outcomes) == 0 {
			w.Errorf("no request to %s during the restart", want)
		}
		for _, outcome := range outcomes {
			if outcome.Err != nil || outcome.Answer.Server != want {
				w.Fatalf("a request during the restart met %+v, want %s", outcome, want)
			}
		}
	}
}

// watchesThrough waits until the agent has begun another watch than these through the proxy.
func (w *world) watchesThrough(watches int) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), 2*time.Minute)
	defer cancel()
	w.must(lab.Eventually(ctx, func() error {
		if now := w.proxy.count("watch"); now <= watches {
			return fmt.Errorf("%d watches as before", now)
		}
		return nil
	}))
}

// TestSilentWatch: a watch that says nothing, not even that it is there, is not believed for longer than 90 s.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	w := apart(t, "silent", "silent")
	second := w.servingAPIOnly()
	first := w.create("first").add().running(true)
	fresh := w.create("fresh").add().running(false)
	w.goesTo("first")
	w.settle()
	began := time.Now()
	w.proxy.silence()
	lists := w.proxy.count("list")
	w.whenBack(func(w *world) { w.proxy.speak() })
	fresh.running(true)
	second.forceDelete()
	w.answers("first")
	ctx, cancel := lab.Patience(w.Context(), beyondSilence)
	defer cancel()
	w.awaitFor(ctx, "to list", func(a *runtimedir.Status) bool { return endpointOf(a, magic().Addr()) == "fresh" })
	w.answers("fresh")
	w.goesToOf(apiOnly, "")
	t.Logf("heard of the change after %v", time.Since(began).Round(time.Millisecond))
	if w.proxy.count("list") == lists {
		t.Error("it has not listed")
	}
	first.del()
	fresh.running(false) // by the next poll
	w.create("next").add().running(true)
	w.goesTo("next")
}

// TestSlow: an API server that takes its time, longer than a poll waits, is heard all the same; CNI does not wait for it.
func TestSlow(t *testing.T) {
	t.Parallel()
	w := apart(t, "slow", "slow")
	w.proxy.set(func() { w.proxy.slow = slowness{delay: 5 * time.Second, pause: 200 * time.Millisecond, piece: 200} })
	w.serve()
	until := time.Now().Add(beyondPauses)
	for i := 0; time.Now().Before(until); i++ {
		pod := w.unheardOf(fmt.Sprintf("cni-%d", i)).add()
		w.goesToWithin(soon, pod.name)
		pod.del()
		w.goesToWithin(soon, "")
		known := w.create(fmt.Sprintf("known-%d", i)).addUnrecorded().running(true)
		began := time.Now()
		w.goesTo(known.name)
		t.Logf("heard of a pod after %v", time.Since(began).Round(time.Millisecond))
		known.forceDelete()
		w.goesTo("")
		known.del()
	}
	w.agent.Kill()
	pod := w.create("echo").addUnrecorded().running(true)
	w.start()
	w.goesTo(pod.name)
	w.mended()
}

// TestGone: where every watch is answered that what it asks for is too old, the agent goes by lists.
func TestGone(t *testing.T) {
	t.Parallel()
	w := apart(t, "gone", "gone")
	w.serve()
	old := w.create("old").add().running(true)
	w.goesTo("old")
	w.settle()
	w.answersOnly("watch", http.StatusGone, "Expired")
	for i := range 5 {
		fresh := w.create(fmt.Sprintf("new-%d", i)).add().running(true)
		w.goesTo(fresh.name)
		old.del()
		old.forceDelete()
		old = fresh
	}
	if w.proxy.count("watch") < 2 || w.proxy.count("list") == 0 {
		t.Error("it has not tried to watch, and listed")
	}
	watches := w.proxy.count("watch")
	everythingPasses(w)
	w.watchesThrough(watches)
	w.mended()
	old.running(false)
	w.create("last").add().running(true)
	w.goesTo("last")
}

// TestUnknownToAPI: a record whose pod the API has never heard of counts for a minute, and then for as long as its host
// interface stands. Where that is gone too, the agent says that the record is dead, and the plugin drops it.
func TestUnknownToAPI(t *testing.T) {
	t.Parallel()
	w := apart(t, "unknown", "unknown")
	w.servingTwo(w.namespace)
	standing := w.unheardOf("standing").add()
	vanished := w.unheardOf("vanished").add()
	// A record without a host interface, as of a CNI plugin that names none.
	runtimeDir := w.node.Path(lab.RuntimeDir)
	_, err := runtimedir.New(runtimeDir).Update(time.Second, nil, runtimedir.Attachment{
		ContainerID: "nameless", IfName: "eth0", Network: network, Namespace: w.namespace, Name: "nameless", UID: "nameless",
		Labels: map[string]string{"app": "api-only"}, IPs: []netip.Addr{netip.MustParseAddr("10.244.1.250")}, AddedAt: time.Now(),
	})
	w.must(err)
	added := time.Now()
	apiOnlyIs := func(pod string) func(*runtimedir.Status) bool {
		return func(a *runtimedir.Status) bool { return endpointOf(a, apiOnly) == pod }
	}
	w.await("to serve the record without an interface", apiOnlyIs("nameless"))
	vanished.end()
	_, err = w.node.Run(t.Context(), "ip", "netns", "delete", vanished.netns) // and DEL never comes
	w.must(err)
	w.goesTo("standing")

	ctx, cancel := lab.Patience(t.Context(), 65*time.Second)
	defer cancel()
	w.awaitFor(ctx, "to drop it", apiOnlyIs(""))
	if after := time.Since(added); after < 59*time.Second {
		t.Errorf("dropped after %v", after)
	}
	w.awaitFor(ctx, "to name the dead record", func(*runtimedir.Status) bool { return len(w.reported().Dead) == 1 })
	w.staysWith("standing")
	if _, recorded := vanished.record(); !recorded {
		t.Error("the dead record is gone before the plugin has written")
	}
	w.create("next").add()
	if _, recorded := vanished.record(); recorded {
		t.Error("the plugin has kept the dead record")
	}
	if _, recorded := standing.record(); !recorded {
		t.Error("the plugin has dropped the record of a pod that stands")
	}
}
