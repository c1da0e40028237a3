// Command compare measures, on a whole cluster, what an update of a target costs the clients of a magic IP, and in the
// same run what it costs those of a Service with internalTrafficPolicy: Local for the same pods: `make compare`.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() { os.Exit(run()) }

func run() (code int) {
	times := flag.Int("runs", 3, "how often each update is measured, on each node")
	only := flag.String("only", "", "measure the updates alone whose `NAME` contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	if err := compare(ctx, *times, *only, log); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		return 1
	}
	return 0
}

const restFor = time.Minute

// still measures what no update is needed for.
func (w *world) still(ctx context.Context, restFor time.Duration) ([]row, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute+2*restFor)
	defer cancel()
	var absences []absence
	for _, n := range w.Nodes {
		some, err := w.absent(ctx, n)
		if err != nil {
			return nil, err
		}
		absences = append(absences, some...)
	}
	var rests []rest
	for _, n := range w.Nodes {
		r, err := w.atRest(ctx, n, restFor)
		if err != nil {
			return nil, err
		}
		rests = append(rests, r)
	}
	return append(absentRows(absences), restRows(rests, len(w.Nodes))...), nil
}

func compare(ctx context.Context, times int, only string, log func(string, ...any)) (err error) {
	limited, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	w, err := newWorld(limited, "compare", log)
	if err != nil {
		return err
	}
	defer func() {
		if errClose := w.Close(); err == nil {
			err = errClose
		}
	}()
	log("the cluster is up, and the chart is installed")
	var rows []row
	for _, u := range updates() {
		if !strings.Contains(u.name, only) {
			continue
		}
		var all []measured
		for _, n := range w.Nodes {
			limited, cancel := context.WithTimeout(ctx, time.Duration(times+1)*time.Minute)
			defer cancel()
			ms, err := w.runs(limited, n, u, times)
			if err != nil {
				return err
			}
			all = append(all, ms...)
		}
		rows = append(rows, rowsOf(u, all)...)
		if u.first {
			rows = append(rows, ruledRow(u, all))
		}
	}
	if only == "" {
		more, err := w.still(ctx, restFor)
		if err != nil {
			return err
		}
		rows = append(rows, more...)
	}
	return printTable(os.Stdout, rows)
}
