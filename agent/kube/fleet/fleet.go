// Package fleet runs a command in the agents' containers of a cluster, one on each node, with the credentials of a person.
package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

const (
	// container is that of the agent in its pod.
	container = "agent"
	// atOnce bounds the commands that run at the same time.
	atOnce = 16
	// maxOutput is how much of a command's output is kept, in bytes: more than that of a status with 10,000 magic IPs.
	maxOutput = 16 << 20
)

// Options say which cluster, and which pods are agents.
type Options struct {
	// Kubeconfig and Context are as those of kubectl; empty for its defaults.
	Kubeconfig, Context string
	// Namespace has the agents; empty for all namespaces.
	Namespace string
	// Selector is the label selector of the agents' pods.
	Selector string
	// Timeout bounds a command on a node.
	Timeout time.Duration
}

// Fleet is the agents of a cluster.
type Fleet struct {
	Options
	config *rest.Config
	client kubernetes.Interface
}

// Connect reads the credentials as kubectl does.
func Connect(options Options) (*Fleet, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = options.Kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: options.Context}).ClientConfig()
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 50, 100 // a request for each node
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &Fleet{Options: options, config: config, client: client}, nil
}

// Node is what a node has said.
type Node struct {
	Name string
	// Pod is the agent's, namespace/name; empty where the node has none.
	Pod string
	// flags are those of its agent that every command takes.
	flags []string
	// Output is what the command has written to standard output.
	Output []byte
	// ExitCode is that of the command. Err is why there is none: no pod, a pod that does not run, or no answer.
	ExitCode int
	Err      error
}

// Run runs the command on each Linux node, with the runtime directory of the agent there, and returns the nodes in the order of their names, those without an agent first.
func (f *Fleet) Run(ctx context.Context, command []string) ([]Node, error) {
	list, err := f.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: corev1.LabelOSStable + "=linux"})
	if err != nil {
		return nil, err
	}
	pods, err := f.client.CoreV1().Pods(f.Namespace).List(ctx, metav1.ListOptions{LabelSelector: f.Selector})
	if err != nil {
		return nil, err
	}
	nodes := assign(list.Items, pods.Items)
	var group sync.WaitGroup
	free := make(chan struct{}, atOnce)
	for i := range nodes {
		if nodes[i].Err != nil {
			continue
		}
		free <- struct{}{}
		group.Go(func() {
			f.run(ctx, &nodes[i], slices.Concat(command, nodes[i].flags))
			<-free
		})
	}
	group.Wait()
	slices.SortStableFunc(nodes, func(a, b Node) int { return without(a) - without(b) })
	return nodes, nil
}

// without orders nodes without an agent before the others.
func without(n Node) int {
	if n.Pod == "" {
		return 0
	}
	return 1
}

// assign finds the agent's pod of each node: of several a ready one, since each of them sees the agents of all releases.
func assign(list []corev1.Node, pods []corev1.Pod) []Node {
	best := map[string]*corev1.Pod{}
	for i := range pods {
		pod := &pods[i]
		isAgent := slices.ContainsFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == container })
		if known := best[pod.Spec.NodeName]; isAgent && (known == nil || !ready(known) && ready(pod)) {
			best[pod.Spec.NodeName] = pod
		}
	}
	nodes := make([]Node, len(list))
	for i, n := range list {
		nodes[i] = Node{Name: n.Name, Err: errors.New("no agent")}
		if pod := best[n.Name]; pod != nil {
			nodes[i].Pod, nodes[i].Err = pod.Namespace+"/"+pod.Name, nil
			nodes[i].flags = runtimeDir(pod)
			if reason := notRunning(pod); reason != "" {
				nodes[i].Err = fmt.Errorf("pod %s/%s %s", pod.Namespace, pod.Name, reason)
			}
		}
	}
	slices.SortFunc(nodes, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	return nodes
}

// runtimeDir is the flag of the agent's container that says where its files are; empty where it has the default.
func runtimeDir(pod *corev1.Pod) (flags []string) {
	const flag = "--runtime-dir"
	for _, c := range pod.Spec.Containers {
		if c.Name != container {
			continue
		}
		words := slices.Concat(c.Command, c.Args)
		for i, word := range words {
			switch {
			case strings.HasPrefix(word, flag+"="):
				flags = []string{word}
			case word == flag && i+1 < len(words):
				flags = words[i : i+2]
			}
		}
	}
	return flags
}

func ready(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// notRunning is why the agent's container does not run; empty where it does.
func notRunning(pod *corev1.Pod) string {
	for _, status := range pod.Status.ContainerStatuses {
		switch {
		case status.Name != container:
		case status.State.Running != nil:
			return ""
		case status.State.Waiting != nil:
			return "does not run: " + status.State.Waiting.Reason
		case status.State.Terminated != nil:
			return "has ended: " + status.State.Terminated.Reason
		}
	}
	return "does not run: " + string(pod.Status.Phase)
}

// run runs the command in the pod of a node.
func (f *Fleet) run(ctx context.Context, node *Node, command []string) {
	ctx, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	namespace, name, _ := strings.Cut(node.Pod, "/")
	request := f.client.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(name).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	executor, err := newExecutor(f.config, request)
	if err != nil {
		node.Err = err
		return
	}
	var stdout, stderr limited
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr})
	node.Output = stdout.Bytes()
	ended := exec.CodeExitError{}
	switch {
	case errors.As(err, &ended):
		node.ExitCode = ended.Code
	case err != nil:
		node.Err = err
	}
	if node.Err == nil && len(node.Output) == 0 {
		node.Err = fmt.Errorf("no answer: %s", strings.TrimSpace(stderr.String()))
	}
}

// newExecutor takes WebSockets, and SPDY for API servers before 1.30.
func newExecutor(config *rest.Config, request *rest.Request) (remotecommand.Executor, error) {
	websocket, err := remotecommand.NewWebSocketExecutor(config, "GET", request.URL().String())
	if err != nil {
		return nil, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(config, "POST", request.URL())
	if err != nil {
		return nil, err
	}
	return remotecommand.NewFallbackExecutor(websocket, spdy, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
}

// limited keeps the first maxOutput bytes.
type limited struct{ bytes.Buffer }

func (l *limited) Write(data []byte) (int, error) {
	if l.Len()+len(data) > maxOutput {
		return 0, fmt.Errorf("more than %d bytes", maxOutput)
	}
	return l.Buffer.Write(data)
}
