package kube

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

const (
	// firstAnswer is how long the API server may take for the first answer before that is a problem.
	firstAnswer = 2 * time.Second
	// pollTimeout bounds the list of a poll.
	pollTimeout = 3 * time.Second
	// pollCounts is how long the list of a poll says how things are now: what it lacks must not look gone for inventory.Grace.
	pollCounts = inventory.Grace / 2
)

// feed is the pods of one namespace: an informer, and the lists of polls.
type feed struct {
	connection
	pods      *Pods
	namespace string
	query     *inventory.Query
	informer  cache.SharedIndexInformer
	stop      func() // does nothing before start
	polling   atomic.Bool
	begunAt   time.Time

	// polled is what the last poll that succeeded listed; nil for none. Guarded by connection.mu.
	polled        []*corev1.Pod
	polledAt      time.Time
	polledVersion string
	pollFailed    bool // the last one did, or was not let ask
}

func (p *Pods) newFeed(namespace string, query *inventory.Query) *feed {
	f := &feed{pods: p, namespace: namespace, query: query, stop: func() {}, begunAt: time.Now()}
	f.changed = func() { p.wake() }
	pods := p.client.CoreV1().Pods(f.apiNamespace())
	lw := f.listWatch(
		func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			p.requests.list.Add(1)
			return pods.List(ctx, f.ofNode(options))
		},
		func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			p.requests.watch.Add(1)
			return pods.Watch(ctx, f.ofNode(options))
		},
	)
	f.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, p.client), &corev1.Pod{}, 0, cache.Indexers{})
	changed := func(any) { p.wake() }
	updated := func(before, now any) {
		old, okOld := before.(*corev1.Pod)
		pod, ok := now.(*corev1.Pod)
		if !okOld || !ok || !reflect.DeepEqual(old.OwnerReferences, pod.OwnerReferences) || !reflect.DeepEqual(convert(old), convert(pod)) {
			p.wake()
		}
	}
	// These fail only for an informer that runs already. connection keeps the errors.
	_ = f.informer.SetTransform(func(object any) (any, error) {
		if pod, ok := object.(*corev1.Pod); ok {
			return trim(pod, query), nil
		}
		return object, nil
	})
	_ = f.informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {})
	_, _ = f.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: changed, DeleteFunc: changed, UpdateFunc: updated,
	})
	return f
}

func (f *feed) ofNode(options metav1.ListOptions) metav1.ListOptions {
	options.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", f.pods.node).String()
	return options
}

func (f *feed) apiNamespace() string {
	if f.namespace == inventory.AllNamespaces {
		return metav1.NamespaceAll
	}
	return f.namespace
}

func (f *feed) start(ctx context.Context) {
	ctx, f.stop = context.WithCancel(ctx)
	go f.informer.RunWithContext(ctx)
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), f.informer.HasSynced) {
			f.pods.wake() // a namespace without pods is synced too
		}
	}()
}

// fresh says that the API server has not answered because it was asked just now.
func (f *feed) fresh() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seenAt.IsZero() && f.err == nil && time.Since(f.begunAt) < firstAnswer
}

// polledCounts reports whether the last poll is newer than the informer. A watch that was opened again is healthy before
// it has brought everything: the state from before it broke must not return meanwhile.
func (f *feed) polledCounts() bool {
	order, err := resourceversion.CompareResourceVersion(f.informer.LastSyncResourceVersion(), f.polledVersion)
	switch {
	case f.polled == nil, err == nil && order >= 0:
		return false
	case !f.healthyLocked(), !f.informer.HasSynced():
		return true
	}
	// Versions go back where etcd was restored.
	return err == nil && time.Since(f.healthySince) < pollTimeout
}

// view returns the pods, whether they have been listed, and why the API server cannot be asked now.
func (f *feed) view() (pods []*corev1.Pod, synced bool, problem string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.polledCounts() {
		pods, synced = f.polled, true
	} else {
		pods, synced = f.watched(), f.informer.HasSynced()
	}
	if f.polled != nil && !f.pollFailed && !f.polledAt.Before(f.seenAt) && time.Since(f.polledAt) < pollCounts {
		return pods, synced, ""
	}
	switch {
	case apierrors.IsForbidden(f.err):
		problem = fmt.Sprintf("the API server does not allow the pods of namespace %s; allow get, list and watch of pods there: %v", f.namespace, f.err)
	case f.err != nil:
		problem = fmt.Sprintf("pods of namespace %s: %v", f.namespace, f.err)
	case f.seenAt.IsZero():
		problem = fmt.Sprintf("pods of namespace %s: the API server has not answered yet", f.namespace)
	case f.watching == nil && time.Since(f.endedAt) > pollTimeout: // one watch ends every few minutes, and another begins
		problem = fmt.Sprintf("pods of namespace %s: the watch ended %s ago, and no other has begun", f.namespace, time.Since(f.endedAt).Round(time.Second))
	case f.watching != nil && !f.healthyLocked():
		problem = fmt.Sprintf("pods of namespace %s: the watch has been silent for %s", f.namespace, time.Since(f.seenAt).Round(time.Second))
	}
	return pods, synced, problem
}

func (f *feed) watched() (pods []*corev1.Pod) {
	for _, object := range f.informer.GetStore().List() {
		if pod, ok := object.(*corev1.Pod); ok {
			pods = append(pods, pod)
		}
	}
	return pods
}

// poll lists once.
func (f *feed) poll(ctx context.Context) {
	begun := time.Now()
	ctx, cancel := context.WithTimeout(withUrgency(ctx, sheds), pollTimeout)
	defer cancel()
	f.pods.requests.poll.Add(1)
	fromCache := metav1.ListOptions{ResourceVersion: "0"}
	list, err := f.pods.client.CoreV1().Pods(f.apiNamespace()).List(ctx, f.ofNode(fromCache))
	if errors.Is(err, errThrottled) { // nothing was asked: what the last poll brought gets old
		f.mu.Lock()
		defer f.mu.Unlock()
		f.pollFailed = true
		return
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("the API server has not answered within %s", pollTimeout)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pollFailed = err != nil
	if err != nil {
		if f.seenAt.Before(begun) { // and the watch has not answered meanwhile
			f.err = err
		}
		return
	}
	f.polled, f.polledAt, f.polledVersion = []*corev1.Pod{}, time.Now(), list.ResourceVersion
	for i := range list.Items {
		f.polled = append(f.polled, trim(&list.Items[i], f.query))
	}
}
