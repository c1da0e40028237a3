package install

import (
	"fmt"
	"time"
)

// quarrel keeps two writers from fighting in a loop. A primary CNI that is upgraded writes its file anew once or twice, and
// the entry comes back at once. One that will have no entry but its own removes it each time: then the pauses grow.
type quarrel struct {
	times int       // that the entry was lost, since it last stood for calm
	at    time.Time // the last of them
	until time.Time // when it may be put back
	open  bool      // it is lost now
	path  string
}

const (
	patientTimes = 2 // losses that are answered at once
	firstPause   = time.Second
	maxPause     = 5 * time.Minute
	calm         = 2 * maxPause
)

// lost says that the entry is not where it was put, and returns whether that is news.
func (q *quarrel) lost(now time.Time, path string) bool {
	if q.open {
		return false
	}
	if now.Sub(q.at) > calm {
		q.times = 0
	}
	q.open, q.at, q.path = true, now, path
	q.times++
	pause := time.Duration(0)
	if n := q.times - patientTimes; n > 0 {
		pause = maxPause
		if n < 16 { // the shift is of few bits
			pause = min(maxPause, firstPause<<(n-1))
		}
	}
	q.until = now.Add(pause)
	return true
}

// stands says that the entry is in place.
func (q *quarrel) stands() { q.open = false }

// note is what an operator should know; empty where there is no quarrel.
func (q *quarrel) note() string {
	if q.times <= patientTimes || time.Since(q.at) > calm {
		return ""
	}
	text := fmt.Sprintf("another program has removed the entry from %s %d times, last at %s", q.path, q.times, q.at.UTC().Format(time.RFC3339))
	if q.open {
		text += "; it is put back at " + q.until.UTC().Format(time.RFC3339)
	}
	return text + ": a CNI that owns the directory has to be told to share it (Cilium: cni.exclusive=false)"
}
