//go:build e2e

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestCompare is the short form of the comparison: one run of each update on each node. It fails where the limit that
// is broken is no mere time. What the Service costs is not judged.
func TestCompare(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	w, err := newWorld(ctx, "compare", func(format string, args ...any) { t.Logf(format, args...) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.LogTails())
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	var rows []row
	for _, u := range updates() {
		t.Run(u.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			var all []measured
			for _, n := range w.Nodes {
				runs, err := w.runs(ctx, n, u, 1)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, runs...)
			}
			for _, m := range all {
				judge(t, m)
			}
			rows = append(rows, rowsOf(u, all)...)
		})
	}
	t.Run("nothing happens", func(t *testing.T) {
		more, err := w.still(t.Context(), 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, more...)
	})
	if err := printTable(os.Stdout, rows); err != nil {
		t.Error(err)
	}
}

// judge fails where requests by the magic IP failed although a process listened, or did not come back.
func judge(t *testing.T, m measured) {
	t.Helper()
	where := fmt.Sprintf("%s on %s", m.update.name, m.node.Name)
	for kind, c := range m.costs[byMagicIP] {
		if c.sent < 500 {
			t.Errorf("%s, %s: no more than %d requests were sent", where, kind, c.sent)
		}
		if c.excess == never {
			t.Errorf("%s, %s: no request was answered by the new pod", where, kind)
		}
		for _, o := range c.blamed {
			t.Errorf("%s, %s: a request sent %v after the update failed after %v, while a process listened: %v", where, kind, o.Sent.Sub(m.at), o.Took, o.Err)
		}
	}
	if m.update.first && m.ruled <= 0 {
		t.Errorf("%s: the rule was there %v after the process", where, -m.ruled)
	}
}
