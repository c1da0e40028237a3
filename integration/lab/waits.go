package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Waits watches for how long processes cannot go on: they are ready to run and have no processor, or the kernel is busy with a change of nftables rules by
// others. An agent has no more of a processor than what its pod asks for, so that it may wait where a witness does not.
type Waits struct {
	processes []string // their directories in /proc
	stop      context.CancelFunc
	found     chan Outcomes
}

const waitsEvery = 10 * time.Millisecond

// WatchWaits watches the processes of the node whose command lines match a pattern of pgrep -f and that run now. It ends with the context at the latest.
func (n *Node) WatchWaits(ctx context.Context, pattern string) (*Waits, error) {
	printed, err := n.Run(ctx, "pgrep", "-f", pattern)
	if err != nil {
		return nil, err
	}
	w := &Waits{found: make(chan Outcomes, 1)}
	for _, pid := range strings.Fields(printed) {
		w.processes = append(w.processes, n.Path("/proc/"+pid))
	}
	ctx, w.stop = context.WithCancel(ctx)
	go w.run(ctx)
	return w, nil
}

// End returns the waits: each began at Sent and took as long as it says.
func (w *Waits) End() Outcomes {
	w.stop()
	return <-w.found
}

func (w *Waits) run(ctx context.Context) {
	var all Outcomes
	before, _ := w.look()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			w.found <- all
			return
		case <-time.After(waitsEvery):
		}
		waited, behindOthers := w.look()
		now := time.Now()
		var most time.Duration // a thread counts its wait when that is over
		if behindOthers {      // since when is not known, but by the look before
			most = now.Sub(last)
		}
		for thread, total := range waited {
			most = max(most, total-before[thread])
		}
		all = addWait(all, last, now, most)
		before, last = waited, now
	}
}

// addWait adds a wait that was over between two looks, or continues the one before, where it ended no sooner than this one began: of many short waits
// none becomes a long one.
func addWait(all Outcomes, last, now time.Time, waited time.Duration) Outcomes {
	if waited < time.Millisecond {
		return all
	}
	from := last.Add(-max(0, waited-now.Sub(last)))
	until := from.Add(waited)
	if i := len(all) - 1; i >= 0 && !from.After(all[i].Sent.Add(all[i].Took)) {
		if all[i].Sent.Before(from) {
			from = all[i].Sent
		}
		all = all[:i]
	}
	return append(all, Outcome{Sent: from, Took: until.Sub(from)})
}

// look returns how long each thread has waited for a processor so far: the second number (Documentation/scheduler/sched-stats.rst of the kernel), in
// nanoseconds. behindOthers: one of them waits now for changes of others.
func (w *Waits) look() (waited map[string]time.Duration, behindOthers bool) {
	waited = map[string]time.Duration{}
	for _, process := range w.processes {
		tasks, _ := filepath.Glob(process + "/task/*")
		for _, task := range tasks {
			behindOthers = behindOthers || waitsBehindOthers(task)
			data, err := os.ReadFile(task + "/schedstat")
			if err != nil {
				continue // it has ended
			}
			var ran, total int64
			if _, err := fmt.Sscan(string(data), &ran, &total); err == nil {
				waited[task] = time.Duration(total)
			}
		}
	}
	return waited, behindOthers
}

// waitsBehindOthers reports whether a thread, by its directory in /proc, waits to change nftables rules. The kernel lets one process of a network namespace
// do that at a time, and one that ends keeps the others waiting until it has freed what was removed (nft_rcv_nl_event): the busier the machine, the longer.
func waitsBehindOthers(task string) bool {
	function, _ := os.ReadFile(task + "/wchan") // what it sleeps in: proc(5)
	return strings.HasPrefix(string(function), "nf_tables_")
}

// stall is how long a witness, who asks a server that nothing happens to, waits for its answers only where the machine has no time for client or
// server.
const (
	stall  = 20 * time.Millisecond
	around = 100 * time.Millisecond
)

// Stalled reports whether the witness has waited too, then or shortly before or after: a machine that has no time for
// client or server has none for the agent. The witness may be the agent itself, by its waits.
func (o Outcome) Stalled(witness Outcomes) bool {
	for _, w := range witness {
		if w.Took >= stall && w.Sent.Add(-around).Before(o.Sent.Add(o.Took)) && o.Sent.Before(w.Sent.Add(w.Took+around)) {
			return true
		}
	}
	return false
}
