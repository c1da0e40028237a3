package lab

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"
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
