package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// DaemonSet is the one that this process belongs to. When it is deleted, what the process has put on the node
// is to go; when the process alone is told to stop, for an upgrade or a reboot say, all of it is to stay.
//
// Only what the API server says of this very object counts. That it does not answer, or refuses (401, 403), says nothing: API
// servers that start refuse everybody, and whoever deletes a release deletes its rights as well.
type DaemonSet struct {
	client          kubernetes.Interface
	namespace, name string
	log             *slog.Logger

	own      types.UID       // empty until it has been seen
	orphaned bool            // it is being deleted without its pods
	opened   watch.Interface // by Await, for Deleted
}

const (
	// answerTimeout bounds how long the API server may take for an answer, and until it begins a watch.
	answerTimeout = 5 * time.Second
	// lastTimeout bounds the last look after SIGTERM.
	lastTimeout = 2 * time.Second
	// firstPatience is longer than it takes from the deletion of a DaemonSet until kubelet stops its pods.
	firstPatience = 5 * time.Second
	// watchTime is how long a watch lasts at least, and half of how long at most: agents that have begun together do not
	// begin anew together.
	watchTime = 30 * time.Minute
	// After a failure it is asked again after these times.
	minPause = time.Second
	maxPause = 30 * time.Second
)

// ConnectDaemonSet makes the client for the DaemonSet called "namespace/name"; credentials are those of Connect.
func ConnectDaemonSet(kubeconfig, name string, log *slog.Logger) (*DaemonSet, error) {
	namespace, name, found := strings.Cut(name, "/")
	if !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, fmt.Errorf("DaemonSet %q is not allowed; allowed: NAMESPACE/NAME", namespace+"/"+name)
	}
	pods, err := Connect(kubeconfig, name) // for its client alone: no pods are asked for
	if err != nil {
		return nil, err
	}
	return &DaemonSet{client: pods.client, namespace: namespace, name: name, log: log}, nil
}

// Await waits until the DaemonSet is watched, so that nothing is put on a node by a pod that is on its way out: who starts when
// a release is just being uninstalled finds neither the DaemonSet nor the right to ask for it, would never know why it is
// told to stop, and would leave everything behind. Who watches hears of a deletion even if the right to watch goes with it.
// It gives up after firstPatience, and at once where nobody answers: the node must be served while the API server is away.
func (d *DaemonSet) Await(ctx context.Context) {
	said := false
	for deadline := time.Now().Add(firstPatience); ctx.Err() == nil && time.Now().Before(deadline); {
		events, deleted, err := d.open(ctx)
		var status apierrors.APIStatus
		switch {
		case err == nil && !deleted:
			d.opened = events
			return
		case err == nil || !errors.As(err, &status):
			return // Deleted finds it out
		}
		if !said {
			d.log.Warn("the API server does not tell of our own DaemonSet; waiting a little before anything is changed", "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(minPause / 2):
		}
	}
}

// Deleted waits until the DaemonSet is deleted, or being deleted with its pods, and returns true then. When ctx ends before
// that, it asks a last time, shortly: SIGTERM may be faster than the news of what it was sent for.
func (d *DaemonSet) Deleted(ctx context.Context) bool {
	pause := minPause
	said := ""
	for ctx.Err() == nil {
		begun := time.Now()
		deleted, err := d.follow(ctx)
		if deleted {
			return true
		}
		lasted := time.Since(begun)
		if err == nil && lasted > minPause {
			// The server has ended the watch, as it does with all of them in time. Nobody looks until the next one, and who
			// deletes a release takes the right to look a moment after the DaemonSet: that must not fall into a pause.
			pause, said = minPause, ""
			continue
		}
		if err == nil || lasted > maxPause { // it went well for a while
			pause = minPause
		}
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			d.log.Warn("the API server does not tell of our own DaemonSet; nothing is uninstalled for that", "error", err)
		} else if err == nil {
			said = ""
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, maxPause)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTimeout)
	defer cancel()
	deleted, _ := d.get(ctx)
	return deleted
}

