package main

import (
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// measured is what a client went through while its server was replaced.
type measured struct {
	sent, failed int
	// failedAfter are the requests that were sent when the new process listened already, and failed.
	failedAfter int
	gap         time.Duration // the longest time without an answer
	// excess is the time from the new process listening to its first answer: what the network adds to
	// what the pods themselves cost. Zero where the new process never answered; see answered.
	excess   time.Duration
	answered bool
}

// What bars are made of: the pods' own part of a gap, and what the network adds to it.
const (
	pods   = '░'
	excess = '█'
)

// bar draws the gap as long as it is in proportion to the widest of all, which has 24 characters, and begun ones of the excess.
func (m measured) bar(widest time.Duration) string {
	const length = 24
	part := func(d time.Duration) int { return int((d*length + widest - 1) / widest) }
	all := part(m.gap)
	network := min(all, part(m.excess))
	return strings.Repeat(string(pods), all-network) + strings.Repeat(string(excess), network)
}

// measure looks at the outcomes of a client; the process called server listened from listening on.
func measure(outcomes lab.Outcomes, server string, listening time.Time) measured {
	m := measured{sent: len(outcomes), failed: len(outcomes.Failed()), gap: outcomes.LongestGap()}
	for _, o := range outcomes {
		if o.Err != nil && o.Sent.After(listening) {
			m.failedAfter++
		}
		if o.Err == nil && o.Server == server && !m.answered { // in the order of their ends
			m.answered = true
			m.excess = max(0, o.Sent.Add(o.Took).Sub(listening))
		}
	}
	return m
}
