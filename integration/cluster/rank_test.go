//go:build e2e

package cluster

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// The rows of the README's table, "Which pod is the endpoint", and what stands below it.

// TestReadyBeatsNewer: a newer pod that is not ready takes no traffic (maxSurge), and all of it once it is.
func TestReadyBeatsNewer(t *testing.T) {
	w := serving(t)
	old := w.create("old").add().running(true)
	w.goesTo("old")
	fresh := w.create("new").add()
	w.staysWith("old")
	fresh.running(false)
	w.staysWith("old")
	fresh.running(true)
	w.goesTo("new")
	old.terminate()
	w.staysWith("new")
	old.del()
	old.forceDelete()
	w.staysWith("new")
}

// TestNotReadyBeatsNone: a pod gets traffic from its ADD on where no other is there.
func TestNotReadyBeatsNone(t *testing.T) {
	w := serving(t)
	w.goesTo("")
	first := w.create("first").add()
	w.goesTo("first")
	first.running(false)
	w.staysWith("first")
	w.create("second").add().running(false)
	w.goesTo("second") // of one rank the newest
}

// TestTerminating: a terminating pod serves while it is ready, and still where there is no other.
func TestTerminating(t *testing.T) {
	w := serving(t)
	old := w.create("old").add().running(true)
	w.goesTo("old")
	old.terminate()
	w.staysWith("old")
	fresh := w.create("new").add().running(false)
	w.staysWith("old") // ready, terminating beats not ready
	old.running(false)
	w.goesTo("new") // not ready beats not ready, terminating
	fresh.forceDelete()
	fresh.del()
	w.goesTo("old") // terminating, not ready beats none
	old.del()
	w.goesTo("")
}

func TestRequire(t *testing.T) {
	w := serving(t, "readiness: require")
	pod := w.create("echo").add()
	w.staysWith("")
	pod.running(false)
	w.staysWith("")
	pod.running(true)
	w.goesTo("echo")
	pod.running(false)
	w.goesTo("")
	pod.running(true)
	w.goesTo("echo")
	pod.terminate()
	w.staysWith("echo")
	pod.running(false)
	w.goesTo("")
}

func TestIgnore(t *testing.T) {
	w := serving(t, "readiness: ignore")
	w.create("old").add().running(true)
	w.goesTo("old")
	fresh := w.create("new").add()
	w.goesTo("new")
	fresh.running(false)
	w.staysWith("new")
	fresh.terminate()
	w.goesTo("old")
}

// TestFinished: a pod that has ended is no endpoint, although its sandbox still stands.
func TestFinished(t *testing.T) {
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		t.Run(string(phase), func(t *testing.T) {
			w := serving(t)
			pod := w.create("echo").add().running(true)
			w.goesTo("echo")
			pod.status(phase, false)
			w.goesTo("")
		})
	}
}

// TestForceDeleted: the object goes first. The pod serves as long as its sandbox stands.
func TestForceDeleted(t *testing.T) {
	w := serving(t)
	pod := w.create("echo").add().running(true)
	w.goesTo("echo")
	pod.forceDelete()
	w.staysWith("echo")
	pod.del()
	w.goesTo("")
}

// TestWithdrawnAddress: after DEL the pod's podIP, which the API tells still, counts no more.
func TestWithdrawnAddress(t *testing.T) {
	w := serving(t)
	pod := w.create("echo").add().running(true)
	w.goesTo("echo")
	pod.del()
	w.goesTo("")
	w.staysWith("")
	pod.add() // a new sandbox under the same UID
	w.goesTo("echo")
}

// TestOlderThanThePlugin: a pod without a record is reached by its podIP, once it runs.
func TestOlderThanThePlugin(t *testing.T) {
	w := serving(t)
	pod := w.create("echo")
	pod.addUnrecorded()
	w.staysWith("")
	pod.running(true)
	w.goesTo("echo")
	if _, recorded := pod.record(); recorded {
		t.Error("the pod is recorded, and should not be")
	}
	pod.forceDelete()
	w.goesTo("")
}

