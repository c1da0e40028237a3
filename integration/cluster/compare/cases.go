package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// update is a way in which the target of a node is replaced, or comes.
type update struct {
	part    string // its name in files and on the command line
	name    string
	target  target
	broken  fault // what does not work meanwhile; nil: all works
	replace func(ctx context.Context, w *world, n *whole.Node, pod string) error
	first   bool // there is no target before
	anew    bool // each run has a pod of its own before
	runs    int  // on all nodes together, in a full comparison
	// none: a magic IP loses no request at all; else requests may fail only while no process listens.
	none bool
}

// fault breaks something until it is mended.
type fault func(ctx context.Context, w *world, n *whole.Node) (mend func() error, err error)

// mendAfter is how long after the new process listens what was broken is mended.
const mendAfter = 3 * time.Second

func rollingUpdate(ctx context.Context, w *world, n *whole.Node, _ string) error {
	return w.update(ctx, n)
}

func forceDelete(ctx context.Context, w *world, _ *whole.Node, pod string) error {
	_, err := w.Kubectl(ctx, "delete", "pod", "--namespace", targets, "--force", "--grace-period=0", "--wait=false", pod)
	return err
}

func firstPod(ctx context.Context, w *world, n *whole.Node, _ string) error {
	return w.create(ctx, n, target{hostPort: true})
}

// killSandbox ends the first process of the pod's sandbox: kubelet makes another, with another address, and asks nobody.
func killSandbox(ctx context.Context, _ *world, n *whole.Node, pod string) error {
	printed, err := n.Exec(ctx, "sh", "-ec", `for p in $(pgrep -x echo); do
	[ "$(tr '\0' ' ' </proc/$p/cmdline)" != "/echo pause " ] || [ "$(nsenter --target $p --uts hostname)" != "$1" ] || echo $p
done`, "sh", pod)
	if err != nil {
		return err
	}
	pids := strings.Fields(printed)
	if len(pids) != 1 {
		return fmt.Errorf("sandboxes of pod %s: processes %q", pod, pids)
	}
	_, err = n.Exec(ctx, "kill", "-KILL", pids[0])
	return err
}

// componentsDown freezes what makes the rules of the node: agents, kube-proxy and the poller.
func componentsDown(ctx context.Context, w *world, n *whole.Node) (mend func() error, err error) {
	agents, err := n.Exec(ctx, "pgrep", "-f", agentPattern)
	if err != nil {
		return nil, err
	}
	pids := strings.Fields(agents)
	if _, err := n.Exec(ctx, "kill", append([]string{"-STOP"}, pids...)...); err != nil {
		return nil, err
	}
	w.pollers[n].paused.Store(true)
	if err := n.Component(whole.KubeProxy).Freeze(); err != nil {
		return nil, err
	}
	return func() error {
		_, err := n.Exec(ctx, "kill", append([]string{"-CONT"}, pids...)...)
		w.pollers[n].paused.Store(false)
		return errors.Join(err, n.Component(whole.KubeProxy).Thaw())
	}, nil
}

// apiDown freezes the API server: its connections stay open, and nobody answers.
func apiDown(_ context.Context, w *world, _ *whole.Node) (mend func() error, err error) {
	return w.ThawAPIServer, w.FreezeAPIServer()
}

// underLoad has processes on the node that take all processor time that they get, as many as there are processors.
func underLoad(_ context.Context, _ *world, n *whole.Node) (mend func() error, err error) {
	var all []*lab.Process
	mend = func() error {
		for _, process := range all {
			process.Kill()
		}
		return nil
	}
	for range runtime.NumCPU() {
		process, err := n.Lab().Start("sh", "-c", "while :; do :; done")
		if err != nil {
			return nil, errors.Join(err, mend())
		}
		all = append(all, process)
	}
	return mend, nil
}

