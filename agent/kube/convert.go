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

// trim drops the fields that convert does not read.
func trim(object any) (any, error) {
	pod, ok := object.(*corev1.Pod)
	if !ok {
		return object, nil
	}
	kept := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion, Labels: pod.Labels,
			CreationTimestamp: pod.CreationTimestamp, DeletionTimestamp: pod.DeletionTimestamp, OwnerReferences: pod.OwnerReferences,
		},
		Status: corev1.PodStatus{Phase: pod.Status.Phase, PodIPs: pod.Status.PodIPs},
	}
	if uid := staticUID(pod); uid != "" {
		kept.Annotations = map[string]string{configMirror: "kept", configHash: uid}
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			kept.Status.Conditions = []corev1.PodCondition{{Type: condition.Type, Status: condition.Status}}
		}
	}
	for _, c := range pod.Spec.Containers {
		kept.Spec.Containers = append(kept.Spec.Containers, corev1.Container{Ports: c.Ports})
	}
	for _, c := range pod.Spec.InitContainers {
		kept.Spec.InitContainers = append(kept.Spec.InitContainers, corev1.Container{Ports: c.Ports, RestartPolicy: c.RestartPolicy})
	}
	return kept, nil
}

// staticUID is the UID that CNI has of the static pod of a mirror pod; empty for any other pod.
func staticUID(pod *corev1.Pod) string {
	if _, mirror := pod.Annotations[configMirror]; !mirror {
		return ""
	}
	return pod.Annotations[configHash]
}

func convert(pod *corev1.Pod) inventory.Pod {
	p := inventory.Pod{
		PodID:       inventory.PodID{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)},
		StaticUID:   staticUID(pod),
		Labels:      pod.Labels,
		CreatedAt:   pod.CreationTimestamp.Time,
		Running:     pod.Status.Phase == corev1.PodRunning,
		Finished:    pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed,
		Terminating: pod.DeletionTimestamp != nil,
	}
	if owner := metav1.GetControllerOfNoCopy(pod); owner != nil {
		p.Owner = owner.Kind + "/" + owner.Name
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
	named := func(containers []corev1.Container, counts func(corev1.Container) bool) {
		for _, c := range containers {
			for _, port := range c.Ports {
				if port.Name != "" && counts(c) {
					protocol := cmp.Or(strings.ToLower(string(port.Protocol)), "tcp")
					p.Ports = append(p.Ports, runtimedir.NamedPort{Name: port.Name, Protocol: runtimedir.Protocol(protocol), Port: uint16(port.ContainerPort)})
				}
			}
		}
	}
	named(pod.Spec.Containers, func(corev1.Container) bool { return true })
	named(pod.Spec.InitContainers, func(c corev1.Container) bool { // native sidecars
		return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
	return p
}
