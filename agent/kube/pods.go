package kube

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// Pods are the pods of the node as the Kubernetes API reports them.
type Pods struct {
	client   kubernetes.Interface
	node     string
	requests requests
	owners   *owners

	mu       sync.Mutex
	ctx      context.Context // of Run; nil before
	wake     func()
	query    *inventory.Query
	feeds    map[string]*feed // by namespace
	polledAt time.Time        // when Poll was called last
}

// Run calls wake after each change of what View returns, until ctx ends.
func (p *Pods) Run(ctx context.Context, wake func()) error {
	p.mu.Lock()
	p.ctx, p.wake = ctx, wake
	p.owners.start(ctx, wake)
	for _, f := range p.feeds {
		f.start(ctx)
	}
	p.mu.Unlock()
	<-ctx.Done()
	return nil
}

// Select sets what View returns.
func (p *Pods) Select(query inventory.Query) {
	namespaces := query.Namespaces
	if slices.Contains(namespaces, inventory.AllNamespaces) {
		namespaces = []string{inventory.AllNamespaces}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// What was trimmed away of the pods is listed again.
	anew := p.query != nil && !(includes(p.query.LabelKeys, query.LabelKeys) && includes(p.query.PortNames, query.PortNames))
	p.query = &query
	for namespace, f := range p.feeds {
		if anew || !slices.Contains(namespaces, namespace) {
			f.stop()
			delete(p.feeds, namespace)
		}
	}
	for _, namespace := range namespaces {
		if p.feeds[namespace] != nil {
			continue
		}
		f := p.newFeed(namespace, p.query)
		p.feeds[namespace] = f
		if p.ctx != nil {
			f.start(p.ctx)
		}
	}
}

// includes reports whether all of some is in set.
func includes(set, some map[string]bool) bool {
	for key := range some {
		if !set[key] {
			return false
		}
	}
	return true
}

// View is what the API reported last.
func (p *Pods) View() inventory.View {
	var view inventory.View
	feeds, query := p.all()
	for _, f := range feeds {
		pods, synced, problem := f.view()
		if synced {
			view.Synced = append(view.Synced, f.namespace)
			for _, pod := range pods {
				converted := convert(pod)
				var unresolved []inventory.OwnerQuery
				converted.Owners, unresolved = p.owners.of(pod, query.Owners)
				view.Pods = append(view.Pods, converted)
				view.Unresolved = append(view.Unresolved, unresolved...)
			}
		}
		if synced && problem == "" {
			view.Current = append(view.Current, f.namespace)
		}
		if problem != "" && !f.fresh() {
			view.Problems = append(view.Problems, problem)
		}
	}
	view.Problems = append(view.Problems, p.owners.problems()...)
	slices.Sort(view.Problems)
	p.owners.ask()
	return view
}

// Poll lists the namespaces whose watch is not healthy; a healthy watch costs the API server nothing. It does not wait
// for the answer, after which it calls wake: the agent goes on whatever the API server does.
//
// The lists are spread over half the time since the last call, for the watches of a whole cluster end at one moment. While the API
// server asks for no request there are none, and the last answer counts on.
func (p *Pods) Poll(ctx context.Context) {
	p.mu.Lock()
	wake := p.wake
	spread := time.Duration(0)
	if !p.polledAt.IsZero() {
		spread = min(time.Since(p.polledAt)/2, maxSpread)
	}
	p.polledAt = time.Now()
	p.mu.Unlock()
	if wake == nil {
		return // Run has not begun
	}
	p.owners.ask()
	feeds, _ := p.all()
	for _, f := range feeds {
		if !f.healthy() && !f.fresh() && f.polling.CompareAndSwap(false, true) {
			go func() {
				defer f.polling.Store(false)
				select {
				case <-ctx.Done():
				case <-time.After(rand.N(spread + 1)):
					f.poll(ctx)
					wake()
				}
			}()
		}
	}
}

func (p *Pods) all() ([]*feed, *inventory.Query) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.feeds)), p.query
}
