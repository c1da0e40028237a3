package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// apiServer plays the API server for one DaemonSet. A test sets what it answers.
type apiServer struct {
	t *testing.T

	mu       sync.Mutex
	get      func(w http.ResponseWriter) // answers a GET of the DaemonSet, and so the other requests; nil: never answers
	list     func(w http.ResponseWriter) // what a list finds, where that is not the same
	events   chan watch.Event            // of the watch that is open
	requests int
	asked    []string      // requests that no right allows
	opened   chan struct{} // for each watch
	closed   chan struct{}
}

const (
	daemonSetPath = "/apis/apps/v1/namespaces/kube-system/daemonsets"
	daemonSetName = "magic"
)

func newAPIServer(t *testing.T) (*apiServer, *DaemonSet) {
	t.Helper()
	s := &apiServer{t: t, opened: make(chan struct{}, 100), closed: make(chan struct{})}
	server := httptest.NewServer(s)
	t.Cleanup(func() { close(s.closed); server.Close() })
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	config := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":%q}}],`+
		`"contexts":[{"name":"c","context":{"cluster":"c"}}],"current-context":"c"}`, server.URL)
	if err := os.WriteFile(kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	own, err := ConnectDaemonSet(kubeconfig, "kube-system/"+daemonSetName, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.answer(exists("u1"))
	return s, own
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	get, list, closed := s.get, s.list, s.closed
	s.requests++
	s.mu.Unlock()
	query := r.URL.Query()
	one := r.Method == http.MethodGet && r.URL.Path == daemonSetPath+"/"+daemonSetName
	many := r.Method == http.MethodGet && r.URL.Path == daemonSetPath && query.Get("fieldSelector") == "metadata.name="+daemonSetName // what resourceNames can allow
	if !one && !many {
		s.mu.Lock()
		s.asked = append(s.asked, r.Method+" "+r.URL.String())
		s.mu.Unlock()
		w.WriteHeader(http.StatusForbidden)
		return
	}
	if get == nil {
		select {
		case <-r.Context().Done():
		case <-closed:
		}
		return
	}
	w.Header().Set("Content-Type", "application/json")
	answer := httptest.NewRecorder()
	if one || list == nil {
		list = get
	}
	list(answer)
	switch {
	case one, answer.Code != http.StatusOK && !isNotFound(answer):
		get(w)
	case query.Get("sendInitialEvents") != "": // as a server without that feature
		status(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, nil)(w)
	case query.Get("watch") == "":
		objects := appsv1.DaemonSetList{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSetList"}, ListMeta: metav1.ListMeta{ResourceVersion: "5"}}
		if answer.Code == http.StatusOK {
			var set appsv1.DaemonSet
			_ = json.Unmarshal(answer.Body.Bytes(), &set)
			objects.Items = append(objects.Items, set)
		}
		_ = json.NewEncoder(w).Encode(objects)
	default:
		s.watch(w, r)
	}
}

// isNotFound reports whether an answer is that of an API server that serves DaemonSets and does not have this one.
func isNotFound(answer *httptest.ResponseRecorder) bool {
	var status metav1.Status
	return json.Unmarshal(answer.Body.Bytes(), &status) == nil && status.Details != nil && status.Reason == metav1.StatusReasonNotFound && status.Details.Name == daemonSetName
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request) {
	events := make(chan watch.Event)
	s.mu.Lock()
	s.events = events
	s.mu.Unlock()
	w.(http.Flusher).Flush()
	s.opened <- struct{}{}
	for {
		select {
		case <-r.Context().Done():
			return
		case <-s.closed:
			return
		case event, open := <-events:
			if !open {
				return
			}
			object, err := json.Marshal(event.Object)
			if err != nil {
				s.t.Error(err)
			}
			_ = json.NewEncoder(w).Encode(metav1.WatchEvent{Type: string(event.Type), Object: runtime.RawExtension{Raw: object}})
			w.(http.Flusher).Flush()
		}
	}
}

func (s *apiServer) answer(get func(http.ResponseWriter)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.get = get
}

// send sends an event; endWatch closes the connection. Both need a watch that is open.
func (s *apiServer) send(kind watch.EventType, object runtime.Object) {
	s.t.Helper()
	s.mu.Lock()
	events := s.events
	s.mu.Unlock()
	select {
	case events <- watch.Event{Type: kind, Object: object}:
	case <-lab.After(s.t, 10*time.Second):
		s.t.Fatal("there is no watch")
	}
}

// expire ends the watch so that the DaemonSet is listed again.
func (s *apiServer) expire() { s.send(watch.Error, errorStatus(410, metav1.StatusReasonExpired, nil)) }

func (s *apiServer) endWatch() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.events)
}

