// Command compare measures, on whole clusters, what an update of a target costs the clients of a magic IP, and in the same run what it
// costs those of other ways to a pod of the node: `make compare`. It writes raw data; integration/plots makes the report of that.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func main() { os.Exit(run()) }

func run() int {
	names := flag.String("parts", "", "measure these `PARTS` alone: "+partNames())
	missing := flag.Bool("missing", false, "measure only what the data has not")
	runs := flag.Float64("runs", 1, "how often each update is measured, as a `MULTIPLE` of the usual")
	data := flag.String("data", "docs/benchmarks/data", "`DIRECTORY` of the data, from the root of the module")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	began := time.Now()
	c := comparison{scale: scale{runs: *runs, rest: time.Minute, rounds: 200}}
	c.log = func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1fs "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	chosen, err := selected(*names)
	if err == nil {
		err = c.prepare(*data)
	}
	if err == nil {
		err = c.compare(ctx, chosen, *missing)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		return 1
	}
	return 0
}

// comparison measures parts, those of a setup on one cluster.
type comparison struct {
	scale scale
	dir   string
	log   func(string, ...any)

	world *world // nil: there is no cluster
}

func (c *comparison) prepare(dir string) error {
	if filepath.IsAbs(dir) {
		c.dir = dir
		return nil
	}
	root, err := lab.ModuleRoot()
	c.dir = filepath.Join(root, dir)
	return err
}

// compare measures and saves part by part. One that fails is tried once more, on another cluster, and does not keep the others from
// being measured.
func (c *comparison) compare(ctx context.Context, chosen []part, missing bool) (err error) {
	defer func() { err = errors.Join(err, c.leave()) }()
	if missing {
		has, err := saved(c.dir)
		if err != nil {
			return err
		}
		chosen = slices.DeleteFunc(chosen, func(p part) bool { return has[p.name] })
	}
	var failed []error
	for _, p := range chosen {
		began := time.Now()
		err := c.part(ctx, p)
		if err != nil && ctx.Err() == nil {
			c.log("%s: %v; it is tried again", p.name, err)
			err = errors.Join(c.leave(), c.part(ctx, p))
		}
		if ctx.Err() != nil {
			return errors.Join(append(failed, context.Cause(ctx))...)
		}
		if err != nil {
			c.log("%s: failed: %v", p.name, err)
			failed = append(failed, fmt.Errorf("%s: %w", p.name, err), c.leave())
			continue
		}
		c.log("%s is measured, after %v", p.name, time.Since(began).Round(time.Second))
	}
	return errors.Join(failed...)
}

func (c *comparison) part(ctx context.Context, p part) error {
	if c.world != nil && c.world.name != p.setup {
		if err := c.leave(); err != nil {
			return err
		}
	}
	if c.world == nil {
		s := setups()[p.setup]
		s.name = p.setup
		limited, cancel := lab.Patience(ctx, 5*time.Minute)
		defer cancel()
		w, err := newWorld(limited, s, c.log)
		if err != nil {
			return err
		}
		c.world = w
	}
	about, err := c.world.about(ctx)
	if err != nil {
		return err
	}
	before := loadAverage()
	r, err := p.measure(ctx, c.world, c.scale)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, c.world.LogTails())
	}
	line := []any{p.name, time.Now().UTC().Format(time.DateOnly)}
	r.add(partsTable, append(append(line, about...), before, loadAverage())...)
	return r.save(c.dir, p.name)
}

func (c *comparison) leave() error {
	if c.world == nil {
		return nil
	}
	w := c.world
	c.world = nil
	return w.Close()
}

// about is what is measured and where: without it the figures mean nothing.
func (w *world) about(ctx context.Context) ([]any, error) {
	kubernetes, err := w.Admin.Discovery().ServerVersion()
	if err != nil {
		return nil, err
	}
	nodes, err := w.nodeInfos(ctx)
	if err != nil {
		return nil, err
	}
	return []any{kubernetes.GitVersion, strings.Join(nodes, " and "), processor()}, nil
}
