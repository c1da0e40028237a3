package kube

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// overloaded is an API server that rejects the first request of each node, and notes when the second comes.
type overloaded struct {
	code       int
	retryAfter string

	mu   sync.Mutex
	seen map[string]int
	at   []time.Time
}

func (o *overloaded) node(name string) http.RoundTripper {
	return roundTripper(func(*http.Request) (*http.Response, error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		response := &http.Response{
			StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}},
			Body: io.NopCloser(strings.NewReader(`{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}`)),
		}
		o.seen[name]++
		switch o.seen[name] {
		case 1:
		case 2:
			o.at = append(o.at, time.Now())
			fallthrough
		default:
			return response, nil
		}
		response.StatusCode = o.code
		response.Header.Set("Retry-After", o.retryAfter)
		response.Body = io.NopCloser(strings.NewReader("come later"))
		return response, nil
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(request *http.Request) (*http.Response, error) { return f(request) }

// TestRetryAfter: no request of any kind comes before the time that the API server asks for, and those of many nodes do not come
// at one moment.
func TestRetryAfter(t *testing.T) {
	const nodes = 20
	for name, test := range map[string]struct {
		code       int
		retryAfter string
		request    func(ctx context.Context, p *Pods)
		wait       time.Duration
	}{
		"polls":         {429, "10", func(ctx context.Context, p *Pods) { p.Poll(ctx) }, 10 * time.Second},
		"polls, 503":    {503, "10", func(ctx context.Context, p *Pods) { p.Poll(ctx) }, 10 * time.Second},
		"polls, a date": {503, "Sat, 01 Jan 2000 00:00:30 GMT", func(ctx context.Context, p *Pods) { p.Poll(ctx) }, 30 * time.Second},
		"polls, a day":  {503, "86400", func(ctx context.Context, p *Pods) { p.Poll(ctx) }, maxRetryAfter},
		"lists": {429, "10", func(ctx context.Context, p *Pods) {
			_, _ = p.client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{})
		}, 10 * time.Second},
		"another request than the one that was answered so": {429, "10", func(ctx context.Context, p *Pods) {
			_, _ = p.client.CoreV1().Events("default").Create(ctx, &corev1.Event{}, metav1.CreateOptions{})
			_, _ = p.client.AppsV1().DaemonSets("default").Get(ctx, "agent", metav1.GetOptions{})
		}, 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := &overloaded{code: test.code, retryAfter: test.retryAfter, seen: map[string]int{}}
				ctx, cancel := context.WithCancel(t.Context())
				begun := time.Now()
				for i := range nodes {
					name := string(rune('a' + i))
					p, err := New(&rest.Config{Host: "http://api", Transport: server.node(name), QPS: -1}, name)
					if err != nil {
						t.Fatal(err)
					}
					p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
					p.feeds["default"].begunAt = begun.Add(-time.Minute)
					p.wake = func() {}
					go func() {
						for ; ctx.Err() == nil; time.Sleep(test.wait / 10) {
							test.request(ctx, p)
						}
					}()
				}
				time.Sleep(2*test.wait + 10*time.Second)
				cancel()
				time.Sleep(time.Minute)
				synctest.Wait()
				if len(server.at) != nodes {
					t.Fatalf("%d nodes return, want %d", len(server.at), nodes)
				}
				slices.SortFunc(server.at, time.Time.Compare)
				first, last := server.at[0].Sub(begun), server.at[nodes-1].Sub(begun)
				if first < test.wait || first > 3*test.wait/2 {
					t.Errorf("the first request comes after %s, want %s and a little more", first, test.wait)
				}
				if last-first < time.Second {
					t.Errorf("%d nodes return within %s", nodes, last-first)
				}
			})
		})
	}
}

