package kube

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func askers(nodes int32, pods ...*corev1.Pod) *Askers {
	controller := true
	d := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "test", UID: "u"},
		Spec:       appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "test"}}},
		Status:     appsv1.DaemonSetStatus{DesiredNumberScheduled: nodes},
	}
	client := fake.NewClientset(d)
	for _, pod := range pods {
		pod.Namespace, pod.Labels = "n", map[string]string{"app": "test"}
		if pod.OwnerReferences == nil {
			pod.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Name: "test", UID: "u", Controller: &controller}}
		}
		_ = client.Tracker().Add(pod)
	}
	return &Askers{client: client, namespace: "n", name: "test", tick: time.Second}
}

func asker(node string, status corev1.ContainerStatus) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "test-" + node}, Spec: corev1.PodSpec{NodeName: node},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{status}},
	}
}

func endedWith(code int32, message string) *corev1.ContainerStateTerminated {
	return &corev1.ContainerStateTerminated{ExitCode: code, Message: message}
}

func TestAskersEnd(t *testing.T) {
	other := asker("node9", corev1.ContainerStatus{State: corev1.ContainerState{Terminated: endedWith(1, "")}})
	other.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Name: "other", UID: "v"}}
	a := askers(3,
		asker("node1", corev1.ContainerStatus{State: corev1.ContainerState{Terminated: endedWith(0, "")}}),
		asker("node2", corev1.ContainerStatus{
			State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
			LastTerminationState: corev1.ContainerState{Terminated: endedWith(1, "FAIL  refused\n")},
		}),
		// kubelet has started it again after it had passed.
		asker("node3", corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}, LastTerminationState: corev1.ContainerState{Terminated: endedWith(0, "")}}),
		other,
	)
	got, err := a.Await(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []Asked{{Node: "node1", Passed: true}, {Node: "node2", Message: "FAIL  refused"}, {Node: "node3", Passed: true}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
}

func TestAskersThatDoNotEnd(t *testing.T) {
	unscheduled := asker("", corev1.ContainerStatus{})
	unscheduled.Status = corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "no room"}}}
	for name, test := range map[string]struct {
		askers *Askers
		want   []Asked
		err    string
	}{
		"running":         {askers(1, asker("node1", corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}})), []Asked{{Node: "node1", Message: "still asking"}}, "0 of 1 nodes have a result"},
		"no image":        {askers(1, asker("node1", corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "not found"}}})), []Asked{{Node: "node1", Message: "the container waits: ErrImagePull not found"}}, "0 of 1 nodes have a result"},
		"no node":         {askers(1, unscheduled), []Asked{{Node: "pod test-", Message: "not scheduled: no room"}}, "0 of 1 nodes have a result"},
		"a node is short": {askers(2, asker("node1", corev1.ContainerStatus{State: corev1.ContainerState{Terminated: endedWith(0, "")}})), []Asked{{Node: "node1", Passed: true}}, "DaemonSet n/test: 1 of 2 nodes have a result"},
		"no pods":         {askers(0), nil, "0 of 0 nodes have a result"},
		"no DaemonSet":    {&Askers{client: fake.NewClientset(), namespace: "n", name: "test", tick: time.Second}, nil, "not found"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				got, err := test.askers.Await(ctx)
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("results (-want +got):\n%s", diff)
				}
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want %q", err, test.err)
				}
			})
		})
	}
}
