//go:build e2e

package cluster

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// soon is how fast the agent acts on what CNI tells, whatever the API server does, in working time of the machine.
const soon = time.Second

// outages are the ways an API server can be away, and how it comes back.
func outages() map[string]struct{ begin, end func(*world) } {
	return map[string]struct{ begin, end func(*world) }{
		"stopped": {
			begin: func(w *world) {
				plane.KillAPIServer()
				w.problem("refused")
			},
			end: func(w *world) { w.must(plane.StartAPIServer(w.patience())) },
		},
		"hung": {
			begin: func(w *world) { w.must(plane.FreezeAPIServer()) },
			end:   func(w *world) { w.must(plane.ThawAPIServer()) },
		},
	}
}

// TestOutage: while the API server is away, what CNI tells is acted on within a second, and a restarted agent goes
// on with the endpoint that it had. Afterwards the agent hears of what has happened meanwhile, and watches again.
func TestOutage(t *testing.T) {
	for name, outage := range outages() {
		t.Run(name, func(t *testing.T) {
			w := serving(t)
			old := w.create("old").add().running(true)
			fresh := w.create("new")
			w.goesTo("old")
			w.settle()

			outage.begin(w)
			back := w.whenBack(outage.end)
			fresh.add()
			w.answers("old") // it was ready when the API was last heard
			old.del()
			w.goesToWithin(soon, "new")

			w.agent.Kill()
			w.start()
			w.goesToWithin(soon, "new")
			w.problem("")

			unheard := w.unheardOf("unheard").add()
			fresh.del()
			w.goesToWithin(soon, "unheard")
			unheard.del()
			w.goesToWithin(soon, "")
			fresh.add()
			w.goesToWithin(soon, "new")

			watches, err := plane.Requests("watch")
			w.must(err)
			back()
			w.mended()
			w.staysWith("new") // and not with the old pod, whose DEL the API does not know of
			w.watchesAgain(watches)
			old.add()
			w.goesTo("old") // ready, as far as the API knows
			fresh.running(true)
			old.running(false)
			w.goesTo("new")
		})
	}
}

// TestRestartInOutage: a pod that only the API knew stays the endpoint of an agent that is restarted without it.
func TestRestartInOutage(t *testing.T) {
	for name, outage := range outages() {
		t.Run(name, func(t *testing.T) {
			w := serving(t)
			pod := w.create("echo").addUnrecorded().running(true)
			w.goesTo("echo")
			outage.begin(w)
			back := w.whenBack(outage.end)
			for range 2 {
				w.agent.Kill()
				w.start()
				w.problem("")
				w.goesToWithin(soon, "echo")
			}
			back()
			w.mended()
			w.staysWith("echo")
			pod.forceDelete()
			w.goesTo("")
		})
	}
}

// TestLabelsOutliveRestart: records without labels, whose pods the API has told of before, are still known for what
// they are by an agent that is restarted without the API.
func TestLabelsOutliveRestart(t *testing.T) {
	w := serving(t)
	w.agent.Kill()
	w.create("first").add()
	second := w.create("second").add()
	w.start()
	w.goesTo("second")
	w.settle()
	w.must(plane.FreezeAPIServer())
	w.whenBack(func(w *world) { w.must(plane.ThawAPIServer()) })
	for range 2 {
		w.agent.Kill()
		w.start()
	}
	w.goesToWithin(soon, "second")
	second.del()
	w.goesToWithin(soon, "first")
}

// TestNoFlapAfterOutage: what the agent has learned by polling is not forgotten while it begins to watch again.
func TestNoFlapAfterOutage(t *testing.T) {
	w := serving(t)
	w.create("old").add().running(true)
	fresh := w.create("new").add().running(false)
	w.goesTo("old")
	w.settle()
	watches, err := plane.Requests("watch")
	w.must(err)
	plane.KillAPIServer()
	w.problem("refused")
	w.must(plane.StartAPIServer(w.patience()))
	fresh.running(true)
	w.goesTo("new")
	probe := w.node.StartProbe(lab.Client{Kind: lab.NewConnection, From: "client", To: magic()}, time.Millisecond)
	w.watchesAgain(watches)
	w.settle()
	for _, outcome := range probe.Stop() {
		if outcome.Answer.Server != "new" {
			t.Fatalf("a request met %+v, want new", outcome)
		}
	}
}

