//go:build clients

package clients_test

import (
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/examples"
)

// drain is for how long a server with maxSurge goes on after it was told to end.
const drain = 10

// strategy is how a DaemonSet is updated.
type strategy string

const (
	rolling strategy = "rolling update"
	surging strategy = "maxSurge 1, server drains"
)

// server is the target of an example. The names of its journals begin with that of the pod.
type server struct {
	example    string
	containers []corev1.Container
	// lameduck says that a server drains by itself where it is told to, and needs no preStop hook.
	lameduck bool
}

// servers are the targets by the name of the example. Those of Datadog's traces and of Elastic are stand-ins.
func servers() []server {
	return []server{
		{example: "opentelemetry", containers: []corev1.Container{collector("traces", `otlp: {protocols: {grpc: {endpoint: "0.0.0.0:4317"}, http: {endpoint: "0.0.0.0:4318"}}}`)}},
		{example: "zipkin", containers: []corev1.Container{collector("traces", `zipkin: {endpoint: "0.0.0.0:9411"}`)}},
		{example: "statsd", containers: []corev1.Container{collector("metrics", statsd(9125))}},
		{example: "datadog", containers: []corev1.Container{collector("metrics", statsd(8125)), standin(8126)}},
		{example: "elastic-apm", containers: []corev1.Container{standin(8200)}},
		{example: "dns-cache", containers: []corev1.Container{coredns("cache")}, lameduck: true},
		{example: "metadata-mock", containers: []corev1.Container{metadataMock(1338)}},
	}
}

// The servers of names: the cache is the target, and asks the other one, which is at the address that the example gives to the
// cluster's DNS.
const (
	corefiles  = "corefiles" // a ConfigMap, and where it is mounted
	clusterDNS = "10.96.0.10"
)

// manifestsDNS are what the cache needs. A name of the zone has an address, and a text that fits into no packet of 1,500 bytes.
func manifestsDNS() string {
	text := strings.Repeat(fmt.Sprintf(" %q", strings.Repeat("x", 200)), 8)
	return fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: corefiles, namespace: kube-system}
data:
  cache: |
    . {
      health :8080 {
        lameduck %ds
      }
      ready :8181
      errors
      cache
      forward . %s
    }
  zone: |
    . {
      ready :8181
      errors
      template IN A e2e.test {
        answer "{{ .Name }} 60 IN A 192.0.2.80"
      }
      template IN TXT e2e.test {
        answer %q
      }
      template ANY ANY {
        rcode NXDOMAIN
      }
    }
---
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: %s
  selector: {app: kube-dns}
  ports:
    - {name: udp, port: 53, protocol: UDP}
    - {name: tcp, port: 53, protocol: TCP}
`, drain, clusterDNS, "{{ .Name }} 60 IN TXT"+text, clusterDNS)
}

// coredns is CoreDNS with one of the files.
func coredns(file string) corev1.Container {
	return corev1.Container{
		Name: "coredns", Image: imageServers, ImagePullPolicy: corev1.PullNever, Command: []string{"/coredns", "-conf", "/" + corefiles + "/" + file},
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(8181)}}},
		VolumeMounts:   []corev1.VolumeMount{{Name: corefiles, MountPath: "/" + corefiles}},
	}
}

func corefilesVolume() corev1.Volume {
	return corev1.Volume{Name: corefiles, VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: corefiles}},
	}}
}

// zone is the pod that the cache asks.
func zone() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "kube-dns", Labels: map[string]string{"app": "kube-dns"}},
		Spec:       corev1.PodSpec{DNSPolicy: corev1.DNSDefault, Containers: []corev1.Container{coredns("zone")}, Volumes: []corev1.Volume{corefilesVolume()}},
	}
}

// metadataMock is Amazon's.
func metadataMock(port int32) corev1.Container {
	return corev1.Container{
		Name: "mock", Image: imageServers, ImagePullPolicy: corev1.PullNever, Command: []string{"/ec2-metadata-mock"},
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(port)}}},
	}
}

// statsd is a receiver that passes on what it has taken at once: it forgets what it has not passed on when it is told to end.
func statsd(port int) string {
	return fmt.Sprintf(`statsd: {endpoint: "0.0.0.0:%d", aggregation_interval: 50ms}`, port)
}

// collector is an OpenTelemetry Collector of one receiver.
func collector(signal, receiver string) corev1.Container {
	const health = 13133
	name := receiver[:slices.Index([]byte(receiver), ':')]
	configuration := fmt.Sprintf(`
receivers: {%s}
exporters: {journal: {directory: %s, name: "${env:POD_NAME}-collector"}}
extensions: {health_check: {endpoint: "0.0.0.0:%d"}}
service:
  extensions: [health_check]
  telemetry: {metrics: {level: none}}
  pipelines: {%s: {receivers: [%s], exporters: [journal]}}
