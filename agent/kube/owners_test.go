package kube

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// objects are what an API server has, by path; what is not there is not found. A refusal is the answer to all requests.
type objects struct {
	mu      sync.Mutex
	live    map[string]metav1.PartialObjectMetadata
	refusal int
	asked   []string
}

func (o *objects) client(t *testing.T) metadata.Interface {
	t.Helper()
	client, err := metadata.NewForConfig(&rest.Config{Host: "http://api", QPS: -1, Transport: roundTripper(o.answer)})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func (o *objects) answer(request *http.Request) (*http.Response, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	path := request.URL.Path
	o.asked = append(o.asked, path)
	object, found := o.live[path]
	parts := strings.Split(path, "/")
	object.TypeMeta = metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadata"}
	code, body := http.StatusOK, any(object)
	switch {
	case o.refusal == http.StatusForbidden:
		code, body = o.refusal, errorStatus(o.refusal, metav1.StatusReasonForbidden, nil)
	case o.refusal != 0:
		code, body = o.refusal, errorStatus(o.refusal, metav1.StatusReasonInternalError, nil)
	case !found:
		code, body = http.StatusNotFound, errorStatus(http.StatusNotFound, metav1.StatusReasonNotFound, &metav1.StatusDetails{Kind: parts[len(parts)-2], Name: parts[len(parts)-1]})
	}
	data, err := json.Marshal(body)
	return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(data)), Request: request}, err
}

func (o *objects) set(path, uid string, controller ...metav1.OwnerReference) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if uid == "" {
		delete(o.live, path)
		return
	}
	o.live[path] = metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{UID: types.UID(uid), OwnerReferences: controller}}
}

func (o *objects) refuse(code int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.refusal = code
}

func controlledBy(apiVersion, kind, name, uid string) metav1.OwnerReference {
	yes := true
	return metav1.OwnerReference{APIVersion: apiVersion, Kind: kind, Name: name, UID: types.UID(uid), Controller: &yes}
}

const (
	daemonSetOf  = "/apis/apps/v1/namespaces/default/daemonsets/echo"
	deploymentOf = "/apis/apps/v1/namespaces/default/deployments/echo"
	replicaSetOf = "/apis/apps/v1/namespaces/default/replicasets/echo-5d"
	kruiseOf     = "/apis/apps.kruise.io/v1alpha1/namespaces/default/daemonsets/echo"
)

// asking is a bubble with owners whose requests are answered by o. owns says which of the wanted owners a pod with this reference has, once
// all has been asked for that can be.
func asking(t *testing.T, o *objects, test func(t *testing.T, owns func(namespace string, reference metav1.OwnerReference, wanted ...string) string, owners *owners)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		owners := newOwners(o.client(t))
		owners.start(t.Context(), func() {})
		test(t, func(namespace string, reference metav1.OwnerReference, wanted ...string) string {
			pod := examplePod()
			pod.Namespace, pod.OwnerReferences = namespace, []metav1.OwnerReference{reference}
			var queries []inventory.OwnerQuery
			for _, text := range wanted {
				owner, err := inventory.ParseOwner(text)
				if err != nil {
					t.Fatal(err)
				}
				queries = append(queries, inventory.OwnerQuery{Namespace: "default", Owner: owner})
			}
			var owns []string
			var unresolved []inventory.OwnerQuery
			for range 4 {
				owns, unresolved = owners.of(pod, queries)
				owners.ask()
				synctest.Wait()
			}
			for _, query := range unresolved {
				owns = append(owns, query.String()+"?")
			}
			return strings.Join(owns, " ")
		}, owners)
	})
}