func (s *apiServer) awaitWatch() {
	s.t.Helper()
	select {
	case <-s.opened:
	case <-lab.After(s.t, 20*time.Second):
		s.t.Fatal("there is no watch")
	}
}

// daemonSet is ours with this UID, after these changes.
func daemonSet(uid string, changes ...func(*appsv1.DaemonSet)) *appsv1.DaemonSet {
	object := &appsv1.DaemonSet{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: daemonSetName, UID: types.UID(uid), ResourceVersion: "5"},
	}
	for _, change := range changes {
		change(object)
	}
	return object
}

func deleting(finalizers ...string) func(*appsv1.DaemonSet) {
	return func(d *appsv1.DaemonSet) {
		now := metav1.Now()
		d.DeletionTimestamp, d.Finalizers = &now, finalizers
	}
}

func updated(d *appsv1.DaemonSet) { d.Generation++ }

func exists(uid string, changes ...func(*appsv1.DaemonSet)) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { _ = json.NewEncoder(w).Encode(daemonSet(uid, changes...)) }
}

// status answers as the API server does; details may be nil.
func status(code int, reason metav1.StatusReason, details *metav1.StatusDetails) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(errorStatus(code, reason, details))
	}
}

func errorStatus(code int, reason metav1.StatusReason, details *metav1.StatusDetails) *metav1.Status {
	return &metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Details: details, Message: string(reason),
	}
}

var (
	absent       = status(404, metav1.StatusReasonNotFound, &metav1.StatusDetails{Group: "apps", Kind: "daemonsets", Name: daemonSetName})
	unauthorized = status(401, metav1.StatusReasonUnauthorized, nil)
	forbidden    = status(403, metav1.StatusReasonForbidden, &metav1.StatusDetails{Group: "apps", Kind: "daemonsets", Name: daemonSetName})
	// Of an API server that does not serve the kind yet, and of a proxy before it.
	noSuchKind = status(404, metav1.StatusReasonNotFound, &metav1.StatusDetails{})
	proxy      = func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte("404 page not found"))
	}
	broken = status(500, metav1.StatusReasonInternalError, nil)
)

// following waits for the deletion of own in the background.
func following(t *testing.T, own *DaemonSet) (answer <-chan bool, sigterm func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	result := make(chan bool, 1)
	go func() { result <- own.Deleted(ctx) }()
	return result, cancel
}

func want(t *testing.T, answer <-chan bool, deleted bool) {
	t.Helper()
	select {
	case got := <-answer:
		if got != deleted {
			t.Errorf("deleted: %t, want %t", got, deleted)
		}
	case <-time.After(5 * time.Minute): // of a bubble's clock too, which no witness can read
		t.Fatalf("no answer, want deleted: %t", deleted)
	}
}

