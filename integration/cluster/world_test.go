//go:build e2e

package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: the node is 192.0.2.2, pods are 10.244.1.0/24 on the bridge of 10-bridge.conflist, those
// without the plugin 10.244.2.0/24, and the magic IP is 169.254.210.210:8080.
const (
	agentName = "default.magic-ip"
	magicIP   = "169.254.210.210"
	port      = 8080
	network   = "bridge"

	// networkWithout is one without the plugin.
	networkWithout  = "without"
	conflistWithout = `{"cniVersion": "1.1.0", "name": "without", "plugins": [{"type": "bridge", "bridge": "cni1", "isGateway": true,
		"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.2.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`
)

// plane is the control plane. The tests that stop it, and those that need no node of their own, share its node one after
// the other.
var plane *ControlPlane

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, cancel := lab.Patience(context.Background(), 2*time.Minute)
	defer cancel()
	node, err := newNode(ctx, "node1", metav1.NamespaceDefault)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = node.Close() }()
	if plane, err = Start(ctx, node); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// newNode is a node with both networks, whose plugin records pods of this namespace, and a client.
func newNode(ctx context.Context, name, namespace string) (*lab.Node, error) {
	node, err := lab.NewNode(ctx, lab.NodeOptions{Name: name})
	if err != nil {
		return nil, err
	}
	conflist, err := lab.Conflist("10-bridge.conflist")
	if err == nil {
		err = node.AddConf("10-bridge.conflist", bytes.ReplaceAll(conflist, []byte(`"namespace": "default"`), fmt.Appendf(nil, `"namespace": %q`, namespace)))
	}
	if err == nil {
		err = node.AddConf("without.conflist", []byte(conflistWithout))
	}
	if err == nil {
		_, err = node.Add(ctx, network, lab.Pod{Name: "client", Namespace: "elsewhere"})
	}
	if err != nil {
		return nil, errors.Join(err, node.Close())
	}
	return node, nil
}

// world is an agent on a node, and helpers that wait for it to have acted.
type world struct {
	testing.TB
	node       *lab.Node
	namespace  string // of the pods
	kubeconfig string // of the agent
	proxy      *proxy // between agent and API server; nil for none
	agent      *lab.Agent
	conf       []byte
	poll       string // pollInterval; 1s where empty
	steps      int
}

// serving starts an agent on the shared node, with one magic IP; settings are those that differ from the defaults,
// in YAML.
func serving(t testing.TB, settings ...string) *world {
	t.Helper()
	return servingBy(t, AgentKubeconfig, settings...)
}

// servingBy is serving with another kubeconfig; empty for the service account's.
func servingBy(t testing.TB, kubeconfig string, settings ...string) *world {
	t.Helper()
	w := &world{TB: t, node: plane.node, namespace: metav1.NamespaceDefault, kubeconfig: kubeconfig}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, err := w.node.Run(ctx, "sh", "-c", "nft delete table ip magic-ip-"+agentName+"; rm -r "+lab.RuntimeDir)
		if err != nil {
			t.Error(err)
		}
	})
	w.serve(settings...)
	return w
}

// serve starts the agent. A pod that nobody selects, the marker, is there to tell what the agent has heard.
func (w *world) serve(settings ...string) {
	w.Helper()
	if !strings.Contains(strings.Join(settings, ""), "ports:") {
		settings = append(settings, fmt.Sprintf("ports: [{port: %d}]", port))
	}
	if !strings.Contains(strings.Join(settings, ""), "namespace:") {
		settings = append(settings, "namespace: "+w.namespace)
	}
	w.conf = fmt.Appendf(nil, "name: %s\npollInterval: %s\nmagicIPs:\n- {ipAddress: %s, selector: app=echo, %s}\n",
		agentName, cmp.Or(w.poll, "1s"), magicIP, strings.Join(settings, ", "))
	w.start()
	w.Cleanup(func() {
		w.agent.Kill()
		if w.Failed() {
			w.Logf("log of the agent:\n%s", w.agent.Log())
		}
	})
	w.create("marker", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "marker"} })
}

