package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// target is how the DaemonSet of a node is updated, and its servers answer and end.
type target struct {
	surge bool          // maxSurge 1 and readiness probes; else the default strategy
	delay time.Duration // how long each answer takes
	drain time.Duration // for how long the servers go on after SIGTERM
	// hostPort: the pod has ports of its node. Kubernetes takes no maxSurge with that.
	hostPort bool
}

func setName(n *whole.Node) string { return "echo-" + n.Name }

// daemonSet is that of a node: pods with a server for HTTP and datagrams and one for gRPC, both at a Unix socket too.
func (t target) daemonSet(n *whole.Node) *appsv1.DaemonSet {
	labels := map[string]string{"app": "echo", "node": n.Name}
	directory := corev1.HostPathDirectoryOrCreate
	no := false
	args := func(journals string, to int) []string {
		return []string{
			"serve", "--delay", t.delay.String(), "--drain", t.drain.String(), "--journal", journals + "/$(POD_NAME)",
			"--unix", fmt.Sprintf("%s/%d", socketDir, to),
		}
	}
	spec := corev1.PodSpec{
		NodeSelector:                 map[string]string{corev1.LabelHostname: n.Name},
		AutomountServiceAccountToken: &no,
		Containers: []corev1.Container{
			{
				Name: "echo", Image: whole.ImageEcho, Args: append(args(journalDir, port), "--instance"),
				// Cilium's policy finds them by their names.
				Ports: []corev1.ContainerPort{{Name: "tcp", ContainerPort: port, Protocol: corev1.ProtocolTCP}, {Name: "udp", ContainerPort: port, Protocol: corev1.ProtocolUDP}},
			},
			{Name: "stream", Image: imageStream, Args: args(streamJournalDir, streamPort), Ports: []corev1.ContainerPort{{Name: "grpc", ContainerPort: streamPort}}},
		},
	}
	for _, directoryName := range []string{journalDir, streamJournalDir, socketDir} {
		name := strings.TrimPrefix(directoryName, "/run/")
		spec.Volumes = append(spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			HostPath: &corev1.HostPathVolumeSource{Path: directoryName, Type: &directory},
		}})
	}
	for i := range spec.Containers {
		c := &spec.Containers[i]
		c.ImagePullPolicy = corev1.PullNever
		c.Env = []corev1.EnvVar{{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}}
		for _, volume := range spec.Volumes {
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: volume.Name, MountPath: volume.HostPath.Path})
		}
		for j := range c.Ports {
			if t.hostPort {
				c.Ports[j].HostPort = c.Ports[j].ContainerPort + ahead
			}
		}
	}
	set := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: targets, Name: setName(n)},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: spec},
		},
	}
	if t.surge {
		one, none := intstr.FromInt32(1), intstr.FromInt32(0)
		set.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{
			Type:          appsv1.RollingUpdateDaemonSetStrategyType,
			RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &one, MaxUnavailable: &none},
		}
		containers := set.Spec.Template.Spec.Containers
		containers[0].ReadinessProbe = &corev1.Probe{
			PeriodSeconds: 1,
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(control)}},
		}
		containers[1].ReadinessProbe = &corev1.Probe{
			PeriodSeconds: 1,
			ProbeHandler:  corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(streamPort)}},
		}
	}
	return set
}

// place makes this the target of a node, and waits until it is alone and runs.
func (w *world) place(ctx context.Context, n *whole.Node, t target) (pod string, err error) {
	if err := w.remove(ctx, n); err != nil {
		return "", err
	}
	if err := w.create(ctx, n, t); err != nil {
		return "", err
	}
	return w.settled(ctx, n, "", true)
}

func (w *world) create(ctx context.Context, n *whole.Node, t target) error {
	_, err := w.Admin.AppsV1().DaemonSets(targets).Create(ctx, t.daemonSet(n), metav1.CreateOptions{})
	return err
}

