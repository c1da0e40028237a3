package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// DaemonSet is the DaemonSet that this process belongs to, by an informer for its name. Its deletion means uninstall: what
// the process put on the node goes. When only the process is stopped, as for an upgrade or a reboot, all of it stays.
//
// Only what the API server says about this very object counts. No answer, or 401 and 403, mean nothing: API servers
// answer so while they start, and the rights of a release are deleted together with its DaemonSet.
type DaemonSet struct {
	client          kubernetes.Interface
	namespace, name string
	log             *slog.Logger

	informer   cache.SharedIndexInformer
	connection connection
	start      sync.Once
	changes    chan change
	failed     chan struct{} // requests started or ceased to fail; of capacity 1
	ended      chan struct{} // closed when Deleted returns

	// own is the UID; empty until the API server was asked for it, and again after the object was deleted without its pods.
	own      types.UID
	orphaned bool // it is being deleted without its pods
	deleted  bool
	logged   string
}

// change is the object after a change, or its last state where it was deleted.
type change struct {
	object  *appsv1.DaemonSet
	deleted bool
}

const (
	// answerTimeout bounds one request.
	answerTimeout = 5 * time.Second
	// lastTimeout bounds the last request after SIGTERM.
	lastTimeout = 2 * time.Second
	// awaitTimeout bounds the wait for the first answer.
	awaitTimeout = 5 * time.Second
	// refusedTimeout bounds the wait for a DaemonSet that the API server does not know, or does not let us read. It is longer than the 30 s from
	// SIGTERM to SIGKILL: a SIGTERM that comes before a container's first process has a handler is lost.
	refusedTimeout = 40 * time.Second
	// watchTime is the shortest time that a watch is asked for, and half the longest.
	watchTime = 30 * time.Minute
	// After a failure the request is repeated after these times, and up to as long again.
	minPause = 500 * time.Millisecond
	maxPause = 15 * time.Second
)

// ConnectDaemonSet makes the client for the DaemonSet called "namespace/name"; credentials are those of Connect.
func ConnectDaemonSet(kubeconfig, name string, log *slog.Logger) (*DaemonSet, error) {
	namespace, name, found := strings.Cut(name, "/")
	if !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, fmt.Errorf("DaemonSet %q is not allowed; allowed: NAMESPACE/NAME", namespace+"/"+name)
	}
	config, err := credentials(kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := newClient(config)
	if err != nil {
		return nil, err
	}
	return newDaemonSet(client, namespace, name, log), nil
}

func newDaemonSet(client kubernetes.Interface, namespace, name string, log *slog.Logger) *DaemonSet {
	d := &DaemonSet{
		client: client, namespace: namespace, name: name, log: log,
		changes: make(chan change, 16), failed: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	d.connection.changed = func() {
		select {
		case d.failed <- struct{}{}:
		default:
		}
	}
	byName := fields.OneTermEqualSelector(metav1.ObjectNameField, name).String() // what resourceNames can allow
	sets := client.AppsV1().DaemonSets(namespace)
	lw := d.connection.listWatch(
		func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			options.FieldSelector = byName
			return sets.List(ctx, options)
		},
		func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			seconds := int64((watchTime + rand.N(watchTime)) / time.Second) // agents that started together do not begin anew together
			options.FieldSelector, options.TimeoutSeconds = byName, &seconds
			return sets.Watch(ctx, options)
		},
	)
	d.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), &appsv1.DaemonSet{}, 0, cache.Indexers{})
	// These fail only for an informer that runs already. connection keeps the errors.
	_ = d.informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {})
	_, _ = d.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { d.pass(object, false) },
		UpdateFunc: func(_, object any) { d.pass(object, false) },
		DeleteFunc: func(object any) { d.pass(object, true) },
	})
	return d
}

// pass hands a change to the goroutine of Await or Deleted; until one reads it, the informer keeps it.
func (d *DaemonSet) pass(object any, deleted bool) {
	if tombstone, ok := object.(cache.DeletedFinalStateUnknown); ok {
		object = tombstone.Obj
	}
	if set, ok := object.(*appsv1.DaemonSet); ok {
		select {
		case d.changes <- change{set, deleted}:
		case <-d.ended:
		}
	}
}

// watch starts the informer. It outlives the context of Deleted: a deletion that is on its way when SIGTERM comes counts.
func (d *DaemonSet) watch() {
	d.start.Do(func() { go d.informer.Run(d.ended) })
}

