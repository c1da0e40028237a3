package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestTrimAndConvert: what is read of a pod, and that nothing else is kept.
func TestTrimAndConvert(t *testing.T) {
	query := &inventory.Query{LabelKeys: keys, PortNames: ports}
	read := func(pod *corev1.Pod) inventory.Pod { return convert(trim(pod, query)) }
	want := inventory.Pod{
		PodID: inventory.PodID{Namespace: "default", Name: "echo", UID: "u1"}, StaticUID: "hash", Labels: map[string]string{"app": "echo"}, ServiceAccount: "echo",
		IPs: []netip.Addr{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00::2")}, CreatedAt: time.Unix(1000, 0),
		Running: true, Ready: true, HostNetwork: true,
		Ports: []runtimedir.NamedPort{
			{Name: "http", Protocol: "tcp", Port: 8080}, {Name: "http", Protocol: "udp", Port: 8081},
			{Name: "proxy", Protocol: "tcp", Port: 15001}, {Name: "http", Protocol: "tcp", Port: 2},
		},
	}
	pod := examplePod()
	pod.Spec.HostNetwork = true
	pod.Spec.Containers[0].Ports = append(pod.Spec.Containers[0].Ports,
		corev1.ContainerPort{Name: "http", Protocol: corev1.ProtocolUDP, ContainerPort: 8081}, corev1.ContainerPort{Name: "unused", ContainerPort: 3})
	if diff := cmp.Diff(want, read(pod), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("pod (-want +got):\n%s", diff)
	}
	kept := trim(pod, query)
	if len(kept.ManagedFields) > 0 || kept.Spec.Containers[0].Image != "" || len(kept.Annotations) != 2 || len(kept.OwnerReferences) != 1 {
		t.Errorf("kept more than is read: %+v", kept)
	}
	if diff := cmp.Diff(kept, trim(kept, query)); diff != "" {
		t.Errorf("trimmed again (-want +got):\n%s", diff)
	}
	now := metav1.NewTime(time.Unix(2000, 0))
	pod.DeletionTimestamp, pod.Status.Phase = &now, corev1.PodSucceeded
	pod.Status.Conditions[1].Status = corev1.ConditionFalse
	if got := read(pod); !got.Terminating || !got.Finished || got.Ready || got.Running {
		t.Errorf("a pod at its end: %+v", got)
	}
	// A pod's creator writes its annotations: a hash alone makes no mirror pod.
	delete(pod.Annotations, configMirror)
	if got := read(pod); got.StaticUID != "" {
		t.Errorf("no mirror pod: %+v", got)
	}
}

// TestLabelsOfManySelectors: a pod that a hundred selectors choose by a key each has all these labels.
func TestLabelsOfManySelectors(t *testing.T) {
	query, pod := &inventory.Query{LabelKeys: map[string]bool{}}, examplePod()
	for i := range 100 {
		key := fmt.Sprint("magic/", i)
		query.LabelKeys[key], pod.Labels[key] = true, "true"
	}
	if got := convert(trim(pod, query)).Labels; len(got) != 100 {
		t.Errorf("%d labels", len(got))
	}
}

// TestBounds: 40 pods with almost a megabyte each, in labels and whatever else their author writes, cost the agent next to nothing.
func TestBounds(t *testing.T) {
	const pods, most = 40, 40 << 10
	var objects []runtime.Object
	for i := range pods {
		pod := examplePod()
		pod.Name, pod.UID = fmt.Sprint("echo-", i), types.UID(fmt.Sprint(i))
		big := strings.Repeat("x", 1000)
		pod.Labels = map[string]string{"app": "echo"}
		for n := range 5000 {
			pod.Labels[fmt.Sprintf("%s%04d", strings.Repeat("k", 60), n)] = strings.Repeat("v", 63)
		}
		pod.Annotations[configHash], pod.Annotations[big] = "hash", big
		for n := range 100 {
			pod.Finalizers = append(pod.Finalizers, big)
			pod.OwnerReferences = append(pod.OwnerReferences, metav1.OwnerReference{Name: big})
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: big, Args: []string{big}, Ports: []corev1.ContainerPort{{Name: fmt.Sprint("p", n), ContainerPort: 1}}})
			pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: corev1.PodConditionType(big), Message: big})
		}
		objects = append(objects, pod)
	}
	synctest.Test(t, func(t *testing.T) {
		p := newPods(fake.NewClientset(objects...), noOwners(), "node1")
		p.Select(inventory.Query{Namespaces: []string{"default"}, LabelKeys: keys, PortNames: ports})
		ctx, end := running(t, p, func() {})
		f := p.feeds["default"]
		f.poll(ctx)
		for what, kept := range map[string]any{"watched": f.watched(), "polled": f.polled, "view": p.View()} {
			data, err := json.Marshal(kept)
			if err != nil || len(data) > most || !strings.Contains(string(data), "echo-39") {
				t.Errorf("%s: %d bytes of %d pods are kept, want at most %d; %v", what, len(data), pods, most, err)
			}
		}
		end()
	})
}