// TestDeletion: what the API server says while it is watched, and whether that is the deletion of ours.
func TestDeletion(t *testing.T) {
	t.Parallel()
	orphan := deleting(metav1.FinalizerOrphanDependents)
	for name, test := range map[string]struct {
		says    func(s *apiServer)
		deleted bool
	}{
		"deleted": {func(s *apiServer) { s.send(watch.Deleted, daemonSet("u1")) }, true},
		"being deleted, foreground": {func(s *apiServer) {
			s.send(watch.Modified, daemonSet("u1", deleting(metav1.FinalizerDeleteDependents)))
		}, true},
		"another one comes": {func(s *apiServer) {
			s.answer(exists("u2"))
			s.expire()
		}, true},
		"another one comes, and the watch says so": {func(s *apiServer) {
			s.answer(exists("u2"))
			s.send(watch.Added, daemonSet("u2"))
		}, true},
		"another one was there before we looked": {func(s *apiServer) {
			s.send(watch.Added, daemonSet("u0"))
			s.send(watch.Deleted, daemonSet("u0"))
			s.send(watch.Added, daemonSet("u1"))
		}, false},
		"deleted, after another one that was there before we looked": {func(s *apiServer) {
			s.send(watch.Added, daemonSet("u0"))
			s.send(watch.Deleted, daemonSet("u0"))
			s.send(watch.Added, daemonSet("u1"))
			s.send(watch.Deleted, daemonSet("u1"))
		}, true},
		"another one is deleted, of which nothing is known": {func(s *apiServer) { s.send(watch.Deleted, daemonSet("u0")) }, false},
		"changed": {func(s *apiServer) {
			s.send(watch.Modified, daemonSet("u1", updated))
			s.send(watch.Bookmark, &appsv1.DaemonSet{TypeMeta: daemonSet("").TypeMeta, ObjectMeta: metav1.ObjectMeta{ResourceVersion: "9"}})
		}, false},
		"deleted without its pods": {func(s *apiServer) {
			s.answer(absent)
			s.send(watch.Modified, daemonSet("u1", orphan))
			s.send(watch.Deleted, daemonSet("u1", deleting()))
		}, false},
		"deleted without its pods, and the next one adopts them": {func(s *apiServer) {
			s.answer(exists("u2"))
			s.send(watch.Modified, daemonSet("u1", orphan))
			s.send(watch.Deleted, daemonSet("u1", deleting()))
			s.send(watch.Added, daemonSet("u2"))
			s.send(watch.Modified, daemonSet("u2", updated))
		}, false},
		"the next one that has adopted them is deleted": {func(s *apiServer) {
			s.answer(exists("u2"))
			s.send(watch.Modified, daemonSet("u1", orphan))
			s.send(watch.Deleted, daemonSet("u1", deleting()))
			s.send(watch.Added, daemonSet("u2"))
			s.send(watch.Deleted, daemonSet("u2"))
		}, true},
		"expired (410), and still there": {func(s *apiServer) {
			s.expire()
			s.awaitWatch()
		}, false},
		"expired (410), and gone meanwhile": {func(s *apiServer) {
			s.answer(absent)
			s.expire()
		}, true},
		"gone while there was no watch": {func(s *apiServer) {
			s.refuse(forbidden)
			s.answer(absent)
		}, true},
		"refused (401)":               {func(s *apiServer) { s.refuse(unauthorized) }, false},
		"refused (403)":               {func(s *apiServer) { s.refuse(forbidden) }, false},
		"broken (500)":                {func(s *apiServer) { s.refuse(broken) }, false},
		"404 of a proxy":              {func(s *apiServer) { s.refuse(proxy) }, false},
		"404 of a server that begins": {func(s *apiServer) { s.refuse(noSuchKind) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, own := newAPIServer(t)
			own.Await(t.Context(), false)
			s.awaitWatch()
			answer, sigterm := following(t, own)
			test.says(s)
			if !test.deleted {
				select {
				case <-answer:
					t.Error("took it for the deletion of ours")
					return
				case <-time.After(300 * time.Millisecond):
				}
				sigterm()
			}
			want(t, answer, test.deleted)
			if len(s.asked) > 0 {
				t.Errorf("asked for more than it may: %s", strings.Join(s.asked, "; "))
			}
		})
	}
}

