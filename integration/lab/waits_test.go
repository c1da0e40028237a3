package lab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
)

// TestAddWait: times are milliseconds; a wait is seen when it is over, by looks 10 ms apart, or later ones on a busy machine.
func TestAddWait(t *testing.T) {
	t.Parallel()
	start := time.Now()
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	type wait struct{ from, took int }
	var all Outcomes
	for _, look := range []struct{ last, now, waited int }{
		{100, 110, 0}, {110, 120, 10}, {120, 130, 10}, {130, 140, 0}, // one of 20
		{200, 210, 0}, {490, 500, 250}, {500, 510, 3}, // one of 253
		{600, 700, 40}, {700, 710, 3}, {710, 720, 3}, {720, 730, 3}, // each of its own
	} {
		all = addWait(all, at(look.last), at(look.now), time.Duration(look.waited)*time.Millisecond)
	}
	var got []wait
	for _, o := range all {
		got = append(got, wait{int(o.Sent.Sub(start) / time.Millisecond), int(o.Took / time.Millisecond)})
	}
	if diff := cmp.Diff([]wait{{110, 20}, {250, 253}, {600, 40}, {700, 3}, {710, 3}, {720, 3}}, got, cmp.AllowUnexported(wait{})); diff != "" {
		t.Error(diff)
	}
}

// TestWatchedWaits: a thread waits for a processor for 50 ms, does something, waits to change rules for 200 ms, and sleeps.
func TestWatchedWaits(t *testing.T) {
	t.Parallel()
	process := t.TempDir()
	task := filepath.Join(process, "task", "1")
	if err := os.MkdirAll(task, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(schedstat, wchan string) {
		for file, text := range map[string]string{"schedstat": schedstat, "wchan": wchan} {
			if err := os.WriteFile(filepath.Join(task, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("1000 2000 3", "0")
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		w := &Waits{processes: []string{process}, found: make(chan Outcomes, 1)}
		var ctx context.Context
		ctx, w.stop = context.WithCancel(t.Context())
		go w.run(ctx)
		time.Sleep(105 * time.Millisecond) // between two looks
		write("1000 50002000 4", "0")
		time.Sleep(200 * time.Millisecond)
		write("2000 50002000 5", "nf_tables_valid_genid")
		time.Sleep(200 * time.Millisecond)
		write("3000 50002000 6", "futex_do_wait")
		time.Sleep(200 * time.Millisecond)
		type wait struct{ From, Took time.Duration }
		var got []wait
		for _, o := range w.End() {
			got = append(got, wait{o.Sent.Sub(start), o.Took})
		}
		if diff := cmp.Diff([]wait{{60 * time.Millisecond, 50 * time.Millisecond}, {300 * time.Millisecond, 200 * time.Millisecond}}, got); diff != "" {
			t.Errorf("waits (-want +got):\n%s", diff)
		}
	})
}

// TestWaitsBehindOthers: beside nft processes that change rules, a thread that does so too is seen to wait for them.
func TestWaitsBehindOthers(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	other, err := node.Start("sh", "-c", `nft add table ip other; while :; do nft add chain ip other c '{ }'; nft add rule ip other c accept; nft delete chain ip other c; done`)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Kill)
	ended := errors.New("ended")
	ctx := patience(t)
	writing := make(chan error, 1)
	go func() {
		writing <- node.In(Host, func() error {
			conn, err := nftables.New(nftables.AsLasting())
			if err != nil {
				return err
			}
			defer func() { _ = conn.CloseLasting() }()
			for ctx.Err() == nil {
				conn.AddTable(&nftables.Table{Name: "own", Family: nftables.TableFamilyIPv4})
				if err := conn.Flush(); err != nil {
					return err
				}
			}
			return ended
		})
	}()
	err = Eventually(ctx, func() error {
		select {
		case err := <-writing:
			t.Fatal(err)
		default:
		}
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err == nil && !slices.ContainsFunc(tasks, waitsBehindOthers) {
			err = errors.New("no thread waits")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
