//go:build e2e

package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedappsv1 "k8s.io/client-go/kubernetes/typed/apps/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// own is an installer on a node of its own, and the DaemonSet that it belongs to. There is no controller: what a garbage
// collector would do about finalizers, the tests do.
type own struct {
	*testing.T
	node      *lab.Node
	plane     *ControlPlane
	installer *lab.Process
}

const (
	ownName     = "magic"
	ownConflist = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
)

// TestOwnDaemonSet: what a real API server says of a DaemonSet that is deleted in one way or another, to an installer with no
// other right than to get, list and watch this one by its name.
func TestOwnDaemonSet(t *testing.T) {
	ctx, cancel := lab.Patience(t.Context(), 2*time.Minute)
	defer cancel()
	node, err := lab.NewNode(ctx, lab.NodeOptions{Name: "own"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = node.Close() })
	plane, err := Start(ctx, node)
	if err != nil {
		t.Fatal(err)
	}
	o := &own{T: t, node: node, plane: plane}
	o.write("/run/net.d/10-a.conflist", ownConflist)
	o.write("/run/bin/other", "")
	o.write("/run/config.yaml", "name: default.own\nmagicIPs:\n- {ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}\n")
	o.allow()

	for _, test := range []struct {
		name string
		do   func()
		gone bool
	}{
		{"deleted, background", func() { o.delete(metav1.DeletePropagationBackground) }, true},
		{"deleted, foreground", func() { o.delete(metav1.DeletePropagationForeground) }, true},
		{"deleted without its pods", func() { o.delete(metav1.DeletePropagationOrphan); o.finish() }, false},
		{"changed", func() { o.change() }, false},
		{"deleted and made anew", func() { o.delete(metav1.DeletePropagationBackground); o.create() }, true},
		{"deleted while the API server was away", func() {
			// A restart: the watch breaks, and what has happened before the next one is found out.
			plane.KillAPIServer()
			if err := plane.StartAPIServer(ctx); err != nil {
				t.Fatal(err)
			}
			o.delete(metav1.DeletePropagationBackground)
		}, true},
		{"rights gone, restart of the API server, SIGTERM", func() {
			o.forbid()
			plane.KillAPIServer()
			if err := plane.StartAPIServer(ctx); err != nil {
				t.Fatal(err)
			}
			o.eventually("to be refused", func() bool { return strings.Contains(o.installer.Log(), "forbidden") })
			o.delete(metav1.DeletePropagationBackground) // and nobody who may know
			if err := o.installer.Stop(ctx); err != nil {
				t.Error(err)
			}
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			o.T = t
			o.create()
			o.start()
			test.do()
			if test.gone {
				o.eventually("the entry to go", func() bool { return o.conflist() == ownConflist })
			} else {
				time.Sleep(2 * time.Second)
				if !strings.Contains(o.conflist(), "default.own") {
					t.Errorf("uninstalled; log:\n%s", o.installer.Log())
				}
			}
			o.installer.Kill()
			o.finish()
			_ = o.daemonSets().Delete(ctx, ownName, metav1.DeleteOptions{})
			o.write("/run/net.d/10-a.conflist", ownConflist)
		})
	}
}

func (o *own) daemonSets() typedappsv1.DaemonSetInterface {
	return o.plane.Admin.AppsV1().DaemonSets(metav1.NamespaceDefault)
}

func (o *own) must(err error) {
	o.Helper()
	if err != nil {
		o.Fatal(err)
	}
}

func (o *own) write(name, content string) {
	o.Helper()
	o.must(o.node.WriteFile(name, []byte(content)))
	past := time.Now().Add(-time.Hour)
	o.must(os.Chtimes(o.node.Path(name), past, past))
}

func (o *own) conflist() string {
	o.Helper()
	data, err := os.ReadFile(o.node.Path("/run/net.d/10-a.conflist"))
	o.must(err)
	return string(data)
}

func (o *own) eventually(what string, so func() bool) {
	o.Helper()
	ctx, cancel := lab.Patience(o.Context(), 60*time.Second)
	defer cancel()
	err := lab.Eventually(ctx, func() error {
		if !so() {
			return fmt.Errorf("waiting for %s", what)
		}
		return nil
	})
	if err != nil {
		o.Fatalf("%v; log:\n%s", err, o.installer.Log())
	}
}

// start starts the installer, and waits until it watches.
func (o *own) start() {
	o.Helper()
	root, err := lab.ModuleRoot()
	o.must(err)
	before, err := o.plane.Requests("watch")
	o.must(err)
	o.installer, err = o.node.Start(filepath.Join(root, "bin", "magic-ip-agent"), "install", "--watch", "--config", "/run/config.yaml",
		"--cni-conf-dir", "/run/net.d", "--cni-bin-dir", "/run/bin", "--plugin", filepath.Join(root, "bin", "magic-ip-address"),
		"--daemonset", metav1.NamespaceDefault+"/"+ownName, "--kubeconfig", AgentKubeconfig)
	o.must(err)
	o.eventually("the entry", func() bool { return strings.Contains(o.conflist(), "default.own") })
	o.eventually("the watch", func() bool {
		now, err := o.plane.Requests("watch")
		return err == nil && now > before
	})
}

func (o *own) create() {
	o.Helper()
	labels := map[string]string{"app": ownName}
	_, err := o.daemonSets().Create(o.Context(), &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Name: ownName},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "agent", Image: "none"}}},
			},
		},
	}, metav1.CreateOptions{})
	o.must(err)
}

func (o *own) delete(how metav1.DeletionPropagation) {
	o.Helper()
	o.must(o.daemonSets().Delete(o.Context(), ownName, metav1.DeleteOptions{PropagationPolicy: &how}))
}

// finish removes the finalizers, as the garbage collector does when it has seen to the pods.
func (o *own) finish() {
	o.Helper()
	object, err := o.daemonSets().Get(o.Context(), ownName, metav1.GetOptions{})
	if err != nil || len(object.Finalizers) == 0 {
		return // it is gone
	}
	object.Finalizers = nil
	_, err = o.daemonSets().Update(o.Context(), object, metav1.UpdateOptions{})
	o.must(err)
}

func (o *own) change() {
	o.Helper()
	object, err := o.daemonSets().Get(o.Context(), ownName, metav1.GetOptions{})
	o.must(err)
	object.Labels = map[string]string{"changed": "yes"}
	_, err = o.daemonSets().Update(o.Context(), object, metav1.UpdateOptions{})
	o.must(err)
}

// allow gives the rights that docs/operations.md names for --daemonset, and no other.
func (o *own) allow() {
	o.Helper()
	rbac := o.plane.Admin.RbacV1()
	_, err := rbac.Roles(metav1.NamespaceDefault).Create(o.Context(), &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: ownName},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{"apps"}, Resources: []string{"daemonsets"}, ResourceNames: []string{ownName}, Verbs: []string{"get", "list", "watch"}}},
	}, metav1.CreateOptions{})
	o.must(err)
	_, err = rbac.RoleBindings(metav1.NamespaceDefault).Create(o.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: ownName},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: ownName},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: AgentUser}},
	}, metav1.CreateOptions{})
	o.must(err)
}

func (o *own) forbid() {
	o.Helper()
	o.must(o.plane.Admin.RbacV1().RoleBindings(metav1.NamespaceDefault).Delete(o.Context(), ownName, metav1.DeleteOptions{}))
}
