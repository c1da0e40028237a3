package main

import (
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// cost is what clients of one kind, by one way, have paid for an update.
type cost struct {
	sent int
	// excess is from the moment that the new process listened to the first answer of it: what the network
	// adds to what the pod itself costs. Negative where there was none.
	excess time.Duration
	gap    time.Duration // the longest time without an answer
	failed int
	// blamed are the failed ones that neither the pod nor the machine can be blamed for: a process of the node
	// listened when they were sent.
	blamed []lab.Outcome
	// cut are failed ones that the server had when it stopped, stalled those that failed while the machine stood still, unserved those that were sent while no process listened.
	cut, stalled, unserved int
	// elsewhere are answers by servers of other nodes.
	elsewhere int
}

// servers are those of a node, and what is known of them.
type servers struct {
	lives []life
	fresh string // the one that was new in the update
	// since is when the component was mended that follows updates; zero where it was never broken. What comes before is not excess.
	since time.Time
	delay time.Duration // that each answer takes
}

// cutWithin is how long before a server stops it may have taken a request that is never answered, in working time.
const cutWithin = 10 * time.Millisecond

const never = time.Duration(-1)

// assess says what an update has cost.
func assess(outcomes, witness lab.Outcomes, s servers) cost {
	c := cost{sent: len(outcomes), excess: never, gap: outcomes.LongestGap(), failed: len(outcomes.Failed())}
	here := map[string]bool{}
	for _, server := range s.lives {
		here[server.server] = true
		if server.server != s.fresh {
			continue
		}
		from := server.listening
		if s.since.After(from) {
			from = s.since
		}
		for _, o := range outcomes {
			if o.Err != nil || o.Server != s.fresh {
				continue
			}
			if after := max(0, o.Sent.Add(o.Took).Sub(from)-s.delay); c.excess == never || after < c.excess {
				c.excess = after
			}
		}
	}
	for _, o := range outcomes {
		if o.Err == nil && !here[o.Server] {
			c.elsewhere++
		}
	}
	for _, o := range outcomes.Failed() {
		switch {
		case isCut(o, s):
			c.cut++
		case !listened(o.Sent, s.lives):
			c.unserved++
		case o.Stalled(witness):
			c.stalled++
		default:
			c.blamed = append(c.blamed, o)
		}
	}
	return c
}

// listened reports whether a process listened at that time.
func listened(at time.Time, servers []life) bool {
	for _, server := range servers {
		if at.After(server.listening) && (server.closed.IsZero() || at.Before(server.closed)) {
			return true
		}
	}
	return false
}

// isCut reports whether a server stopped while it had a request. Where nobody has told the client so, as with datagrams,
// the request must be one of the last. A message that meets the end of its stream can be younger than the listener's end.
func isCut(o lab.Outcome, s servers) bool {
	if o.Err != nil && strings.Contains(o.Err.Error(), "the server stops") { // by the server itself: the program stream
		return true
	}
	for _, server := range s.lives {
		left := server.closed.Sub(o.Sent)
		if !server.closed.IsZero() && left >= 0 && left <= o.Took && (lab.WorkingTime(o.Sent, server.closed) <= cutWithin+s.delay || !timedOut(o)) {
			return true
		}
	}
	return false
}

func timedOut(o lab.Outcome) bool {
	return o.Err != nil && strings.Contains(o.Err.Error(), "deadline exceeded")
}
