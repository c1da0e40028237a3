// Package event decides which changes of the magic IPs operators see as Kubernetes Events, when, and in which words.
//
// A change is reported when it has lasted, and changes that do not last are reported together. What waits is the state of
// each magic IP and not a queue: a late Event describes what holds when it is sent. client-go's correlator counts
// Events that repeat and combines similar ones; the rate of the whole agent is limited before it, because the
// correlator's own limit drops an Event for good, the last one included.
package event

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Event is one Kubernetes Event about the agent's own pod.
type Event struct {
	Reason  string
	Warning bool // else Normal
	Message string
}

// The reasons.
const (
	EndpointGained   = "EndpointGained"   // Normal: traffic goes to this pod now
	EndpointLost     = "EndpointLost"     // Warning: no endpoint for a minute, after there was one
	NoEndpoint       = "NoEndpoint"       // Warning: no endpoint for a minute, and none since the agent started
	EndpointUnstable = "EndpointUnstable" // Warning: the endpoint changes again and again
	Unserved         = "Unserved"         // Warning: a magic IP is not served at all
	BackendFallback  = "BackendFallback"  // Warning: iptables, because nftables cannot be used
)

const (
	// Settle is how long an endpoint must last before it is reported, so that a start is one Event, and a
	// rollout one about the pod that stays.
	Settle = 10 * time.Second
	// NoneFor is how long there must be no endpoint before that is reported: longer than the replacement of a pod takes.
	// Changes that do not settle are reported after the same time.
	NoneFor = 60 * time.Second
	// Spread is the time over which the agents of a cluster spread what all of them report at once.
	Spread = 30 * time.Second
	// Burst Events may be sent at once by one agent, then one each Interval.
	Burst = 10
	// Interval is how often one Event may be sent beyond that.
	Interval = time.Minute

	// unstable is the number of changes before a report that are a fault: a rollout makes two.
	unstable = 6
)

// Options of a Reporter.
type Options struct {
	// Send hands an Event over for sending. It does not wait.
	Send func(Event)
	// Delay is this agent's share of Spread.
	Delay time.Duration
	// Node is the node's name, for the commands in the messages; may be empty.
	Node string
	// Fallback is why the rules are made with iptables although nftables was tried first; empty where they are not.
	Fallback string
}

// Reporter makes Events of what an agent publishes.
type Reporter struct {
	Options
	limit *rate.Limiter
	wake  chan struct{}

	mu         sync.Mutex
	frontends  map[runtimedir.Frontend]*frontend
	fallbackAt time.Time // when to report the fallback; zero for never
}

// New makes a reporter, which sends nothing before Run.
func New(options Options) *Reporter {
	r := &Reporter{
		Options: options, limit: rate.NewLimiter(rate.Every(Interval), Burst), wake: make(chan struct{}, 1), frontends: map[runtimedir.Frontend]*frontend{},
	}
	if options.Fallback != "" {
		r.fallbackAt = time.Now().Add(Settle + options.Delay)
	}
	return r
}

// Observe takes in a status of the agent and the one before it (nil: none). It does not wait.
func (r *Reporter) Observe(before, now *runtimedir.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Now()
	if len(r.frontends) == 0 && before != nil {
		// After a restart of the agent, an endpoint that is the same is not reported again. A fault is.
		for _, m := range before.MagicIPs {
			pods := podsOf(m)
			r.frontends[m.Frontend] = &frontend{MagicIP: m, pods: pods, reported: pods, last: pods, since: at}
		}
	}
	present := make(map[runtimedir.Frontend]bool, len(now.MagicIPs))
	for _, m := range now.MagicIPs {
		key := m.Frontend
		if present[key] {
			continue // the second claim of one file, which is not served
		}
		present[key] = true
		f := r.frontends[key]
		if f == nil {
			f = &frontend{since: at}
			r.frontends[key] = f
		}
		f.update(m, at)
	}
	maps.DeleteFunc(r.frontends, func(key runtimedir.Frontend, _ *frontend) bool { return !present[key] })
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run sends what is due until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-timer.C:
		}
		for {
			e, next := r.next(time.Now())
			if e == nil {
				if !next.IsZero() {
					timer.Reset(time.Until(next))
				}
				break
			}
			r.Send(*e)
		}
	}
}

// next takes one Event that is due. Without one it returns when to look again; the zero time is not before the next change.
func (r *Reporter) next(now time.Time) (e *Event, again time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	isDue := func(at time.Time) bool {
		if at.After(now) && (again.IsZero() || at.Before(again)) {
			again = at
		}
		return !at.After(now)
	}
	fallback := !r.fallbackAt.IsZero() && isDue(r.fallbackAt)
	due := map[string][]*frontend{}
	for _, f := range r.frontends {
		if reason, at := f.due(); reason != "" && isDue(at.Add(r.Delay)) {
			due[reason] = append(due[reason], f)
		}
	}
	if len(due) == 0 && !fallback {
		return nil, again
	}
	slot := r.limit.ReserveN(now, 1)
	if wait := slot.DelayFrom(now); wait > 0 {
		slot.CancelAt(now)
		return nil, now.Add(wait)
	}
	if fallback {
		r.fallbackAt = time.Time{}
		return &Event{
			Reason: BackendFallback, Warning: true,
			Message: "the rules are made with iptables: " + r.Fallback + ". Correct that and restart the agent, or set --backend iptables if iptables is wanted",
		}, again
	}
	for _, reason := range []string{Unserved, EndpointLost, NoEndpoint, EndpointUnstable, EndpointGained} {
		if len(due[reason]) > 0 {
			return r.report(reason, due[reason]), again
		}
	}
	return nil, again
}

// report makes one Event of the first frontend and of all that have the same to report, and notes these as reported.
func (r *Reporter) report(reason string, due []*frontend) *Event {
	slices.SortFunc(due, func(a, b *frontend) int { return a.Frontend.Compare(b.Frontend) })
	key := due[0].groupKey(reason)
	group := slices.DeleteFunc(due, func(f *frontend) bool { return f.groupKey(reason) != key })
	e := r.describe(reason, group)
	for _, f := range group {
		f.setReported(reason)
	}
	return e
}
