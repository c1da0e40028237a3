//go:build e2e

package cluster

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The agents of these tests know their own pod, as the downward API would tell them.
const (
	agentPod = "magic-ip-agent-x"
	agentUID = "99999999-2222-3333-4444-555555555555"
)

// asPod has the agents of the test know their pod.
func asPod(t *testing.T) {
	t.Setenv("POD_NAME", agentPod)
	t.Setenv("POD_NAMESPACE", metav1.NamespaceDefault)
	t.Setenv("POD_UID", agentUID)
}

// events are those of the agent's pod so far, and none from another test.
func (w *world) events() []corev1.Event {
	w.Helper()
	list, err := plane.Admin.CoreV1().Events(metav1.NamespaceDefault).List(w.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + agentUID})
	w.must(err)
	return list.Items
}

func (w *world) awaitEvent(limit time.Duration, reason string) (found corev1.Event) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), limit)
	defer cancel()
	w.must(lab.Eventually(ctx, func() error {
		for _, e := range w.events() {
			if e.Reason == reason {
				found = e
				return nil
			}
		}
		return fmt.Errorf("no event %s among %d", reason, len(w.events()))
	}))
	return found
}

// TestEventsOfAFlappingPod: 200 changes of readiness make a few Events, which count all of them; that no endpoint has
// come back is told too.
func TestEventsOfAFlappingPod(t *testing.T) {
	const flaps, most = 200, 4
	asPod(t)
	before, err := plane.Requests("create")
	if err != nil {
		t.Fatal(err)
	}
	w := serving(t, "readiness: require")
	t.Cleanup(func() {
		_ = plane.Admin.CoreV1().Events(metav1.NamespaceDefault).DeleteCollection(context.WithoutCancel(t.Context()), metav1.DeleteOptions{}, metav1.ListOptions{})
	})
	pod := w.create("echo").add()
	for i := range flaps {
		ready := i%2 == 0
		pod.running(ready)
		want := map[bool]string{true: "echo"}[ready]
		w.await("to follow", func(a *published.Agent) bool { return endpointOf(a, magic().Addr()) == want })
	}
	unstable := w.awaitEvent(100*time.Second, "EndpointUnstable")
	lost := w.awaitEvent(100*time.Second, "EndpointLost")
	events := w.events()
	changes := 0
	for _, e := range events {
		t.Logf("%s %s x%d: %s", e.Type, e.Reason, e.Count, e.Message)
		changes += int(e.Count)
	}
	created, err := plane.Requests("create")
	w.must(err)
	if len(events) > most || created-before > most {
		t.Errorf("%d events of %d requests, want at most %d", len(events), created-before, most)
	}
	if changes < flaps {
		t.Errorf("the events stand for %d changes, want %d", changes, flaps)
	}
	if who := "default/echo (" + pod.ip.String() + ")"; !strings.Contains(lost.Message, who) {
		t.Errorf("%s does not name %s: %s", lost.Reason, who, lost.Message)
	}
	for _, e := range []corev1.Event{unstable, lost} {
		for _, word := range []string{magicIP, "kubectl get pods", "spec.nodeName=" + w.node.Name} {
			if !strings.Contains(e.Message, word) {
				t.Errorf("%s does not say %q: %s", e.Reason, word, e.Message)
			}
		}
		about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: metav1.NamespaceDefault, Name: agentPod, UID: agentUID}
		if e.InvolvedObject != about || e.Type != corev1.EventTypeWarning || e.ReportingController != "magic-ip-agent" {
			t.Errorf("%s is a %s of %s about %+v", e.Reason, e.Type, e.ReportingController, e.InvolvedObject)
		}
	}
}

// TestEventsForbidden: without the right to create them there are none. The agent says so once, and goes on.
func TestEventsForbidden(t *testing.T) {
	asPod(t)
	w := serving(t)
	w.whenBack(func(w *world) { w.mayCreateEvents(true) })
	w.mayCreateEvents(false)
	const missing = "Events are not sent: the API server refuses Events in namespace default: allow create of events there"
	pod := w.create("echo").add().running(true)
	w.goesTo("echo")
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	w.awaitFor(ctx, "to say what right is missing", func(a *published.Agent) bool {
		return strings.Contains(strings.Join(a.Notes, "\n"), missing) && a.LastError == ""
	})
	if status, err := w.node.RunAgent(w.Context(), "status"); err != nil || !strings.Contains(status, "note: "+missing) {
		t.Errorf("status: %v\n%s", err, status)
	}
	pod.del()
	w.goesToWithin(soon, "")
	pod.add()
	w.goesToWithin(soon, "echo")
	if said := strings.Count(w.agent.Log(), "Events cannot be sent"); said != 1 {
		t.Errorf("the log says %d times that Events cannot be sent", said)
	}
}

// mayCreateEvents gives or takes one right of the agent.
func (w *world) mayCreateEvents(may bool) {
	w.Helper()
	verbs := `["get"]` // a rule needs one
	if may {
		verbs = `["create"]`
	}
	patch := `[{"op": "replace", "path": "/rules/1/verbs", "value": ` + verbs + `}]`
	_, err := plane.Admin.RbacV1().Roles(metav1.NamespaceDefault).Patch(context.WithoutCancel(w.Context()), AgentUser, types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
	w.must(err)
}
