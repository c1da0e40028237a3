package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const (
	// watchSilence is the longest silence of a healthy watch: the API server sends a bookmark about every minute.
	watchSilence = 90 * time.Second
	// openTimeout bounds the time until the API server answers the request for a watch.
	openTimeout = 10 * time.Second
	// listTimeout bounds a list of an informer.
	listTimeout = 30 * time.Second
	// maxSpread is the longest time by which agents that have the same reason to ask at the same moment are spread.
	maxSpread = 5 * time.Second
)

// connection is the list and watch of one informer: whether it works, and since when.
//
// A reflector of client-go waits without limit for an API server that accepts a request and never answers it, and for
// an event on a watch that died silently. Both are bounded here.
type connection struct {
	// changed is called when requests start or cease to fail. It does not wait.
	changed func()

	mu sync.Mutex
	// watching is the present watch; nil for none. endedAt is when the last one ended: client-go may wait for minutes
	// before the next where the API server asks for that.
	watching watch.Interface
	endedAt  time.Time
	// seenAt is when the watch was opened, or brought an event or a bookmark, last.
	seenAt time.Time
	err    error // of the last list or watch; nil where it succeeded
	// healthySince is when the watch became healthy last.
	healthySince time.Time
}

// listWatch makes the list and watch of an informer from the two requests.
func (c *connection) listWatch(
	list func(context.Context, metav1.ListOptions) (runtime.Object, error),
	open func(context.Context, metav1.ListOptions) (watch.Interface, error),
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			objects, err := list(ctx, options)
			c.answered(err)
			return objects, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			ctx, cancel := context.WithCancel(ctx)
			late := time.AfterFunc(openTimeout, cancel)
			w, err := open(ctx, options)
			if !late.Stop() && err != nil && !errors.Is(err, errThrottled) {
				err = fmt.Errorf("the API server did not answer within %s: %w", openTimeout, err)
			}
			if err != nil {
				cancel()
				c.answered(err)
				return nil, err
			}
			return c.follow(w, cancel), nil
		},
	}
}

// follow passes the events of w on until w ends, is stopped, or is silent for too long; release is called then. After a silence it
// ends with the error for an expired watch, so that the reflector lists again.
func (c *connection) follow(w watch.Interface, release func()) watch.Interface {
	events := make(chan watch.Event)
	followed := watch.NewProxyWatcher(events)
	c.mu.Lock()
	c.watching = followed
	c.mu.Unlock()
	c.answered(nil)
	go func() {
		defer func() {
			w.Stop()
			release()
			c.mu.Lock()
			if c.watching == followed {
				c.watching, c.endedAt = nil, time.Now()
			}
			c.mu.Unlock()
			close(events)
		}()
		// Many agents notice the silence of one API server, so the time differs.
		silence := time.NewTimer(watchSilence + rand.N(maxSpread))
		defer silence.Stop()
		for {
			var event watch.Event
			open := true
			select {
			case <-followed.StopChan():
				return
			case <-silence.C:
				event = watch.Event{Type: watch.Error, Object: silent()}
			case event, open = <-w.ResultChan():
				if !open {
					return
				}
				silence.Reset(watchSilence + rand.N(maxSpread))
			}
			if event.Type == watch.Error {
				c.answered(apierrors.FromObject(event.Object))
			} else {
				c.answered(nil)
			}
			select {
			case <-followed.StopChan():
				return
			case events <- event:
			}
		}
	}()
	return followed
}

func silent() *metav1.Status {
	return &metav1.Status{
		Status: metav1.StatusFailure, Code: http.StatusGone, Reason: metav1.StatusReasonExpired,
		Message: fmt.Sprintf("the watch was silent for %s", watchSilence),
	}
}

// answered notes that the API server answered, or that a request failed. One that was not sent says nothing new.
func (c *connection) answered(err error) {
	c.mu.Lock()
	if c.err != nil && errors.Is(err, errThrottled) {
		err = c.err
	}
	changed := (err == nil) != (c.err == nil)
	wasHealthy := c.healthyLocked()
	c.err = err
	if err == nil {
		c.seenAt = time.Now()
		if c.endedAt.IsZero() {
			c.endedAt = c.seenAt // a list was answered, and no watch was ever open
		}
	}
	if !wasHealthy && c.healthyLocked() {
		c.healthySince = time.Now()
	}
	c.mu.Unlock()
	if changed {
		c.changed()
	}
}

func (c *connection) healthy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.healthyLocked()
}

func (c *connection) healthyLocked() bool {
	return c.err == nil && c.watching != nil && time.Since(c.seenAt) < watchSilence
}

// problem is the error of the last list or watch; nil where it succeeded.
func (c *connection) problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
