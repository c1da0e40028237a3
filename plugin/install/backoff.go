package install

import (
	"fmt"
	"time"
)

// backoff spaces the attempts to put an entry back that another program removes. A primary CNI that is upgraded writes
// its file once or twice, and the entry is put back at once. One that reconciles its file removes the entry each time:
// the pauses grow then.
type backoff struct {
	losses int       // since the entry was last in place for resetAfter
	at     time.Time // of the last loss
	until  time.Time // when the entry may be put back
	lost   bool      // the entry is not in place now
	path   string
}

const (
	immediate  = 2 // losses after which the entry is put back at once
	firstPause = time.Second
	maxPause   = 5 * time.Minute
	resetAfter = 2 * maxPause
)

// lose records that the entry is not in place, and returns whether that is a new loss.
func (b *backoff) lose(now time.Time, path string) bool {
	if b.lost {
		return false
	}
	if now.Sub(b.at) > resetAfter {
		b.losses = 0
	}
	b.lost, b.at, b.path = true, now, path
	b.losses++
	pause := time.Duration(0)
	if n := b.losses - immediate; n > 0 {
		pause = maxPause
		if n < 16 { // a larger shift would overflow
			pause = min(maxPause, firstPause<<(n-1))
		}
	}
	b.until = now.Add(pause)
	return true
}

// restored records that the entry is in place.
func (b *backoff) restored() { b.lost = false }

// note is for status; empty without repeated losses.
func (b *backoff) note() string {
	if b.losses <= immediate || time.Since(b.at) > resetAfter {
		return ""
	}
	text := fmt.Sprintf("another program has removed the entry from %s %d times, last at %s", b.path, b.losses, b.at.UTC().Format(time.RFC3339))
	if b.lost {
		text += "; it is put back at " + b.until.UTC().Format(time.RFC3339)
	}
	return text + ": configure the owner of that file to keep entries of others (Cilium: cni.exclusive=false). Without the entry, the agent knows new pods by the API only"
}
