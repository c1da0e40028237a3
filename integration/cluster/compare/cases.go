package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// update is a way in which the target of a node is replaced, or comes.
type update struct {
	name    string
	target  target
	replace func(ctx context.Context, w *world, n *whole.Node, pod string) error
	first   bool // there is no target before
	limits  limits
}

// limits are what a magic IP may cost, besides that requests may fail only while no process listens.
type limits struct {
	excess time.Duration // 0: no limit
	none   bool          // no request fails at all
}

func rollingUpdate(ctx context.Context, w *world, n *whole.Node, _ string) error {
	return w.update(ctx, n)
}

func forceDelete(ctx context.Context, w *world, _ *whole.Node, pod string) error {
	_, err := w.Kubectl(ctx, "delete", "pod", "--namespace", targets, "--force", "--grace-period=0", "--wait=false", pod)
	return err
}

func firstPod(ctx context.Context, w *world, n *whole.Node, _ string) error {
	return w.create(ctx, n, target{})
}

const excessLimit = 10 * time.Millisecond

func updates() []update {
	return []update{
		{name: "rolling update", replace: rollingUpdate, limits: limits{excess: excessLimit}},
		{name: "maxSurge 1", target: target{surge: true}, replace: rollingUpdate, limits: limits{none: true}},
		{name: "maxSurge 1, server drains 1.5 s", target: target{surge: true, drain: 1500 * time.Millisecond}, replace: rollingUpdate, limits: limits{none: true}},
		{name: "force delete", replace: forceDelete, limits: limits{excess: excessLimit}},
		{name: "first pod", first: true, replace: firstPod, limits: limits{excess: excessLimit}},
	}
}

// measured is one run of an update on a node.
type measured struct {
	update update
	node   *whole.Node
	costs  map[way]map[lab.Kind]cost
	// ruled is from the moment that the address of the new pod was in the rules until its process began; negative
	// where the process was first.
	ruled time.Duration
	// witness is the longest time that the witness has waited for an answer.
	witness time.Duration
	at      time.Time // of the replacement
	lives   []life
}

const (
	warmUp = time.Second
	// afterwards is for how long the clients go on: longer than kube-proxy takes.
	afterwards = 5 * time.Second
)

// run measures one replacement of what place has placed; or of nothing, where the update is the first pod.
func (w *world) run(ctx context.Context, n *whole.Node, u update, pod string) (m measured, fresh string, err error) {
	m = measured{update: u, node: n, costs: map[way]map[lab.Kind]cost{}}
	if err := w.answered(ctx, n, pod); err != nil {
		return m, "", err
	}
	sleep(ctx, warmUp) // for what the last one has left to do
	// Half-open flows to pods of earlier runs stay for two minutes behind kube-proxy, and take connections that use their
	// ports again: each run begins without. The command fails where there are none.
	_, _ = n.Exec(ctx, "conntrack", "--delete", "--orig-dst", serviceIP)
	rules, err := watchRules(n)
	if err != nil {
		return m, "", err
	}
	defer rules.close()
	loads := map[way]*load{}
	for _, by := range []way{byService, byMagicIP} {
		if loads[by], err = w.startLoad(ctx, n, by, kinds); err != nil {
			return m, "", err
		}
	}
	sleep(ctx, warmUp)
	m.at = time.Now()
	if err := u.replace(ctx, w, n, pod); err != nil {
		return m, "", err
	}
	fresh, err = w.settled(ctx, n, pod)
	if err != nil {
		return m, "", err
	}
	sleep(ctx, afterwards)
	if m.lives, err = lives(n); err != nil {
		return m, "", err
	}
	for by, load := range loads {
		outcomes, witness, err := load.stop(ctx)
		if err != nil {
			return m, "", err
		}
		m.witness = max(m.witness, witness.Longest())
		m.costs[by] = map[lab.Kind]cost{}
		for _, kind := range kinds {
			m.costs[by][kind] = assess(kind, outcomes[kind], witness, m.lives, fresh)
		}
	}
	records, err := recordsOf(n)
	if err != nil {
		return m, "", err
	}
	i := slices.IndexFunc(m.lives, func(l life) bool { return l.pod == fresh })
	j := slices.IndexFunc(records, func(r record) bool { return r.Name == fresh })
	if i < 0 || j < 0 {
		return m, "", fmt.Errorf("pod %s on %s: journals %+v, records %+v", fresh, n.Name, m.lives, records)
	}
	ruledAt, err := rules.first(records[j].IPs[0], m.at)
	m.ruled = m.lives[i].started.Sub(ruledAt)
	return m, fresh, err
}

