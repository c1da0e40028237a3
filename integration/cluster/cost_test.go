//go:build e2e

package cluster

import (
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

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

// TestIdleAgent: an agent whose watch is healthy asks the API server for nothing, and of pods on other nodes it hears
// nothing.
func TestIdleAgent(t *testing.T) {
	t.Parallel()
	const during, updates = time.Minute, 200
	w := apart(t, "idle", "idle")
	w.serve()
	w.create("echo").add().running(true)
	w.goesTo("echo")
	elsewhere := w.create("elsewhere", func(p *corev1.Pod) { p.Spec.NodeName = "another" })
	w.settle()
	requests, bytes := w.proxy.total(), w.proxy.bytes.Load()
	for i := range updates {
		elsewhere.label("step", fmt.Sprint(i))
	}
	w.waitPolls(during)
	t.Logf("in %v of polling every second, beside %d changes of a pod on another node: %d requests, %d bytes from the API server",
		during, updates, w.proxy.total()-requests, w.proxy.bytes.Load()-bytes)
	if got := w.proxy.total(); got != requests {
		t.Errorf("%d requests of an idle agent", got-requests)
	}
	// A bookmark each minute, and the connection's own pings.
	if got := w.proxy.bytes.Load() - bytes; got > 2000 {
		t.Errorf("%d bytes to an idle agent", got)
	}
}
