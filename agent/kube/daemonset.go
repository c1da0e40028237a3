package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

	own      types.UID // empty until it has been seen
	orphaned bool      // it is being deleted without its pods
}

const (
	getTimeout = 10 * time.Second
	// lastTimeout bounds the last look after SIGTERM.
	lastTimeout = 2 * time.Second
	// After a failure, and after a watch that ended, it is asked again after these times.
	minPause = time.Second
	maxPause = 30 * time.Second
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
	client, err := connect(config)
	if err != nil {
		return nil, err
	}
	return &DaemonSet{client: client, namespace: namespace, name: name, log: log}, nil
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
		if err == nil || time.Since(begun) > maxPause { // it went well for a while
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
	_, deleted, _ := d.get(ctx)
	return deleted
}

// follow looks at the DaemonSet and then watches it, until the watch ends.
func (d *DaemonSet) follow(ctx context.Context) (deleted bool, err error) {
	version, deleted, err := d.get(ctx)
	if deleted || err != nil {
		return deleted, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	seconds := int64(300)
	events, err := d.client.AppsV1().DaemonSets(d.namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector:   fields.OneTermEqualSelector("metadata.name", d.name).String(),
		ResourceVersion: version, AllowWatchBookmarks: true, TimeoutSeconds: &seconds,
	})
	if err != nil {
		return false, err
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
			deleted, err := d.event(event)
			if deleted || err != nil {
				return deleted, err
			}
		}
	}
}

// get asks for the DaemonSet as it is now.
func (d *DaemonSet) get(ctx context.Context) (version string, deleted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, getTimeout)
	defer cancel()
	object, err := d.client.AppsV1().DaemonSets(d.namespace).Get(ctx, d.name, metav1.GetOptions{})
	switch {
	case err == nil:
		return object.ResourceVersion, d.seen(object), nil
	case !d.notFound(err):
		return "", false, err
	case d.own == "" || d.orphaned:
		d.own, d.orphaned = "", false
		return "", false, err
	}
	return "", true, nil
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

func (d *DaemonSet) event(event watch.Event) (deleted bool, err error) {
	object, ok := event.Object.(*appsv1.DaemonSet)
	switch {
	case event.Type == watch.Error:
		return false, apierrors.FromObject(event.Object) // 410 among them: ask anew
	case !ok || object.Name != d.name:
		return false, nil
	case event.Type == watch.Bookmark:
		return false, nil
	case event.Type == watch.Deleted && object.UID != d.own:
		return false, nil
	case event.Type == watch.Deleted && (d.orphaned || orphans(object)):
		d.own, d.orphaned = "", false // whatever comes under this name adopts us
		return false, nil
	case event.Type == watch.Deleted:
		return true, nil
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
