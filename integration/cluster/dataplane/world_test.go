//go:build dataplane

// Package dataplane_test runs magic IPs on a node with real Cilium, beside one with the bridge plugin, with every setting of Cilium that
// decides by which way packets of pods go, and on two nodes with real flannel. With -short, those settings with which packets bypass netfilter.
package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: node1 has Cilium, node2 has not; or both have flannel. Servers are pods with app=echo in the namespace default, port 8080; clients and a pod that
// nobody selects are in the namespace clients. The release is called mip, in kube-system.
const (
	agentName   = "kube-system.mip"
	daemonSet   = "mip-magic-ip-address"
	port        = 8080
	clients     = "clients"
	agentLabels = "app=magic-ip-address"
	chart       = "charts/magic-ip-address"
	agent       = "/usr/local/bin/magic-ip-agent"
	longest     = 5 * time.Minute // of one setting
)

var (
	magic = netip.AddrPortFrom(netip.MustParseAddr("169.254.210.210"), port)
	// unserved is a magic IP without any target, control no magic IP at all: a sniffer that hears a packet to it hears others too.
	unserved = netip.AddrPortFrom(netip.MustParseAddr("169.254.210.211"), port)
	control  = netip.AddrPortFrom(netip.MustParseAddr("203.0.113.99"), port)
)

// The nodes that a test is made for.
const (
	ciliumNode   = "cilium"
	flannelNodes = "flannel"
)

// cluster is shared by the tests that are made for the same nodes, one after the other.
var (
	cluster *whole.Cluster
	node    *whole.Node // the first
	made    string      // the nodes that it has
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	root, err := lab.ModuleRoot()
	if err == nil {
		err = os.Chdir(root)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if cluster == nil {
		return code
	}
	if err := cluster.Close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// use makes the cluster with these nodes, where it is not the one that is up.
func use(ctx context.Context, nodes string) (err error) {
	if made == nodes {
		return nil
	}
	made = ""
	if cluster != nil {
		if err := cluster.Close(); err != nil {
			return err
		}
	}
	options := whole.Options{Name: "dataplane-" + nodes, Images: []string{"bin/image.tar"}}
	switch nodes {
	case ciliumNode:
		options.Nodes = []whole.NodeOptions{{Runtime: whole.Containerd1, Cilium: &whole.Cilium{KubeProxyReplacement: true, BPFMasquerade: true}}, {Runtime: whole.Containerd2}}
	case flannelNodes:
		for range 2 {
			options.Nodes = append(options.Nodes, whole.NodeOptions{Runtime: whole.Containerd1, ProxyMode: whole.IPTables, Flannel: &whole.Flannel{VXLAN: true}})
		}
	}
	if cluster, err = whole.New(ctx, options); err != nil {
		return err
	}
	node = cluster.Nodes[0]
	if err := furnish(ctx); err != nil {
		return err
	}
	made = nodes
	return nil
}

// furnish makes the namespace of the clients and installs the chart, with the values of the documentation.
func furnish(ctx context.Context) error {
	// What the kernel's limit on ICMP errors does to clients is not what is tested here.
	if _, err := node.Exec(ctx, "sysctl", "-qw", "net.ipv4.icmp_ratemask=0"); err != nil {
		return err
	}
	if err := cluster.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+clients+"}\n"); err != nil {
		return err
	}
	if err := cluster.AwaitNamespaces(ctx, "default", clients, "kube-system"); err != nil {
		return err
	}
	return release(ctx)
}

// release installs the chart or upgrades it, with these values beside the test's, and waits until the agents have made their rules.
func release(ctx context.Context, values ...string) error {
	args := []string{"upgrade", "mip", chart, "--install", "--namespace", "kube-system", "--set", "minReadySeconds=0"}
	for _, value := range values {
		args = append(args, "--set", value)
	}
	_, err := cluster.Helm(ctx, append(args, "--set-json", fmt.Sprintf(`config.magicIPs=[{"ipAddress":%q,"namespace":"default","selector":"app=echo","ports":[{"port":%d},{"port":%[2]d,"protocol":"udp"}]},`+
		`{"ipAddress":%[3]q,"namespace":"default","selector":"app=none","ports":[{"port":%[2]d},{"port":%[2]d,"protocol":"udp"}]}]`, magic.Addr(), port, unserved.Addr()))...)
	if err != nil {
		return err
	}
	// New pods have a changed configuration at once.
	pods := func() ([]corev1.Pod, error) {
		list, err := cluster.Admin.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{LabelSelector: agentLabels})
		if err != nil {
			return nil, err
		}
		return list.Items, nil
	}
	old, err := pods()
	if err != nil {
		return err
	}
	if _, err := cluster.Kubectl(ctx, "delete", "pod", "--namespace", "kube-system", "--selector", agentLabels); err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		now, err := pods()
		if err != nil {
			return err
		}
		for _, n := range cluster.Nodes {
			if err := agentOf(n, old, now); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
		}
		return nil
	})
}