// TestPollSheds: a poll that the API server refuses for a while does not wait, its answer stands meanwhile; the last request of a process
// is sent all the same.
func TestPollSheds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &overloaded{code: http.StatusServiceUnavailable, retryAfter: "20", seen: map[string]int{}}
		p, err := New(&rest.Config{Host: "http://api", Transport: server.node("a")}, "a")
		if err != nil {
			t.Fatal(err)
		}
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		f := p.feeds["default"]
		begun := time.Now()
		for range 2 {
			f.poll(t.Context())
			if _, _, problem := f.view(); !strings.Contains(problem, "unable to handle the request") || time.Since(begun) > 0 {
				t.Errorf("after %v: %q", time.Since(begun), problem)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := p.client.CoreV1().Pods("default").List(ctx, metav1.ListOptions{}); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "503 Service Unavailable") {
			t.Errorf("a request that waits: %v", err)
		}
		if _, err := p.client.CoreV1().Pods("default").List(withUrgency(t.Context(), once), metav1.ListOptions{}); apierrors.ReasonForError(err) != "" || len(server.at) != 1 {
			t.Errorf("a last request: %v, %d requests", err, len(server.at))
		}
	})
}

// TestPollGetsOld: a poll that brought the pods says for a while how they are, and no longer than until another one could not ask.
func TestPollGetsOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		code := http.StatusOK
		server := roundTripper(func(*http.Request) (*http.Response, error) {
			response := &http.Response{
				StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}},
				Body: io.NopCloser(strings.NewReader(`{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}`)),
			}
			if code != http.StatusOK {
				response.Header.Set("Retry-After", "120")
			}
			return response, nil
		})
		p, err := New(&rest.Config{Host: "http://api", Transport: server}, "a")
		if err != nil {
			t.Fatal(err)
		}
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		f := p.feeds["default"]
		current := func(when string, want bool) {
			t.Helper()
			if view := p.View(); slices.Contains(view.Current, "default") != want || !slices.Contains(view.Synced, "default") || (len(view.Problems) > 0) == want {
				t.Errorf("%s: current %q, synced %q, problems %q", when, view.Current, view.Synced, view.Problems)
			}
		}
		f.poll(t.Context())
		current("polled", true)
		time.Sleep(pollCounts)
		current("polled long ago", false)
		f.poll(t.Context())
		current("polled again", true)

		code = http.StatusServiceUnavailable
		_, _ = p.client.CoreV1().Pods("default").List(withUrgency(t.Context(), once), metav1.ListOptions{}) // such as a watch
		f.poll(t.Context())
		current("a poll that may not ask", false)
	})
}

// TestThrottledWatch: while the API server is left alone, the error of a watch is what it answered.
func TestThrottledWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{
				StatusCode: http.StatusServiceUnavailable, Header: http.Header{"Content-Type": {"application/json"}, "Retry-After": {"40"}},
				Body: io.NopCloser(strings.NewReader(`{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"ServiceUnavailable","message":"etcd is away","code":503}`)),
			}, nil
		})
		p, err := New(&rest.Config{Host: "http://api", Transport: server}, "a")
		if err != nil {
			t.Fatal(err)
		}
		c := connection{changed: func() {}}
		pods := p.client.CoreV1().Pods("default")
		lw := c.listWatch(nil, func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return pods.Watch(ctx, options)
		})
		for range 3 {
			if _, err := lw.WatchWithContext(t.Context(), metav1.ListOptions{}); err == nil {
				t.Fatal("the watch is open")
			}
			if got := c.problem(); got == nil || !strings.Contains(got.Error(), "etcd is away") {
				t.Errorf("the error is %v", got)
			}
		}
	})
}

// TestPollsSpread: the watches of many nodes end at one moment, and their polls do not list at one moment.
func TestPollsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 100
		server := &overloaded{seen: map[string]int{}}
		for i := range nodes {
			server.seen[string(rune('a'+i))] = 1
		}
		for i := range nodes {
			name := string(rune('a' + i))
			p, err := New(&rest.Config{Host: "http://api", Transport: server.node(name), QPS: -1}, name)
			if err != nil {
				t.Fatal(err)
			}
			p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
			p.feeds["default"].begunAt = time.Now().Add(-time.Minute)
			p.wake, p.polledAt = func() {}, time.Now().Add(-5*time.Second)
			p.Poll(t.Context())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		slices.SortFunc(server.at, time.Time.Compare)
		if len(server.at) != nodes || server.at[nodes-1].Sub(server.at[0]) < time.Second {
			t.Errorf("%d lists from %v on", len(server.at), server.at[0])
		}
	})
}
