//go:build e2e

package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The rows of the table in docs/concepts.md, "Which pod is the endpoint", and what stands below it.

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
	w.await("to publish the labels", func(*runtimedir.Status) bool { return w.labels(pod.name, string(pod.uid))["app"] == "echo" })
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

// owner: a pod that merely bears the labels is no target, nor is one whose author names the owner without its UID, or the UID of
// one that was replaced.
func owner(t *testing.T) {
	w := serving(t, "owner: DaemonSet/echo")
	live := w.daemonSet()
	invented := live
	invented.UID = "11111111-2222-3333-4444-555555555555"
	group, kind, mere := live, live, live
	group.APIVersion, kind.Kind, mere.Controller = "apps.example.com/v1", "ReplicaSet", nil
	w.create("impostor").add().running(true)
	w.create("invented", ownedBy(invented)).add().running(true)
	w.create("group", ownedBy(group)).add().running(true)
	w.create("kind", ownedBy(kind)).add().running(true)
	w.create("referenced", ownedBy(mere)).add().running(true)
	w.staysWith("")
	w.create("first", ownedBy(live)).add().running(true)
	w.goesTo("first")
	w.must(plane.Admin.AppsV1().DaemonSets(w.namespace).Delete(w.Context(), "echo", metav1.DeleteOptions{}))
	w.create("second", ownedBy(w.daemonSet())).add().running(false)
	w.goesTo("second")
}

// TestDeployment: it owns a pod by its ReplicaSet.
func TestDeployment(t *testing.T) {
	w := serving(t, "owner: Deployment/echo")
	template := corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "echo"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "echo", Image: "none"}}},
	}
	selector := &metav1.LabelSelector{MatchLabels: template.Labels}
	deployment, err := plane.Admin.AppsV1().Deployments(w.namespace).Create(w.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "echo"}, Spec: appsv1.DeploymentSpec{Selector: selector, Template: template},
	}, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() {
		w.must(plane.Admin.AppsV1().Deployments(w.namespace).Delete(context.WithoutCancel(w.Context()), "echo", metav1.DeleteOptions{}))
	})
	replicaSet := func(name string, owners ...metav1.OwnerReference) metav1.OwnerReference {
		set, err := plane.Admin.AppsV1().ReplicaSets(w.namespace).Create(w.Context(), &appsv1.ReplicaSet{
			ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: owners}, Spec: appsv1.ReplicaSetSpec{Selector: selector, Template: template},
		}, metav1.CreateOptions{})
		w.must(err)
		w.Cleanup(func() {
			w.must(plane.Admin.AppsV1().ReplicaSets(w.namespace).Delete(context.WithoutCancel(w.Context()), name, metav1.DeleteOptions{}))
		})
		return controlledBy("ReplicaSet", name, set.UID)
	}
	w.create("alone", ownedBy(replicaSet("alone"))).add().running(true)
	w.create("named", ownedBy(controlledBy("Deployment", "echo", "11111111-2222-3333-4444-555555555555"))).add().running(true)
	w.staysWith("")
	w.create("echo", ownedBy(replicaSet("echo-5d4f", controlledBy("Deployment", "echo", deployment.UID)))).add().running(true)
	w.goesTo("echo")
}

// serviceAccount: it can be asked for beside the labels.
func serviceAccount(t *testing.T) {
	w := serving(t, "serviceAccount: echo")
	w.create("impostor").add().running(true)
	w.staysWith("")
	w.create("echo", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "echo" }).add().running(true)
	w.goesTo("echo")
}

// daemonSet is the DaemonSet echo, which there is until the end of the test, as the controller of a pod.
func (w *world) daemonSet() metav1.OwnerReference {
	w.Helper()
	labels := map[string]string{"app": "echo"}
	sets := plane.Admin.AppsV1().DaemonSets(w.namespace)
	set, err := sets.Create(w.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: "echo"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "echo", Image: "none"}}},
			},
		},
	}, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() { _ = sets.Delete(context.WithoutCancel(w.Context()), "echo", metav1.DeleteOptions{}) })
	return controlledBy("DaemonSet", "echo", set.UID)
}

