//go:build e2e

package whole_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestRollout rolls a DaemonSet with maxSurge, whose old pods take connections for half a second after they are told
// to end. In the same run clients ask at the magic IP, and at a Service with internalTrafficPolicy: Local.
func TestRollout(t *testing.T) {
	const namespace = "rollout"
	first := newWorld(t, cluster.Nodes[0], namespace)
	service := rolledOut(first)
	waits, onNodes, old := map[*whole.Node]*lab.Waits{}, map[*whole.Node]map[string]map[lab.Kind]*lab.Probe{}, map[*whole.Node]string{}
	for _, n := range cluster.Nodes {
		w := newWorld(t, n, namespace)
		var err error
		waits[n], err = n.Lab().WatchWaits(t.Context(), "magic-ip-agent run")
		w.must(err)
		onNodes[n] = map[string]map[lab.Kind]*lab.Probe{}
		for name, to := range map[string]netip.AddrPort{"magic IP": w.magicIPs()[0], "magic IP, IPv6": w.magicIPs()[1], "Service": service} {
			onNodes[n][name] = map[lab.Kind]*lab.Probe{}
			for kind, load := range lab.Loads {
				client := lab.Client{Kind: kind, From: w.client, To: to, Timeout: load.Timeout}
				probe := n.Lab().StartProbe(client, 6*load.Interval) // eighteen clients share two processors
				defer probe.Stop()
				answer, err := probe.Await(w.patience(), func(o lab.Outcome) bool { return o.Err == nil })
				w.must(err)
				onNodes[n][name][kind], old[n] = probe, answer.Server
			}
		}
	}
	for _, command := range []string{"restart", "status"} {
		_, err := cluster.Kubectl(first.patience(), "rollout", command, "--namespace", namespace, "daemonset/echo")
		first.must(err)
	}
	for n, addresses := range onNodes { // a connection stays until the old pod ends
		for name, probes := range addresses {
			for kind, probe := range probes {
				if name == "Service" { // shown beside it, and not judged
					continue
				}
				_, err := probe.Await(first.patience(), func(o lab.Outcome) bool { return o.Err == nil && o.Server != old[n] })
				if err != nil {
					t.Errorf("%s, %s: %s is not answered by the new pod: %v", n.Name, name, kind, err)
				}
			}
		}
	}
	time.Sleep(time.Second) // for what goes wrong afterwards
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nnode\taddress\tclient\trequests\tfailed\tlongest gap\tpods\twhile the agent could not go on")
	for _, n := range cluster.Nodes {
		waited := waits[n].End()
		for _, name := range []string{"magic IP", "magic IP, IPv6", "Service"} {
			for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
				o := onNodes[n][name][kind].Stop()
				failed := slices.DeleteFunc(o.Failed(), func(o lab.Outcome) bool { return o.Stalled(waited) })
				fmt.Fprintf(table, "%s\t%s\t%s\t%d\t%d\t%v\t%d\t%d\n", n.Name, name, kind, len(o), len(o.Failed()), o.LongestGap().Round(time.Millisecond), len(o.Servers()), len(o.Failed())-len(failed))
				if name == "Service" {
					continue
				}
				if kind == lab.NewConnection && len(failed) > 0 {
					t.Errorf("%s, %s: %d of %d new connections failed while the agent could go on, the first with %v", n.Name, name, len(failed), len(o), failed[0].Err)
				}
				if len(o.Servers()) != 2 {
					t.Errorf("%s, %s: %s was answered by %v, want the old pod and the new one", n.Name, name, kind, o.Servers())
				}
			}
		}
	}
	_ = table.Flush()
	t.Log(text.String())
}

// rolledOut makes the DaemonSet and the Service, whose address it returns.
func rolledOut(w *world) netip.AddrPort {
	w.Helper()
	labels := map[string]string{"app": "echo"}
	meta := metav1.ObjectMeta{Namespace: w.namespace, Name: "echo", Labels: labels}
	pod := echoPod(w.node, w.namespace, "")
	pod.Spec.NodeName = ""
	grace := int64(5)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	pod.Spec.Containers[0].Args = []string{"serve", "--drain", "2s"} // answers with its hostname, the pod's name
	pod.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
		PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(control)}},
	}
	one, none := intstr.FromInt32(1), intstr.FromInt32(0)
	set, err := cluster.Admin.AppsV1().DaemonSets(w.namespace).Create(w.Context(), &appsv1.DaemonSet{
		ObjectMeta: meta,
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pod.Spec},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
				Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &one, MaxUnavailable: &none},
			},
		},
	}, metav1.CreateOptions{})
	w.must(err)
	local := corev1.ServiceInternalTrafficPolicyLocal
	service, err := cluster.Admin.CoreV1().Services(w.namespace).Create(w.Context(), &corev1.Service{
		ObjectMeta: meta,
		Spec: corev1.ServiceSpec{
			Selector: labels, InternalTrafficPolicy: &local,
			Ports: []corev1.ServicePort{{Name: "tcp", Port: port, Protocol: corev1.ProtocolTCP}, {Name: "udp", Port: port, Protocol: corev1.ProtocolUDP}},
		},
	}, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() {
		_, err := cluster.Kubectl(w.patience(), "delete", "--namespace", w.namespace, "--cascade=foreground", "--wait", "daemonset/"+set.Name, "service/"+service.Name)
		if err != nil {
			w.Error(err)
		}
	})
	_, err = cluster.Kubectl(w.patience(), "rollout", "status", "--namespace", w.namespace, "daemonset/"+set.Name)
	w.must(err)
	return netip.AddrPortFrom(netip.MustParseAddr(service.Spec.ClusterIP), port)
}