// apart is a world with a node, a namespace and a proxy of its own, so that it can run beside others. The plugin records
// pods of the namespace recorded.
func apart(t testing.TB, namespace, recorded string) *world {
	t.Helper()
	w := &world{TB: t, namespace: namespace, kubeconfig: tokenKubecfg}
	ctx := t.Context()
	account, err := allowAccount(ctx, namespace)
	w.must(err)
	token, err := newToken(ctx, account)
	w.must(err)
	w.node, err = newNode(ctx, namespace, recorded)
	w.must(err)
	t.Cleanup(func() {
		if err := w.node.Close(); err != nil {
			t.Error(err)
		}
	})
	w.must(giveToken(w.node, token))
	w.proxy, err = startProxy(w.node)
	w.must(err)
	t.Cleanup(func() { _ = w.proxy.close() })
	return w
}

// start starts the agent, for the first time or again.
func (w *world) start() {
	w.Helper()
	before := time.Now()
	var err error
	if w.agent, err = w.node.StartAgent(w.conf, "--kubeconfig", w.kubeconfig, "--backend", "nftables", "--log-level", "debug"); err != nil {
		w.Fatal(err)
	}
	w.await("to run", func(a *runtimedir.Status) bool { return a.StartedAt.After(before) && !a.LastSync.IsZero() })
}

func (w *world) patience() context.Context {
	ctx, cancel := lab.Patience(context.WithoutCancel(w.Context()), 20*time.Second)
	w.Cleanup(cancel)
	return ctx
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// await waits until what the agent has published is as wanted: it publishes after it has acted.
func (w *world) await(what string, wanted func(*runtimedir.Status) bool) *runtimedir.Status {
	w.Helper()
	return w.awaitFor(w.patience(), what, wanted)
}

func (w *world) awaitFor(ctx context.Context, what string, wanted func(*runtimedir.Status) bool) (agent *runtimedir.Status) {
	w.Helper()
	err := lab.Eventually(ctx, func() (err error) {
		if agent, err = runtimedir.New(w.node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus(); err != nil {
			return err
		}
		if !wanted(agent) {
			return fmt.Errorf("the agent has published %+v", agent)
		}
		return nil
	})
	if err != nil {
		w.Fatalf("waiting for the agent %s: %v", what, err)
	}
	return agent
}

// goesTo waits until traffic goes to this pod; with an empty name until it is refused.
func (w *world) goesTo(pod string) {
	w.Helper()
	w.goesToWithin(20*time.Second, pod)
}

func (w *world) goesToWithin(limit time.Duration, pod string) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), limit)
	defer cancel()
	w.awaitFor(ctx, "to have endpoint "+pod, func(a *runtimedir.Status) bool { return endpointOf(a, magic().Addr()) == pod })
	w.answers(pod)
}

// goesToOf is goesTo for another magic IP.
func (w *world) goesToOf(address netip.Addr, pod string) {
	w.Helper()
	w.await("to have endpoint "+pod, func(a *runtimedir.Status) bool { return endpointOf(a, address) == pod })
	w.answersOf(address, pod)
}

// staysWith says that the traffic goes to this pod still, now that the agent has heard all that the API has said.
func (w *world) staysWith(pod string) {
	w.Helper()
	agent := w.settle()
	if got := endpointOf(agent, magic().Addr()); got != pod {
		w.Errorf("endpoint is %q, want %q", got, pod)
	}
	w.answers(pod)
}

// answers asks once.
func (w *world) answers(pod string) {
	w.Helper()
	w.answersOf(magic().Addr(), pod)
}

func (w *world) answersOf(address netip.Addr, pod string) {
	w.Helper()
	if err := w.answeredBy(address, pod); err != nil {
		w.Error(err)
	}
}