// TestForbidden: a right that is missing is named, and nothing else changes; once it is given, all is well.
func TestForbidden(t *testing.T) {
	w := serving(t)
	pod := w.create("echo").add().running(true)
	w.goesTo("echo")
	w.must(plane.Forbid(w.Context()))
	allow := w.whenBack(func(w *world) { w.must(plane.Allow(w.patience())) })
	const missing = "the API server does not allow the pods of namespace default; allow get, list and watch of pods there"

	// Whoever watches already is not stopped: the watch has to begin anew.
	plane.KillAPIServer()
	w.must(plane.StartAPIServer(w.patience()))
	w.problem(missing)
	w.answers("echo")

	w.agent.Kill()
	w.start()
	w.problem(missing)
	w.goesToWithin(soon, "echo")
	status, err := w.node.RunAgent(w.Context(), "status")
	if w.must(err); !strings.Contains(status, missing) || !strings.Contains(status, "default/echo") {
		t.Errorf("status:\n%s", status)
	}

	allow()
	w.mended()
	pod.forceDelete()
	pod.del()
	w.goesTo("")
}

// problem waits until the agent says that something is wrong with the API, in words that contain this.
func (w *world) problem(text string) {
	w.Helper()
	w.await("to name the problem", func(a *runtimedir.Status) bool {
		return strings.Contains(a.LastError, "Kubernetes API: ") && strings.Contains(a.LastError, text)
	})
}

func (w *world) mended() {
	w.Helper()
	w.await("to have no problem", func(a *runtimedir.Status) bool { return a.LastError == "" })
}

// whenBack calls end once: when the test says so, or else at its end.
func (w *world) whenBack(end func(*world)) (back func()) {
	over := false
	back = func() {
		w.Helper()
		if !over {
			over = true
			end(w)
		}
	}
	w.Cleanup(back)
	return back
}

// watchesAgain waits until the agent has begun another watch than these, and it brings events.
func (w *world) watchesAgain(watches int) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), time.Minute)
	defer cancel()
	w.must(lab.Eventually(ctx, func() error {
		now, err := plane.Requests("watch")
		if err == nil && now <= watches {
			err = fmt.Errorf("%d watches as before", now)
		}
		return err
	}))
}

// waitPolls waits until the agent has polled for a while.
func (w *world) waitPolls(during time.Duration) {
	w.Helper()
	until := time.Now().Add(during)
	w.must(lab.Eventually(w.Context(), func() error {
		info, err := os.Stat(runtimedir.New(w.node.Path(lab.RuntimeDir)).Agent(agentName).StatusPath())
		if err == nil && info.ModTime().Before(until) {
			err = errors.New("not yet")
		}
		return err
	}))
}

// TestCompacted: what an agent asks for after an outage is too old, the API server says (410 Gone); it lists.
func TestCompacted(t *testing.T) {
	w := apart(t, "compacted", "compacted")
	w.serve()
	old := w.create("old").add().running(true)
	fresh := w.create("new").add().running(false)
	w.goesTo("old")
	w.settle()
	w.must(w.proxy.close())
	w.problem("refused")
	for i := range 10 {
		fresh.running(i%2 == 0)
	}
	plane.KillAPIServer() // what it remembers begins anew
	w.must(plane.StartAPIServer(w.patience()))
	old.running(false)
	fresh.running(true)
	watches := w.proxy.count("watch")
	w.must(w.proxy.open())
	w.goesTo("new")
	w.watchesThrough(watches)
	w.must(lab.Eventually(w.patience(), func() error {
		if w.proxy.wasGone() == 0 {
			return errors.New("no watch was answered 410 Gone")
		}
		return nil
	}))
	w.mended()
	old.running(true)
	fresh.running(false)
	w.goesTo("old")
}

// TestEmptyEtcd: an API server that has lost all of its data knows no pod of the node. Those whose sandbox stands serve on,
// also where the API alone knew their labels; what only the API knew is gone.
func TestEmptyEtcd(t *testing.T) {
	w := serving(t)
	w.agent.Kill()
	w.create("old").add().running(true)
	serving := w.create("echo").add().running(true) // recorded without labels
	w.start()
	w.goesTo("echo")
	w.settle()
	before, err := plane.Requests("watch")
	w.must(err)
	w.must(plane.Wipe(w.patience()))
	w.watchesAgain(before)
	w.create("marker", labelled("marker"))
	w.staysWith("echo")
	w.agent.Kill()
	w.start()
	w.staysWith("echo")
	fresh := w.unheardOf("unheard").add()
	w.goesTo("unheard")
	fresh.del()
	w.goesTo("echo")
	// The pods are made anew.
	w.create("new").add().running(true)
	w.goesTo("new")
	serving.del()
	w.staysWith("new")
}
