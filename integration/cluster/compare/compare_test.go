//go:build e2e

package main

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestCompare is the short form of the comparison: one run of each update, on one node after the other. It fails where
// a limit is broken that is no mere time. What the Service costs is not judged.
func TestCompare(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	w, err := newWorld(ctx, "compare", t.Logf)
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
	r, err := w.measure(ctx, extent{runs: 1, rest: 10 * time.Second, rounds: 20})
	if err != nil {
		t.Fatal(err)
	}
	for _, runs := range r.runs {
		for _, m := range runs {
			judge(t, m)
		}
	}
	for _, a := range r.absences {
		switch {
		case a.by == byService:
		case a.kind == lab.NewConnection && len(a.refused) < a.sent:
			t.Errorf("%s: not each was refused", a)
		case len(a.refused) == 0 || a.answered > 0:
			t.Errorf("%s: none was refused, or some were answered", a)
		}
	}
	for _, rest := range r.rests {
		if rest.polls > 0 || rest.watches != len(w.Nodes) {
			t.Errorf("at rest: %d lists and %d watches of pods, want none and one for each node", rest.polls, rest.watches)
		}
	}
	if err := printTable(os.Stdout, r.rows(len(w.Nodes))); err != nil {
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