func (w *world) answeredBy(address netip.Addr, pod string) error {
	answer, err := w.node.Ask(w.Context(), lab.Client{Kind: lab.NewConnection, From: "client", To: netip.AddrPortFrom(address, port), Timeout: time.Second})
	switch {
	case pod == "" && err != nil:
		return nil
	case err != nil:
		return fmt.Errorf("%w, want an answer by %s", err, pod)
	case answer.Server != pod:
		return fmt.Errorf("answered by %q, want %q", answer.Server, pod)
	}
	return nil
}

func magic() netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(magicIP), port) }

// endpointOf is the name of the pod that traffic to the magic IP goes to; empty for none.
func endpointOf(a *runtimedir.Status, address netip.Addr) string {
	var names []string
	for _, m := range a.MagicIPs {
		if m.Address != address {
			continue
		}
		for _, e := range m.Endpoints {
			names = append(names, e.Pod[strings.Index(e.Pod, "/")+1:])
		}
	}
	return strings.Join(names, ",")
}

// settle waits until the agent has heard everything that the API has said so far: events come in order, and
// a new label of the marker is the last.
func (w *world) settle() *runtimedir.Status {
	w.Helper()
	w.steps++
	step := fmt.Sprint(w.steps)
	marker := w.patch(w.namespace, "marker", "", map[string]any{"metadata": map[string]any{"labels": map[string]any{"app": "marker-" + step}}})
	return w.await("to hear of the marker", func(*runtimedir.Status) bool { return w.labels("marker", string(marker.UID))["app"] == "marker-"+step })
}

// reported is what the agent reports to the plugin.
func (w *world) reported() *runtimedir.Pods {
	w.Helper()
	pods, err := runtimedir.New(w.node.Path(lab.RuntimeDir)).Agent(agentName).ReadPods()
	if err != nil {
		return &runtimedir.Pods{}
	}
	return pods
}

func (w *world) labels(name, uid string) map[string]string {
	w.Helper()
	return w.reported().LabelsOf(runtimedir.PodID{Namespace: w.namespace, Name: name, UID: uid})
}

// pod is a pod of the node: an object in the API, and once it is attached a network namespace.
type pod struct {
	w         *world
	name      string
	namespace string
	uid       types.UID
	sandbox   types.UID // by which CNI knows the pod, where that is another
	network   string
	netns     string            // name of its network namespace
	labels    map[string]string // that the runtime passes; containerd passes none
	ip        netip.Addr
	echos     []*lab.Echo
}

// create makes the object of a pod: pending, app=echo and with the port "http" where edit does not say otherwise.
func (w *world) create(name string, edit ...func(*corev1.Pod)) *pod {
	w.Helper()
	object := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: w.namespace, Labels: map[string]string{"app": "echo"}},
		Spec: corev1.PodSpec{
			NodeName:   w.node.Name,
			Containers: []corev1.Container{{Name: "echo", Image: "none", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: port}}}},
		},
	}
	for _, edit := range edit {
		edit(object)
	}
	made, err := plane.Admin.CoreV1().Pods(object.Namespace).Create(w.Context(), object, metav1.CreateOptions{})
	w.must(err)
	p := &pod{w: w, name: name, namespace: made.Namespace, uid: made.UID, network: network, netns: name}
	w.Cleanup(func() { p.forceDelete() })
	return p
}

// unheardOf is a pod that the API server has not been told of, whose labels the runtime passes.
func (w *world) unheardOf(name string) *pod {
	return &pod{
		w: w, name: name, namespace: w.namespace, uid: types.UID("unheard-of-" + name), network: network, netns: name,
		labels: map[string]string{"app": "echo"},
	}
}

// lab is what the runtime tells CNI.
func (p *pod) lab() lab.Pod {
	return lab.Pod{Name: p.name, Namespace: p.namespace, UID: string(cmp.Or(p.sandbox, p.uid)), Labels: p.labels, NetNS: p.netns}
}

