package lab

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestWorkingTime(t *testing.T) {
	t.Parallel()
	start := time.Now()
	w := &witness{samples: []sample{{at: start}}}
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	w.add(at(10), 0)                   // nobody waited
	w.add(at(20), 5*time.Millisecond)  // somebody waited half of the time
	w.add(at(30), 10*time.Millisecond) // all of it
	w.add(at(230), 0)                  // the witness itself was not served
	for _, test := range []struct {
		name     string
		from, to int
		want     time.Duration
	}{
		{"quiet", 0, 10, 10 * time.Millisecond},
		{"within a sample", 2, 8, 6 * time.Millisecond},
		{"half", 10, 20, 5 * time.Millisecond},
		{"full", 20, 30, 500 * time.Microsecond},
		{"overslept", 30, 230, 20 * time.Millisecond},
		{"not sampled yet", 230, 235, 5 * time.Millisecond},
		{"before the first sample", -10, 0, 10 * time.Millisecond},
	} {
		if got := w.until(at(test.to)) - w.until(at(test.from)); got.Round(time.Microsecond) != test.want {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}

func TestPressureIsRead(t *testing.T) {
	t.Parallel()
	if _, err := pressure(); err != nil {
		t.Logf("this kernel does not tell of pressure; only oversleeping counts: %v", err)
	}
}

func TestPatienceEnds(t *testing.T) {
	t.Parallel()
	began := time.Now()
	ctx, cancel := Patience(t.Context(), 50*time.Millisecond)
	defer cancel()
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ended with %v", err)
	}
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Errorf("its error is %v", ctx.Err())
	}
	if passed := time.Since(began); passed < 50*time.Millisecond {
		t.Errorf("ended after %v", passed)
	}
	stopped, cancel := Patience(t.Context(), time.Hour)
	cancel()
	if err := context.Cause(stopped); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
}

// TestCleanUp: a test whose time is over cleans up in time of its own.
func TestCleanUp(t *testing.T) {
	t.Parallel()
	var during, after error
	t.Run("over", func(t *testing.T) {
		var ctx context.Context
		Renew(t, &ctx, time.Nanosecond)
		CleanUp(t, &ctx, time.Minute, func() { after = ctx.Err() })
		<-ctx.Done()
		during = ctx.Err()
	})
	if !errors.Is(during, context.DeadlineExceeded) || after != nil {
		t.Errorf("during the test %v, afterwards %v; want its end, and none", during, after)
	}
}
