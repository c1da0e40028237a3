//go:build e2e

package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"text/tabwriter"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// attackRow is an attack by API objects: by is a row of SECURITY.md's table, must what must happen.
type attackRow struct {
	by, how, must string
	test          func(*testing.T)
}

func attackRows() []attackRow {
	return []attackRow{
		{by: "User of another namespace", how: "pods with the target's labels, ready and newer, in the node's network too", must: "cannot: become the target", test: fromAnotherNamespace},
		{by: "User of another namespace", how: "annotations of a mirror pod, with the target's UID", must: "cannot: end or replace it", test: mirrorOfAnother},
		{by: "User of the targets' namespace", how: "annotations of a mirror pod, with the target's UID", must: "cannot: end or replace it", test: mirrorOfOurs},
		{by: "User of the targets' namespace", how: "owner references: no owner, invented UID, other group or kind, no controller", must: "cannot: become the target", test: owner},
		{by: "User of the targets' namespace", how: "another service account", must: "cannot: become the target", test: serviceAccount},
		{by: "Who may write pods' status", how: "podIPs that no pod has: loopback, link-local, multicast, the node's, a magic IP", must: "cannot: become the endpoint", test: specialPodIPs},
		{by: "Who may write pods' status", how: "podIPs that are another pod's", must: "cannot: become the endpoint", test: recordedPodIP},
		{by: "Who may write pods' status", how: "another address, where CNI has recorded none", must: "can: become the endpoint; status says so", test: unrecordedPodIP},
		{by: "Who writes pods' labels, names or rules' comments", how: "0.7 MB of labels", must: "cannot: make the agent's files large", test: hugeLabels},
	}
}

// TestAttacks tries what SECURITY.md says that API objects can and cannot do.
func TestAttacks(t *testing.T) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, row := range attackRows() {
		outcome := "FAIL"
		if t.Run(row.how, row.test) {
			outcome = "ok"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", row.by, row.how, row.must, outcome)
	}
	_ = table.Flush()
}

// besides is a world whose agent lists the pods of the namespace "attackers" too, for another magic IP.
func besides(t *testing.T, namespace string) *world {
	t.Helper()
	w := apart(t, namespace, "*")
	w.grant("attackers")
	w.servingTwo("attackers")
	return w
}

func fromAnotherNamespace(t *testing.T) {
	w := besides(t, "attacked-by-labels")
	w.create("echo").add().running(true)
	w.goesTo("echo")
	w.create("newer", in("attackers")).add().running(true)
	inHost := w.create("host", in("attackers"), func(p *corev1.Pod) { p.Spec.HostNetwork = true })
	inHost.ip = netip.MustParseAddr(lab.NodeIPv4)
	inHost.running(true)
	w.staysWith("echo")
}

// mirrorsOf has pods come, be ready, end and go that claim to be the mirror of the target.
func mirrorsOf(w *world, namespace string, names ...string) {
	target := w.create("echo").add().running(true)
	w.goesTo("echo")
	for _, name := range names {
		mirror := w.create(name, in(namespace), labelled("other"), func(p *corev1.Pod) {
			uid := string(target.uid)
			p.Annotations = map[string]string{"kubernetes.io/config.hash": uid, "kubernetes.io/config.mirror": uid}
		})
		mirror.running(true)
		w.staysWith("echo")
		mirror.status(corev1.PodSucceeded, false)
		w.staysWith("echo")
		mirror.forceDelete()
		w.staysWith("echo")
	}
	if record, recorded := target.record(); !recorded || record.Name != "echo" {
		w.Errorf("the target's record: %+v", record)
	}
}

func mirrorOfAnother(t *testing.T) {
	mirrorsOf(besides(t, "attacked-by-mirrors"), "attackers", "mirror", "echo")
}

func mirrorOfOurs(t *testing.T) { mirrorsOf(serving(t), metav1.NamespaceDefault, "mirror") }

// withPodIP is a target without a record, whose status names an address.
func (w *world) withPodIP(name string, ip netip.Addr) *pod {
	w.Helper()
	p := w.create(name)
	p.ip = ip
	return p.running(true)
}

func specialPodIPs(t *testing.T) {
	w := serving(t)
	for i, address := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254", "169.254.1.1", "224.0.0.1", "255.255.255.255", lab.NodeIPv4, magicIP} {
		p := w.withPodIP(fmt.Sprint("special-", i), netip.MustParseAddr(address))
		w.staysWith("")
		p.forceDelete()
	}
}

func recordedPodIP(t *testing.T) {
	w := serving(t)
	victim := w.create("victim").add().running(false)
	w.goesTo("victim")
	w.withPodIP("impostor", victim.ip) // newer, and ready
	w.staysWith("victim")
}

func unrecordedPodIP(t *testing.T) {
	w := serving(t)
	w.create("recorded").add().running(false)
	w.goesTo("recorded")
	w.withPodIP("unrecorded", netip.MustParseAddr("10.99.0.9"))
	w.await("to serve it, and say so", func(a *runtimedir.Status) bool {
		return endpointOf(a, magic().Addr()) == "unrecorded" && strings.Contains(strings.Join(a.Notes, ""), "in no record of the CNI plugin: default/unrecorded (10.99.0.9)")
	})
}

func hugeLabels(t *testing.T) {
	w := serving(t)
	w.create("echo").add().running(true)
	w.goesTo("echo")
	w.create("huge", func(p *corev1.Pod) {
		for i := range 9000 {
			p.Labels[fmt.Sprint("label-", i)] = strings.Repeat("x", 63)
		}
	}).add()
	w.staysWith("echo")
	agent := runtimedir.New(w.node.Path(lab.RuntimeDir)).Agent(agentName)
	for _, file := range []string{"status.json", "pods.json", "memory.json"} {
		info, err := os.Stat(strings.Replace(agent.StatusPath(), "status.json", file, 1))
		w.must(err)
		if info.Size() > 10000 {
			t.Errorf("%s has %d bytes", file, info.Size())
		}
	}
}
