package kube

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// TestHealth: the state of each watch, and the numbers of requests.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPods(fake.NewClientset(examplePod()), noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		want := func(when string, want Feed) {
			t.Helper()
			if diff := cmp.Diff([]Feed{want}, p.Feeds()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		want("before anything", Feed{Namespace: "default"})
		seen := time.Now()
		ctx, end := running(t, p, func() {})
		f := p.feeds["default"]
		want("watching", Feed{Namespace: "default", Healthy: true, LastSeen: seen})
		time.Sleep(watchSilence - time.Since(seen))
		want("silent", Feed{Namespace: "default", LastSeen: seen})
		f.answered(apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, "", errors.New("no")))
		want("forbidden", Feed{Namespace: "default", Forbidden: true, LastSeen: seen})
		before := p.Requests()
		if before["watch"] == 0 || before["poll"] != 0 {
			t.Errorf("requests before a poll: %v", before)
		}
		pollNow(ctx, p)
		if after := p.Requests(); after["poll"] != 1 {
			t.Errorf("requests after a poll: %v", after)
		}
		end()
	})
}
