package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// absence is what clients meet on a node without a target, while another node has one.
type absence struct {
	node *whole.Node
	by   way
	kind lab.Kind
	sent int
	rate float64 // requests a second that came of it
	// refused is how long it took until a client was told, of those who were.
	refused []time.Duration
	// answered are requests that somebody answered.
	answered int
	// other is an error that is neither a refusal nor a time-out.
	other error
}

const (
	absentFor = 3 * time.Second
	// noticed is how long kube-proxy takes at most to notice that a pod is gone.
	noticed = 3 * time.Second
)

// absent measures a node without a target. Clients by magic IP also come at ten times the rate.
func (w *world) absent(ctx context.Context, n *whole.Node) (all []absence, err error) {
	if err := w.remove(ctx, n); err != nil {
		return nil, err
	}
	for _, other := range w.Nodes {
		if other != n {
			if _, err := w.place(ctx, other, target{}); err != nil {
				return nil, err
			}
		}
	}
	sleep(ctx, noticed)
	interval := lab.Loads[lab.NewConnection].Interval
	for _, every := range []time.Duration{interval, interval / 10} {
		for _, by := range []way{byService, byMagicIP} {
			if every != interval && by == byService {
				continue // there is nothing to be learned from more clients that hang
			}
			for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
				a, err := w.absentOnce(ctx, n, by, kind, every)
				if err != nil {
					return nil, err
				}
				w.log("%s", a)
				all = append(all, a)
			}
		}
	}
	return all, nil
}

func (w *world) absentOnce(ctx context.Context, n *whole.Node, by way, kind lab.Kind, every time.Duration) (absence, error) {
	a := absence{node: n, by: by, kind: kind}
	load, err := w.startLoad(ctx, n, by, []lab.Kind{kind}, "--every", every.String())
	if err != nil {
		return a, err
	}
	sleep(ctx, absentFor)
	outcomes, _, err := load.stop(ctx)
	if err != nil {
		return a, err
	}
	a.rate = float64(len(outcomes[kind])) / absentFor.Seconds()
	for _, o := range outcomes[kind] {
		a.sent++
		switch {
		case o.Err == nil:
			a.answered++
		case strings.Contains(o.Err.Error(), "connection refused"):
			a.refused = append(a.refused, o.Took)
		case !timedOut(o):
			a.other = errors.Join(a.other, o.Err)
		}
	}
	return a, nil
}

func (a absence) String() string {
	text := fmt.Sprintf("no pod on %s, %s, %s, %.0f a second: %d requests, %d refused, %d answered", a.node.Name, a.by, a.kind, a.rate, a.sent, len(a.refused), a.answered)
	if len(a.refused) > 0 {
		text += fmt.Sprintf("; refused after %v, p99 %v, at most %v", quantile(a.refused, 0.5), quantile(a.refused, 0.99), quantile(a.refused, 1))
	}
	if a.other != nil {
		text += "; " + a.other.Error()
	}
	return text
}
