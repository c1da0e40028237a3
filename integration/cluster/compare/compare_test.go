//go:build e2e

package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestCompare is the short form of the comparison: one run of each update, on one node after the other. It fails where
// a limit is broken that is no mere time. What the Service costs is not judged.
func TestCompare(t *testing.T) {
	ctx, cancel := lab.Patience(t.Context(), 8*time.Minute)
	defer cancel()
	s := setups()["two"]
	s.name = "compare"
	w, err := newWorld(ctx, s, t.Logf)
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
	alternate := func(i int) *whole.Node { return w.Nodes[i%len(w.Nodes)] }
	if _, err := w.path(ctx, alternate(0), 20); err != nil {
		t.Fatal(err)
	}
	for i, u := range updates() {
		if u.broken != nil || u.target.delay > 0 {
			continue // of the long form
		}
		runs, err := w.runs(ctx, alternate(i), u, 1)
		if err != nil {
			t.Fatal(err)
		}
		judge(t, runs[0])
	}
	rest, err := w.atRest(ctx, alternate(1), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if rest.polls > 0 || rest.watches != len(w.Nodes) {
		t.Errorf("at rest: %d lists and %d watches of pods, want none and one for each node", rest.polls, rest.watches)
	}
	absences, err := w.absent(ctx, alternate(0))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range absences {
		if !a.by.magic() {
			continue
		}
		if len(a.refused) == 0 || a.answered > 0 || a.kind == lab.NewConnection && len(a.refused) < a.sent {
			t.Errorf("no pod: %s at %.0f a second: %d of %d refused, %d answered", a.kind, a.rate, len(a.refused), a.sent, a.answered)
		}
	}
}

// judge fails where requests by the magic IP failed although a process listened and the agent could go on, or did not come back.
func judge(t *testing.T, m measured) {
	t.Helper()
	where := fmt.Sprintf("%s on %s", m.update.name, m.node.Name)
	for kind, c := range m.costs[magicNFTables] {
		if c.sent < 500 {
			t.Errorf("%s, %s: no more than %d requests were sent", where, kind, c.sent)
		}
		if c.excess == never {
			t.Errorf("%s, %s: no request was answered by the new pod", where, kind)
		}
		for _, o := range c.blamed {
			if o.Stalled(m.waits) {
				continue // String has told it
			}
			t.Errorf("%s, %s: a request sent %v after the update failed after %v, while a process listened: %v", where, kind, o.Sent.Sub(m.at), o.Took, o.Err)
		}
	}
	if m.update.first && m.ruled <= 0 {
		t.Errorf("%s: the rule was there %v after the process", where, -m.ruled)
	}
}
