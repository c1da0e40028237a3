package kube

import (
	"slices"
	"strings"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// Feed is how the Kubernetes API is heard for one namespace.
type Feed struct {
	Namespace string
	// Healthy: the watch is; Refused: it is not since RBAC refuses it.
	Healthy, Refused bool
	// HeardAt is when the watch last brought an event or a bookmark; zero before.
	HeardAt time.Time
}

// requests counts what has been asked of the API server.
type requests struct{ list, watch, poll atomic.Uint64 }

// Requests is how many requests have been made, by kind.
func (p *Pods) Requests() map[string]uint64 {
	return map[string]uint64{"list": p.requests.list.Load(), "watch": p.requests.watch.Load(), "poll": p.requests.poll.Load()}
}

// Feeds is how the API is heard, in the order of the namespaces.
func (p *Pods) Feeds() []Feed {
	feeds, _ := p.all()
	var all []Feed
	for _, f := range feeds {
		f.mu.Lock()
		all = append(all, Feed{
			Namespace: f.namespace, Healthy: f.healthyLocked() && f.informer.HasSynced(), Refused: apierrors.IsForbidden(f.err), HeardAt: f.heardAt,
		})
		f.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Feed) int { return strings.Compare(a.Namespace, b.Namespace) })
	return all
}