// add attaches the pod, on whose address a server then listens.
func (p *pod) add() *pod {
	p.w.Helper()
	attached, err := p.w.node.Add(p.w.Context(), p.network, p.lab())
	p.w.must(err)
	p.w.Cleanup(func() { p.del() })
	p.ip = attached.IPs[0]
	return p.listen(port)
}

// addUnrecorded attaches the pod as if the plugin were not in the conflist yet.
func (p *pod) addUnrecorded() *pod {
	p.network = networkWithout
	return p.add()
}

func (p *pod) listen(port uint16) *pod {
	p.w.Helper()
	echo, err := p.w.node.StartEcho(p.netns, p.name, port)
	p.w.must(err)
	p.echos = append(p.echos, echo)
	return p
}

// running is what kubelet says once the containers run.
func (p *pod) running(ready bool) *pod {
	p.w.Helper()
	return p.status(corev1.PodRunning, ready)
}

func (p *pod) status(phase corev1.PodPhase, ready bool) *pod {
	p.w.Helper()
	condition := corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: metav1.Now()}
	if ready {
		condition.Status = corev1.ConditionTrue
	}
	status := map[string]any{"phase": phase, "conditions": []corev1.PodCondition{condition}}
	if p.ip.IsValid() {
		status["podIP"], status["podIPs"] = p.ip, []map[string]any{{"ip": p.ip}}
	}
	p.w.patch(p.namespace, p.name, "status", map[string]any{"status": status})
	return p
}

func (p *pod) label(key string, value any) {
	p.w.Helper()
	p.w.patch(p.namespace, p.name, "", map[string]any{"metadata": map[string]any{"labels": map[string]any{key: value}}})
}

func (w *world) patch(namespace, name, subresource string, change any) *corev1.Pod {
	w.Helper()
	data, err := json.Marshal(change)
	w.must(err)
	var sub []string
	if subresource != "" {
		sub = []string{subresource}
	}
	pod, err := plane.Admin.CoreV1().Pods(namespace).Patch(w.Context(), name, types.MergePatchType, data, metav1.PatchOptions{}, sub...)
	w.must(err)
	return pod
}

// terminate is what a controller does: the object stays, with a deletionTimestamp, until kubelet has ended the pod.
func (p *pod) terminate() {
	p.w.Helper()
	p.delete(30)
}

// forceDelete removes the object, whatever the pod does.
func (p *pod) forceDelete() {
	p.w.Helper()
	p.delete(0)
}

func (p *pod) delete(grace int64) {
	p.w.Helper()
	ctx := context.WithoutCancel(p.w.Context())
	err := plane.Admin.CoreV1().Pods(p.namespace).Delete(ctx, p.name, metav1.DeleteOptions{
		GracePeriodSeconds: &grace, Preconditions: &metav1.Preconditions{UID: &p.uid},
	})
	if err != nil && !apierrors.IsNotFound(err) {
		p.w.Error(err)
	}
}

// end ends the pod's process.
func (p *pod) end() {
	for _, echo := range p.echos {
		_ = echo.Close()
	}
}

// del ends the pod's process, and takes its sandbox away.
func (p *pod) del() {
	p.w.Helper()
	p.end()
	if err := p.w.node.Del(context.WithoutCancel(p.w.Context()), p.network, p.lab()); err != nil {
		p.w.Error(err)
	}
}

// record is what the plugin has recorded of the pod.
func (p *pod) record() (runtimedir.Attachment, bool) {
	p.w.Helper()
	file, err := runtimedir.New(p.w.node.Path(lab.RuntimeDir)).ReadState()
	if errors.Is(err, fs.ErrNotExist) {
		return runtimedir.Attachment{}, false
	}
	p.w.must(err)
	for _, record := range file.Attachments {
		if record.UID == string(cmp.Or(p.sandbox, p.uid)) {
			return record, true
		}
	}
	return runtimedir.Attachment{}, false
}
