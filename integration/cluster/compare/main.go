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

func run() int {
	runs := flag.Int("runs", 3, "how often each update is measured, on each node")
	only := flag.String("only", "", "measure nothing but the updates whose `NAME` contains this")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	if err := compare(ctx, extent{runs: *runs, everyNode: true, only: *only, rest: time.Minute, rounds: 200}, log); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		return 1
	}
	return 0
}

func compare(ctx context.Context, e extent, log func(string, ...any)) (err error) {
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
	before, err := w.describe(ctx)
	if err != nil {
		return err
	}
	log("%s", before)
	r, err := w.measure(ctx, e)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, w.LogTails())
	}
	fmt.Printf("%s, at the end %s\n\n", before, loadAverage())
	return printTable(os.Stdout, r.rows(len(w.Nodes)))
}

// describe says what is measured and where, in one line: without it the figures mean nothing.
func (w *world) describe(ctx context.Context) (string, error) {
	kubernetes, err := w.Admin.Discovery().ServerVersion()
	if err != nil {
		return "", err
	}
	nodes, err := w.nodeInfos(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s: Kubernetes %s, %s; %s; load at the start %s",
		time.Now().UTC().Format(time.DateOnly), kubernetes.GitVersion, strings.Join(nodes, " and "), processor(), loadAverage()), nil
}