// TestLabelsChange: labels of a running pod that change make it a target or none.
func TestLabelsChange(t *testing.T) {
	w := serving(t)
	pod := w.create("echo", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "other"} }).add().running(true)
	w.staysWith("")
	pod.label("app", "echo")
	w.goesTo("echo")
	pod.label("app", nil)
	w.goesTo("")
}

// TestLabelsPublished: what the API has told of a pod before its ADD, the plugin finds and records.
func TestLabelsPublished(t *testing.T) {
	w := serving(t)
	pod := w.create("echo")
	w.await("to publish the labels", func(a *published.Agent) bool { return a.Labels[string(pod.uid)]["app"] == "echo" })
	other := w.create("other", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "other"} })
	w.settle()
	pod.add()
	if record, _ := pod.record(); record.Labels["app"] != "echo" {
		t.Errorf("record %+v, want label app=echo", record)
	}
	other.add()
	if record, recorded := other.record(); recorded {
		t.Errorf("record %+v of a pod that nobody selects", record)
	}
	w.goesTo("echo")
}

// TestLabelsAfterADD: nobody knew the labels at ADD; the pod is the endpoint once the API has told them.
func TestLabelsAfterADD(t *testing.T) {
	w := serving(t)
	w.agent.Kill()
	pod := w.create("echo").add()
	if record, recorded := pod.record(); !recorded || record.Labels != nil {
		t.Errorf("record %+v, want one without labels", record)
	}
	w.start()
	w.goesTo("echo")
}

// TestOwner: a pod that merely bears the labels is no target.
func TestOwner(t *testing.T) {
	w := serving(t, "owner: DaemonSet/echo")
	w.create("impostor").add().running(true)
	w.create("other", ownedBy("ReplicaSet", "echo", true)).add().running(true)
	w.create("referenced", ownedBy("DaemonSet", "echo", false)).add().running(true)
	w.staysWith("")
	w.create("echo", ownedBy("DaemonSet", "echo", true)).add().running(false)
	w.goesTo("echo")
}

func ownedBy(kind, name string, controller bool) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: name, UID: "11111111-2222-3333-4444-555555555555", Controller: &controller}}
	}
}

// TestNamedPort: each pod has its own number for the name of a port, of a native sidecar too.
func TestNamedPort(t *testing.T) {
	w := serving(t, "ports: [{port: 8080, targetPort: web}]")
	named := func(number int32) []corev1.ContainerPort {
		return []corev1.ContainerPort{{Name: "web", ContainerPort: number}}
	}
	w.create("old", func(p *corev1.Pod) { p.Spec.Containers[0].Ports = named(9001) }).add().listen(9001).running(true)
	w.goesTo("old")
	always := corev1.ContainerRestartPolicyAlways
	fresh := w.create("new", func(p *corev1.Pod) {
		p.Spec.InitContainers = []corev1.Container{{Name: "proxy", Image: "none", RestartPolicy: &always, Ports: named(9002)}}
	}).add().listen(9002).running(true)
	w.goesTo("new")
	w.create("without").add().running(true)
	w.staysWith("new")
	fresh.del()
	w.goesTo("old")
}

// TestForgotten: what the API has told of a pod counts for as long as its sandbox stands, although the API has
// forgotten the pod: labels that nobody knew at ADD, the owner and the number of a port's name.
func TestForgotten(t *testing.T) {
	for name, settings := range map[string]string{
		"labels": "readiness: prefer", "owner": "owner: DaemonSet/echo", "port": fmt.Sprintf("ports: [{port: %d, targetPort: http}]", port),
	} {
		t.Run(name, func(t *testing.T) {
			w := serving(t, settings)
			w.agent.Kill()
			pod := w.create("echo", ownedBy("DaemonSet", "echo", true)).add()
			w.start()
			w.goesTo("echo")
			pod.forceDelete()
			w.staysWith("echo")
			w.agent.Kill()
			w.start()
			w.staysWith("echo")
			pod.del()
			w.goesTo("")
		})
	}
}