// TestOwners: only the UID of the live object counts, of the right API group and kind, and the reference must be the controller's.
func TestOwners(t *testing.T) {
	api := &objects{live: map[string]metav1.PartialObjectMetadata{}}
	api.set(daemonSetOf, "d1")
	api.set(deploymentOf, "p1")
	api.set(replicaSetOf, "r1", controlledBy("apps/v1", "Deployment", "echo", "p1"))
	api.set("/apis/apps/v1/namespaces/default/replicasets/other", "r2", controlledBy("apps/v1", "Deployment", "other", "p2"))
	api.set("/apis/apps/v1/namespaces/default/replicasets/nobodys", "r3")
	api.set(kruiseOf, "k1")
	api.set("/apis/apps/v1/namespaces/other/daemonsets/echo", "d2")
	mere := controlledBy("apps/v1", "DaemonSet", "echo", "d1")
	mere.Controller = nil
	asking(t, api, func(t *testing.T, owns func(string, metav1.OwnerReference, ...string) string, _ *owners) {
		for _, test := range []struct {
			name      string
			namespace string
			reference metav1.OwnerReference
			owner     string
			want      bool
		}{
			{"its DaemonSet", "default", controlledBy("apps/v1", "DaemonSet", "echo", "d1"), "DaemonSet/echo", true},
			{"an invented UID", "default", controlledBy("apps/v1", "DaemonSet", "echo", "x"), "DaemonSet/echo", false},
			{"no UID", "default", controlledBy("apps/v1", "DaemonSet", "echo", ""), "DaemonSet/echo", false},
			{"the UID under another name", "default", controlledBy("apps/v1", "DaemonSet", "other", "d1"), "DaemonSet/echo", false},
			{"the UID under another kind", "default", controlledBy("apps/v1", "StatefulSet", "echo", "d1"), "DaemonSet/echo", false},
			{"the UID in another API group", "default", controlledBy("apps.kruise.io/v1alpha1", "DaemonSet", "echo", "d1"), "DaemonSet/echo", false},
			{"an API version that is none", "default", controlledBy("a/b/c", "DaemonSet", "echo", "d1"), "DaemonSet/echo", false},
			{"a reference that is not the controller's", "default", mere, "DaemonSet/echo", false},
			{"a DaemonSet of that name in another namespace", "other", controlledBy("apps/v1", "DaemonSet", "echo", "d2"), "DaemonSet/echo", false},
			{"a DaemonSet that does not exist", "default", controlledBy("apps/v1", "DaemonSet", "gone", "d3"), "DaemonSet/gone", false},
			{"its Deployment", "default", controlledBy("apps/v1", "ReplicaSet", "echo-5d", "r1"), "Deployment/echo", true},
			{"its ReplicaSet", "default", controlledBy("apps/v1", "ReplicaSet", "echo-5d", "r1"), "ReplicaSet/echo-5d", true},
			{"an invented UID of a ReplicaSet", "default", controlledBy("apps/v1", "ReplicaSet", "echo-5d", "x"), "Deployment/echo", false},
			{"the ReplicaSet of another Deployment", "default", controlledBy("apps/v1", "ReplicaSet", "other", "r2"), "Deployment/echo", false},
			{"a ReplicaSet without a Deployment", "default", controlledBy("apps/v1", "ReplicaSet", "nobodys", "r3"), "Deployment/echo", false},
			{"a kind of another API group", "default", controlledBy("apps.kruise.io/v1beta1", "DaemonSet", "echo", "k1"), "apps.kruise.io/v1alpha1/DaemonSet/echo", true},
		} {
			want := ""
			if test.want {
				want = test.owner
			}
			if got := owns(test.namespace, test.reference, test.owner); got != want {
				t.Errorf("%s: %q, want %q", test.name, got, want)
			}
		}
		both := owns("default", controlledBy("apps/v1", "ReplicaSet", "echo-5d", "r1"), "Deployment/echo", "ReplicaSet/echo-5d", "DaemonSet/echo")
		if both != "Deployment/echo ReplicaSet/echo-5d" {
			t.Errorf("of several: %s", both)
		}
	})
}

