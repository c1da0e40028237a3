package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

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
	replaced := []life{{pod: "old", listening: at(0), closed: at(100)}, {pod: "new", listening: at(300)}}
	surged := []life{{pod: "old", listening: at(0), closed: at(300)}, {pod: "new", listening: at(100)}}
	type want struct{ excess, gap, failed, blamed, cut, moved, stalled int }
	for name, test := range map[string]struct {
		outcomes, witness lab.Outcomes
		servers           []life
		want              want
	}{
		"refused while nobody listens": {
			outcomes: lab.Outcomes{outcome(90, 1, "old", nil), outcome(150, 1, "", refused), outcome(304, 2, "new", nil)},
			servers:  replaced, want: want{excess: 6, gap: 215, failed: 1},
		},
		"refused although the new process listens": {
			outcomes: lab.Outcomes{outcome(90, 1, "old", nil), outcome(310, 1, "", refused), outcome(330, 2, "new", nil)},
			servers:  replaced, want: want{excess: 32, gap: 241, failed: 1, blamed: 1},
		},
		"a datagram before the new process listens is nobody's fault": {
			outcomes: lab.Outcomes{outcome(299, 200, "", silent), outcome(500, 1, "new", nil)},
			servers:  replaced, want: want{excess: 201, gap: 202, failed: 1},
		},
		"answered by the old process while the new one listens": {
			outcomes: lab.Outcomes{outcome(150, 1, "old", nil), outcome(250, 1, "new", nil)},
			servers:  surged, want: want{excess: 151, gap: 100},
		},
		"the server stops in the middle and says so": {
			outcomes: lab.Outcomes{outcome(50, 51, "", errors.New("EOF"))},
			servers:  replaced, want: want{excess: -1, gap: 51, failed: 1, cut: 1},
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
			servers:  surged, want: want{excess: 61, gap: 179, failed: 1, moved: 1},
		},
		"lost before the flow moves": {
			outcomes: lab.Outcomes{outcome(160, 1, "new", nil), outcome(130, 200, "", silent)},
			servers:  surged, want: want{excess: 61, gap: 169, failed: 1, blamed: 1},
		},
		"lost after the flow has moved": {
			outcomes: lab.Outcomes{outcome(160, 1, "new", nil), outcome(170, 1, "new", nil), outcome(165, 200, "", silent)},
			servers:  surged, want: want{excess: 61, gap: 194, failed: 1, blamed: 1},
		},
		"the witness waits too": {
			outcomes: lab.Outcomes{outcome(310, 200, "", silent), outcome(555, 1, "", refused), outcome(700, 200, "", silent)},
			witness:  lab.Outcomes{outcome(305, 3, "witness", nil), outcome(400, 60, "witness", nil)},
			servers:  replaced, want: want{excess: -1, gap: 590, failed: 3, blamed: 1, stalled: 2},
		},
	} {
		c := assess(lab.UDP, test.outcomes, test.witness, test.servers, "new")
		excess := int(c.excess / time.Millisecond)
		if c.excess == never {
			excess = -1
		}
		got := want{excess, int(c.gap / time.Millisecond), c.failed, len(c.blamed), c.cut, c.moved, c.stalled}
		if got != test.want || c.sent != len(test.outcomes) {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)
	got, err := parseLife("echo", "started 2026-01-02T03:04:05.0000006Z\nlistening 2026-01-02T03:04:06.0000006Z\n")
	if want := (life{pod: "echo", started: at, listening: at.Add(time.Second)}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	if _, err := parseLife("echo", "started today\n"); err == nil {
		t.Error("a journal with another time stamp was taken")
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

// TestTable: times are judged by their median, requests that failed by each run.
func TestTable(t *testing.T) {
	t.Parallel()
	of := func(excess, failed, blamed int) map[lab.Kind]cost {
		c := cost{excess: never, gap: time.Second, failed: failed, blamed: make([]lab.Outcome, blamed)}
		if excess >= 0 {
			c.excess = time.Duration(excess) * time.Millisecond
		}
		return map[lab.Kind]cost{lab.NewConnection: c, lab.KeepAlive: c, lab.UDP: c}
	}
	runs := func(magic ...map[lab.Kind]cost) (all []measured) {
		for _, m := range magic {
			all = append(all, measured{costs: map[way]map[lab.Kind]cost{byService: of(407, 200, 90), byMagicIP: m}})
		}
		return all
	}
	rolling, surge := update{name: "rolling", limits: limits{excess: excessLimit}}, update{name: "surge", limits: limits{none: true}}
	rows := slices.Concat(
		rowsOf(rolling, runs(of(5, 100, 0), of(8, 100, 0), of(11, 100, 0))),
		rowsOf(rolling, runs(of(5, 100, 0), of(11, 100, 0), of(-1, 100, 1))),
		rowsOf(surge, runs(of(90, 0, 0), of(90, 0, 0), of(90, 1, 0))),
		rowsOf(surge, runs(of(90, 0, 0))),
	)
	var text strings.Builder
	if err := printTable(&text, rows); err != nil {
		t.Fatal(err)
	}
	want := `
|         |                                 | Service            | magic IP           | worst run             | limit | verdict |
| ------- | ------------------------------- | ------------------ | ------------------ | --------------------- | ----- | ------- |
| rolling | excess, ms                      | 407 / 407 / 407    | 8 / 8 / 8          | 11 / 11 / 11          | ≤ 10  | ok      |
|         | failed                          | 200 / 200 / 200    | 100 / 100 / 100    | 100 / 100 / 100       |       |         |
|         | failed while a process listened | 90 / 90 / 90       | 0 / 0 / 0          | 0 / 0 / 0             | 0     | ok      |
|         | longest gap, ms                 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000    |       |         |
|         | excess, ms                      | 407 / 407 / 407    | 11 / 11 / 11       | never / never / never | ≤ 10  | MISSED  |
|         | failed                          | 200 / 200 / 200    | 100 / 100 / 100    | 100 / 100 / 100       |       |         |
|         | failed while a process listened | 90 / 90 / 90       | 0 / 0 / 0          | 1 / 1 / 1             | 0     | MISSED  |
|         | longest gap, ms                 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000    |       |         |
| surge   | failed                          | 200 / 200 / 200    | 0 / 0 / 0          | 1 / 1 / 1             | 0     | MISSED  |
|         | longest gap, ms                 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000    |       |         |
|         | failed                          | 200 / 200 / 200    | 0 / 0 / 0          | 0 / 0 / 0             | 0     | ok      |
|         | longest gap, ms                 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000 | 1000 / 1000 / 1000    |       |         |
`
	if text.String() != want[1:] {
		t.Errorf("got\n%s\nwant%s", &text, want)
	}
}
