// Package event words what operators should hear of a magic IP, from what the agent publishes, and keeps it
// to a few Events.
//
// An agent may create Events and change none, so nothing is counted up in place: what has changed is told
// once it has lasted, with the number of changes that were not told. What waits to be told is a state for each
// magic IP and no queue. An Event that cannot be sent is dropped.
package event

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// Event is one Kubernetes Event about the agent's own pod.
type Event struct {
	Reason  string
	Warning bool // else Normal
	Message string
	// Count of changes that it stands for, the first of them at First and the last at Last.
	Count       int
	First, Last time.Time
}

// The reasons.
const (
	EndpointGained   = "EndpointGained"   // Normal: traffic goes to this pod now
	EndpointLost     = "EndpointLost"     // Warning: no endpoint for a minute, after there was one
	NoEndpoint       = "NoEndpoint"       // Warning: no endpoint for a minute, and none since the agent started
	EndpointUnstable = "EndpointUnstable" // Warning: the endpoint changes again and again
	ClaimRefused     = "ClaimRefused"     // Warning: a magic IP is not served at all
	BackendFallback  = "BackendFallback"  // Warning: iptables, because nftables cannot be used
)

const (
	// Settle is how long an endpoint has stood before it is told, so that a start is told once, and a
	// rollout with the pod that stays.
	Settle = 10 * time.Second
	// NoneFor is how long there has been no endpoint before that is told: longer than a pod is replaced in.
	// It is also how long changes that do not settle are waited for.
	NoneFor = 60 * time.Second
	// Spread is over how long the agents of a cluster spread what all of them have to tell at once.
	Spread = 30 * time.Second

	// unstable is how many changes within one telling are a fault: a rollout makes two.
	unstable = 6
	// sendTimeout is how long an API server may take over an Event.
	sendTimeout = 5 * time.Second
)

// Of one magic IP and reason a few Events, then one every few minutes; and so for the agent as a whole.
var (
	perReason = rate{burst: 3, every: 5 * time.Minute}   //nolint:gochecknoglobals // a constant
	perAgent  = rate{burst: 10, every: 30 * time.Second} //nolint:gochecknoglobals // a constant
)

// Sender sends an Event. It returns within a few seconds after ctx has ended.
type Sender func(ctx context.Context, e Event) error

// Options of a Recorder.
type Options struct {
	Send Sender
	// Delay is this agent's share of Spread.
	Delay time.Duration
	// Node is the node's name, for the commands in the texts; empty where it is not known.
	Node string
	// Fallback is why the rules are not made with nftables although they might be; empty where they are.
	Fallback string
	Log      *slog.Logger
}

// Recorder turns what an agent publishes into Events.
type Recorder struct {
	Options

	mu        sync.Mutex
	watched   map[plan.Frontend]*watched
	fallback  time.Time // when to tell of it; zero where there is nothing to tell
	limits    map[limit]*bucket
	agent     bucket
	sendError string
	wake      chan struct{}
}

// limit is what is told seldom: all ports of an address count as one.
type limit struct {
	address netip.Addr
	reason  string
}

// watched is a magic IP, what has been told of it, and what has not.
type watched struct {
	published.MagicIP
	has       string // its endpoints, in the words of podsOf
	told      string // the endpoints that were told, in the words of podsOf; empty is none
	refused   string // the refusal that was told
	refusedAt time.Time
	ever      bool   // it has had an endpoint
	lost      string // the endpoints that it had last
	noneFrom  time.Time
	toldNone  bool
	// changes since the last telling: the first of them, the last, and how long there was no endpoint.
	changes     int
	first, last time.Time
	without     time.Duration
}

// New makes a recorder, which tells nothing before Run.
func New(options Options) *Recorder {
	r := &Recorder{Options: options, watched: map[plan.Frontend]*watched{}, limits: map[limit]*bucket{}, wake: make(chan struct{}, 1)}
	if options.Fallback != "" {
		r.fallback = time.Now().Add(Settle + options.Delay)
	}
	return r
}

