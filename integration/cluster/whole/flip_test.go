//go:build e2e

package whole_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const flips = 20

// gate is a condition that the tests set, and that kubelet makes part of a pod's readiness.
const gate corev1.PodConditionType = "e2e.test/ready"

// TestReadinessFlip moves the endpoint back and forth by readiness, and measures how long after a change of readiness the kernel sends connections to the other pod:
// from where a watch of the API has told of it, and from the cause.
func TestReadinessFlip(t *testing.T) {
	onEachNode(t, "flip", func(w *world) {
		old := w.ready(w.create(echoPod(w.node, w.namespace, "old-"+w.node.Name)))
		gated := echoPod(w.node, w.namespace, "new-"+w.node.Name)
		gated.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: gate}}
		fresh := w.create(gated)
		w.must(lab.Eventually(w.patience(), func() (err error) {
			if recordOf(w.node, fresh) == nil {
				return fmt.Errorf("pod %s has no record", fresh.Name)
			}
			return nil
		}))
		w.goesTo(old.Name)
		addresses := map[bool]netip.Addr{false: recordOf(w.node, old).IPs[0], true: recordOf(w.node, fresh).IPs[0]}

		kernel, api := watchKernel(w), watchPods(w)
		var fromCause, fromWatch []time.Duration
		for i := range flips {
			ready := i%2 == 0
			caused := time.Now()
			w.open(fresh, ready)
			var told, acted time.Time
			w.must(lab.Eventually(w.patience(), func() (err error) {
				if told, err = api.first(caused, fresh.UID, func(p *corev1.Pod) bool { return isReady(p) == ready }); err != nil {
					return err
				}
				acted, err = kernel.firstAfter(caused, addresses[ready])
				return err
			}))
			fromCause, fromWatch = append(fromCause, acted.Sub(caused)), append(fromWatch, acted.Sub(told))
		}
		var text strings.Builder
		table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintf(table, "\nuntil the kernel had the other address, %d flips\tmedian\tp99\t\n", flips)
		fmt.Fprintf(table, "after a watch told of the readiness\t%s\t%s\t\n", milliseconds(percentile(fromWatch, 50)), milliseconds(percentile(fromWatch, 99)))
		fmt.Fprintf(table, "after the cause\t%s\t%s\t\n", milliseconds(percentile(fromCause, 50)), milliseconds(percentile(fromCause, 99)))
		_ = table.Flush()
		w.Log(text.String())
		w.goesTo(old.Name)
	})
}

// open sets the gate of a pod.
func (w *world) open(pod *corev1.Pod, ready bool) {
	w.Helper()
	condition := corev1.PodCondition{Type: gate, Status: corev1.ConditionFalse}
	if ready {
		condition.Status = corev1.ConditionTrue
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.PodCondition{condition}}})
	w.must(err)
	_, err = cluster.Admin.CoreV1().Pods(pod.Namespace).Patch(w.Context(), pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	w.must(err)
}