`, receiver, journals, health, signal, name)
	return corev1.Container{
		Name: "collector", Image: imageServers, ImagePullPolicy: corev1.PullNever, Command: []string{"/collector", "--config=env:CONFIGURATION"},
		Env:            []corev1.EnvVar{{Name: "CONFIGURATION", Value: configuration}},
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(health)}}},
	}
}

// standin takes what Datadog's tracer and Elastic's agent send.
func standin(port int32) corev1.Container {
	return corev1.Container{
		Name: "standin", Image: imageServers, ImagePullPolicy: corev1.PullNever,
		Command:        []string{"/standin", "--listen", fmt.Sprintf(":%d", port), "--journals", journals, "--name", "$(POD_NAME)-standin"},
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(port)}}},
	}
}

// serviceName is that of the Service and of the DaemonSet of an example.
func serviceName(e examples.Example) string { return e.Name }

// daemonSet is the target of an example.
func (s server) daemonSet(e examples.Example, by strategy) *appsv1.DaemonSet {
	set := &appsv1.DaemonSet{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"},
		ObjectMeta: metav1.ObjectMeta{Namespace: e.Namespace, Name: serviceName(e)},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: e.Labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: e.Labels, Annotations: map[string]string{"strategy": string(by)}},
				Spec:       corev1.PodSpec{DNSPolicy: corev1.DNSDefault, Containers: slices.Clone(s.containers)},
			},
		},
	}
	one, none := intstr.FromInt32(1), intstr.FromInt32(0)
	set.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{
		Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &none, MaxUnavailable: &one},
	}
	if by == surging {
		set.Spec.UpdateStrategy.RollingUpdate = &appsv1.RollingUpdateDaemonSet{MaxSurge: &one, MaxUnavailable: &none}
	}
	spec := &set.Spec.Template.Spec
	for i := range spec.Containers {
		c := &spec.Containers[i]
		c.Env = append(slices.Clone(c.Env), corev1.EnvVar{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}})
		slices.Reverse(c.Env) // what refers to it stands behind it
		probe := *c.ReadinessProbe
		probe.PeriodSeconds = 1
		c.ReadinessProbe = &probe
		for _, mount := range c.VolumeMounts {
			if mount.Name == corefiles {
				spec.Volumes = append(spec.Volumes, corefilesVolume())
			}
		}
		if by == surging && !s.lameduck {
			c.Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: drain}}}
		}
	}
	journalsVolume(spec)
	return set
}

// service leads to the same pods, as a Service that stays on the node.
func service(e examples.Example) *corev1.Service {
	local := corev1.ServiceInternalTrafficPolicyLocal
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: e.Namespace, Name: serviceName(e)},
		Spec:       corev1.ServiceSpec{Selector: e.Labels, InternalTrafficPolicy: &local},
	}
	for i, port := range e.Ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
			Name: fmt.Sprint("port", i), Port: int32(port.Port), TargetPort: intstr.FromInt32(int32(port.TargetPort)), Protocol: corev1.Protocol(strings.ToUpper(port.Protocol)),
		})
	}
	return s
}

// place makes a server the target of its example, and waits until it is alone and ready.
func (w world) place(s server, by strategy) (pod string) {
	w.Helper()
	sets := cluster.Admin.AppsV1().DaemonSets(all[s.example].Namespace)
	set := s.daemonSet(all[s.example], by)
	before, err := sets.Get(w.Context(), set.Name, metav1.GetOptions{})
	if err == nil {
		set.ResourceVersion = before.ResourceVersion
		_, err = sets.Update(w.Context(), set, metav1.UpdateOptions{})
	} else {
		_, err = sets.Create(w.Context(), set, metav1.CreateOptions{})
	}
	w.must(err)
	return w.settled(s, "")
}

// replace updates the template, as `kubectl rollout restart` does, and waits until the old pod is gone.
func (w world) replace(s server, pod string) {
	w.Helper()
	patch := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"restarted":%q}}}}}`, time.Now().Format(time.RFC3339Nano))
	e := all[s.example]
	_, err := cluster.Admin.AppsV1().DaemonSets(e.Namespace).Patch(w.Context(), serviceName(e), types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	w.must(err)
	w.settled(s, pod)
}

// settled waits until a server is one pod, which is ready and not the one named before, and returns its name.
func (w world) settled(s server, before string) (pod string) {
	w.Helper()
	e := all[s.example]
	w.eventually("roll-out of "+s.example, func() error {
		set, err := cluster.Admin.AppsV1().DaemonSets(e.Namespace).Get(w.Context(), serviceName(e), metav1.GetOptions{})
		if err != nil {
			return err
		}
		pods, err := cluster.Admin.CoreV1().Pods(e.Namespace).List(w.Context(), metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(set.Spec.Selector)})
		if err != nil {
			return err
		}
		s := set.Status
		if s.ObservedGeneration != set.Generation || s.UpdatedNumberScheduled != int32(len(cluster.Nodes)) || s.NumberAvailable != int32(len(cluster.Nodes)) ||
			len(pods.Items) != len(cluster.Nodes) || pods.Items[0].DeletionTimestamp != nil || pods.Items[0].Name == before {
			return fmt.Errorf("DaemonSet %s/%s has not settled after %q: %+v, %d pods", set.Namespace, set.Name, before, s, len(pods.Items))
		}
		pod = pods.Items[0].Name
		return nil
	})
	return pod
}
