// Package examples reads the folder examples/ as a user does: the commands of a README, and from the values what the
// commands lead where.
package examples

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

// Image is that of the client of the one example that has a pod.
const Image = "registry.example/client:1.0.0"

// Example is a folder below examples/. Its files are as they are in the repository.
type Example struct {
	Name string
	// Commands are those of the README, without comments: helm or kubectl, and their arguments. Their files are named from the
	// module's root.
	Commands [][]string
	// Namespace and Labels are those of the targets, Address and Ports where clients ask for them.
	Namespace string
	Labels    map[string]string
	Address   netip.Addr
	Ports     []Port
	// Settings are the client's, from a ConfigMap; DNS is that of the client where it is a pod.
	Settings map[string]string
	DNS      *corev1.PodDNSConfig
}

// Port is a port of an example's magic IP.
type Port struct {
	Port       uint16 `json:"port"`
	TargetPort uint16 `json:"targetPort"`
	Protocol   string `json:"protocol"`
}

// magicIP has the keys of values that the examples use.
type magicIP struct {
	Port
	IPAddress netip.Addr `json:"ipAddress"`
	Namespace string     `json:"namespace"`
	Selector  string     `json:"selector"`
	Ports     []Port     `json:"ports"`
	MagicIPs  []magicIP  `json:"magicIPs"`
}

// Read reads all examples, in the order of their names.
func Read(root string) ([]Example, error) {
	folders, err := filepath.Glob(filepath.Join(root, "examples", "*", "values.yaml"))
	if err != nil {
		return nil, err
	}
	var all []Example
	for _, values := range folders {
		example, err := read(filepath.Dir(values))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", values, err)
		}
		all = append(all, example)
	}
	return all, nil
}

// Run runs the commands. The working directory is the module's root.
func (e Example) Run(ctx context.Context, cluster *whole.Cluster) error {
	for _, command := range e.Commands {
		run := map[string]func(context.Context, ...string) (string, error){"helm": cluster.Helm, "kubectl": cluster.Kubectl}[command[0]]
		if run == nil {
			return fmt.Errorf("examples/%s: %q is neither helm nor kubectl", e.Name, command)
		}
		if _, err := run(ctx, command[1:]...); err != nil {
			return fmt.Errorf("examples/%s: %w", e.Name, err)
		}
	}
	return nil
}

func read(folder string) (Example, error) {
	e := Example{Name: filepath.Base(folder)}
	readme, err := os.ReadFile(filepath.Join(folder, "README.md"))
	if err != nil {
		return e, err
	}
	e.Commands = commands(string(readme))
	var values struct {
		Config magicIP `json:"config"`
	}
	if err := decode(filepath.Join(folder, "values.yaml"), &values); err != nil {
		return e, err
	}
	served := values.Config
	if len(served.MagicIPs) == 1 {
		served = served.MagicIPs[0]
	}
	if len(served.Ports) == 0 {
		served.Ports = []Port{served.Port}
	}
	e.Namespace, e.Address, e.Ports = served.Namespace, served.IPAddress, served.Ports
	for i, port := range e.Ports {
		if port.Protocol == "" {
			e.Ports[i].Protocol = "tcp"
		}
		if port.TargetPort == 0 {
			e.Ports[i].TargetPort = port.Port
		}
	}
	if e.Labels, err = labels.ConvertSelectorToLabelsMap(served.Selector); err != nil {
		return e, err
	}
	var client struct {
		Data map[string]string `json:"data"`
		Spec struct {
			DNSConfig *corev1.PodDNSConfig `json:"dnsConfig"`
		} `json:"spec"`
	}
	err = decode(filepath.Join(folder, "client.yaml"), &client)
	e.Settings, e.DNS = client.Data, client.Spec.DNSConfig
	return e, err
}

func decode(file string, into any) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return yaml.Unmarshal(data, into)
}

// commands are the lines of the blocks of a README, without comments.
func commands(readme string) (all [][]string) {
	blocks := strings.Split(readme, "```")
	for i := 1; i < len(blocks); i += 2 {
		_, block, _ := strings.Cut(blocks[i], "\n")
		for line := range strings.Lines(block) {
			line, _, _ = strings.Cut(line, " #")
			if words := strings.Fields(line); len(words) > 0 {
				all = append(all, words)
			}
		}
	}
	return all
}
