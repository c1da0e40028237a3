package kube

import (
	"strings"
	"testing"
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

func TestEvents(t *testing.T) {
	t.Parallel()
	client := fake.NewClientset()
	pods := &Pods{client: client, node: "node1"}
	self := Self{Namespace: "kube-system", Name: strings.Repeat("long-", 50) + "n", UID: "u"}
	send := pods.Events(self)
	first, last := time.Unix(1000, 0), time.Unix(1060, 0)
	long := strings.Repeat("ä", mostMessage)
	for _, e := range []event.Event{
		{Reason: event.EndpointGained, Message: "gained", Count: 1, First: first, Last: first},
		{Reason: event.EndpointUnstable, Warning: true, Message: long, Count: 40, First: first, Last: last},
	} {
		if err := send(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	list, err := client.CoreV1().Events("kube-system").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: "kube-system", Name: self.Name, UID: "u"}
	source := corev1.EventSource{Component: "magic-ip-agent", Host: "node1"}
	want := []corev1.Event{
		{
			InvolvedObject: about, Source: source, ReportingController: "magic-ip-agent", ReportingInstance: self.Name, Type: "Normal",
			Reason: "EndpointGained", Message: "gained", Count: 1, FirstTimestamp: metav1.NewTime(first), LastTimestamp: metav1.NewTime(first),
		},
		{
			InvolvedObject: about, Source: source, ReportingController: "magic-ip-agent", ReportingInstance: self.Name, Type: "Warning",
			Reason: "EndpointUnstable", Message: strings.Repeat("ä", mostMessage/2-2) + "...", Count: 40, FirstTimestamp: metav1.NewTime(first), LastTimestamp: metav1.NewTime(last),
		},
	}
	byReason := cmpopts.SortSlices(func(a, b corev1.Event) bool { return a.Reason < b.Reason })
	if diff := cmp.Diff(want, list.Items, byReason, cmpopts.IgnoreFields(corev1.Event{}, "ObjectMeta", "TypeMeta")); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	for _, e := range list.Items {
		if len(e.Name) > 253 || !strings.HasPrefix(e.Name, "long-") {
			t.Errorf("an event is called %s", e.Name)
		}
	}
}

// TestEventsForbidden: the error names the right that is missing.
func TestEventsForbidden(t *testing.T) {
	t.Parallel()
	client := fake.NewClientset()
	client.PrependReactor("create", "events", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "events"}, "", nil)
	})
	pods := &Pods{client: client}
	err := pods.Events(Self{Namespace: "kube-system", Name: "agent", UID: "u"})(t.Context(), event.Event{})
	if err == nil || !strings.Contains(err.Error(), "allow create of events there") {
		t.Errorf("error %v, want one that names the right", err)
	}
}
