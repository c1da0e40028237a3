package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	"github.com/magic-ip-address/magic-ip-address/agent/event"
)

const (
	// component is the source of the Events.
	component = "magic-ip-agent"
	// maxMessage is the longest message of an Event, in bytes (events.k8s.io/v1, note).
	maxMessage = 1024
	// eventTimeout bounds one request.
	eventTimeout = 5 * time.Second
	// problemAge is how long a failure is a problem: longer than client-go retries an Event, and not until the next Event, which may
	// come after days.
	problemAge = 3 * time.Minute
)

// Self is the agent's own pod, which its Events are about.
type Self struct{ Namespace, Name, UID string }

// Known reports whether all of it is known.
func (s Self) Known() bool { return s.Namespace != "" && s.Name != "" && s.UID != "" }

// Events sends Events about a pod by client-go's broadcaster, which retries each for two minutes while the API server is not
// reachable.
type Events struct {
	client   typedcorev1.EventInterface
	about    *corev1.ObjectReference
	recorder record.EventRecorder
	log      *slog.Logger

	mu sync.Mutex
	// err is the error of the last attempt, which ended at failedAt. forbidden is the last refusal for a right that is missing. Both are
	// nil after an Event that was accepted.
	err, forbidden error
	failedAt       time.Time
}

// Events makes the sender, which works until ctx ends.
func (p *Pods) Events(ctx context.Context, self Self, log *slog.Logger) *Events {
	e := &Events{
		client: p.client.CoreV1().Events(self.Namespace), log: log,
		about: &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: self.Namespace, Name: self.Name, UID: types.UID(self.UID)},
	}
	// The sink logs and remembers errors; the broadcaster would log each attempt, with the whole Event.
	quiet := klog.NewContext(ctx, logr.Discard())
	// event.Reporter keeps the rate. The correlator's limit is above it: what it drops is not sent again.
	limits := record.CorrelatorOptions{BurstSize: 10 * event.Burst, QPS: float32(10 / event.Interval.Seconds())}
	broadcaster := record.NewBroadcaster(record.WithContext(quiet), record.WithCorrelatorOptions(limits))
	broadcaster.StartRecordingToSink(e)
	e.recorder = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component, Host: p.node})
	return e
}

// Send hands an Event to the broadcaster.
func (e *Events) Send(what event.Event) {
	kind := corev1.EventTypeNormal
	if what.Warning {
		kind = corev1.EventTypeWarning
	}
	message := what.Message
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	e.recorder.Event(e.about, kind, what.Reason, message)
}

// Problem is why Events are not sent; empty where they are, and where the last attempt is so long ago that its error says nothing of now.
// A missing right is a problem until an Event is accepted.
func (e *Events) Problem() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.problem(); err != nil {
		return err.Error()
	}
	return ""
}

func (e *Events) problem() error {
	if e.err != nil && time.Since(e.failedAt) < problemAge {
		return e.err
	}
	return e.forbidden
}

// Create is part of record.EventSink.
func (e *Events) Create(object *corev1.Event) (*corev1.Event, error) {
	return e.attempt(func(ctx context.Context) (*corev1.Event, error) {
		return e.client.Create(ctx, object, metav1.CreateOptions{})
	})
}

// Update is part of record.EventSink, which never calls it.
func (e *Events) Update(*corev1.Event) (*corev1.Event, error) { return nil, errors.ErrUnsupported }

// Patch is part of record.EventSink.
func (e *Events) Patch(object *corev1.Event, data []byte) (*corev1.Event, error) {
	return e.attempt(func(ctx context.Context) (*corev1.Event, error) {
		return e.client.Patch(ctx, object.Name, types.StrategicMergePatchType, data, metav1.PatchOptions{})
	})
}

// attempt sends, and remembers how that ended. That an Event to be patched has expired is no failure: it is created anew.
func (e *Events) attempt(send func(context.Context) (*corev1.Event, error)) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	object, err := send(ctx)
	if apierrors.IsNotFound(err) {
		return object, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.err, e.forbidden = nil, nil
		return object, nil
	}
	known := e.problem() != nil
	e.err, e.failedAt = err, time.Now()
	if apierrors.IsForbidden(err) {
		e.err = fmt.Errorf("the API server does not allow Events in namespace %s; allow create and patch of events there: %w", e.about.Namespace, err)
		e.forbidden = e.err
	}
	if !known {
		e.log.Warn("Events cannot be sent; `magic-ip-agent status` shows the state", "error", e.err)
	}
	return object, err
}