// Await waits until the DaemonSet is watched and its UID is known. A pod that starts while its release is being uninstalled
// finds neither the DaemonSet nor the right to read it: it must not change the node, because it would never learn why it is
// stopped. A watch that is open brings the deletion even when the right to it is gone.
//
// It gives up after refusedTimeout, after awaitTimeout where the API server is silent, and at once where there is none: the node must
// be served while that is away. replaces says that a process of this name has changed the node before: then there is nothing new
// to leave behind, and awaitTimeout is enough.
func (d *DaemonSet) Await(ctx context.Context, replaces bool) {
	d.watch()
	timeout := refusedTimeout
	if replaces {
		timeout = awaitTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	silent := time.NewTimer(awaitTimeout)
	defer silent.Stop()
	for ctx.Err() == nil && !d.deleted {
		pause := minPause
		err := d.connection.problem()
		if err == nil && d.connection.healthy() {
			if err = d.look(ctx); err == nil {
				return
			}
		} else if err == nil {
			pause /= 20 // until the watch is open
		}
		var status apierrors.APIStatus
		if err != nil && !errors.As(err, &status) {
			return
		}
		d.report(err)
		if err != nil {
			silent.Stop()
		}
		select {
		case <-ctx.Done():
		case <-silent.C:
			return
		case c := <-d.changes:
			d.take(ctx, c)
		case <-time.After(pause):
		}
	}
}

// Deleted waits until the DaemonSet is deleted, or being deleted with its pods, and returns true then. When ctx ends before
// that, it asks a last time: SIGTERM may arrive before the deletion that is its cause.
func (d *DaemonSet) Deleted(ctx context.Context) bool {
	d.watch()
	defer close(d.ended)
	pause := minPause
	retry := time.NewTimer(0)
	defer retry.Stop()
	for ctx.Err() == nil && !d.deleted {
		select {
		case <-ctx.Done():
		case c := <-d.changes:
			d.take(ctx, c)
		case <-d.failed:
			d.report(d.connection.problem())
		case <-retry.C:
			if d.own == "" && d.informer.HasSynced() {
				d.report(d.look(ctx))
			}
			retry.Reset(pause + rand.N(pause))
			pause = min(2*pause, maxPause)
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTimeout)
	defer cancel()
	d.drain(ctx)
	if !d.deleted {
		_ = d.look(withUrgency(ctx, once))
		d.drain(ctx)
	}
	return d.deleted
}

// drain takes the changes that have arrived.
func (d *DaemonSet) drain(ctx context.Context) {
	for {
		select {
		case c := <-d.changes:
			d.take(ctx, c)
		default:
			return
		}
	}
}

// take decides about a change.
func (d *DaemonSet) take(ctx context.Context, c change) {
	switch {
	case d.own == "" || !c.deleted && c.object.UID != d.own:
		// The informer begins with what a cache held, which may be the predecessor of our DaemonSet.
		if err := d.look(ctx); err != nil {
			d.report(err)
		}
	case !c.deleted:
		d.see(c.object)
	case c.object.UID != d.own:
	case d.orphaned || orphans(c.object):
		d.own, d.orphaned = "", false // the next DaemonSet of this name adopts our pod
	default:
		d.deleted = true
	}
}

// look reads the DaemonSet as it is now.
func (d *DaemonSet) look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	object, err := d.client.AppsV1().DaemonSets(d.namespace).Get(ctx, d.name, metav1.GetOptions{})
	switch {
	case err == nil:
		d.see(object)
	case !notFound(err, "daemonsets", d.name) || d.own == "":
		return err
	case d.orphaned:
		d.own, d.orphaned = "", false
		return err
	default:
		d.deleted = true
	}
	return nil
}

// see decides about the DaemonSet of this name as it is now.
func (d *DaemonSet) see(object *appsv1.DaemonSet) {
	switch {
	case d.own == "" || d.orphaned && object.UID != d.own:
		d.own, d.orphaned = object.UID, false
	case object.UID != d.own:
		d.deleted = true // ours was deleted, and another was created since
	}
	if object.DeletionTimestamp != nil {
		d.orphaned = d.orphaned || orphans(object)
		d.deleted = d.deleted || !d.orphaned
	}
}

// orphans reports whether the pods of a DaemonSet that is being deleted stay (kubectl delete --cascade=orphan).
func orphans(object *appsv1.DaemonSet) bool {
	return slices.Contains(object.Finalizers, metav1.FinalizerOrphanDependents)
}

// report logs an error, once for as long as it stays the same.
func (d *DaemonSet) report(err error) {
	if err == nil {
		d.logged = ""
	} else if err.Error() != d.logged {
		d.logged = err.Error()
		d.log.Warn("our own DaemonSet cannot be read; nothing is uninstalled because of that, and a deletion may be missed meanwhile",
			"daemonSet", d.namespace+"/"+d.name, "error", err)
	}
}
