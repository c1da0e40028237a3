package lab

import (
	"errors"
	"testing"
	"time"
)

func TestGapsAndFailures(t *testing.T) {
	t.Parallel()
	start := time.Now()
	outcome := func(sent, took int, err error) Outcome {
		return Outcome{Sent: start.Add(time.Duration(sent)), Took: time.Duration(took), Err: err}
	}
	failure := errors.New("refused")
	for name, test := range map[string]struct {
		outcomes             Outcomes
		failed, longest, gap int
	}{
		"nothing":               {},
		"all answered":          {Outcomes{outcome(0, 10, nil), outcome(20, 5, nil), outcome(40, 10, nil)}, 0, 10, 25},
		"a failure between":     {Outcomes{outcome(0, 10, nil), outcome(20, 300, failure), outcome(330, 10, nil)}, 1, 300, 330},
		"failures at the end":   {Outcomes{outcome(0, 10, nil), outcome(20, 30, failure), outcome(60, 30, failure)}, 2, 30, 80},
		"only failures":         {Outcomes{outcome(0, 10, failure), outcome(20, 10, failure)}, 2, 10, 30},
		"answered out of order": {Outcomes{outcome(10, 10, nil), outcome(20, 10, nil), outcome(0, 100, nil)}, 0, 100, 70},
	} {
		failed, longest, gap := len(test.outcomes.Failed()), test.outcomes.Longest(), test.outcomes.LongestGap()
		if failed != test.failed || longest != time.Duration(test.longest) || gap != time.Duration(test.gap) {
			t.Errorf("%s: %d failed, longest request %d, longest gap %d, want %d, %d, %d",
				name, failed, longest, gap, test.failed, test.longest, test.gap)
		}
	}
}
