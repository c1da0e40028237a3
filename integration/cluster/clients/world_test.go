//go:build clients

// Package clients_test is what people put behind a magic IP, with what sends to it: an OpenTelemetry Collector and the SDKs of
// OpenTelemetry, Zipkin, Datadog and Elastic; and CoreDNS with resolvers. Everything is installed by the examples of the
// repository, as they are written.
package clients_test

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/examples"
	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The plan: one node, all examples. The targets are DaemonSets in the namespaces of the examples; what sends to them is in
// the namespace "default", where the commands of the examples put the clients' settings.
const (
	applicationsNamespace = metav1.NamespaceDefault
	// journals is where servers and applications write what they have received and sent, on the node.
	journals = "/run/journals"

	imageServers = "localhost/servers:e2e"
	imageApp     = "localhost/app:e2e"
)

var update = flag.Bool("update", false, "write docs/benchmarks/clients.md and clients.csv")

// cluster is shared by all tests, one after the other.
var (
	cluster *whole.Cluster
	node    *whole.Node
	root    string // of the module
	all     map[string]examples.Example
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := up(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return cluster.Test(func() error { return furnish(ctx) }, m.Run)
}

// up brings up the cluster, in the folder from which the commands of the examples work.
func up(ctx context.Context) (err error) {
	if root, err = lab.ModuleRoot(); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	read, err := examples.Read(root)
	if err != nil {
		return err
	}
	all = map[string]examples.Example{}
	for _, e := range read {
		all[e.Name] = e
	}
	cluster, err = whole.New(ctx, whole.Options{
		Name: "clients", Nodes: []whole.NodeOptions{{Runtime: whole.Containerd2}}, Images: []string{"bin/image.tar"},
	})
	return err
}

// loadImages gives the node the images of servers and clients.
func loadImages(ctx context.Context) error {
	app, err := glibc()
	if err != nil {
		return err
	}
	app["/app"] = "bin/sdk/app"
	for _, image := range []whole.Image{
		{Name: imageServers, Files: map[string]string{"/collector": "bin/sdk/collector", "/standin": "bin/sdk/standin", "/ec2-metadata-mock": "bin/sdk/ec2-metadata-mock", "/coredns": "bin/coredns/coredns"}},
		{Name: imageApp, Entrypoint: []string{"/app"}, Files: app},
		{Name: examples.Image, Entrypoint: []string{"/app", "--send", "dns-udp", "--name", "example", "--every", "1s", "--journals", "/"}, Files: app},
	} {
		archive, err := image.Archive()
		if err == nil {
			err = node.LoadImage(ctx, archive)
		}
		if err != nil {
			return fmt.Errorf("image %s: %w", image.Name, err)
		}
	}
	return nil
}

// glibc is the machine's program that asks the C library for names, and what it is linked with: path in an image → file.
func glibc() (map[string]string, error) {
	const program = "/usr/bin/getent"
	printed, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w", program, err)
	}
	files := map[string]string{program: program}
	for word := range strings.FieldsSeq(string(printed)) {
		if filepath.IsAbs(word) {
			files[word] = word
		}
	}
	return files, nil
}

// furnish loads the images, makes the namespaces, and runs the commands of all examples.
func furnish(ctx context.Context) error {
	node = cluster.Nodes[0]
	if err := loadImages(ctx); err != nil {
		return err
	}
	made := map[string]bool{applicationsNamespace: true, metav1.NamespaceSystem: true}
	for _, e := range all {
		if !made[e.Namespace] {
			made[e.Namespace] = true
			if err := cluster.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+e.Namespace+"}\n"); err != nil {
				return err
			}
		}
	}
	if err := cluster.AwaitNamespaces(ctx, slices.Sorted(maps.Keys(made))...); err != nil {
		return err
	}
	if err := cluster.Apply(ctx, manifestsDNS()); err != nil {
		return err
	}
	if _, err := cluster.Admin.CoreV1().Pods(metav1.NamespaceSystem).Create(ctx, zone(), metav1.CreateOptions{}); err != nil {
		return err
	}
	for _, e := range all {
		if err := e.Run(ctx, cluster); err != nil {
			return err
		}
	}
	return installHolding(ctx)
}

// holdingAddress leads to the target of an example too; connections wait for a target where the example's are refused.
func holdingAddress(e examples.Example) string {
	address := e.Address.As4()
	address[2]++
	return netip.AddrFrom4(address).String()
}

// installHolding installs one release for all examples, with noEndpoint: hold; a pod that is not ready yet would refuse.
func installHolding(ctx context.Context) error {
	type object = map[string]any
	var magicIPs []object
	for _, e := range all {
		magicIPs = append(magicIPs, object{
			"ipAddress": holdingAddress(e), "namespace": e.Namespace, "selector": labels.FormatLabels(e.Labels), "ports": e.Ports,
			"noEndpoint": "hold", "holdFor": "60s", "readiness": "require",
		})
	}
	values, err := json.Marshal(object{"config": object{"magicIPs": magicIPs}})
	if err != nil {
		return err
	}
	command := cluster.Command(ctx, "helm", "install", "hold", "charts/magic-ip-address", "--namespace", metav1.NamespaceSystem, "--values", "-")
	command.Stdin = bytes.NewReader(values)
	if printed, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("helm install hold: %w: %s", err, printed)
	}
	return nil
}

// world is a test.
type world struct{ *testing.T }

func (w world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// eventually waits, for at most a minute.
func (w world) eventually(what string, condition func() error) {
	w.Helper()
	ctx, cancel := lab.Patience(w.Context(), time.Minute)
	defer cancel()
	if err := lab.Eventually(ctx, condition); err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

// journalsVolume is the directory of the journals, for a container.
func journalsVolume(spec *corev1.PodSpec) {
	directory := corev1.HostPathDirectoryOrCreate
	spec.Volumes = append(spec.Volumes, corev1.Volume{Name: "journals", VolumeSource: corev1.VolumeSource{
		HostPath: &corev1.HostPathVolumeSource{Path: journals, Type: &directory},
	}})
	for i := range spec.Containers {
		spec.Containers[i].VolumeMounts = append(spec.Containers[i].VolumeMounts, corev1.VolumeMount{Name: "journals", MountPath: journals})
	}
}
