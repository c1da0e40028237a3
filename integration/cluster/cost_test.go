//go:build e2e

package cluster

import (
	"slices"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestReadinessLatency measures how long after a change of readiness clients meet the other pod.
func TestReadinessLatency(t *testing.T) {
	const flips = 50
	w := serving(t)
	w.create("old").add().running(true)
	w.goesTo("old")
	fresh := w.create("new").add()
	var took []time.Duration
	for i := range flips {
		ready := i%2 == 0
		want := map[bool]string{false: "old", true: "new"}[ready]
		fresh.running(ready)
		acknowledged := time.Now()
		w.must(lab.Eventually(w.patience(), func() error { return w.answeredBy(magic().Addr(), want) }))
		took = append(took, time.Since(acknowledged))
	}
	slices.Sort(took)
	t.Logf("from the API server's answer to the first request at the other pod, %d flips: p50 %v, p99 %v, max %v",
		flips, took[flips/2], took[flips*99/100], took[flips-1])
}

// TestIdleAgent: an agent whose watch is healthy asks the API server for nothing.
func TestIdleAgent(t *testing.T) {
	const during = 10 * time.Second
	w := serving(t)
	w.create("echo").add().running(true)
	w.goesTo("echo")
	w.settle()
	before := w.requests()
	w.waitPolls(during)
	t.Logf("requests in %v of polling every second: %d", during, w.requests()-before)
	if got := w.requests(); got != before {
		t.Errorf("%d requests of an idle agent", got-before)
	}
}

func (w *world) requests() (sum int) {
	w.Helper()
	for _, verb := range []string{"get", "list", "watch"} {
		n, err := plane.Requests(verb)
		w.must(err)
		sum += n
	}
	return sum
}