// Published takes in what the agent has published instead of before, which is nil where there was nothing. It
// never waits.
func (r *Recorder) Published(before, now *published.Agent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := time.Now()
	if len(r.watched) == 0 && before != nil {
		// The agent was restarted: what was so before is no news. What is wrong still is.
		for _, m := range before.MagicIPs {
			pods := podsOf(m)
			r.watched[frontendOf(m)] = &watched{MagicIP: m, has: pods, told: pods, lost: pods, ever: pods != "", noneFrom: at}
		}
	}
	here := map[plan.Frontend]bool{}
	for _, m := range now.MagicIPs {
		frontend := frontendOf(m)
		if here[frontend] {
			continue // the second claim of one file, which is refused
		}
		here[frontend] = true
		w := r.watched[frontend]
		if w == nil {
			w = &watched{noneFrom: at}
			r.watched[frontend] = w
		}
		w.take(m, at)
	}
	for frontend := range r.watched {
		if !here[frontend] {
			delete(r.watched, frontend)
		}
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (w *watched) take(m published.MagicIP, at time.Time) {
	if m.Refused != w.Refused {
		w.refusedAt = at
	}
	if m.Refused == "" {
		w.refused = ""
	}
	same := slices.Equal(m.Endpoints, w.Endpoints)
	w.MagicIP = m
	if same {
		return // before anything is made of it: there may be thousands
	}
	had, has := w.has, podsOf(m)
	w.has = has
	if had == has {
		return
	}
	if had == w.told && at.Sub(w.last) >= NoneFor {
		w.changes, w.without = 0, 0 // it had come back to what was told, and stayed
	}
	if w.changes++; w.changes == 1 {
		w.first = at
	}
	w.last = at
	if had != "" {
		w.lost = had
	}
	if has != "" {
		if had == "" {
			w.without += at.Sub(w.noneFrom)
		}
		w.ever = true
	} else {
		w.noneFrom = at
	}
}

// settled notes that all of w has been told.
func (w *watched) settled(reason string) {
	w.told, w.toldNone = w.has, reason == EndpointLost || reason == NoEndpoint
	w.changes, w.without = 0, 0
}

// due says what there is to tell of w and when; an empty reason where there is nothing.
func (w *watched) due(delay time.Duration) (reason string, at time.Time) {
	switch {
	case w.Refused != "":
		if w.Refused != w.refused {
			return ClaimRefused, w.refusedAt.Add(delay)
		}
		return "", time.Time{}
	case w.changes >= unstable:
		reason, at = EndpointUnstable, earlier(w.last.Add(Settle), w.first.Add(NoneFor))
	case w.has == "" && w.toldNone:
		return "", time.Time{}
	case w.has == "" && w.ever:
		reason, at = EndpointLost, w.noneFrom.Add(NoneFor)
	case w.has == "":
		reason, at = NoEndpoint, w.noneFrom.Add(NoneFor)
	case w.has != w.told:
		reason, at = EndpointGained, earlier(w.last.Add(Settle), w.first.Add(NoneFor))
	default:
		return "", time.Time{} // as it was told
	}
	return reason, at.Add(delay)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// Run sends what there is to tell until ctx ends.
func (r *Recorder) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-timer.C:
		}
		for ctx.Err() == nil {
			e, next, ok := r.next()
			if !ok {
				if !next.IsZero() {
					timer.Reset(time.Until(next))
				}
				break
			}
			r.send(ctx, e)
		}
	}
}

// next takes what is to be told now. Else it says when to look again; the zero time is not before the next change.
func (r *Recorder) next() (e Event, again time.Time, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	soonest := func(at time.Time) {
		if again.IsZero() || at.Before(again) {
			again = at
		}
	}
	due := map[string][]*watched{}
	for frontend, w := range r.watched {
		reason, at := w.due(r.Delay)
		if reason == "" {
			continue
		}
		if allowed := r.limit(frontend, reason).next(now, perReason); allowed.After(at) {
			at = allowed
		}
		if at.After(now) {
			soonest(at)
			continue
		}
		due[reason] = append(due[reason], w)
	}
	fallback := !r.fallback.IsZero() && !r.fallback.After(now)
	if !r.fallback.IsZero() && !fallback {
		soonest(r.fallback)
	}
	if len(due) == 0 && !fallback {
		return Event{}, again, false
	}
	if allowed := r.agent.next(now, perAgent); allowed.After(now) {
		return Event{}, allowed, false
	}
	r.agent.take(now, perAgent)
	if fallback {
		r.fallback = time.Time{}
		return Event{
			Reason: BackendFallback, Warning: true, Count: 1, First: now, Last: now,
			Message: "the rules are made with iptables: " + r.Fallback + ". Mend that and restart the agent, or say --backend iptables if it is meant to be so",
		}, time.Time{}, true
	}
	for _, reason := range []string{ClaimRefused, EndpointLost, NoEndpoint, EndpointUnstable, EndpointGained} {
		if len(due[reason]) > 0 {
			return r.tell(now, reason, due[reason]), time.Time{}, true
		}
	}
	return Event{}, again, false
}

// tell words what has become of the first of several magic IPs and of those that have fared alike, and counts all of
// these as told.
func (r *Recorder) tell(now time.Time, reason string, due []*watched) Event {
	slices.SortFunc(due, func(a, b *watched) int { return frontendOf(a.MagicIP).Compare(frontendOf(b.MagicIP)) })
	alike := slices.DeleteFunc(slices.Clone(due), func(w *watched) bool { return w.alike(reason) != due[0].alike(reason) })
	e := r.word(now, reason, alike)
	for _, w := range alike {
		r.limit(frontendOf(w.MagicIP), reason).take(now, perReason)
		if reason == ClaimRefused {
			w.refused = w.Refused
			continue
		}
		w.settled(reason)
	}
	maps.DeleteFunc(r.limits, func(_ limit, b *bucket) bool { return !b.full.After(now) })
	return e
}

// alike is what magic IPs have in common that one Event tells of.
func (w *watched) alike(reason string) string {
	if reason == ClaimRefused {
		return ""
	}
	return strings.Join([]string{w.Namespace, w.Selector, w.has, w.told, w.Action}, "\n")
}

func (r *Recorder) limit(frontend plan.Frontend, reason string) *bucket {
	key := limit{frontend.Address, reason}
	b := r.limits[key]
	if b == nil {
		b = &bucket{}
		r.limits[key] = b
	}
	return b
}

// send sends e. What cannot be sent is dropped, and said once.
func (r *Recorder) send(ctx context.Context, e Event) {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	err := r.Send(ctx, e)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.sendError = ""
	case r.sendError == "":
		r.Log.Warn("Events cannot be sent, and are dropped until they can", "err", err)
		fallthrough
	default:
		r.sendError = err.Error()
	}
}

// Problem is why the last Event could not be sent; empty where it was.
func (r *Recorder) Problem() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sendError
}

func frontendOf(m published.MagicIP) plan.Frontend {
	return plan.Frontend{Address: m.Address, Protocol: plan.Protocol(m.Protocol), Port: m.Port}
}
