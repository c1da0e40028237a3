//go:build e2e

package whole_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: each test has a namespace and a magic IP of its own, and its twin of IPv6, port 8080 of pods with app=echo in all cases. Each
// node has a client pod in the namespace "clients", which nobody selects.
const (
	agentName = "e2e.magic-ip"
	port      = 8080
	control   = 8081 // of the servers in pods
)

var magicIPs = map[string]string{
	"start":   "169.254.210.1",
	"older":   "169.254.210.2",
	"flip":    "169.254.210.3",
	"static":  "169.254.210.4",
	"host":    "169.254.210.5",
	"forced":  "169.254.210.6",
	"outage":  "169.254.210.7",
	"reboot":  "169.254.210.8",
	"rollout": "169.254.210.9",
}

// twin is the IPv6 address with the last number of an IPv4 one.
func twin(address string) string {
	return "fd00:a9fe:d2d2::" + address[strings.LastIndex(address, ".")+1:]
}

// cluster is shared by all tests, one after the other.
var cluster *whole.Cluster

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctx, cancel := lab.Patience(context.Background(), 2*time.Minute)
	defer cancel()
	before, err := snapshot()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if cluster, err = whole.New(ctx, whole.Options{Name: "whole", Nodes: whole.Mixed()}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := cluster.Test(func() error { return place(ctx) }, m.Run)
	if err := leftAlone(before, cluster); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// place makes the namespaces and the client pods, and puts plugin and agent in place.
func place(ctx context.Context) error {
	manifests := `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: magic-ip-agent}
rules: [{apiGroups: [""], resources: [pods], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: magic-ip-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: magic-ip-agent}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: magic-ip-agent}]
`
	for _, namespace := range append(slices.Sorted(maps.Keys(magicIPs)), "clients") {
		manifests += "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: " + namespace + "}\n"
	}
	if err := cluster.Apply(ctx, manifests); err != nil {
		return err
	}
	for _, n := range cluster.Nodes {
		if _, err := createPod(ctx, echoPod(n, "clients", "client-"+n.Name)); err != nil {
			return err
		}
	}
	for _, n := range cluster.Nodes {
		if _, err := awaitReady(ctx, "clients/client-"+n.Name); err != nil {
			return err
		}
		if err := placeOn(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// placeOn puts the plugin and the agent on a node, and waits until the runtime calls the plugin.
func placeOn(ctx context.Context, n *whole.Node) error {
	root, err := lab.ModuleRoot()
	if err != nil {
		return err
	}
	kubeconfig, err := cluster.KubeconfigFor("magic-ip-agent")
	if err != nil {
		return err
	}
	config := fmt.Sprintf("name: %s\npollInterval: 1s\nmagicIPs:\n", agentName)
	var selectors []map[string]string
	for namespace, address := range magicIPs {
		for _, address := range []string{address, twin(address)} {
			config += fmt.Sprintf("- {ipAddress: %q, namespace: %s, selector: app=echo, ports: [{port: %d}, {port: %[3]d, protocol: udp}]}\n", address, namespace, port)
		}
		selectors = append(selectors, map[string]string{"namespace": namespace, "selector": "app=echo"})
	}
	err = errors.Join(
		n.CopyFile(filepath.Join(root, "bin", "magic-ip-address"), whole.CNIBinDir+"/magic-ip-address"),
		n.WriteFile("/etc/magic-ip-address/config.yaml", []byte(config), 0o644),
		n.WriteFile("/etc/magic-ip-address/kubeconfig", kubeconfig, 0o600),
	)
	if err != nil {
		return err
	}
	if err := startAgent(ctx, n); err != nil {
		return err
	}
	if err := chain(n, map[string]any{
		"type": "magic-ip-address", "runtimeDir": lab.RuntimeDir, "capabilities": map[string]bool{"labels": true},
		"selectors": map[string]any{agentName: selectors},
	}); err != nil {
		return err
	}
	pod, err := awaitConflist(ctx, n, "start", true)
	if err != nil {
		return err
	}
	return removePod(ctx, pod)
}

// awaitConflist makes pods until one is recorded, or is not: the runtime says nowhere that it has read the conflist
// again. It returns that pod.
func awaitConflist(ctx context.Context, n *whole.Node, namespace string, recorded bool) (*corev1.Pod, error) {
	for attempt := 1; ; attempt++ {
		pod, err := createPod(ctx, echoPod(n, namespace, fmt.Sprintf("attempt-%d-%s", attempt, n.Name)))
		if err == nil {
			pod, err = awaitReady(ctx, namespace+"/"+pod.Name)
		}
		if err != nil || recorded == (recordOf(n, pod) != nil) {
			return pod, err
		}
		if err := removePod(ctx, pod); err != nil {
			return nil, err
		}
	}
}

// startAgent starts the agent as a process of the node, and waits until it serves.
func startAgent(ctx context.Context, n *whole.Node) error {
	root, err := lab.ModuleRoot()
	if err != nil {
		return err
	}
	_, err = n.StartProcess("agent", filepath.Join(root, "bin", "magic-ip-agent"), "run", "--config", "/etc/magic-ip-address/config.yaml", "--kubeconfig", "/etc/magic-ip-address/kubeconfig",
		"--node-name", n.Name, "--runtime-dir", lab.RuntimeDir, "--log-level", "debug")
	if err != nil {
		return err
	}
	return lab.Eventually(ctx, func() error {
		agent, err := runtimedir.New(n.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
		if err == nil && agent.LastSync.IsZero() {
			return errors.New("the agent has not made its rules yet")
		}
		return err
	})
}

// chain appends a plugin to the node's conflist.
func chain(n *whole.Node, plugin map[string]any) error {
	data, err := n.ReadFile(whole.ConflistFile)
	if err != nil {
		return err
	}
	var conflist map[string]any
	if err := json.Unmarshal(data, &conflist); err != nil {
		return err
	}
	conflist["plugins"] = append(conflist["plugins"].([]any), plugin)
	if data, err = json.Marshal(conflist); err != nil {
		return err
	}
	return n.WriteFile(whole.ConflistFile, data, 0o644)
}

// echoPod is a pod of a node with the server, which is ready as soon as it runs and ends as soon as it is told to.
func echoPod(n *whole.Node, namespace, name string) *corev1.Pod {
	grace := int64(1)
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": "echo"}},
		Spec: corev1.PodSpec{
			NodeName:                      n.Name,
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "echo", Image: whole.ImageEcho, ImagePullPolicy: corev1.PullNever, Args: []string{"serve", "--name", name},
			}},
		},
	}
}

func createPod(ctx context.Context, pod *corev1.Pod) (made *corev1.Pod, err error) {
	// The default service account of a new namespace takes its time.
	err = lab.Eventually(ctx, func() (err error) {
		made, err = cluster.Admin.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
		return err
	})
	return made, err
}

// awaitReady waits until a pod, namespace/name, is Ready.
func awaitReady(ctx context.Context, name string) (pod *corev1.Pod, err error) {
	namespace, name, _ := strings.Cut(name, "/")
	err = lab.Eventually(ctx, func() error {
		if pod, err = cluster.Admin.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		if !isReady(pod) {
			return fmt.Errorf("pod %s/%s is not ready: %+v", namespace, name, pod.Status)
		}
		return nil
	})
	return pod, err
}

func isReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// removePod deletes a pod and waits until its sandbox is gone too.
func removePod(ctx context.Context, pod *corev1.Pod) error {
	pods := cluster.Admin.CoreV1().Pods(pod.Namespace)
	if err := pods.Delete(ctx, pod.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return lab.Eventually(ctx, func() error {
		now, err := pods.Get(ctx, pod.Name, metav1.GetOptions{})
		switch {
		case err == nil && now.UID == pod.UID:
			return fmt.Errorf("pod %s/%s is still there", pod.Namespace, pod.Name)
		case err != nil && !apierrors.IsNotFound(err):
			return err
		case recordOf(cluster.Node(pod.Spec.NodeName), pod) != nil:
			return fmt.Errorf("the record of pod %s/%s is still there", pod.Namespace, pod.Name)
		}
		return nil
	})
}

// recordOf is what the plugin has recorded of a pod; nil for nothing.
func recordOf(n *whole.Node, pod *corev1.Pod) *runtimedir.Attachment {
	uid := pod.UID
	if hash, static := pod.Annotations["kubernetes.io/config.hash"]; static {
		uid = types.UID(hash)
	}
	file, err := runtimedir.New(n.Path(lab.RuntimeDir)).ReadState()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		panic(err) // the file is corrupt, whatever the test is about
	}
	for i := range file.Attachments {
		if file.Attachments[i].UID == string(uid) {
			return &file.Attachments[i]
		}
	}
	return nil
}

// world is the cluster, and what waits for the agent of a node to have acted.
type world struct {
	*testing.T
	node      *whole.Node
	namespace string
	client    string // the network namespace of the client pod
}

// onEachNode runs a test on both nodes at once.
func onEachNode(t *testing.T, namespace string, test func(*world)) {
	for _, n := range cluster.Nodes {
		t.Run(string(n.Runtime()), func(t *testing.T) {
			t.Parallel()
			test(newWorld(t, n, namespace))
		})
	}
}

func newWorld(t *testing.T, n *whole.Node, namespace string) *world {
	w := &world{T: t, node: n, namespace: namespace}
	// After a reboot the API tells of the containers before it for a while.
	ctx := w.patience()
	w.must(lab.Eventually(ctx, func() error {
		pod, err := awaitReady(ctx, "clients/client-"+n.Name)
		if err != nil {
			return err
		}
		w.client, err = n.PodNetNS(ctx, pod)
		return err
	}))
	t.Cleanup(func() {
		if t.Failed() {
			if agent, err := runtimedir.New(n.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus(); err == nil {
				t.Logf("the agent of %s has published %+v", n.Name, agent.MagicIPs)
			}
		}
	})
	return w
}

func (w *world) patience() context.Context {
	ctx, cancel := lab.Patience(context.WithoutCancel(w.Context()), time.Minute)
	w.Cleanup(cancel)
	return ctx
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) magic() netip.AddrPort { return w.magicIPs()[0] }

// magicIPs are those of both families.
func (w *world) magicIPs() (all []netip.AddrPort) {
	for _, address := range []string{magicIPs[w.namespace], twin(magicIPs[w.namespace])} {
		all = append(all, netip.AddrPortFrom(netip.MustParseAddr(address), port))
	}
	return all
}

// create makes a pod that is removed after the test.
func (w *world) create(pod *corev1.Pod) *corev1.Pod {
	w.Helper()
	made, err := createPod(w.patience(), pod)
	w.must(err)
	w.Cleanup(func() {
		if err := removePod(w.patience(), made); err != nil {
			w.Error(err)
		}
	})
	return made
}

func (w *world) ready(pod *corev1.Pod) *corev1.Pod {
	w.Helper()
	ready, err := awaitReady(w.patience(), pod.Namespace+"/"+pod.Name)
	w.must(err)
	return ready
}

// endpoints is where the agent says that traffic to a magic IP goes now.
func (w *world) endpoints(of netip.AddrPort) ([]runtimedir.Endpoint, error) {
	agent, err := runtimedir.New(w.node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
	if err != nil {
		return nil, err
	}
	for _, m := range agent.MagicIPs {
		if m.Address == of.Addr() && m.Protocol == "tcp" {
			return m.Endpoints, nil
		}
	}
	return nil, fmt.Errorf("the agent does not serve %v", of)
}

// goesTo waits until traffic goes to this pod, with an empty name until it is refused, and then asks once by each
// kind of client and for both families: from the client pod, which must be seen by its own address, and from the node.
func (w *world) goesTo(name string) {
	w.Helper()
	for _, to := range w.magicIPs() {
		w.goesToAt(to, name)
	}
}

func (w *world) goesToAt(to netip.AddrPort, name string) {
	w.Helper()
	var endpoints []runtimedir.Endpoint
	w.must(lab.Eventually(w.patience(), func() (err error) {
		if endpoints, err = w.endpoints(to); err != nil {
			return err
		}
		var pods []string
		for _, e := range endpoints {
			pods = append(pods, strings.TrimPrefix(e.Pod, w.namespace+"/"))
		}
		if got := strings.Join(pods, ","); got != name {
			return fmt.Errorf("traffic goes to %q, not to %q", got, name)
		}
		return nil
	}))
	client, err := awaitReady(w.patience(), "clients/client-"+w.node.Name)
	w.must(err)
	for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
		for _, e := range endpoints { // a pod without a probe is ready before its process listens
			w.must(lab.Eventually(w.patience(), func() error {
				_, err := w.node.Lab().Ask(w.Context(), lab.Client{Kind: kind, From: lab.Host, To: e.Address, Timeout: 2 * time.Second})
				return err
			}))
		}
		for _, from := range []string{w.client, lab.Host} {
			began := time.Now()
			answer, err := w.node.Lab().Ask(w.Context(), lab.Client{Kind: kind, From: from, To: to, Timeout: 2 * time.Second})
			switch {
			case name == "" && err == nil:
				w.Errorf("%s from %q to %s was answered by %s, want it refused", kind, from, to, answer.Server)
			case name == "":
				if took := lab.WorkingTime(began, time.Now()); took > time.Second {
					w.Errorf("%s from %q to %s was refused after %v: %v", kind, from, to, took, err)
				}
			case err != nil:
				w.Errorf("%s from %q to %s: %v", kind, from, to, err)
			case answer.Server != name:
				w.Errorf("%s from %q was answered by %s, want %s", kind, from, answer.Server, name)
			case from == w.client && !slices.Contains(client.Status.PodIPs, corev1.PodIP{IP: answer.Client.Addr().String()}):
				w.Errorf("%s from the client pod %v came from %s", kind, client.Status.PodIPs, answer.Client)
			}
		}
	}
}