// answered waits until both ways lead to this pod, and to no other: a Service may have an endpoint for a while that is
// gone, and take it every other time. With an empty name it waits for nothing.
func (w *world) answered(ctx context.Context, n *whole.Node, pod string) error {
	if pod == "" {
		return nil
	}
	namespace, err := w.clientNetNS(ctx, n)
	if err != nil {
		return err
	}
	for _, by := range []way{byService, byMagicIP} {
		for _, kind := range kinds {
			client := lab.Client{Kind: kind, From: namespace, To: by.address(), Timeout: lab.Loads[kind].Timeout}
			err := lab.Eventually(ctx, func() error {
				for range 10 {
					answer, err := n.Lab().Ask(ctx, client)
					if err != nil {
						return err
					}
					if answer.Server != pod {
						return fmt.Errorf("answered by %s, not by %s", answer.Server, pod)
					}
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("%s by %s: %w", kind, by, err)
			}
		}
	}
	return nil
}

// runs measures an update on a node as often as that.
func (w *world) runs(ctx context.Context, n *whole.Node, u update, times int) (all []measured, err error) {
	var pod string
	if !u.first {
		if pod, err = w.place(ctx, n, u.target); err != nil {
			return nil, err
		}
	}
	for range times {
		if u.first {
			if err := w.remove(ctx, n); err != nil {
				return nil, err
			}
		}
		m, fresh, err := w.run(ctx, n, u, pod)
		if err != nil {
			return nil, fmt.Errorf("%s on %s: %w", u.name, n.Name, err)
		}
		w.log("%s", m)
		all = append(all, m)
		if !u.first {
			pod = fresh
		}
	}
	return all, nil
}

// String is the run in a few lines.
func (m measured) String() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s on %s (%s), rule %v before the process, longest wait of the witness %v\n",
		m.update.name, m.node.Name, m.node.Runtime(), m.ruled.Round(time.Millisecond), m.witness.Round(100*time.Microsecond))
	for _, by := range []way{byService, byMagicIP} {
		for _, kind := range kinds {
			c := m.costs[by][kind]
			fmt.Fprintf(&text, "  %-8s %-14s %4d requests, %3d failed (%d while a process listened, %d cut, %d moved, %d stalled), gap %v, excess %v\n",
				by, kind, c.sent, c.failed, len(c.blamed), c.cut, c.moved, c.stalled, c.gap.Round(time.Millisecond), c.excess.Round(100*time.Microsecond))
			if by == byMagicIP {
				for _, o := range c.blamed {
					fmt.Fprintf(&text, "    sent %v, after %v: %v\n", o.Sent.Sub(m.at), o.Took, o.Err)
				}
			}
		}
	}
	for _, l := range m.lives[max(0, len(m.lives)-2):] {
		since := func(t time.Time) time.Duration {
			if t.IsZero() {
				return 0
			}
			return t.Sub(m.at).Round(100 * time.Microsecond)
		}
		fmt.Fprintf(&text, "    %s: started %v, listening %v, terminated %v, closed %v\n", l.pod, since(l.started), since(l.listening), since(l.terminated), since(l.closed))
	}
	return strings.TrimSuffix(text.String(), "\n")
}
