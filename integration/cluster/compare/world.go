package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The plan: the chart is installed with one magic IP for each backend. Each node has a DaemonSet of its own in one namespace, whose
// pod is the target of all peers, and a client pod in another.
const (
	targets = "targets"
	clients = "clients"
	release = "magic-ip"
	// agentName is how the chart calls the agents of that release.
	agentName = "kube-system." + release

	// Where the servers write when they began and ceased to listen, on the node.
	journalDir       = "/run/journals"
	streamJournalDir = "/run/stream-journals"

	imageStream = "localhost/stream:e2e"
)

const ports = `
    - {name: tcp, port: 8080, protocol: TCP}
    - {name: grpc, port: 8082, protocol: TCP}
    - {name: udp, port: 8080, protocol: UDP}
`

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
  clusterIP: ` + localAddress + `
  internalTrafficPolicy: Local
  selector: {app: echo}
  ports:` + ports + `---
apiVersion: v1
kind: Service
metadata: {name: echo-same-node, namespace: ` + targets + `}
spec:
  clusterIP: ` + sameNodeAddress + `
  trafficDistribution: PreferSameNode
  selector: {app: echo}
  ports:` + ports

const redirectPolicy = `
apiVersion: cilium.io/v2
kind: CiliumLocalRedirectPolicy
metadata: {name: echo, namespace: ` + targets + `}
spec:
  redirectFrontend:
    addressMatcher:
      ip: ` + redirectAddress + `
      toPorts:
        - {name: tcp, port: "8080", protocol: TCP}
        - {name: grpc, port: "8082", protocol: TCP}
        - {name: udp, port: "8080", protocol: UDP}
  redirectBackend:
    localEndpointSelector: {matchLabels: {app: echo}}
    toPorts:
      - {name: tcp, port: "8080", protocol: TCP}
      - {name: grpc, port: "8082", protocol: TCP}
      - {name: udp, port: "8080", protocol: UDP}
`

// values are the chart's: everything else is as it comes.
func values(address, backend string) string {
	return `
image: {pullPolicy: Never}
backend: ` + backend + `
config:
  magicIPs:
    - ipAddress: ` + address + `
      namespace: ` + targets + `
      selector: app=echo
      ports:
        - {port: 8080, protocol: tcp}
        - {port: 8082, protocol: tcp}
        - {port: 8080, protocol: udp}
`
}

// setup is what a cluster has.
type setup struct {
	name   string
	peers  []peer
	kinds  []lab.Kind
	cilium *whole.Cilium // on the first node
	// every is how often each client asks; 0 is as often as outages are measured with.
	every time.Duration
}

// world is a cluster in which all peers lead to the same pods.
type world struct {
	*whole.Cluster
	setup
	root    string
	log     func(format string, args ...any)
	pollers map[*whole.Node]*polling
	ended   []func()
}

// newWorld brings the cluster up and installs the chart; the caller closes it.
func newWorld(ctx context.Context, s setup, log func(string, ...any)) (w *world, err error) {
	lab.WorkingTime(time.Now(), time.Now()) // it is measured from here on
	root, err := lab.ModuleRoot()
	if err != nil {
		return nil, err
	}
	image := filepath.Join(root, "bin", "image.tar")
	if _, err := os.Stat(image); err != nil {
		return nil, fmt.Errorf("%w: run `make e2e-image`", err)
	}
	options := whole.Options{Name: s.name, Images: []string{image}}
	if s.cilium != nil {
		options.Nodes = []whole.NodeOptions{{Runtime: whole.Containerd1, Cilium: s.cilium}, {Runtime: whole.Containerd2}}
	}
	cluster, err := whole.New(ctx, options)
	if err != nil {
		return nil, err
	}
	w = &world{Cluster: cluster, setup: s, root: root, log: log, pollers: map[*whole.Node]*polling{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, errors.New(w.LogTails()), w.Close())
		}
	}()
	if err := w.furnish(ctx); err != nil {
		return nil, err
	}
	for _, n := range w.Nodes {
		err := lab.Eventually(ctx, func() error {
			_, err := w.witnessOf(ctx, n)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *world) furnish(ctx context.Context) error {
	if err := w.Apply(ctx, manifests); err != nil {
		return err
	}
	if slices.Contains(w.peers, ciliumLRP) {
		if err := w.Apply(ctx, redirectPolicy); err != nil {
			return err
		}
	}
	image := whole.Image{Name: imageStream, Entrypoint: []string{"/stream"}, Files: map[string]string{"/stream": w.program("stream")}}
	archive, err := image.Archive()
	if err != nil {
		return fmt.Errorf("%w: run `make e2e-binaries`", err)
	}
	for _, n := range w.Nodes {
		err := errors.Join(n.LoadImage(ctx, archive), w.createPod(ctx, n, clientName(n), "pause"), w.createPod(ctx, n, witnessName(n), "serve"))
		if err != nil {
			return err
		}
		if slices.Contains(w.peers, poller) {
			w.pollers[n] = startPolling(w, n)
			w.ended = append(w.ended, w.pollers[n].stop)
		}
	}
	for _, r := range []struct {
		of                     peer
		name, address, backend string
	}{{magicNFTables, release, magicAddress, "nftables"}, {magicIPTables, release + "-iptables", iptablesAddress, "iptables"}} {
		if slices.Contains(w.peers, r.of) {
			if err := w.install(ctx, r.name, values(r.address, r.backend)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close ends all of it.
func (w *world) Close() error {
	for _, end := range w.ended {
		end()
	}
	return w.Cluster.Close()
}

// program is one of those of the images, which clients run in the network namespace of their pod.
func (w *world) program(name string) string { return filepath.Join(w.root, "bin", "pods", name) }

// measured are the nodes with all peers.
func (w *world) measured() []*whole.Node {
	if w.cilium != nil {
		return w.Nodes[:1]
	}
	return w.Nodes
}

func addressOf(pod *corev1.Pod) (netip.AddrPort, error) {
	address, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return netip.AddrPortFrom(address, port), nil
}

// install installs the chart as a user does.
func (w *world) install(ctx context.Context, name, values string) error {
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
	_, err = w.Helm(ctx, "install", name, filepath.Join(w.root, "charts", "magic-ip-address"),
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

func (w *world) witnessOf(ctx context.Context, n *whole.Node) (netip.AddrPort, error) {
	pod, err := w.Admin.CoreV1().Pods(clients).Get(ctx, witnessName(n), metav1.GetOptions{})
	if err != nil {
		return netip.AddrPort{}, err
	}
	return addressOf(pod)
}

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

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
