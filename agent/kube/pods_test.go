package kube

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/metadata"
	fakemetadata "k8s.io/client-go/metadata/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// What the tests' selectors look at.
var (
	keys  = map[string]bool{"app": true, "version": true}
	ports = map[string]bool{"http": true, "proxy": true, "setup": true}
)

// noOwners is an API server without owners.
func noOwners() metadata.Interface {
	return fakemetadata.NewSimpleMetadataClient(fakemetadata.NewTestScheme())
}

func examplePod() *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	controller := true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: "echo", UID: "u1", Labels: map[string]string{"app": "echo"},
			Annotations:       map[string]string{configHash: "hash", configMirror: "hash", "other": "dropped"},
			CreationTimestamp: metav1.NewTime(time.Unix(1000, 0)),
			OwnerReferences:   []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "x"}, {APIVersion: "apps/v1", Kind: "DaemonSet", Name: "echo", UID: "d1", Controller: &controller}},
			ManagedFields:     []metav1.ManagedFieldsEntry{{Manager: "kubelet"}},
		},
		Spec: corev1.PodSpec{
			NodeName: "node1", ServiceAccountName: "echo",
			InitContainers: []corev1.Container{
				{Name: "init", Ports: []corev1.ContainerPort{{Name: "setup", ContainerPort: 1}}},
				{Name: "sidecar", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "proxy", ContainerPort: 15001}, {Name: "http", ContainerPort: 2}}},
			},
			Containers: []corev1.Container{{Name: "main", Image: "dropped", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {ContainerPort: 9}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.244.1.2"}, {IP: "fd00::2"}, {IP: "nonsense"}},
			Conditions: []corev1.PodCondition{{Type: corev1.PodInitialized, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
}

// running runs p, in a bubble of synctest, until it has listed; end has it end.
func running(t *testing.T, p *Pods, wake func()) (ctx context.Context, end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- p.Run(ctx, wake) }()
	time.Sleep(time.Second)
	synctest.Wait()
	return ctx, func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute) // for the reflectors' back-off
		synctest.Wait()
	}
}

// pollNow is a poll that is not spread, and has ended.
func pollNow(ctx context.Context, p *Pods) {
	p.mu.Lock()
	p.polledAt = time.Time{}
	p.mu.Unlock()
	p.Poll(ctx)
	synctest.Wait()
}

func names(view inventory.View) string {
	var all []string
	for _, pod := range view.Pods {
		all = append(all, pod.Namespace+"/"+pod.Name)
	}
	return strings.Join(all, " ")
}

// TestPollAndWatch: of a poll and a watch that begins anew, the newer one counts.
func TestPollAndWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset()
		var version atomic.Value
		version.Store("10")
		var listErr atomic.Pointer[error]
		client.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			pod, of := examplePod(), version.Load().(string)
			pod.Name, pod.ResourceVersion = "as-of-"+of, of
			if err := listErr.Load(); err != nil {
				return true, nil, *err
			}
			return true, &corev1.PodList{ListMeta: metav1.ListMeta{ResourceVersion: of}, Items: []corev1.Pod{*pod}}, nil
		})
		p := newPods(client, noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		ctx, end := running(t, p, func() {})
		f := p.feeds["default"]
		expect := func(when, want string) {
			t.Helper()
			if view := p.View(); names(view) != "default/"+want || len(view.Current) == 0 {
				t.Errorf("%s: got %+v, want %s", when, view, want)
			}
		}
		expect("watching", "as-of-10")

		f.answered(errors.New("broken"))
		version.Store("20")
		pollNow(ctx, p)
		expect("polled", "as-of-20")
		fails := errors.New("late")
		listErr.Store(&fails)
		pollNow(ctx, p)
		if view := p.View(); names(view) != "default/as-of-20" || len(view.Current) > 0 {
			t.Errorf("the next poll failed: %+v, want as-of-20, not reachable", view)
		}
		listErr.Store(nil)
		f.answered(nil)
		expect("the watch begins anew", "as-of-20")
		time.Sleep(pollTimeout)
		expect("the watch has told all, in versions that went back", "as-of-10")

		f.answered(errors.New("broken"))
		version.Store("9")
		pollNow(ctx, p)
		expect("a poll from before", "as-of-10")

		version.Store("10")
		f.answered(errors.New("broken"))
		listErr.Store(&fails)
		client.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			f.answered(nil)
			return false, nil, nil
		})
		pollNow(ctx, p)
		expect("a poll that has failed beside a watch that answers", "as-of-10")
		end()
	})
}

