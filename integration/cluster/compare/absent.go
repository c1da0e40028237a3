package main

import (
	"context"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// absence is what clients meet on a node without a target, while another node has one.
type absence struct {
	node *whole.Node
	by   peer
	kind lab.Kind
	sent int
	rate float64 // requests a second that came of it
	// refused is how long it took until a client was told, of those who were.
	refused []time.Duration
	// timedOut and answered are requests that nobody and that somebody answered; other those with another error.
	timedOut, answered, other int
}

const (
	absentFor = 3 * time.Second
	// noticed is how long kube-proxy takes at most to notice that a pod is gone.
	noticed = 3 * time.Second
)

// absent measures a node without a target, by clients of all peers at once, and then those of a magic IP at ten times the rate.
func (w *world) absent(ctx context.Context, n *whole.Node) (all []absence, err error) {
	if err := w.remove(ctx, n); err != nil {
		return nil, err
	}
	for _, other := range w.Nodes {
		if other != n {
			if _, err := w.place(ctx, other, target{hostPort: true}); err != nil {
				return nil, err
			}
		}
	}
	sleep(ctx, max(noticed, w.afterwards()))
	interval := lab.Loads[lab.NewConnection].Interval
	for _, every := range []time.Duration{interval, interval / 10} {
		of := map[peer][]lab.Kind{}
		for _, p := range w.peers {
			if every == interval || p.magic() {
				of[p] = p.kindsOf([]lab.Kind{lab.NewConnection, lab.UDP}, false)
			}
		}
		loads, err := w.startLoads(ctx, n, of, "--every", every.String())
		if err != nil {
			return nil, err
		}
		sleep(ctx, absentFor)
		outcomes, _, err := loads.stop(ctx)
		if err != nil {
			return nil, err
		}
		for _, p := range w.peers {
			for _, kind := range of[p] {
				a := countAbsent(outcomes[p][kind])
				a.node, a.by, a.kind = n, p, kind
				w.log("no pod on %s, %s, %s: %d requests, %d refused, %d answered, %d timed out, %d other", n.Name, p, kind, a.sent, len(a.refused), a.answered, a.timedOut, a.other)
				all = append(all, a)
			}
		}
	}
	return all, nil
}

func countAbsent(outcomes lab.Outcomes) (a absence) {
	a.sent, a.rate = len(outcomes), float64(len(outcomes))/absentFor.Seconds()
	for _, o := range outcomes {
		switch {
		case o.Err == nil:
			a.answered++
		case strings.Contains(o.Err.Error(), "connection refused"):
			a.refused = append(a.refused, o.Took)
		case timedOut(o):
			a.timedOut++
		default:
			a.other++
		}
	}
	return a
}
