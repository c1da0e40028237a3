package lab

import (
	"errors"
	"testing"
	"time"
)

// TestUnlessItHadNoTime: only a plugin that says that it has given up is executed again, and not for longer than it would have waited.
func TestUnlessItHadNoTime(t *testing.T) {
	t.Parallel()
	const gaveUp = `level=ERROR msg="the runtime directory does not respond; the record of the pod is left as it is" command=ADD` + "\n"
	broken := errors.New("broken")
	hangs := func() { <-After(t, 2*time.Second) } // of working time, so that no stall shortens it
	for name, test := range map[string]struct {
		during func()
		said   []string // by one execution after the other; the last one again and again
		err    error
		want   int // executions
	}{
		"it gave up twice":     {said: []string{gaveUp, gaveUp, ""}, want: 3},
		"it says other things": {said: []string{"level=WARN msg=other\n"}, want: 1},
		"it fails":             {said: []string{gaveUp}, err: broken, want: 1},
		"it hangs":             {during: hangs, said: []string{gaveUp}, want: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			executed := 0
			printed, err := unlessItHadNoTime(func(again bool) (printed, said string, err error) {
				if again != (executed > 0) {
					t.Errorf("execution %d: again is %t", executed, again)
				}
				if test.during != nil {
					test.during()
				}
				executed++
				return "result", test.said[min(executed, len(test.said))-1], test.err
			})
			if executed != test.want || printed != "result" || !errors.Is(err, test.err) {
				t.Errorf("executed %d times, want %d; it printed %q and failed with %v", executed, test.want, printed, err)
			}
		})
	}
}
