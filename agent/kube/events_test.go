package kube

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/magic-ip-address/magic-ip-address/agent/event"
)

// newEventSink is an API server that answers requests for Events with what fails was called with last, if not nil.
func newEventSink() (client *fake.Clientset, fails func(error)) {
	client = fake.NewClientset()
	var answer atomic.Pointer[error]
	client.PrependReactor("*", "events", func(clienttesting.Action) (bool, runtime.Object, error) {
		if err := answer.Load(); err != nil && *err != nil {
			return true, nil, *err
		}
		return false, nil, nil
	})
	return client, func(err error) { answer.Store(&err) }
}

// TestEvents: what the API server has in the end of what was sent, and what is said while it takes none.
func TestEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, fails := newEventSink()
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var log bytes.Buffer
		self := Self{Namespace: "kube-system", Name: "agent", UID: "u"}
		events := newPods(client, noOwners(), "node1").Events(ctx, self, slog.New(slog.NewTextHandler(&log, nil)))
		send := func(wait time.Duration, sent ...event.Event) {
			for _, e := range sent {
				events.Send(e)
				time.Sleep(time.Millisecond) // Events are named by the time, in nanoseconds
			}
			time.Sleep(wait)
			synctest.Wait()
		}
		begun := time.Now()
		lost := event.Event{Reason: event.EndpointLost, Warning: true, Message: strings.Repeat("ä", maxMessage)}
		gained := event.Event{Reason: event.EndpointGained, Message: "gained"}
		send(time.Minute, gained, lost)
		send(time.Minute, lost)

		fails(apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "", nil))
		send(time.Minute, gained)
		if problem := events.Problem(); !strings.Contains(problem, "allow create and patch of events there") {
			t.Errorf("without the right: %q", problem)
		}
		fails(errors.New("connection refused"))
		send(time.Minute, event.Event{Reason: event.Unserved, Warning: true, Message: "late"})
		if problem := events.Problem(); problem != "connection refused" {
			t.Errorf("while the API server is away: %q", problem)
		}
		fails(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if problem := events.Problem(); problem != "" {
			t.Errorf("afterwards: %q", problem)
		}
		if said := strings.Count(log.String(), "Events cannot be sent"); said != 1 {
			t.Errorf("logged %d times: %s", said, log.String())
		}

		list, err := client.CoreV1().Events("kube-system").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "kube-system", Name: "agent", UID: "u"}
		entry := func(kind, reason, message string, count int32, first, last time.Duration) corev1.Event {
			return corev1.Event{
				InvolvedObject: about, Source: corev1.EventSource{Component: "magic-ip-agent", Host: "node1"}, ReportingController: "magic-ip-agent",
				Type: kind, Reason: reason, Message: message, Count: count,
				FirstTimestamp: metav1.NewTime(begun.Add(first)), LastTimestamp: metav1.NewTime(begun.Add(last)), ReportingInstance: "node1",
			}
		}
		want := []corev1.Event{
			entry("Normal", "EndpointGained", "gained", 1, 0, 0),
			entry("Warning", "EndpointLost", strings.Repeat("ä", maxMessage/2-2)+"...", 2, 0, time.Minute),
			entry("Warning", "Unserved", "late", 1, 3*time.Minute, 3*time.Minute),
		}
		byReason := cmpopts.SortSlices(func(a, b corev1.Event) bool { return a.Reason < b.Reason })
		if diff := cmp.Diff(want, list.Items, byReason, cmpopts.IgnoreFields(corev1.Event{}, "ObjectMeta", "TypeMeta"), cmpopts.EquateApproxTime(time.Second)); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	})
}

// TestEventsProblemEnds: an Event is sent only when something changes, and client-go drops one at once that the API server answers with an
// error: nothing shows then that it accepts Events again. A right that is missing stays missing until an Event is accepted.
func TestEventsProblemEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, fails := newEventSink()
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var log bytes.Buffer
		self := Self{Namespace: "kube-system", Name: "agent", UID: "u"}
		events := newPods(client, noOwners(), "node1").Events(ctx, self, slog.New(slog.NewTextHandler(&log, nil)))
		send := func(err error) {
			fails(err)
			events.Send(event.Event{Reason: event.EndpointGained, Message: "gained"})
			time.Sleep(time.Second)
			synctest.Wait()
		}
		want := func(when, problem string) {
			t.Helper()
			if got := events.Problem(); problem == "" && got != "" || !strings.Contains(got, problem) {
				t.Errorf("%s: %q, want %q", when, got, problem)
			}
		}
		busy := apierrors.NewServiceUnavailable("busy")
		forbidden := apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "", nil)
		for range 2 { // each is logged
			send(busy)
			time.Sleep(2 * time.Minute)
			want("while client-go could still retry", "busy")
			time.Sleep(problemAge - 2*time.Minute)
			want("long after", "")
		}
		send(errors.New("connection refused"))
		for range 11 {
			time.Sleep(10 * time.Second)
			synctest.Wait()
			want("while client-go retries", "connection refused")
		}
		time.Sleep(problemAge)
		want("long after the last try", "")
		send(forbidden)
		send(busy)
		want("another failure after it", "busy")
		time.Sleep(time.Hour)
		want("without the right", "allow create and patch of events there")
		send(nil)
		want("with the right", "")
		if said := strings.Count(log.String(), "Events cannot be sent"); said != 4 {
			t.Errorf("logged %d times: %s", said, log.String())
		}
	})
}
