package event

import "time"

// rate is how often something may be: so many times at once, then once each time that long has passed.
type rate struct {
	burst int
	every time.Duration
}

// bucket counts by a rate. Its zero value is full.
type bucket struct {
	// full is when the bucket is full again.
	full time.Time
}

// next is when something may be again: now, or later.
func (b *bucket) next(now time.Time, r rate) time.Time {
	if at := b.full.Add(-time.Duration(r.burst-1) * r.every); at.After(now) {
		return at
	}
	return now
}

// take notes that it has been.
func (b *bucket) take(now time.Time, r rate) {
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(r.every)
}