func updates() []update {
	alone, surge := target{hostPort: true}, target{surge: true}
	drain, slow := surge, surge
	drain.drain, slow.delay = 1500*time.Millisecond, 30*time.Millisecond
	return []update{
		{part: "rolling", name: "rolling update", target: alone, replace: rollingUpdate, runs: 10},
		{part: "surge", name: "maxSurge 1, stops at once", target: surge, replace: rollingUpdate, runs: 20, none: true},
		{part: "surge-slow", name: "maxSurge 1, stops at once, answers take 30 ms", target: slow, replace: rollingUpdate, runs: 20, none: true},
		{part: "surge-drain", name: "maxSurge 1, drains 1.5 s", target: drain, replace: rollingUpdate, runs: 20, none: true},
		{part: "force", name: "force delete", target: alone, replace: forceDelete, runs: 6},
		{part: "first", name: "first pod", first: true, replace: firstPod, runs: 6},
		{part: "down", name: "rolling update, agent and kube-proxy down", target: alone, broken: componentsDown, replace: rollingUpdate, runs: 4},
		{part: "api", name: "new sandbox, API server down", target: alone, broken: apiDown, replace: killSandbox, anew: true, runs: 4},
		{part: "load", name: "rolling update, node under load", target: alone, broken: underLoad, replace: rollingUpdate, runs: 4},
	}
}

// mendable reports whether an update is measured from when what was broken works again: where clients can be served no sooner.
func (u update) mendable() bool { return u.part == "down" || u.part == "api" }

// measured is one run of an update on a node.
type measured struct {
	update update
	node   *whole.Node
	costs  map[peer]map[lab.Kind]cost
	// alone is for how long no process listened; zero where one always did.
	alone map[lab.Kind]time.Duration
	// ruled is from the moment that the address of the new pod was in the rules until its process began; negative
	// where the process was first.
	ruled time.Duration
	// witness is the longest time that the witness has waited for an answer, after the replacement.
	witness time.Duration
	// waits are when the agents could not go on.
	waits lab.Outcomes
	// dropped are the packets that the machine's processors had no room for meanwhile, whoever they were of.
	dropped uint64
	// decisions are what the agents have said of endpoints meanwhile, where clients of theirs failed while a process listened.
	decisions []string
	at        time.Time // of the replacement
	lives     map[lab.Kind][]life
}

const (
	warmUp = 500 * time.Millisecond
	// afterwards is for how long the clients go on: longer than kube-proxy takes.
	afterwards = 5 * time.Second
)

