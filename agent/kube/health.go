package kube

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Feed is the state of the watch of one namespace.
type Feed struct {
	Namespace string
	// Healthy: the watch is open and not silent. Forbidden: RBAC does not allow it.
	Healthy, Forbidden bool
	// LastSeen is when the watch was opened, or brought an event or a bookmark, last; zero before.
	LastSeen time.Time
}

// requests counts the requests to the API server.
type requests struct{ list, watch, poll atomic.Uint64 }

// Requests are the numbers of requests by kind.
func (p *Pods) Requests() map[string]uint64 {
	return map[string]uint64{"list": p.requests.list.Load(), "watch": p.requests.watch.Load(), "poll": p.requests.poll.Load(), "owner": p.owners.requests.Load()}
}

// Feeds are the watches, in the order of the namespaces.
func (p *Pods) Feeds() []Feed {
	feeds, _ := p.all()
	var all []Feed
	for _, f := range feeds {
		f.mu.Lock()
		all = append(all, Feed{
			Namespace: f.namespace, Healthy: f.healthyLocked() && f.informer.HasSynced(), Forbidden: apierrors.IsForbidden(f.err), LastSeen: f.seenAt,
		})
		f.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Feed) int { return strings.Compare(a.Namespace, b.Namespace) })
	return all
}