func controlledBy(kind, name string, uid types.UID) metav1.OwnerReference {
	controller := true
	return metav1.OwnerReference{APIVersion: "apps/v1", Kind: kind, Name: name, UID: uid, Controller: &controller}
}

func ownedBy(owner metav1.OwnerReference) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.OwnerReferences = []metav1.OwnerReference{owner} }
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
			pod := w.create("echo", ownedBy(w.daemonSet())).add()
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

// TestStaticPod: the sandbox of a static pod has another UID than its mirror in the API, which kubelet makes, and makes
// again when somebody deletes it.
func TestStaticPod(t *testing.T) {
	w := serving(t)
	const hash = "8f0f2d0d1c3a4b5c6d7e8f9012345678"
	mirror := func(p *corev1.Pod) {
		p.Annotations = map[string]string{
			"kubernetes.io/config.hash": hash, "kubernetes.io/config.mirror": hash,
			"kubernetes.io/config.seen": "2026-01-01T00:00:00.000000000Z", "kubernetes.io/config.source": "file",
		}
		controller := true
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: w.node.Name, UID: "node-uid", Controller: &controller}}
	}
	old := w.create("old").add().running(true)
	w.goesTo("old")
	static := w.create("static-node1", mirror)
	static.sandbox = hash
	w.await("to publish the labels", func(*runtimedir.Status) bool { return w.labels(static.name, hash)["app"] == "echo" })
	static.add()
	if record, _ := static.record(); record.Labels["app"] != "echo" {
		t.Errorf("record %+v, want label app=echo", record)
	}
	w.staysWith("old")
	static.running(true)
	w.goesTo("static-node1") // ready, and newer
	static.running(false)
	w.goesTo("old")
	static.running(true)
	w.goesTo("static-node1")
	old.del()
	old.forceDelete()

	static.forceDelete()
	w.staysWith("static-node1")
	again := w.create("static-node1", mirror)
	again.sandbox, again.ip = hash, static.ip
	w.staysWith("static-node1")
	again.running(true)
	w.staysWith("static-node1")
	static.del()
	w.goesTo("")
	w.staysWith("")
}

// TestHostNetwork: a pod in the node's own network has no ADD; its address is the node's.
func TestHostNetwork(t *testing.T) {
	w := serving(t)
	pod := w.create("echo", func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	pod.netns, pod.ip = lab.Host, netip.MustParseAddr(lab.NodeIPv4)
	pod.listen(port)
	t.Cleanup(func() { _ = pod.echos[0].Close() })
	w.staysWith("")
	pod.running(false)
	w.goesTo("echo")
	pod.running(true)
	w.staysWith("echo")
	fresh := w.create("new").add().running(false)
	w.staysWith("echo")
	fresh.running(true)
	w.goesTo("new")
	fresh.del()
	w.goesTo("echo")
	pod.forceDelete()
	fresh.forceDelete()
	w.goesTo("")
}

// TestSameName: a pod that comes again under its name, and perhaps its address, is another pod (StatefulSet).
func TestSameName(t *testing.T) {
	w := serving(t)
	before := w.create("echo-0").add().running(true)
	w.goesTo("echo-0")
	before.terminate()
	before.running(false)
	before.del()
	w.goesTo("")
	before.forceDelete()
	again := w.create("echo-0")
	w.staysWith("")
	again.add()
	w.goesTo("echo-0")
	again.running(true)
	w.staysWith("echo-0")

	// And where the node hears late: the new object is there while the old sandbox still is.
	again.forceDelete()
	last := w.create("echo-0")
	last.netns = "echo-0-again"
	w.staysWith("echo-0")
	last.add().running(true)
	w.settle()
	w.await("to go to the new sandbox", func(a *runtimedir.Status) bool { return a.MagicIPs[0].Endpoints[0].UID == string(last.uid) })
	again.del()
	w.staysWith("echo-0")
	last.del()
	w.goesTo("")
}

// TestRandom: new connections are spread over all targets of the best rank, and no other.
func TestRandom(t *testing.T) {
	w := serving(t, "distribution: random")
	w.create("a").add().running(true)
	b := w.create("b").add().running(true)
	w.create("c").add().running(false)
	meets := func(want ...string) {
		t.Helper()
		w.settle()
		met := map[string]bool{}
		for range 40 {
			answer, err := w.node.Ask(t.Context(), lab.Client{Kind: lab.NewConnection, From: "client", To: magic()})
			w.must(err)
			met[answer.Server] = true
		}
		if got := slices.Sorted(maps.Keys(met)); !slices.Equal(got, want) {
			t.Errorf("answered by %v, want %v", got, want)
		}
	}
	meets("a", "b")
	b.running(false)
	meets("a")
	b.running(true)
	meets("a", "b")
	b.terminate()
	meets("a")
}

// TestNamespaces: one agent serves several namespaces, each with its own pods. One that it may not read does not
// keep it from the others, after a restart neither.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	w := apart(t, "several", "*")
	other := in("several-too")
	revoke := w.grant("several-too")
	w.grant("several-not")
	w.servingTwo("several-too")
	second := w.create("second", other, labelled("api-only")).add().running(true)
	w.goesToOf(apiOnly, "second")
	w.staysWith("")
	w.create("first", in("several")).add().running(true)
	w.goesTo("first")
	w.create("third", in("several-not")).add().running(true)
	w.create("fourth", in("several-too")).add().running(true)
	w.create("fifth", labelled("api-only")).add().running(true)
	w.staysWith("first")
	w.answersOf(apiOnly, "second")

	revoke()
	w.agent.Kill()
	w.start()
	w.problem("the API server does not allow the pods of namespace several-too; allow get, list and watch of pods there")
	w.staysWith("first")
	w.answersOf(apiOnly, "second")
	last := w.create("last").add().running(true)
	w.goesTo("last")
	last.del()
	w.goesTo("first")
	last.forceDelete()
	w.answersOf(apiOnly, "second")

	w.grant("several-too")
	w.mended()
	second.running(false)
	w.create("third-too", other, labelled("api-only")).add().running(true)
	w.goesToOf(apiOnly, "third-too")
}

