package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// configHash is the annotation that holds the UID by which CNI knows a static pod.
const configHash = "kubernetes.io/config.hash"

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
	if hash := pod.Annotations[configHash]; hash != "" {
		kept.Annotations = map[string]string{configHash: hash}
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

func convert(pod *corev1.Pod) inventory.Pod {
	p := inventory.Pod{
		Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID), ConfigHash: pod.Annotations[configHash], Labels: pod.Labels,
		CreatedAt:   pod.CreationTimestamp.Time,
		Running:     pod.Status.Phase == corev1.PodRunning,
		Finished:    pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed,
		Terminating: pod.DeletionTimestamp != nil,
		Ports:       map[string]uint16{},
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
				if _, taken := p.Ports[port.Name]; port.Name != "" && !taken && counts(c) {
					p.Ports[port.Name] = uint16(port.ContainerPort)
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
