package install

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestQuarrel(t *testing.T) {
	t.Parallel()
	var q quarrel
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	lose := func() time.Duration {
		t.Helper()
		if !q.lost(now, "10-a.conflist") || q.lost(now, "10-a.conflist") {
			t.Error("a loss counts once")
		}
		return q.until.Sub(now)
	}
	var pauses []time.Duration
	for range 14 {
		pause := lose()
		pauses = append(pauses, pause/time.Second)
		now = now.Add(pause)
		q.stands() // and is removed again at once
	}
	if diff := cmp.Diff([]time.Duration{0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300}, pauses); diff != "" {
		t.Errorf("pauses in seconds (-want +got):\n%s", diff)
	}
	for range 100 {
		now = now.Add(lose())
		q.stands()
	}
	now = now.Add(calm + time.Second)
	if pause := lose(); pause != 0 {
		t.Errorf("after a calm time the pause is %s", pause)
	}
}