// remove removes the target of a node, and waits until nothing is left of it.
func (w *world) remove(ctx context.Context, n *whole.Node) error {
	err := w.Admin.AppsV1().DaemonSets(targets).Delete(ctx, setName(n), metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	return lab.Eventually(ctx, func() error {
		pods, err := w.podsOf(ctx, n)
		if err != nil {
			return err
		}
		records, err := recordsOf(n)
		if len(pods)+len(records) > 0 {
			return fmt.Errorf("%s still has %d pods and %d records", n.Name, len(pods), len(records))
		}
		return err
	})
}

// update changes the template, as `kubectl rollout restart` does.
func (w *world) update(ctx context.Context, n *whole.Node) error {
	patch := fmt.Appendf(nil, `{"spec":{"template":{"metadata":{"annotations":{"restarted":%q}}}}}`, time.Now().Format(time.RFC3339Nano))
	_, err := w.Admin.AppsV1().DaemonSets(targets).Patch(ctx, setName(n), types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	return err
}

// settled waits until a node has one target, which is not the one named before where that is replaced, and returns its name.
func (w *world) settled(ctx context.Context, n *whole.Node, before string, replaced bool) (pod string, err error) {
	if !replaced {
		before = ""
	}
	ctx, cancel := lab.Patience(ctx, time.Minute)
	defer cancel()
	err = lab.Eventually(ctx, func() error {
		set, err := w.Admin.AppsV1().DaemonSets(targets).Get(ctx, setName(n), metav1.GetOptions{})
		if err != nil {
			return err
		}
		pods, err := w.podsOf(ctx, n)
		if err != nil {
			return err
		}
		records, err := recordsOf(n)
		if err != nil {
			return err
		}
		status := set.Status
		if status.ObservedGeneration != set.Generation || status.UpdatedNumberScheduled != 1 || status.NumberAvailable != 1 ||
			len(pods) != 1 || pods[0].DeletionTimestamp != nil || pods[0].Name == before || len(records) != 1 || records[0].UID != string(pods[0].UID) {
			return fmt.Errorf("%s has not settled after %s: %+v, %d pods, records %+v", set.Name, before, status, len(pods), records)
		}
		pod = pods[0].Name
		return nil
	})
	return pod, err
}

func (w *world) podsOf(ctx context.Context, n *whole.Node) ([]corev1.Pod, error) {
	pods, err := w.Admin.CoreV1().Pods(targets).List(ctx, metav1.ListOptions{LabelSelector: "node=" + n.Name})
	if err != nil {
		return nil, err
	}
	return pods.Items, nil
}

type record = runtimedir.Attachment

func recordsOf(n *whole.Node) ([]record, error) {
	file, err := runtimedir.New(n.Path(lab.RuntimeDir)).ReadState()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return file.Attachments, err
}

// life is when a server of a node began and ceased to listen.
type life struct {
	server             string // what it answers with
	pod                string
	started, listening time.Time
	terminated, closed time.Time // zero: not yet
}

// lives are those of all servers of a kind that the node has had, by their journals, in the order of their starts.
func lives(n *whole.Node, journals string) ([]life, error) {
	files, err := os.ReadDir(n.Path(journals))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it has had none
	}
	if err != nil {
		return nil, err
	}
	var all []life
	for _, file := range files {
		data, err := n.ReadFile(filepath.Join(journals, file.Name()))
		if err != nil {
			return nil, err
		}
		ofPod, err := parseLives(file.Name(), string(data))
		if err != nil {
			return nil, err
		}
		all = append(all, ofPod...)
	}
	slices.SortFunc(all, func(a, b life) int { return a.started.Compare(b.started) })
	return all, nil
}

// parseLives reads the journal of a pod, whose servers may have been started more than once.
func parseLives(pod, journal string) (all []life, err error) {
	for line := range strings.Lines(journal) {
		what, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return nil, fmt.Errorf("journal of %s: %w", pod, err)
		}
		if what == "started" {
			all = append(all, life{server: lab.Instance(pod, at), pod: pod, started: at})
			continue
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("journal of %s: %s before any start", pod, what)
		}
		l := &all[len(all)-1]
		switch what {
		case "listening":
			l.listening = at
		case "terminated":
			l.terminated = at
		case "closed":
			l.closed = at
		}
	}
	return all, nil
}

// allLives are those of the servers of each kind of client.
func allLives(n *whole.Node) (of map[lab.Kind][]life, err error) {
	of = map[lab.Kind][]life{}
	echo, errEcho := lives(n, journalDir)
	stream, errStream := lives(n, streamJournalDir)
	for _, kind := range allKinds() {
		of[kind] = echo
	}
	of[grpcStream] = stream
	return of, errors.Join(errEcho, errStream)
}
