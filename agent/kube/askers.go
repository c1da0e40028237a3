package kube

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Askers is a DaemonSet whose pods ask the magic IPs of their nodes and end: with `helm test`, one on each node that has an agent.
type Askers struct {
	client          kubernetes.Interface
	namespace, name string
	// tick is how often the API server is asked.
	tick time.Duration
}

// ConnectAskers makes the client for the DaemonSet called "namespace/name"; credentials are those of Connect.
func ConnectAskers(kubeconfig, name string) (*Askers, error) {
	d, err := ConnectDaemonSet(kubeconfig, name, nil)
	if err != nil {
		return nil, err
	}
	return &Askers{client: d.client, namespace: d.namespace, name: d.name, tick: time.Second}, nil
}

// Asked is the result of one node.
type Asked struct {
	Node string
	// Passed: the pod ended with exit status 0.
	Passed bool
	// Message is what the container reported with another exit status, or why it has not ended.
	Message string
}

// Await returns the results of all nodes of the DaemonSet, once the pods of all of them have ended. When ctx ends before that, it is an
// error, with the results so far.
func (a *Askers) Await(ctx context.Context) ([]Asked, error) {
	for {
		results, err := a.results(ctx)
		if err == nil {
			return results, nil
		}
		select {
		case <-ctx.Done():
			return results, fmt.Errorf("DaemonSet %s/%s: %w", a.namespace, a.name, err)
		case <-time.After(a.tick):
		}
	}
}

func (a *Askers) results(ctx context.Context) (results []Asked, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	defer cancel()
	d, err := a.client.AppsV1().DaemonSets(a.namespace).Get(ctx, a.name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	pods, err := a.client.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return nil, err
	}
	ended := 0
	for i := range pods.Items {
		pod := &pods.Items[i]
		if !metav1.IsControlledBy(pod, d) || pod.DeletionTimestamp != nil {
			continue
		}
		result, hasEnded := asked(pod)
		results = append(results, result)
		if hasEnded {
			ended++
		}
	}
	nodes := int(d.Status.DesiredNumberScheduled)
	if nodes == 0 || d.Status.ObservedGeneration < d.Generation || ended < nodes {
		err = fmt.Errorf("%d of %d nodes have a result", ended, nodes)
	}
	return results, err
}

// asked is the first end of a pod's container: kubelet restarts it, as with every pod of a DaemonSet.
func asked(pod *corev1.Pod) (result Asked, ended bool) {
	result = Asked{Node: pod.Spec.NodeName, Message: "the pod has not run: " + string(pod.Status.Phase)}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodScheduled && condition.Status == corev1.ConditionFalse {
			result.Node, result.Message = "pod "+pod.Name, "not scheduled: "+condition.Message
		}
	}
	for _, status := range pod.Status.ContainerStatuses {
		terminated := status.State.Terminated
		if terminated == nil {
			terminated = status.LastTerminationState.Terminated
		}
		switch {
		case terminated != nil:
			return Asked{Node: pod.Spec.NodeName, Passed: terminated.ExitCode == 0, Message: strings.TrimSpace(terminated.Message)}, true
		case status.State.Running != nil:
			result.Message = "still asking"
		case status.State.Waiting != nil:
			result.Message = strings.TrimSpace("the container waits: " + status.State.Waiting.Reason + " " + status.State.Waiting.Message)
		}
	}
	return result, false
}