// refuse ends the watch, and answers so until it has been asked again.
func (s *apiServer) refuse(get func(http.ResponseWriter)) {
	s.t.Helper()
	s.mu.Lock()
	before := s.requests
	s.mu.Unlock()
	s.answer(get)
	s.endWatch()
	for passed := lab.Stopwatch(); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		requests := s.requests
		s.mu.Unlock()
		if requests > before {
			return
		}
		if passed() > 20*time.Second {
			s.t.Fatal("it does not ask again")
		}
	}
}

// TestNeverSeen: that it is not there when the process starts says nothing.
func TestNeverSeen(t *testing.T) {
	t.Parallel()
	s, own := newAPIServer(t)
	s.answer(absent)
	answer, sigterm := following(t, own)
	time.Sleep(300 * time.Millisecond)
	sigterm()
	want(t, answer, false)
}

// TestStaleCache: the cache of an API server may still hold the predecessor of our DaemonSet.
func TestStaleCache(t *testing.T) {
	t.Parallel()
	s, own := newAPIServer(t)
	s.list = exists("u0")
	own.Await(t.Context(), false)
	s.awaitWatch()
	answer, _ := following(t, own)
	s.send(watch.Deleted, daemonSet("u0"))
	s.send(watch.Added, daemonSet("u1"))
	select {
	case <-answer:
		t.Fatal("took it for the deletion of ours")
	case <-time.After(300 * time.Millisecond):
	}
	s.send(watch.Deleted, daemonSet("u1"))
	want(t, answer, true)
}

// TestBeingDeletedAtTheStart counts.
func TestBeingDeletedAtTheStart(t *testing.T) {
	t.Parallel()
	s, own := newAPIServer(t)
	s.answer(exists("u1", deleting()))
	answer, _ := following(t, own)
	want(t, answer, true)
}

// TestSIGTERM: at the end there is one more request, which is short; only a deletion counts.
func TestSIGTERM(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		get     func(http.ResponseWriter)
		deleted bool
	}{
		"upgrade: it is still there": {exists("u1", updated), false},
		"gone":                       {absent, true},
		"being deleted":              {exists("u1", deleting()), true},
		"another one":                {exists("u2"), true},
		"orphaned":                   {exists("u1", deleting(metav1.FinalizerOrphanDependents)), false},
		"401":                        {unauthorized, false},
		"403":                        {forbidden, false},
		"500":                        {broken, false},
		"404 of a proxy":             {proxy, false},
		"no answer":                  {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, own := newAPIServer(t)
			own.Await(t.Context(), false)
			s.awaitWatch()
			answer, sigterm := following(t, own)
			s.answer(test.get)
			passed := lab.Stopwatch()
			sigterm()
			want(t, answer, test.deleted)
			if took := passed(); took > lastTimeout+3*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

// TestSilentWatch: a watch that is silent is begun anew, and what happened meanwhile is noticed.
func TestSilentWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(daemonSet("u1"))
		var watches atomic.Int32
		client.PrependWatchReactor("daemonsets", func(clienttesting.Action) (bool, watch.Interface, error) {
			watches.Add(1)
			return true, watch.NewFake(), nil
		})
		own := newDaemonSet(client, "kube-system", daemonSetName, slog.New(slog.DiscardHandler))
		answer, _ := following(t, own)
		time.Sleep(10 * time.Minute)
		if n := watches.Load(); n < 4 || n > 7 {
			t.Errorf("%d watches within ten silent minutes", n)
		}
		if err := client.Tracker().Delete(appsv1.SchemeGroupVersion.WithResource("daemonsets"), "kube-system", daemonSetName); err != nil {
			t.Fatal(err)
		}
		time.Sleep(watchSilence + maxSpread + time.Minute)
		synctest.Wait()
		select {
		case deleted := <-answer:
			if !deleted {
				t.Error("not taken for a deletion")
			}
		default:
			t.Error("no answer")
		}
	})
}

