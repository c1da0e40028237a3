package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The plan: the chart is installed with one magic IP. Each node has a DaemonSet of its own in one namespace, whose
// pod is the target of the magic IP and of the Service, and a client pod in another.
const (
	magicIP   = "169.254.210.210"
	serviceIP = "10.96.0.80"
	port      = 8080
	control   = 8081

	targets = "targets"
	clients = "clients"
	release = "magic-ip"
	// agentName is how the chart calls the agents of that release.
	agentName = "kube-system." + release

	// journalDir is where the servers write when they began and ceased to listen, on the node.
	journalDir = "/run/journals"
)

const manifests = `
apiVersion: v1
kind: Namespace
metadata: {name: ` + targets + `}
---
apiVersion: v1
kind: Namespace
metadata: {name: ` + clients + `}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: ` + targets + `}
spec:
  clusterIP: ` + serviceIP + `
  internalTrafficPolicy: Local
  selector: {app: echo}
  ports:
    - {name: tcp, port: 8080, protocol: TCP}
    - {name: udp, port: 8080, protocol: UDP}
`

// values are the chart's: everything else is as it comes.
const values = `
image: {pullPolicy: Never}
config:
  magicIPs:
    - ipAddress: ` + magicIP + `
      namespace: ` + targets + `
      selector: app=echo
      ports:
        - {port: 8080, protocol: tcp}
        - {port: 8080, protocol: udp}
`

// way is how clients reach the target.
type way string

const (
	byService way = "Service"
	byMagicIP way = "magic IP"
)

func (w way) address() netip.AddrPort {
	if w == byService {
		return netip.AddrPortFrom(netip.MustParseAddr(serviceIP), port)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(magicIP), port)
}

var kinds = []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} //nolint:gochecknoglobals // a constant

// world is a cluster in which both ways lead to the same pods.
type world struct {
	*whole.Cluster
	root string
	log  func(format string, args ...any)
}

// newWorld brings the cluster up and installs the chart; the caller closes it.
func newWorld(ctx context.Context, name string, log func(string, ...any)) (w *world, err error) {
	lab.WorkingTime(time.Now(), time.Now()) // it is measured from here on
	root, err := lab.ModuleRoot()
	if err != nil {
		return nil, err
	}
	image := filepath.Join(root, "bin", "image.tar")
	if _, err := os.Stat(image); err != nil {
		return nil, fmt.Errorf("%w: run `make e2e-image`", err)
	}
	cluster, err := whole.New(ctx, whole.Options{Name: name, Images: []string{image}})
	if err != nil {
		return nil, err
	}
	w = &world{Cluster: cluster, root: root, log: log}
	defer func() {
		if err != nil {
			err = errors.Join(err, errors.New(w.LogTails()), w.Close())
		}
	}()
	if err := w.Apply(ctx, manifests); err != nil {
		return nil, err
	}
	for _, n := range w.Nodes {
		if err := errors.Join(w.createPod(ctx, n, clientName(n), "pause"), w.createPod(ctx, n, witnessName(n), "serve")); err != nil {
			return nil, err
		}
	}
	if err := w.install(ctx); err != nil {
		return nil, err
	}
	for _, n := range w.Nodes {
		err := lab.Eventually(ctx, func() error {
			pod, err := w.Admin.CoreV1().Pods(clients).Get(ctx, witnessName(n), metav1.GetOptions{})
			if err == nil {
				_, err = addressOf(pod)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return w, nil
}

// echo is the program of the images, which clients run in the network namespace of their pod.
func (w *world) echo() string { return filepath.Join(w.root, "bin", "pods", "echo") }

func addressOf(pod *corev1.Pod) (netip.AddrPort, error) {
	address, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return netip.AddrPortFrom(address, port), nil
}

// install installs the chart as a user does.
func (w *world) install(ctx context.Context) error {
	file, err := os.CreateTemp("", "values-*.yaml")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }()
	if _, err := file.WriteString(values); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	_, err = w.Helm(ctx, "install", release, filepath.Join(w.root, "charts", "magic-ip-address"),
		"--namespace", "kube-system", "--values", file.Name(), "--wait", "--timeout", "2m")
	return err
}

// createPod creates a pod that stays as it is.
func (w *world) createPod(ctx context.Context, n *whole.Node, name string, args ...string) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: clients, Name: name},
		Spec: corev1.PodSpec{
			NodeName:   n.Name,
			Containers: []corev1.Container{{Name: "echo", Image: whole.ImageEcho, ImagePullPolicy: corev1.PullNever, Args: args}},
		},
	}
	return lab.Eventually(ctx, func() error { // the service account of a new namespace takes its time
		_, err := w.Admin.CoreV1().Pods(clients).Create(ctx, pod, metav1.CreateOptions{})
		return err
	})
}

func clientName(n *whole.Node) string { return "client-" + n.Name }

// witnessName is that of the pod that nothing happens to.
func witnessName(n *whole.Node) string { return "witness-" + n.Name }

// clientNetNS is the network namespace of the client pod of a node.
func (w *world) clientNetNS(ctx context.Context, n *whole.Node) (namespace string, err error) {
	err = lab.Eventually(ctx, func() error {
		pod, err := w.Admin.CoreV1().Pods(clients).Get(ctx, clientName(n), metav1.GetOptions{})
		if err == nil {
			namespace, err = n.PodNetNS(ctx, pod)
		}
		return err
	})
	return namespace, err
}

// load is clients in the client pod of a node that ask by one way, and the witness beside them, who sends datagrams to
// the address of a pod that nothing happens to: where it waits, the machine stands still.
type load struct {
	process *lab.Process
	witness netip.AddrPort
}

// startLoad starts them; a process for each way, so that what one suffers is not the other's.
func (w *world) startLoad(ctx context.Context, n *whole.Node, by way, kinds []lab.Kind, flags ...string) (*load, error) {
	namespace, err := w.clientNetNS(ctx, n)
	if err != nil {
		return nil, err
	}
	pod, err := w.Admin.CoreV1().Pods(clients).Get(ctx, witnessName(n), metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	witness, err := addressOf(pod)
	if err != nil {
		return nil, err
	}
	args := append([]string{"--net=" + namespace, w.echo(), "load", "--lines", "--for", "1h"}, flags...)
	for _, kind := range kinds {
		args = append(args, fmt.Sprintf("%s=%v", kind, by.address()))
	}
	process, err := n.Lab().Start("nsenter", append(args, fmt.Sprintf("%s=%v", lab.UDP, witness))...)
	return &load{process, witness}, err
}

// stop ends the clients and returns what became of their requests, and of those of the witness.
func (l *load) stop(ctx context.Context) (byKind map[lab.Kind]lab.Outcomes, witness lab.Outcomes, err error) {
	if err := l.process.Stop(ctx); err != nil {
		return nil, nil, err
	}
	byTarget, err := lab.ReadRequests(strings.NewReader(l.process.Log()))
	byKind = map[lab.Kind]lab.Outcomes{}
	for target, outcomes := range byTarget {
		if target.To == l.witness {
			witness = outcomes
		} else {
			byKind[target.Kind] = outcomes
		}
	}
	return byKind, witness, err
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