// TestFeed: what a silent, a refused and a recovered API server make of the view.
func TestFeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(examplePod())
		var forbidden atomic.Bool
		var lists atomic.Int32
		client.PrependReactor("list", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
			lists.Add(1)
			if got := action.(clienttesting.ListAction).GetListRestrictions().Fields.String(); got != "spec.nodeName=node1" {
				t.Errorf("field selector is %q", got)
			}
			if !forbidden.Load() {
				return false, nil, nil
			}
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", errors.New("no"))
		})
		p := newPods(client, noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		if view := p.View(); len(view.Synced) > 0 || len(view.Current) > 0 || len(view.Problems) > 0 {
			t.Errorf("before anything: %+v", view)
		}
		time.Sleep(firstAnswer)
		if view := p.View(); len(view.Synced) > 0 || len(view.Current) > 0 || len(view.Problems) != 1 {
			t.Errorf("before anything, after some time: %+v", view)
		}
		var wakes atomic.Int32
		ctx, end := running(t, p, func() { wakes.Add(1) })
		if view := p.View(); len(view.Synced) == 0 || len(view.Current) == 0 || names(view) != "default/echo" || wakes.Load() == 0 {
			t.Errorf("after the list: %+v, %d wakes", view, wakes.Load())
		}

		// A healthy watch costs nothing per poll, a silent one a list.
		before := lists.Load()
		pollNow(ctx, p)
		if lists.Load() != before {
			t.Error("a poll beside a healthy watch has listed")
		}
		time.Sleep(watchSilence - time.Second) // running took the first second; a moment later the informer lists again
		if view := p.View(); len(view.Current) > 0 || names(view) != "default/echo" {
			t.Errorf("a silent watch: %+v", view)
		}
		forbidden.Store(true)
		pollNow(ctx, p)
		view := p.View()
		if len(view.Current) > 0 || names(view) != "default/echo" || !strings.Contains(strings.Join(view.Problems, ""), "allow get, list and watch of pods") {
			t.Errorf("a poll that was refused: %+v", view)
		}
		forbidden.Store(false)
		if err := client.Tracker().Delete(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, "default", "echo"); err != nil {
			t.Fatal(err)
		}
		pollNow(ctx, p)
		if view := p.View(); len(view.Current) == 0 || names(view) != "" {
			t.Errorf("a poll that was answered: %+v", view)
		}

		p.Select(inventory.Query{Namespaces: []string{"other", inventory.AllNamespaces}, LabelKeys: keys, PortNames: ports})
		time.Sleep(time.Second)
		synctest.Wait()
		if len(p.feeds) != 1 || p.feeds[inventory.AllNamespaces] == nil {
			t.Errorf("feeds: %v", p.feeds)
		}
		end()
	})
}

// TestWake: only what View returns wakes the agent. Kubelet writes a pod's status for more reasons than that.
func TestWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(examplePod())
		p := newPods(client, noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		var wakes atomic.Int32
		ctx, end := running(t, p, func() { wakes.Add(1) })
		for _, change := range []struct {
			what  string
			wakes int32
			do    func(*corev1.Pod)
		}{
			{"an annotation and a condition that nobody reads", 0, func(pod *corev1.Pod) {
				pod.Annotations["other"], pod.Status.Conditions[0].Message, pod.Status.Message = "new", "new", "new"
			}},
			{"ready", 1, func(pod *corev1.Pod) { pod.Status.Conditions[1].Status = corev1.ConditionFalse }},
			{"an address", 1, func(pod *corev1.Pod) { pod.Status.PodIPs[0].IP = "10.244.1.3" }},
			{"a label", 1, func(pod *corev1.Pod) { pod.Labels["version"] = "2" }},
			{"terminating", 1, func(pod *corev1.Pod) { now := metav1.Now(); pod.DeletionTimestamp = &now }},
		} {
			wakes.Store(0)
			pod, err := client.CoreV1().Pods("default").Get(ctx, "echo", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			change.do(pod)
			if _, err := client.CoreV1().Pods("default").Update(ctx, pod, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if wakes.Load() != change.wakes {
				t.Errorf("%s: %d wakes, want %d", change.what, wakes.Load(), change.wakes)
			}
		}
		end()
	})
}

// TestWatchEnds: between a watch that has ended and the next, which may be long in coming, polls list.
func TestWatchEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPods(fake.NewClientset(examplePod()), noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		f := p.feeds["default"]
		begin := func() *watch.FakeWatcher {
			w := watch.NewFake()
			followed := f.follow(w, func() {})
			go func() {
				for range followed.ResultChan() { //nolint:revive // until it ends
				}
			}()
			return w
		}
		expect := func(when string, healthy bool, problem string) {
			t.Helper()
			synctest.Wait()
			_, _, got := f.view()
			if f.healthy() != healthy || (got == "") != (problem == "") || !strings.Contains(got, problem) {
				t.Errorf("%s: healthy is %v, problem %q", when, f.healthy(), got)
			}
		}
		f.answered(nil)
		expect("listed", false, "")
		time.Sleep(pollTimeout + time.Second)
		expect("listed, and no watch has begun", false, "no other has begun")
		first := begin()
		expect("watching", true, "")
		first.Stop()
		expect("the watch has ended", false, "")
		time.Sleep(pollTimeout + time.Second)
		expect("and no other has begun", false, "no other has begun")
		f.poll(t.Context())
		expect("polled", false, "")
		time.Sleep(time.Second)
		second := begin()
		third := begin()
		second.Stop()
		expect("an older watch has ended after another had begun", true, "")
		time.Sleep(watchSilence)
		expect("a silent watch", false, "silent")
		third.Modify(examplePod())
		expect("an event", true, "")
		third.Stop()
		synctest.Wait()
	})
}

// TestTokenFile: a token that is refused is read again, and another one in the file is taken at once.
func TestTokenFile(t *testing.T) {
	var want atomic.Value
	want.Store("Bearer first")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != want.Load() {
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}`)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	p, err := New(&rest.Config{Host: server.URL, BearerToken: "first", BearerTokenFile: file}, "node1")
	if err != nil {
		t.Fatal(err)
	}
	p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
	f := p.feeds["default"]
	problem := func() string {
		f.poll(t.Context())
		_, _, problem := f.view()
		return problem
	}
	if got := problem(); got != "" {
		t.Errorf("with the token: %s", got)
	}
	want.Store("Bearer second")
	if got := problem(); got == "" {
		t.Error("a token that is refused has no problem")
	}
	write("second")
	if got := problem(); got != "" {
		t.Errorf("with another token: %s", got)
	}
}