// agentOf tells whether the agent of a node is that of a pod which is none of the old ones, and has made its rules. The pods are all those of agents.
func agentOf(n *whole.Node, old, pods []corev1.Pod) error {
	pods = slices.DeleteFunc(slices.Clone(pods), func(p corev1.Pod) bool { return p.Spec.NodeName != n.Name })
	if len(pods) != 1 {
		return fmt.Errorf("it has %d pods of agents", len(pods))
	}
	pod := pods[0]
	if slices.ContainsFunc(old, func(o corev1.Pod) bool { return o.UID == pod.UID }) {
		return fmt.Errorf("pod %s is still there", pod.Name)
	}
	container := slices.IndexFunc(pod.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.Name == "agent" && c.State.Running != nil })
	if container < 0 {
		return fmt.Errorf("the agent of pod %s does not run", pod.Name)
	}
	status, err := runtimedir.New(n.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
	if err == nil && (status.LastSync.IsZero() || status.StartedAt.Before(pod.Status.ContainerStatuses[container].State.Running.StartedAt.Time)) {
		err = errors.New("the agent has not made its rules yet")
	}
	return err
}

// world is a test of one setting.
type world struct {
	*testing.T
	ctx      context.Context
	observed compat.Observed
}

func newWorld(t *testing.T, nodes string) *world {
	w := &world{T: t}
	lab.Renew(t, &w.ctx, longest)
	w.must(use(w.ctx, nodes))
	w.Cleanup(func() {
		if t.Failed() {
			w.describe()
		}
	})
	return w
}

