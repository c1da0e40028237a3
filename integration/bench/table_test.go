package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTable(t *testing.T) {
	var text strings.Builder
	measured := table{title: "path", unit: "µs", base: "own", notes: []string{"one note"}, rows: []row{
		{what: "own address", values: sample{10, 20, 30}},
		{what: "magic IP", values: sample{11, 21, 300}, ratios: sample{1.1, 1.05, 10}, target: target{ratioMedian, 1.06}},
		{what: "slow", values: sample{1, 2}, ratios: sample{2, 2}, target: target{valueP99, 1.5}},
		{what: "unmeasured", ratios: sample{}, target: target{ratioMedian, 2}},
	}}
	if err := measured.print(&text); err != nil {
		t.Fatal(err)
	}
	const want = `
| path        |  n | median µs | p99 µs | ratio to own | its p99 | target       |        |
| ----------- | -: | --------: | -----: | -----------: | ------: | ------------ | ------ |
| own address |  3 |      20.0 |   30.0 |              |         |              |        |
| magic IP    |  3 |      21.0 |    300 |        1.100 |  10.000 | ratio ≤ 1.06 | MISSED |
| slow        |  2 |      1.00 |   2.00 |        2.000 |   2.000 | p99 ≤ 1.5    | MISSED |
| unmeasured  |  0 |       NaN |    NaN |          NaN |     NaN | ratio ≤ 2    | MISSED |

- one note
`
	if diff := cmp.Diff(want, text.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
	if missed := measured.missed(); missed != 3 {
		t.Errorf("%d missed, want 3", missed)
	}
}
