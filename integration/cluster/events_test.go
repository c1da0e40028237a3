//go:build e2e

package cluster

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The agents of these tests know their own pod, as the downward API would tell them.
const (
	agentPod = "magic-ip-agent-x"
	agentUID = "99999999-2222-3333-4444-555555555555"
)

// servingAsPod starts an agent that knows its pod, on a node of its own.
func servingAsPod(t *testing.T, namespace string, settings ...string) *world {
	t.Helper()
	w := apart(t, namespace, namespace)
	w.node.Env = []string{"POD_NAME=" + agentPod, "POD_NAMESPACE=" + namespace, "POD_UID=" + agentUID}
	w.serve(settings...)
	return w
}

// events are those of the agent's pod so far.
func (w *world) events() []corev1.Event {
	w.Helper()
	list, err := plane.Admin.CoreV1().Events(w.namespace).List(w.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=" + agentUID})
	w.must(err)
	return list.Items
}

func (w *world) awaitEvent(limit time.Duration, reason string) (found corev1.Event) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), limit)
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

// TestEventsOfAFlappingPod: 200 changes of readiness make a few Events, which name the number of changes; that there is
// no endpoint in the end is one of them.
func TestEventsOfAFlappingPod(t *testing.T) {
	t.Parallel()
	const flaps, most = 200, 4
	w := servingAsPod(t, "flapping", "readiness: require")
	w.mayCreateEvents()
	pod := w.create("echo").add()
	for i := range flaps {
		ready := i%2 == 0
		pod.running(ready)
		want := map[bool]string{true: "echo"}[ready]
		w.await("to follow", func(a *runtimedir.Status) bool { return endpointOf(a, magic().Addr()) == want })
	}
	unstable := w.awaitEvent(100*time.Second, "EndpointUnstable")
	lost := w.awaitEvent(100*time.Second, "EndpointLost")
	events := w.events()
	changes := 0
	for _, e := range events {
		t.Logf("%s %s x%d: %s", e.Type, e.Reason, e.Count, e.Message)
		if _, rest, found := strings.Cut(e.Message, "has changed "); found {
			var n int
			if _, err := fmt.Sscan(rest, &n); err != nil {
				t.Error(err)
			}
			changes += n
		}
	}
	if created := w.proxy.count("post"); len(events) > most || created > most {
		t.Errorf("%d events of %d requests, want at most %d", len(events), created, most)
	}
	if changes < flaps-6 { // a few at either end are no more than a rollout
		t.Errorf("the events name %d changes, want %d", changes, flaps)
	}
	if who := "flapping/echo (" + pod.ip.String() + ")"; !strings.Contains(lost.Message, who) {
		t.Errorf("%s does not name %s: %s", lost.Reason, who, lost.Message)
	}
	for _, e := range []corev1.Event{unstable, lost} {
		for _, word := range []string{magicIP, "kubectl get pods", "spec.nodeName=" + w.node.Name} {
			if !strings.Contains(e.Message, word) {
				t.Errorf("%s does not say %q: %s", e.Reason, word, e.Message)
			}
		}
		about := corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: w.namespace, Name: agentPod, UID: agentUID}
		if e.InvolvedObject != about || e.Type != corev1.EventTypeWarning || e.ReportingController != "magic-ip-agent" {
			t.Errorf("%s is a %s of %s about %+v", e.Reason, e.Type, e.ReportingController, e.InvolvedObject)
		}
	}
}

// TestEventsForbidden: without the right to create them there are none. The agent logs that once, and goes on.
func TestEventsForbidden(t *testing.T) {
	t.Parallel()
	w := servingAsPod(t, "silenced")
	const missing = "Events are not sent: the API server does not allow Events in namespace silenced; allow create and patch of events there"
	pod := w.create("echo").add().running(true)
	w.goesTo("echo")
	ctx, cancel := lab.Patience(w.Context(), time.Minute)
	defer cancel()
	w.awaitFor(ctx, "to say what right is missing", func(a *runtimedir.Status) bool {
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

// mayCreateEvents gives the agent that right.
func (w *world) mayCreateEvents() {
	w.Helper()
	const patch = `[{"op": "add", "path": "/rules/-", "value": {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}}]`
	_, err := plane.Admin.RbacV1().Roles(w.namespace).Patch(w.Context(), AgentUser, types.JSONPatchType, []byte(patch), metav1.PatchOptions{})
	w.must(err)
}
