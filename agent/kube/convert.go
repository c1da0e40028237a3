package kube

import (
	"cmp"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The API has a mirror pod for a static pod. configHash is the UID that CNI has of the static pod.
const (
	configMirror = "kubernetes.io/config.mirror"
	configHash   = "kubernetes.io/config.hash"
)

// trim drops what the query does not need of a pod.
func trim(pod *corev1.Pod, query *inventory.Query) *corev1.Pod {
	kept := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
			CreationTimestamp: pod.CreationTimestamp, DeletionTimestamp: pod.DeletionTimestamp,
			Labels: runtimedir.SelectLabels(pod.Labels, query.LabelKeys),
		},
		Spec:   corev1.PodSpec{ServiceAccountName: pod.Spec.ServiceAccountName, HostNetwork: pod.Spec.HostNetwork},
		Status: corev1.PodStatus{Phase: pod.Status.Phase, PodIPs: pod.Status.PodIPs},
	}
	if controller := metav1.GetControllerOf(pod); controller != nil {
		kept.OwnerReferences = []metav1.OwnerReference{*controller}
	}
	if uid := staticUID(pod); uid != "" {
		kept.Annotations = map[string]string{configMirror: "kept", configHash: uid}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			kept.Status.Conditions = []corev1.PodCondition{{Type: condition.Type, Status: condition.Status}}
		}
	}
	ports := func(c *corev1.Container) (kept []corev1.ContainerPort) {
		for _, port := range c.Ports {
			if query.PortNames[port.Name] {
				kept = append(kept, port)
			}
		}
		return kept
	}
	for i := range pod.Spec.Containers {
		if c := &pod.Spec.Containers[i]; len(ports(c)) > 0 {
			kept.Spec.Containers = append(kept.Spec.Containers, corev1.Container{Ports: ports(c)})
		}
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		sidecar := c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		if sidecar && len(ports(c)) > 0 {
			kept.Spec.Containers = append(kept.Spec.Containers, corev1.Container{Ports: ports(c)}) // after the others, as for Services
		}
	}
	return kept
}

// staticUID is the UID that CNI has of the static pod of a mirror pod; empty for any other pod.
func staticUID(pod *corev1.Pod) string {
	if _, mirror := pod.Annotations[configMirror]; !mirror {
		return ""
	}
	return pod.Annotations[configHash]
}

// convert reads a pod that trim has made.
func convert(pod *corev1.Pod) inventory.Pod {
	p := inventory.Pod{
		PodID:       inventory.PodID{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)},
		StaticUID:   staticUID(pod),
		Labels:      pod.Labels,
		CreatedAt:   pod.CreationTimestamp.Time,
		Running:     pod.Status.Phase == corev1.PodRunning,
		Finished:    pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed,
		Terminating: pod.DeletionTimestamp != nil,

		ServiceAccount: pod.Spec.ServiceAccountName,
		HostNetwork:    pod.Spec.HostNetwork,
	}
	for _, ip := range pod.Status.PodIPs {
		if address, err := netip.ParseAddr(ip.IP); err == nil {
			p.IPs = append(p.IPs, address)
		}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			p.Ready = condition.Status == corev1.ConditionTrue
		}
	}
	for _, c := range pod.Spec.Containers {
		for _, port := range c.Ports {
			protocol := cmp.Or(strings.ToLower(string(port.Protocol)), "tcp")
			p.Ports = append(p.Ports, runtimedir.NamedPort{Name: port.Name, Protocol: runtimedir.Protocol(protocol), Port: uint16(port.ContainerPort)})
		}
	}
	return p
}