// run measures one replacement of what place has placed; or of nothing, where the update is the first pod.
func (w *world) run(ctx context.Context, n *whole.Node, u update, pod string) (m measured, fresh string, err error) {
	m = measured{update: u, node: n, costs: map[peer]map[lab.Kind]cost{}, alone: map[lab.Kind]time.Duration{}}
	if err := w.answered(ctx, n, u, pod); err != nil {
		return m, "", err
	}
	if err := forgetFlows(ctx, n); err != nil { // of those who asked too early
		return m, "", err
	}
	rules, err := watchRules(n)
	if err != nil {
		return m, "", err
	}
	defer rules.close()
	of := w.kindsBy(u.target.surge)
	loads, err := w.startLoads(ctx, n, of)
	if err != nil {
		return m, "", err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	waits, err := n.Lab().WatchWaits(ctx, agentPattern)
	if err != nil {
		return m, "", err
	}
	sleep(ctx, warmUp)
	droppedBefore, err := droppedByProcessors()
	if err != nil {
		return m, "", err
	}
	mended, err := w.replace(ctx, n, u, pod, &m)
	if err != nil {
		return m, "", err
	}
	if fresh, err = w.settled(ctx, n, pod, u.replaces()); err != nil {
		return m, "", err
	}
	sleep(ctx, w.afterwards())
	if m.lives, err = allLives(n); err != nil {
		return m, "", err
	}
	m.waits = waits.End()
	outcomes, witness, err := loads.stop(ctx)
	if err != nil {
		return m, "", err
	}
	if m.dropped, err = droppedByProcessors(); err != nil {
		return m, "", err
	}
	m.dropped -= droppedBefore
	m.witness = longestOf(witness, m.at)
	for _, kind := range w.kinds {
		all := m.lives[kind]
		last := all[len(all)-1]
		if last.pod != fresh {
			return m, "", fmt.Errorf("pod %s on %s: the last of the %s servers is %+v", fresh, n.Name, kind, last)
		}
		if len(all) > 1 && !u.first {
			m.alone[kind] = max(0, last.listening.Sub(all[len(all)-2].closed))
		}
		for p, byKind := range outcomes {
			if slices.Contains(of[p], kind) {
				if m.costs[p] == nil {
					m.costs[p] = map[lab.Kind]cost{}
				}
				m.costs[p][kind] = assess(byKind[kind], witness, servers{lives: all, fresh: last.server, since: mended, delay: u.target.delay})
				if p.magic() && len(m.costs[p][kind].blamed) > 0 && m.decisions == nil {
					m.decisions = decisions(n, m.at)
				}
			}
		}
	}
	if !slices.Contains(w.peers, magicNFTables) {
		return m, fresh, nil
	}
	records, err := recordsOf(n)
	if err != nil {
		return m, "", err
	}
	i := slices.IndexFunc(records, func(r record) bool { return r.Name == fresh })
	if i < 0 {
		return m, "", fmt.Errorf("pod %s on %s: records %+v", fresh, n.Name, records)
	}
	ruledAt, err := rules.first(records[i].IPs[0], m.at)
	echo := m.lives[lab.NewConnection]
	m.ruled = echo[len(echo)-1].started.Sub(ruledAt)
	return m, fresh, err
}

// longestOf is the longest that was sent after a moment.
func longestOf(outcomes lab.Outcomes, after time.Time) (longest time.Duration) {
	for _, o := range outcomes {
		if o.Sent.After(after) {
			longest = max(longest, o.Took)
		}
	}
	return longest
}

// decisions are the lines about endpoints that the agents of a node have logged since a moment.
func decisions(n *whole.Node, since time.Time) (lines []string) {
	logs, _ := filepath.Glob(n.Path("/var/log/pods/*_" + release + "*/agent/*.log"))
	for _, log := range logs {
		text, err := os.ReadFile(log)
		if err != nil {
			lines = append(lines, err.Error())
		}
		for line := range strings.Lines(string(text)) {
			stamp, rest, _ := strings.Cut(line, " ") // as the runtime writes it: time, stream, tag, line
			_, said, found := strings.Cut(rest, " msg=")
			at, err := time.Parse(time.RFC3339Nano, stamp)
			if err == nil && found && strings.Contains(said, "magicIP=") && at.After(since) {
				lines = append(lines, fmt.Sprintf("%s: %v: %s", filepath.Base(filepath.Dir(filepath.Dir(log))), at.Sub(since).Round(100*time.Microsecond), strings.TrimSpace(said)))
			}
		}
	}
	return lines
}

// forgetFlows: half-open flows to pods of earlier runs, or to none, stay for two minutes behind kube-proxy and the poller, and take
// connections that use their ports again. Each run begins without.
func forgetFlows(ctx context.Context, n *whole.Node) error {
	for _, address := range []string{localAddress, sameNodeAddress, pollerAddress} {
		for {
			_, err := n.Exec(ctx, "conntrack", "--delete", "--orig-dst", address)
			if err == nil || strings.Contains(err.Error(), " 0 flow entries") { // it fails where there are none
				break
			}
			if !strings.Contains(err.Error(), "doesn't exist") { // it ends at one that has gone since it was listed
				return err
			}
		}
	}
	return nil
}

// replaces reports whether the update brings a pod of another name.
func (u update) replaces() bool { return u.part != "api" }

// afterwards is how long the clients go on after an update.
func (w *world) afterwards() time.Duration {
	if slices.Contains(w.peers, poller) {
		return pollEvery + 500*time.Millisecond
	}
	return afterwards
}

// replace breaks what is to be broken, replaces the pod, waits until the new servers listen, and mends; it returns when that was, for
// updates that are measured from then on.
func (w *world) replace(ctx context.Context, n *whole.Node, u update, pod string, m *measured) (mended time.Time, err error) {
	before, err := allLives(n)
	if err != nil {
		return mended, err
	}
	mend := func() error { return nil }
	if u.broken != nil {
		if mend, err = u.broken(ctx, w, n); err != nil {
			return mended, err
		}
		sleep(ctx, warmUp)
	}
	m.at = time.Now()
	if err := u.replace(ctx, w, n, pod); err != nil {
		return mended, errors.Join(err, mend())
	}
	limited, cancel := lab.Patience(ctx, time.Minute)
	defer cancel()
	err = lab.Eventually(limited, func() error {
		now, err := allLives(n)
		for _, kind := range w.kinds {
			if len(now[kind]) == len(before[kind]) || now[kind][len(now[kind])-1].listening.IsZero() {
				return errors.Join(err, fmt.Errorf("%s on %s: no new server for %s listens", u.name, n.Name, kind))
			}
		}
		return err
	})
	if err != nil || u.broken == nil {
		return mended, errors.Join(err, mend())
	}
	sleep(ctx, mendAfter)
	if u.mendable() {
		mended = time.Now()
	}
	return mended, mend()
}

// answered waits until clients of all peers are answered by this pod, and by no other: a Service may have an endpoint for a while that
// is gone, and take it every other time. With an empty name it waits for nothing.
func (w *world) answered(ctx context.Context, n *whole.Node, u update, pod string) error {
	if pod == "" {
		return nil
	}
	if err := forgetFlows(ctx, n); err != nil {
		return err
	}
	of := w.kindsBy(u.target.surge)
	ctx, cancel := lab.Patience(ctx, time.Minute)
	defer cancel()
	return lab.Eventually(ctx, func() error {
		loads, err := w.startLoads(ctx, n, of)
		if err != nil {
			return err
		}
		sleep(ctx, warmUp)
		outcomes, _, err := loads.stop(ctx)
		if err != nil {
			return err
		}
		for p, kinds := range of {
			for _, kind := range kinds {
				o := outcomes[p][kind]
				for _, last := range o[max(0, len(o)-10):] {
					if last.Err != nil || !strings.HasPrefix(last.Server, pod+".") {
						return fmt.Errorf("%s by %s: answered by %q, not by %s: %w", kind, p, last.Server, pod, last.Err)
					}
				}
				if len(o) == 0 {
					return fmt.Errorf("%s by %s: nothing was sent", kind, p)
				}
			}
		}
		return nil
	})
}

// kindsBy are the kinds of client that each peer has in an update.
func (w *world) kindsBy(surge bool) map[peer][]lab.Kind {
	of := map[peer][]lab.Kind{}
	for _, p := range w.peers {
		if kinds := p.kindsOf(w.kinds, surge); len(kinds) > 0 {
			of[p] = kinds
		}
	}
	return of
}

// runs measures an update on a node as often as that.
func (w *world) runs(ctx context.Context, n *whole.Node, u update, times int) (all []measured, err error) {
	var pod string
	if !u.first && !u.anew {
		if pod, err = w.place(ctx, n, u.target); err != nil {
			return nil, err
		}
	}
	for range times {
		if u.first {
			err = w.remove(ctx, n)
		} else if u.anew {
			pod, err = w.place(ctx, n, u.target)
		}
		if err != nil {
			return nil, err
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
	fmt.Fprintf(&text, "%s on %s (%s), rule %v before the process, longest wait of the witness %v, of the agents %v, %d packets dropped by the processors\n",
		m.update.name, m.node.Name, m.node.Runtime(), m.ruled.Round(time.Millisecond), m.witness.Round(100*time.Microsecond), longestOf(m.waits, m.at).Round(100*time.Microsecond), m.dropped)
	for _, p := range slices.Sorted(maps.Keys(m.costs)) {
		for _, kind := range allKinds() {
			c, has := m.costs[p][kind]
			if !has {
				continue
			}
			excess := c.excess.Round(100 * time.Microsecond).String()
			if c.excess == never {
				excess = "never"
			}
			fmt.Fprintf(&text, "  %-22.22s %-14s %4d requests, %3d failed (%d unserved, %d while a process listened, %d cut, %d stalled), %d elsewhere, gap %v, excess %s\n",
				p, kind, c.sent, c.failed, c.unserved, len(c.blamed), c.cut, c.stalled, c.elsewhere, c.gap.Round(time.Millisecond), excess)
			if p.magic() {
				for _, o := range c.blamed[:min(len(c.blamed), 5)] {
					fmt.Fprintf(&text, "    sent %v, after %v: %v\n", o.Sent.Sub(m.at), o.Took, o.Err)
				}
			}
		}
	}
	for _, line := range m.decisions {
		fmt.Fprintf(&text, "    %s\n", line)
	}
	for _, kind := range []lab.Kind{lab.NewConnection, grpcStream} {
		lives := m.lives[kind]
		for _, l := range lives[max(0, len(lives)-2):] {
			since := func(t time.Time) time.Duration {
				if t.IsZero() {
					return 0
				}
				return t.Sub(m.at).Round(100 * time.Microsecond)
			}
			fmt.Fprintf(&text, "    %s, %s: started %v, listening %v, terminated %v, closed %v\n", kind, l.server, since(l.started), since(l.listening), since(l.terminated), since(l.closed))
		}
	}
	return strings.TrimSuffix(text.String(), "\n")
}