// Cleanup is that of the test, with time of its own where the test's is over.
func (w *world) Cleanup(f func()) { lab.CleanUp(w.T, &w.ctx, longest, f) }

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) eventually(what string, condition func() error) {
	w.Helper()
	ctx, cancel := lab.Patience(w.ctx, time.Minute)
	defer cancel()
	if err := lab.Eventually(ctx, condition); err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

func (w *world) exec(script string) string {
	w.Helper()
	out, err := node.Exec(w.ctx, "sh", "-ec", script)
	w.must(err)
	return out
}

// describe is for people, after a failure.
func (w *world) describe() {
	for _, script := range []string{"ip route show table local proto 109", "bin/magic-ip-agent status", "bin/magic-ip-agent doctor"} {
		root, _ := lab.ModuleRoot()
		out, err := node.Exec(w.ctx, "sh", "-c", strings.Replace(script, "bin/", root+"/bin/", 1)+" 2>&1 || true")
		w.Logf("%s:\n%s%v", script, out, err)
	}
	out, err := cluster.Kubectl(w.ctx, "logs", "-n", "kube-system", "-l", agentLabels, "-c", "agent", "--prefix", "--tail=20")
	w.Log(out, err)
}

// agent runs a command of the agent of the machine on the node, as root; doctor may find something.
func (w *world) agent(command ...string) string {
	w.Helper()
	root, err := lab.ModuleRoot()
	w.must(err)
	out, err := node.Exec(w.ctx, "sh", "-c", root+"/bin/magic-ip-agent "+strings.Join(command, " ")+" || true")
	w.must(err)
	return out
}

func (w *world) status() *runtimedir.Status {
	w.Helper()
	status, err := runtimedir.New(node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
	w.must(err)
	return status
}

// awaitStatus waits for what the agent of the node has published.
func (w *world) awaitStatus(what string, wanted func(*runtimedir.Status) error) {
	w.Helper()
	w.eventually(what, func() error {
		status, err := runtimedir.New(node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
		if err != nil {
			return err
		}
		return wanted(status)
	})
}

// awaitEndpoint waits until traffic goes to this pod; none where empty.
func (w *world) awaitEndpoint(pod string) {
	w.Helper()
	w.awaitStatus("endpoint "+pod, func(status *runtimedir.Status) error {
		for _, m := range status.MagicIPs {
			if m.Address == magic.Addr() && (pod == "" && len(m.Endpoints) > 0 || pod != "" && (len(m.Endpoints) != 1 || m.Endpoints[0].Pod != "default/"+pod)) {
				return fmt.Errorf("the agent has published %+v", m)
			}
		}
		return nil
	})
}

// echoPod is a pod on the first node that answers at port 8080.
func echoPod(namespace, name string, labels map[string]string) *corev1.Pod {
	grace := int64(1)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			NodeName: node.Name, TerminationGracePeriodSeconds: &grace, DNSPolicy: corev1.DNSDefault,
			Containers: []corev1.Container{{
				Name: "echo", Image: whole.ImageEcho, ImagePullPolicy: corev1.PullNever, Args: []string{"serve", "--drain", "500ms"},
			}},
		},
	}
}

var echoLabels = map[string]string{"app": "echo"}

// pod makes a pod of the node that is removed after the test, and waits until it is ready.
func (w *world) pod(namespace, name string, labels map[string]string) *corev1.Pod {
	w.Helper()
	return w.create(echoPod(namespace, name, labels))
}

func (w *world) create(pod *corev1.Pod) *corev1.Pod {
	w.Helper()
	_, err := cluster.Admin.CoreV1().Pods(pod.Namespace).Create(w.ctx, pod, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() { w.remove(pod.Namespace, pod.Name) })
	return w.ready(pod.Namespace, pod.Name)
}

func (w *world) ready(namespace, name string) (pod *corev1.Pod) {
	w.Helper()
	w.eventually("pod "+name, func() (err error) {
		if pod, err = cluster.Admin.CoreV1().Pods(namespace).Get(w.ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		ready := slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue })
		if !ready {
			return fmt.Errorf("it is not ready: %+v", pod.Status)
		}
		return nil
	})
	return pod
}

// remove removes a pod and waits until it is gone.
func (w *world) remove(namespace, name string) {
	w.Helper()
	pods := cluster.Admin.CoreV1().Pods(namespace)
	if err := pods.Delete(w.ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		w.Error(err)
	}
	w.eventually("the end of pod "+name, func() error {
		if _, err := pods.Get(w.ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("it is still there: %w", err)
		}
		return nil
	})
}

func (w *world) netns(pod *corev1.Pod) string {
	w.Helper()
	path, err := node.PodNetNS(w.ctx, pod)
	w.must(err)
	return path
}

// ask asks once; refused is within a second.
func (w *world) ask(kind lab.Kind, from string, to netip.AddrPort) (lab.Answer, error) {
	return node.Lab().Ask(w.ctx, lab.Client{Kind: kind, From: from, To: to, Timeout: 2 * time.Second})
}

// refused wants each kind of client refused at once, from each namespace, and reports whether they are.
func (w *world) refused(when string, to netip.AddrPort, from map[string]string) bool {
	w.Helper()
	all := true
	for who, namespace := range from {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			began := time.Now()
			answer, err := w.ask(kind, namespace, to)
			if took := lab.WorkingTime(began, time.Now()); err == nil || took > time.Second {
				w.Errorf("%s: %s from %s got %+v, %v after %v; want it refused at once", when, kind, who, answer, err, took)
				all = false
			}
		}
	}
	return all
}

// served wants each kind of client answered by the server, and returns the sources that it has seen.
func (w *world) served(when, server string, from map[string]string) map[string]netip.Addr {
	w.Helper()
	sources := map[string]netip.Addr{}
	for who, namespace := range from {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			answer, err := w.ask(kind, namespace, magic)
			if err != nil || answer.Server != server {
				w.Errorf("%s: %s from %s: answered by %q, %v; want %s", when, kind, who, answer.Server, err, server)
				continue
			}
			if before, both := sources[who]; both && before != answer.Client.Addr() {
				w.Errorf("%s: %s is seen as %s by one protocol and as %s by another", when, who, before, answer.Client.Addr())
			}
			sources[who] = answer.Client.Addr()
		}
	}
	return sources
}