// TestAwait: the start waits until the DaemonSet has been read, while the API server refuses that, but not for long, and not where there is
// no answer.
func TestAwait(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		get, then   func(http.ResponseWriter) // then after a second
		least, most time.Duration
	}{
		"there":                    {exists("u1"), nil, 0, time.Second},
		"being deleted":            {exists("u1", deleting()), nil, 0, time.Second},
		"forbidden, and then seen": {forbidden, exists("u1"), time.Second, awaitTimeout},
		"no answer":                {nil, nil, awaitTimeout, awaitTimeout + 2*time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, own := newAPIServer(t)
			s.answer(test.get)
			if test.then != nil {
				time.AfterFunc(time.Second, func() { s.answer(test.then) })
			}
			begun, passed := time.Now(), lab.Stopwatch()
			own.Await(t.Context(), false)
			if took := time.Since(begun); took < test.least || passed() > test.most {
				t.Errorf("waited for %v, want %v to %v", took, test.least, test.most)
			}
		})
	}
	for replaces, timeout := range map[bool]time.Duration{false: refusedTimeout, true: awaitTimeout} {
		for name, err := range map[string]error{
			"unauthorized for good": apierrors.NewUnauthorized("who is that"),
			"forbidden for good":    apierrors.NewForbidden(appsv1.Resource("daemonsets"), daemonSetName, nil),
			"gone for good":         apierrors.NewNotFound(appsv1.Resource("daemonsets"), daemonSetName),
		} {
			t.Run(fmt.Sprintf("%s, replaces %t", name, replaces), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					client := fake.NewClientset()
					client.PrependReactor("get", "daemonsets", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, err })
					own := newDaemonSet(client, "kube-system", daemonSetName, slog.New(slog.DiscardHandler))
					begun := time.Now()
					own.Await(t.Context(), replaces)
					if took := time.Since(begun); took != timeout {
						t.Errorf("waited for %v, want %v", took, timeout)
					}
					following(t, own)
				})
			})
		}
	}
	t.Run("deleted together with all rights, before another request", func(t *testing.T) {
		t.Parallel()
		s, own := newAPIServer(t)
		own.Await(t.Context(), false)
		s.answer(forbidden)
		answer, _ := following(t, own)
		s.send(watch.Deleted, daemonSet("u1"))
		want(t, answer, true)
	})
	t.Run("stopped", func(t *testing.T) {
		t.Parallel()
		s, own := newAPIServer(t)
		s.answer(forbidden)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		passed := lab.Stopwatch()
		own.Await(ctx, false)
		if took := passed(); took > time.Second {
			t.Errorf("waited for %v", took)
		}
	})
}

// TestEndedWatch: the API server ends each watch after some time. The next one begins at once: if the DaemonSet was deleted in a pause, and
// the right to read it too, the deletion would never be noticed.
func TestEndedWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := fake.NewClientset(daemonSet("u1"))
		var begun []time.Time
		var watches []*watch.FakeWatcher
		client.PrependWatchReactor("daemonsets", func(clienttesting.Action) (bool, watch.Interface, error) {
			begun, watches = append(begun, time.Now()), append(watches, watch.NewFake())
			return true, watches[len(watches)-1], nil
		})
		own := newDaemonSet(client, "kube-system", daemonSetName, slog.New(slog.DiscardHandler))
		answer, sigterm := following(t, own)
		for n := range 5 {
			time.Sleep(time.Minute)
			synctest.Wait()
			if len(watches) != n+1 || time.Since(begun[n]) != time.Minute {
				t.Fatalf("watches began at %v, the last has ended a minute before %v", begun, time.Now())
			}
			watches[n].Stop()
		}
		sigterm()
		want(t, answer, false)
	})
}

func TestNameOfTheDaemonSet(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "magic", "/magic", "kube-system/", "a/b/c"} {
		if _, err := ConnectDaemonSet("", name, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "NAMESPACE/NAME") {
			t.Errorf("%q: %v", name, err)
		}
	}
}
