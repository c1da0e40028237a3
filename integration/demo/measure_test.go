package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func TestMeasure(t *testing.T) {
	start := time.Now()
	at := func(sent, took int, server string) lab.Outcome {
		o := lab.Outcome{Sent: start.Add(time.Duration(sent) * time.Millisecond), Took: time.Duration(took) * time.Millisecond}
		if o.Server = server; server == "" {
			o.Err = errors.New("refused")
		}
		return o
	}
	outcomes := lab.Outcomes{at(0, 1, "old"), at(10, 1, ""), at(20, 1, ""), at(31, 1, ""), at(33, 2, "new"), at(40, 1, "new")}
	got := measure(outcomes, "new", start.Add(30*time.Millisecond))
	want := measured{sent: 6, failed: 3, failedAfter: 1, gap: 34 * time.Millisecond, excess: 5 * time.Millisecond, answered: true}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for widest, want := range map[time.Duration]string{34 * time.Millisecond: strings.Repeat("░", 20) + "████", 240 * time.Millisecond: "░░░█"} {
		if got := got.bar(widest); got != want {
			t.Errorf("of %s: %q, want %q", widest, got, want)
		}
	}
	if got := measure(outcomes, "other", start); got.answered || got.excess != 0 {
		t.Errorf("a server that never answered: %+v", got)
	}
}
