package fleet

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestAssign: each node is asked by one pod of an agent, a ready one if there is one; a node whose agent does not run says why.
func TestAssign(t *testing.T) {
	node := func(name string) corev1.Node { return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}} }
	pod := func(name, node, of string, isReady bool, state corev1.ContainerState) corev1.Pod {
		condition := corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse}
		if isReady {
			condition.Status = corev1.ConditionTrue
		}
		return corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: name},
			Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: of}}},
			Status: corev1.PodStatus{
				Phase: corev1.PodPending, Conditions: []corev1.PodCondition{condition},
				ContainerStatuses: []corev1.ContainerStatus{{Name: of, State: state}},
			},
		}
	}
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	waiting := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull"}}
	ended := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Error"}}
	got := assign([]corev1.Node{node("d"), node("c"), node("b"), node("a"), node("e")}, []corev1.Pod{
		pod("starts", "a", container, false, waiting), pod("ready", "a", container, true, running), pod("other", "a", container, true, running),
		pod("starts", "b", container, false, waiting),
		pod("asker", "c", "ask", true, running),
		pod("ended", "d", container, false, ended),
		pod("unready", "e", container, false, running),
	})
	want := []string{
		"a kube-system/ready: <nil>",
		"b kube-system/starts: pod kube-system/starts does not run: ErrImagePull",
		"c : no agent",
		"d kube-system/ended: pod kube-system/ended has ended: Error",
		"e kube-system/unready: <nil>",
	}
	var lines []string
	for _, n := range got {
		said := "<nil>"
		if n.Err != nil {
			said = n.Err.Error()
		}
		lines = append(lines, n.Name+" "+n.Pod+": "+said)
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestRuntimeDir: a command reads the files of the agent, wherever they are.
func TestRuntimeDir(t *testing.T) {
	for name, tt := range map[string]struct{ command, args, want []string }{
		"default":        {nil, []string{"run", "--backend=auto"}, nil},
		"chart":          {nil, []string{"run", "--runtime-dir=/var/run/x", "--backend=auto"}, []string{"--runtime-dir=/var/run/x"}},
		"two words":      {nil, []string{"run", "--runtime-dir", "/var/run/x"}, []string{"--runtime-dir", "/var/run/x"}},
		"in the command": {[]string{"magic-ip-agent", "run", "--runtime-dir=/x"}, nil, []string{"--runtime-dir=/x"}},
		"the last one":   {nil, []string{"--runtime-dir=/x", "--runtime-dir=/y"}, []string{"--runtime-dir=/y"}},
	} {
		pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "other", Args: []string{"--runtime-dir=/other"}}, {Name: container, Command: tt.command, Args: tt.args}}}}
		if diff := cmp.Diff(tt.want, runtimeDir(pod)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		pod.Spec.NodeName = "n"
		if diff := cmp.Diff(tt.want, assign([]corev1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "n"}}}, []corev1.Pod{*pod})[0].flags); diff != "" {
			t.Errorf("%s, assigned (-want +got):\n%s", name, diff)
		}
	}
}
