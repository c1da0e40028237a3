// Command bench measures what a magic IP costs: the plugin beside its upstream peers, the time from a pod's
// record to the rule in the kernel, and the data path beside the pod's own address. `make bench` runs it.
//
// Everything happens in nodes made of namespaces (see integration/lab), on whatever else the machine has to
// do: what is compared takes turns within one run, and the ratio of a turn is what counts. A target that is
// missed is printed as MISSED and is no failure; the exit status tells whether the measurement succeeded.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

func main() { os.Exit(run()) }

// part is one of the things that are measured. It returns tables with what one must know to read it.
type part struct {
	name    string
	measure func(context.Context, rounds) ([]table, error)
}

// rounds says how often things are repeated.
type rounds struct {
	plugin int // turns of all plugins, ADD and DEL
	rules  int // cycles of four changes
	path   int // of one block for each way, per kind of traffic
	// of two changes for each number of magic IPs, and of one block for each
	scale, scalePath int
	flows            int // sweeps of each kind
	storms           int // starts of all pods of a node
}

func run() int {
	short := flag.Bool("short", false, "a tenth of the repetitions: see that it works, do not quote the figures")
	only := flag.String("only", "", "measure one `PART`: plugin, rules, path, routes, scale, flows or storm")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()

	count := rounds{plugin: 1000, rules: 100, path: 1000, scale: 100, scalePath: 300, flows: 20, storms: 3}
	if *short {
		count = rounds{plugin: 100, rules: 10, path: 100, scale: 5, scalePath: 30, flows: 5, storms: 1}
	}
	parts := []part{{"plugin", measurePlugins}, {"rules", measureRules}, {"path", measurePath}, {"routes", measureRoutes}, {"scale", measureScale}, {"flows", measureFlows}, {"storm", measureStorm}}
	if *only != "" {
		parts = slices.DeleteFunc(parts, func(p part) bool { return p.name != *only })
	}
	if err := report(ctx, os.Stdout, parts, count); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		return 1
	}
	return 0
}

func report(ctx context.Context, w io.Writer, parts []part, count rounds) error {
	if len(parts) == 0 {
		return errors.New("-only: there are the parts plugin, rules, path, scale, flows and storm")
	}
	header, err := describe(ctx)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w, header); err != nil {
		return err
	}
	started := time.Now()
	missed := 0
	for _, p := range parts {
		measured, err := p.measure(ctx, count)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		for _, t := range measured {
			if err := t.print(w); err != nil {
				return err
			}
			missed += t.missed()
		}
	}
	_, err = fmt.Fprintf(w, "\nMeasured in %s; %d targets missed.\n", time.Since(started).Round(time.Second), missed)
	return err
}
