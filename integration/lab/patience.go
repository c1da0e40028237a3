package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits of tests are limits of working time, so that a busy machine stretches them and no test fails for want of a
// processor or a disk. A witness measures it: from the pressure stall information of the kernel
// (Documentation/accounting/psi.rst: how long at least one task was ready and had no processor, or waited for a disk), and
// from how late the witness itself wakes up.

const (
	witnessInterval = 10 * time.Millisecond
	// slowest is how much slower than the clock working time passes at most: a limit ends at last.
	slowest = 20
)

// witness holds the working time at moments of the past, in order.
type witness struct {
	mu      sync.Mutex
	samples []sample
	stalled func() time.Duration // so far; nil where the kernel does not tell
}

type sample struct {
	at      time.Time
	working time.Duration // since the first sample
}

var theWitness = sync.OnceValue(func() *witness { //nolint:gochecknoglobals // there is one machine
	w := &witness{samples: []sample{{at: time.Now()}}}
	if _, err := pressure(); err == nil {
		w.stalled = func() time.Duration { total, _ := pressure(); return total }
	}
	go w.run()
	return w
})

func (w *witness) run() {
	var before time.Duration
	if w.stalled != nil {
		before = w.stalled()
	}
	for {
		time.Sleep(witnessInterval)
		var stall time.Duration
		if w.stalled != nil {
			now := w.stalled()
			before, stall = now, now-before
		}
		w.add(time.Now(), stall)
	}
}

// add takes a sample, with how long tasks have waited since the one before.
func (w *witness) add(at time.Time, stall time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	last := w.samples[len(w.samples)-1]
	passed := at.Sub(last.at)
	working := min(passed-stall, 2*witnessInterval) // it slept for longer: nobody was served
	w.samples = append(w.samples, sample{at, last.working + max(working, passed/slowest)})
}

// until is the working time at a moment; what the last sample does not cover yet counts in full.
func (w *witness) until(moment time.Time) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	i, _ := slices.BinarySearchFunc(w.samples, moment, func(s sample, t time.Time) int { return s.at.Compare(t) })
	switch {
	case i == 0:
		return moment.Sub(w.samples[0].at)
	case i == len(w.samples):
		last := w.samples[i-1]
		return last.working + min(moment.Sub(last.at), 2*witnessInterval)
	}
	from, to := w.samples[i-1], w.samples[i]
	part := float64(moment.Sub(from.at)) / float64(to.at.Sub(from.at))
	return from.working + time.Duration(part*float64(to.working-from.working))
}

// pressure is how long tasks have waited for a processor or a disk since the machine was started.
func pressure() (total time.Duration, err error) {
	for _, resource := range []string{"cpu", "io"} {
		data, err := os.ReadFile("/proc/pressure/" + resource)
		if err != nil {
			return 0, err
		}
		line, _, _ := strings.Cut(string(data), "\n") // some avg10=0.00 avg60=0.00 avg300=0.00 total=0
		_, text, _ := strings.Cut(line, "total=")
		micros, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/pressure/%s: %w", resource, err)
		}
		total += time.Duration(micros) * time.Microsecond
	}
	return total, nil
}

// WorkingTime is how much of the time from one moment to another the machine worked for everybody. It knows nothing of
// the time before its first call, or that of Patience, in this process: that counts in full.
func WorkingTime(from, to time.Time) time.Duration {
	w := theWitness()
	return w.until(to) - w.until(from)
}

// Stopwatch returns how much working time has passed since, each time it is asked.
func Stopwatch() (passed func() time.Duration) {
	w, began := theWitness(), time.Now()
	return func() time.Duration { return w.until(time.Now()) - w.until(began) }
}

// After is closed after so much working time, or at the end of the test.
func After(t interface{ Cleanup(func()) }, limit time.Duration) <-chan struct{} {
	ctx, cancel := Patience(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx.Done()
}

// patient is a context whose end by the limit is that of a deadline.
type patient struct{ context.Context }

func (p patient) Err() error {
	if errors.Is(context.Cause(p.Context), context.DeadlineExceeded) {
		return context.DeadlineExceeded
	}
	return p.Context.Err()
}

// Patience returns a context that ends after so much working time. Its cause says how long that was by the clock.
func Patience(parent context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	w, began := theWitness(), time.Now()
	ctx, cancel := context.WithCancelCause(parent)
	go func() {
		for ctx.Err() == nil {
			left := limit - (w.until(time.Now()) - w.until(began))
			if left <= 0 {
				cancel(fmt.Errorf("%w: %v of working time, %v by the clock", context.DeadlineExceeded, limit, time.Since(began).Round(time.Millisecond)))
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(max(left, time.Millisecond)):
			}
		}
	}()
	return patient{ctx}, func() { cancel(context.Canceled) }
}

// limited is a testing.T.
type limited interface {
	Cleanup(func())
	Context() context.Context
}

// Renew gives a test this much working time from now on, by the context that it uses for all it does; clean-up included, for which that of the test
// itself is over.
func Renew(t limited, ctx *context.Context, limit time.Duration) {
	var cancel context.CancelFunc
	*ctx, cancel = Patience(context.WithoutCancel(t.Context()), limit)
	t.Cleanup(cancel)
}

// CleanUp calls f at the end of the test, which has time of its own where the test's is over: what a test leaves would fail those that follow.
func CleanUp(t limited, ctx *context.Context, limit time.Duration, f func()) {
	t.Cleanup(func() {
		if (*ctx).Err() != nil {
			Renew(t, ctx, limit)
		}
		f()
	})
}