// open begins to watch the DaemonSet, and then looks at it: in this order nothing happens in between.
func (d *DaemonSet) open(ctx context.Context) (events watch.Interface, deleted bool, err error) {
	watching, end := context.WithCancel(ctx)
	late := time.AfterFunc(answerTimeout, end)
	seconds := int64((watchTime + rand.N(watchTime)) / time.Second) //nolint:gosec // spreads load
	stream, err := d.client.AppsV1().DaemonSets(d.namespace).Watch(watching, metav1.ListOptions{
		FieldSelector:       fields.OneTermEqualSelector("metadata.name", d.name).String(),
		AllowWatchBookmarks: true, TimeoutSeconds: &seconds,
	})
	if !late.Stop() && ctx.Err() == nil {
		err = errors.Join(fmt.Errorf("the API server has not answered within %s", answerTimeout), err)
	}
	events = ended{stream, end}
	if err == nil {
		deleted, err = d.get(ctx)
	}
	if deleted || err != nil {
		events.Stop()
		return nil, deleted, err
	}
	return events, false, nil
}

// ended is a watch with the end of its connection.
type ended struct {
	watch.Interface // nil where there is none
	end             func()
}

func (e ended) Stop() {
	if e.Interface != nil {
		e.Interface.Stop()
	}
	e.end()
}

// follow watches the DaemonSet, until the watch ends.
func (d *DaemonSet) follow(ctx context.Context) (deleted bool, err error) {
	events := d.opened
	d.opened = nil
	if events == nil {
		if events, deleted, err = d.open(ctx); deleted || err != nil {
			return deleted, err
		}
	}
	defer events.Stop()
	for {
		silent := time.NewTimer(watchSilence)
		select {
		case <-ctx.Done():
			silent.Stop()
			return false, nil
		case <-silent.C: // a bookmark comes about every minute: this connection is dead
			return false, errors.New("the watch is silent")
		case event, open := <-events.ResultChan():
			silent.Stop()
			if !open {
				return false, nil
			}
			deleted, err := d.event(ctx, event)
			if deleted || err != nil {
				return deleted, err
			}
		}
	}
}

// get asks for the DaemonSet as it is now.
func (d *DaemonSet) get(ctx context.Context) (deleted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	object, err := d.client.AppsV1().DaemonSets(d.namespace).Get(ctx, d.name, metav1.GetOptions{})
	switch {
	case err == nil:
		return d.seen(object), nil
	case !d.notFound(err):
		return false, err
	case d.own == "" || d.orphaned:
		d.own, d.orphaned = "", false
		return false, err // whatever comes under this name adopts us
	}
	return true, nil
}

// notFound says whether an error is the API server's word that this object does not exist. A proxy has a 404 of its own, and
// so has an API server that has not begun to serve this kind yet.
func (d *DaemonSet) notFound(err error) bool {
	var status apierrors.APIStatus
	if !apierrors.IsNotFound(err) || !errors.As(err, &status) {
		return false
	}
	details := status.Status().Details
	return details != nil && details.Kind == "daemonsets" && details.Name == d.name &&
		!slices.ContainsFunc(details.Causes, func(c metav1.StatusCause) bool { return c.Type == metav1.CauseTypeUnexpectedServerResponse })
}

func (d *DaemonSet) event(ctx context.Context, event watch.Event) (deleted bool, err error) {
	object, ok := event.Object.(*appsv1.DaemonSet)
	switch {
	case event.Type == watch.Error:
		return false, apierrors.FromObject(event.Object) // 410 among them: ask anew
	case !ok || object.Name != d.name || event.Type == watch.Bookmark:
		return false, nil
	case event.Type == watch.Deleted && object.UID != d.own:
		return false, nil
	case event.Type == watch.Deleted && (d.orphaned || orphans(object)):
		d.own, d.orphaned = "", false
		return false, nil
	case event.Type == watch.Deleted:
		return true, nil
	case d.own != "" && !d.orphaned && object.UID != d.own:
		return d.get(ctx) // the watch begins with what was there before we looked
	}
	return d.seen(object), nil
}

// seen says whether this sight of the DaemonSet means that ours is deleted.
func (d *DaemonSet) seen(object *appsv1.DaemonSet) bool {
	switch {
	case d.own == "" || d.orphaned && object.UID != d.own:
		d.own, d.orphaned = object.UID, false
	case object.UID != d.own:
		return true // ours was deleted, and another one has come since
	}
	if object.DeletionTimestamp == nil {
		return false
	}
	d.orphaned = d.orphaned || orphans(object)
	return !d.orphaned
}

// orphans says whether the pods of a DaemonSet that is being deleted are to stay (kubectl delete --cascade=orphan).
func orphans(object *appsv1.DaemonSet) bool {
	return slices.Contains(object.Finalizers, metav1.FinalizerOrphanDependents)
}
