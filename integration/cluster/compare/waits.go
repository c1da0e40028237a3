package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// waits watch for how long the agents of a node are ready to run and have no processor. On a busy machine that is longer than a witness waits, since
// the agents have no more than what the chart asks for.
type waits struct {
	processes []string // their directories in /proc
	stop      context.CancelFunc
	found     chan lab.Outcomes
}

const waitsEvery = 10 * time.Millisecond

// watchWaits starts it; it ends with the context at the latest.
func watchWaits(ctx context.Context, n *whole.Node) (*waits, error) {
	printed, err := n.Exec(ctx, "pgrep", "-f", agentPattern)
	if err != nil {
		return nil, err
	}
	w := &waits{found: make(chan lab.Outcomes, 1)}
	for _, pid := range strings.Fields(printed) {
		w.processes = append(w.processes, n.Path("/proc/"+pid))
	}
	ctx, w.stop = context.WithCancel(ctx)
	go w.run(ctx)
	return w, nil
}

// end returns the waits: each began at Sent and took as long as it says.
func (w *waits) end() lab.Outcomes {
	w.stop()
	return <-w.found
}

func (w *waits) run(ctx context.Context) {
	var all lab.Outcomes
	before, last := w.waited(), time.Now()
	for {
		select {
		case <-ctx.Done():
			w.found <- all
			return
		case <-time.After(waitsEvery):
		}
		waited, now := w.waited(), time.Now()
		var most time.Duration // a thread counts its wait when that is over
		for thread, total := range waited {
			most = max(most, total-before[thread])
		}
		all = addWait(all, last, now, most)
		before, last = waited, now
	}
}

// addWait adds a wait that was over between two looks, or continues the one before.
func addWait(all lab.Outcomes, last, now time.Time, waited time.Duration) lab.Outcomes {
	if waited < time.Millisecond {
		return all
	}
	from := last.Add(-max(0, waited-now.Sub(last)))
	until := from.Add(waited)
	if i := len(all) - 1; i >= 0 && !from.After(all[i].Sent.Add(all[i].Took+waitsEvery)) {
		if all[i].Sent.Before(from) {
			from = all[i].Sent
		}
		all = all[:i]
	}
	return append(all, lab.Outcome{Sent: from, Took: until.Sub(from)})
}

// waited is how long each thread has waited so far: the second number (Documentation/scheduler/sched-stats.rst of the kernel), in nanoseconds.
func (w *waits) waited() map[string]time.Duration {
	all := map[string]time.Duration{}
	for _, process := range w.processes {
		files, _ := filepath.Glob(process + "/task/*/schedstat")
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				continue // it has ended
			}
			var ran, waited int64
			if _, err := fmt.Sscan(string(data), &ran, &waited); err == nil {
				all[file] = time.Duration(waited)
			}
		}
	}
	return all
}