// TestEveryNamespace: `namespace: "*"` is every one, also one that is made later.
func TestEveryNamespace(t *testing.T) {
	t.Parallel()
	w := apart(t, "every", "*")
	w.grant("*")
	w.serve(`namespace: "*"`)
	first := w.create("first").add().running(true)
	w.goesTo("first")
	w.grant("every-later")
	fresh := w.create("second", in("every-later")).add().running(true)
	w.goesTo("second")
	fresh.running(false)
	w.goesTo("first")
	first.running(false)
	unrecorded := w.create("third", in("every-later")).addUnrecorded().running(true)
	w.goesTo("third")
	unrecorded.forceDelete()
	w.goesTo("second")
}

// grant lets the agent's account read the pods of another namespace too, or with "*" of all, until the test ends or it
// is taken back.
func (w *world) grant(namespace string) (revoke func()) {
	w.Helper()
	ctx, rbac := context.WithoutCancel(w.Context()), plane.Admin.RbacV1()
	meta := metav1.ObjectMeta{Name: w.namespace}
	subjects := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: AgentUser, Namespace: w.namespace}}
	var err error
	if namespace == "*" {
		role := &rbacv1.ClusterRole{ObjectMeta: meta, Rules: podReader}
		_, errRole := rbac.ClusterRoles().Create(ctx, role, metav1.CreateOptions{})
		_, errBinding := rbac.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: meta, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		}, metav1.CreateOptions{})
		err = errors.Join(errRole, errBinding)
		revoke = func() { _ = rbac.ClusterRoleBindings().Delete(ctx, meta.Name, metav1.DeleteOptions{}) }
	} else {
		_, errRole := allowAccount(ctx, namespace)
		_, errBinding := rbac.RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
			ObjectMeta: meta, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: AgentUser},
		}, metav1.CreateOptions{})
		err = errors.Join(errRole, errBinding)
		revoke = func() { _ = rbac.RoleBindings(namespace).Delete(ctx, meta.Name, metav1.DeleteOptions{}) }
	}
	w.must(err)
	w.Cleanup(revoke)
	return revoke
}

func in(namespace string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Namespace = namespace }
}

func labelled(app string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Labels = map[string]string{"app": app} }
}
