package main

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestQuantile(t *testing.T) {
	hundred := make(sample, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, test := range []struct {
		sample sample
		q      float64
		want   float64
	}{
		{sample{7}, 0.5, 7},
		{sample{7}, 0.99, 7},
		{sample{3, 1, 2}, 0.5, 2},
		{sample{4, 1, 3, 2}, 0.5, 2},
		{sample{3, 1, 2}, 0, 1},
		{hundred, 0.5, 50},
		{hundred, 0.99, 99},
		{hundred, 1, 100},
	} {
		if got := test.sample.quantile(test.q); got != test.want {
			t.Errorf("quantile %v of %v: %v, want %v", test.q, test.sample, got, test.want)
		}
	}
	if got := (sample{}).quantile(0.5); !math.IsNaN(got) {
		t.Errorf("quantile of nothing: %v, want NaN", got)
	}
}

func TestRatiosKeepTheOrderOfTheMeasurements(t *testing.T) {
	if diff := cmp.Diff(sample{2, 0.5}, sample{4, 1}.ratios(sample{2, 2})); diff != "" {
		t.Error("ratios (-want +got):\n" + diff)
	}
}