// TestOwnerIsReplaced: the live object is the one that exists now. An answer that does not come changes nothing.
func TestOwnerIsReplaced(t *testing.T) {
	api := &objects{live: map[string]metav1.PartialObjectMetadata{}}
	api.set(daemonSetOf, "d1")
	asking(t, api, func(t *testing.T, owns func(string, metav1.OwnerReference, ...string) string, _ *owners) {
		first, second := controlledBy("apps/v1", "DaemonSet", "echo", "d1"), controlledBy("apps/v1", "DaemonSet", "echo", "d2")
		expect := func(when string, reference metav1.OwnerReference, want string) {
			t.Helper()
			if got := owns("default", reference, "DaemonSet/echo"); got != want {
				t.Errorf("%s: %q, want %q", when, got, want)
			}
		}
		expect("at first", first, "DaemonSet/echo")
		api.refuse(http.StatusInternalServerError)
		time.Sleep(2 * ownerInterval)
		expect("while the API server fails", first, "DaemonSet/echo")
		expect("a new UID meanwhile", second, "DaemonSet/echo?")
		api.refuse(0)
		time.Sleep(2 * maxOwnerPause)
		expect("a UID that was invented", second, "")
		api.set(daemonSetOf, "")
		time.Sleep(2 * ownerInterval)
		expect("deleted without its pods", first, "")
		api.set(daemonSetOf, "d3")
		expect("made anew", controlledBy("apps/v1", "DaemonSet", "echo", "d3"), "DaemonSet/echo")
		expect("and a pod of the one before", first, "")
		before := len(api.asked)
		for range 100 {
			expect("that is known", first, "")
		}
		if more := len(api.asked) - before; more > 0 {
			t.Errorf("%d requests for what is known", more)
		}
	})
}

// TestOwnerForbidden: the right that is missing is named, and asked for again ever less often.
func TestOwnerForbidden(t *testing.T) {
	api := &objects{live: map[string]metav1.PartialObjectMetadata{}, refusal: http.StatusForbidden}
	api.set(daemonSetOf, "d1")
	asking(t, api, func(t *testing.T, owns func(string, metav1.OwnerReference, ...string) string, owners *owners) {
		reference := controlledBy("apps/v1", "DaemonSet", "echo", "d1")
		for range 600 {
			if got := owns("default", reference, "DaemonSet/echo"); got != "DaemonSet/echo?" {
				t.Fatalf("without the right: %q", got)
			}
			time.Sleep(time.Second)
		}
		if n := len(api.asked); n < 8 || n > 30 {
			t.Errorf("%d requests within ten minutes", n)
		}
		if slices.ContainsFunc(api.asked, func(path string) bool { return path != daemonSetOf }) {
			t.Errorf("asked for more than it may: %q", api.asked)
		}
		if got := strings.Join(owners.problems(), ""); !strings.Contains(got, "allow get of daemonsets.apps there") {
			t.Errorf("problems: %q", got)
		}
		api.refuse(0)
		time.Sleep(2 * maxOwnerPause)
		if got := owns("default", reference, "DaemonSet/echo"); got != "DaemonSet/echo" || len(owners.problems()) > 0 {
			t.Errorf("with the right: %q, %q", got, owners.problems())
		}
	})
}

// TestUnresolvedOwner: the view says of which owners it is not known whether they are a pod's.
func TestUnresolvedOwner(t *testing.T) {
	api := &objects{live: map[string]metav1.PartialObjectMetadata{}, refusal: http.StatusForbidden}
	owners := newOwners(api.client(t))
	owner, err := inventory.ParseOwner("DaemonSet/echo")
	if err != nil {
		t.Fatal(err)
	}
	query := []inventory.OwnerQuery{{Namespace: inventory.AllNamespaces, Owner: owner}}
	owns, unresolved := owners.of(examplePod(), query)
	if diff := cmp.Diff(query, unresolved); diff != "" || len(owns) > 0 {
		t.Errorf("owns %v, unresolved (-want +got):\n%s", owns, diff)
	}
}
