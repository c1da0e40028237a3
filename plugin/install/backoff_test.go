package install

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestBackoff(t *testing.T) {
	t.Parallel()
	var b backoff
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	lose := func() time.Duration {
		t.Helper()
		if !b.lose(now, "10-a.conflist") || b.lose(now, "10-a.conflist") {
			t.Error("a loss counts once")
		}
		return b.until.Sub(now)
	}
	var pauses []time.Duration
	for range 14 {
		pause := lose()
		pauses = append(pauses, pause/time.Second)
		now = now.Add(pause)
		b.restored() // and is removed again at once
	}
	if diff := cmp.Diff([]time.Duration{0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300}, pauses); diff != "" {
		t.Errorf("pauses in seconds (-want +got):\n%s", diff)
	}
	for range 100 {
		now = now.Add(lose())
		b.restored()
	}
	now = now.Add(resetAfter + time.Second)
	if pause := lose(); pause != 0 {
		t.Errorf("after resetAfter the pause is %s", pause)
	}
}
