package main

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestAssess: times are milliseconds after the start of the old process.
func TestAssess(t *testing.T) {
	t.Parallel()
	start := time.Now().Add(-time.Hour) // before the witness of working time
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	outcome := func(sent, took int, server string, err error) lab.Outcome {
		return lab.Outcome{Sent: at(sent), Took: time.Duration(took) * time.Millisecond, Answer: lab.Answer{Server: server}, Err: err}
	}
	refused, silent := errors.New("connect: connection refused"), context.DeadlineExceeded
	replaced := []life{{server: "old", listening: at(0), closed: at(100)}, {server: "new", listening: at(300)}}
	surged := []life{{server: "old", listening: at(0), closed: at(300)}, {server: "new", listening: at(100)}}
	type want struct{ excess, gap, failed, blamed, cut, stalled, unserved, elsewhere int }
	for name, test := range map[string]struct {
		outcomes, witness lab.Outcomes
		servers           []life
		since, delay      int
		want              want
	}{
		"refused while nobody listens": {
			outcomes: lab.Outcomes{outcome(90, 1, "old", nil), outcome(150, 1, "", refused), outcome(304, 2, "new", nil)},
			servers:  replaced, want: want{excess: 6, gap: 215, failed: 1, unserved: 1},
		},
		"refused although the new process listens": {
			outcomes: lab.Outcomes{outcome(90, 1, "old", nil), outcome(310, 1, "", refused), outcome(330, 2, "new", nil)},
			servers:  replaced, want: want{excess: 32, gap: 241, failed: 1, blamed: 1},
		},
		"a datagram before the new process listens is nobody's fault": {
			outcomes: lab.Outcomes{outcome(299, 200, "", silent), outcome(500, 1, "new", nil)},
			servers:  replaced, want: want{excess: 201, gap: 202, failed: 1, unserved: 1},
		},
		"answered by the old process while the new one listens": {
			outcomes: lab.Outcomes{outcome(150, 1, "old", nil), outcome(250, 1, "new", nil)},
			servers:  surged, want: want{excess: 151, gap: 100},
		},
		"the server stops in the middle and says so": {
			outcomes: lab.Outcomes{outcome(50, 51, "", errors.New("EOF"))},
			servers:  replaced, want: want{excess: -1, gap: 51, failed: 1, cut: 1},
		},
		"the server ends the stream, and the message comes a moment after its listener's end": {
			outcomes: lab.Outcomes{outcome(301, 1, "", errors.New("rpc error: code = Unavailable desc = the server stops"))},
			servers:  surged, want: want{excess: -1, gap: 1, failed: 1, cut: 1},
		},
		"the server stops in the middle and is silent": {
			outcomes: lab.Outcomes{outcome(95, 200, "", silent)},
			servers:  replaced, want: want{excess: -1, gap: 200, failed: 1, cut: 1},
		},
		"lost long before the server stops": {
			outcomes: lab.Outcomes{outcome(50, 200, "", silent)},
			servers:  replaced, want: want{excess: -1, gap: 200, failed: 1, blamed: 1},
		},
		"sent to the old process although it has stopped": {
			outcomes: lab.Outcomes{outcome(301, 1, "", refused)},
			servers:  surged, want: want{excess: -1, gap: 1, failed: 1, blamed: 1},
		},
		"the old process has a datagram when the flow moves": {
			outcomes: lab.Outcomes{outcome(150, 1, "old", nil), outcome(160, 1, "new", nil), outcome(140, 200, "", silent)},
			servers:  surged, want: want{excess: 61, gap: 179, failed: 1, blamed: 1},
		},
		"lost before the flow moves": {
			outcomes: lab.Outcomes{outcome(160, 1, "new", nil), outcome(130, 200, "", silent)},
			servers:  surged, want: want{excess: 61, gap: 169, failed: 1, blamed: 1},
		},
		"lost after the flow has moved": {
			outcomes: lab.Outcomes{outcome(160, 1, "new", nil), outcome(170, 1, "new", nil), outcome(165, 200, "", silent)},
			servers:  surged, want: want{excess: 61, gap: 194, failed: 1, blamed: 1},
		},
		"a slow server had it when it stopped": {
			outcomes: lab.Outcomes{outcome(275, 200, "", silent), outcome(255, 200, "", silent)},
			servers:  surged, delay: 30, want: want{excess: -1, gap: 200, failed: 2, blamed: 1, cut: 1},
		},
		"from when the component is back": {
			outcomes: lab.Outcomes{outcome(310, 1, "", refused), outcome(504, 2, "new", nil)},
			servers:  replaced, since: 500, want: want{excess: 6, gap: 196, failed: 1, blamed: 1},
		},
		"answered by another node": {
			outcomes: lab.Outcomes{outcome(150, 1, "other", nil), outcome(304, 2, "new", nil)},
			servers:  replaced, want: want{excess: 6, gap: 155, elsewhere: 1},
		},
		"the witness waits too": {
			outcomes: lab.Outcomes{outcome(310, 200, "", silent), outcome(555, 1, "", refused), outcome(700, 200, "", silent)},
			witness:  lab.Outcomes{outcome(305, 3, "witness", nil), outcome(400, 60, "witness", nil)},
			servers:  replaced, want: want{excess: -1, gap: 590, failed: 3, blamed: 1, stalled: 2},
		},
	} {
		s := servers{lives: test.servers, fresh: "new", delay: time.Duration(test.delay) * time.Millisecond}
		if test.since > 0 {
			s.since = at(test.since)
		}
		c := assess(test.outcomes, test.witness, s)
		excess := int(c.excess / time.Millisecond)
		if c.excess == never {
			excess = -1
		}
		got := want{excess, int(c.gap / time.Millisecond), c.failed, len(c.blamed), c.cut, c.stalled, c.unserved, c.elsewhere}
		if got != test.want || c.sent != len(test.outcomes) {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	got, err := parseLives("echo", "started 2026-01-02T03:04:05.0000006Z\nlistening 2026-01-02T03:04:06.0000006Z\nstarted 2026-01-02T03:04:07.0000006Z\n")
	again := at.Add(2 * time.Second)
	want := []life{
		{server: lab.Instance("echo", at), pod: "echo", started: at, listening: at.Add(time.Second)},
		{server: lab.Instance("echo", again), pod: "echo", started: again},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, journal := range []string{"started today\n", "closed 2026-01-02T03:04:05Z\n"} {
		if _, err := parseLives("echo", journal); err == nil {
			t.Errorf("the journal %q was taken", journal)
		}
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	lists, watches := parseMetrics(`# HELP apiserver_request_total Counter of requests
apiserver_request_total{code="200",resource="pods",scope="namespace",verb="LIST",version="v1"} 7
apiserver_request_total{code="403",resource="pods",scope="namespace",verb="LIST",version="v1"} 2
apiserver_request_total{code="200",resource="pods",scope="cluster",verb="LIST",version="v1"} 5
apiserver_request_total{code="200",resource="pods",scope="namespace",verb="WATCH",version="v1"} 40
apiserver_request_total{code="200",resource="leases",scope="namespace",verb="LIST",version="v1"} 1e+06
apiserver_longrunning_requests{resource="pods",scope="cluster",verb="WATCH"} 6
apiserver_longrunning_requests{resource="pods",scope="namespace",verb="WATCH"} 2
`)
	if lists != 9 || watches != 2 {
		t.Errorf("%d lists and %d watches, want 9 and 2", lists, watches)
	}
}

// TestSave: a part that is measured again takes the place of its own lines, and lines have as many columns as the header.
func TestSave(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	u := update{name: "rolling update"}
	run := func(gap time.Duration) measured {
		return measured{update: u, node: &whole.Node{Name: "node1"}, costs: map[peer]map[lab.Kind]cost{
			unixSocket: {lab.NewConnection: {sent: 7, gap: gap, excess: never}},
		}}
	}
	save := func(part string, gap time.Duration) {
		t.Helper()
		var r results
		r.addRuns(part, []peer{unixSocket}, []lab.Kind{lab.NewConnection, lab.UDP}, []measured{run(gap)})
		r.add(partsTable, part, "2026-01-02", "v1", "nodes", "machine", "0.1", "0.2")
		if err := r.save(dir, part); err != nil {
			t.Fatal(err)
		}
	}
	save("surge", 2*time.Second)
	save("rolling", 9*time.Second)
	save("rolling", time.Second)
	got, err := readTable(filepath.Join(dir, runsTable+".csv"))
	if err != nil {
		t.Fatal(err)
	}
	line := func(part, gap string) [][]string {
		return [][]string{
			{part, "rolling update", string(unixSocket), "new-connection", "1", "node1", "7", "0", "0", "0", "0", "0", "0", gap, "never", "0", "0", "0", ""},
			{part, "rolling update", string(unixSocket), "udp", "1", "node1", "", "", "", "", "", "", "", "", "", "", "", "", "a stream socket takes no datagrams"},
		}
	}
	want := slices.Concat([][]string{columns()[runsTable]}, line("rolling", "1000"), line("surge", "2000"))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	has, err := saved(dir)
	if err != nil || !has["rolling"] || !has["surge"] || len(has) != 2 {
		t.Errorf("saved: %v, %v", has, err)
	}
}
