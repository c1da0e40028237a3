package chart

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
)

// TestExamples: the agent takes the configuration of each example; its NetworkPolicy selects the targets and admits exactly their
// ports; its clients ask the address at its ports, and each setting names its source. All examples fit into one cluster.
func TestExamples(t *testing.T) {
	directories, err := filepath.Glob(root + "/examples/*")
	if err != nil || len(directories) < 7 {
		t.Fatalf("%d examples: %v", len(directories), err)
	}
	claimed := map[netip.Addr]string{}
	for _, directory := range directories {
		name := filepath.Base(directory)
		t.Run(name, func(t *testing.T) {
			files, err := filepath.Glob(directory + "/*")
			if err != nil {
				t.Fatal(err)
			}
			for i, file := range files {
				files[i] = filepath.Base(file)
			}
			if want := []string{"README.md", "client.yaml", "networkpolicy.yaml", "values.yaml"}; !slices.Equal(files, want) {
				t.Fatalf("it has %q, want %q", files, want)
			}
			parsed := configuration(t, parse(t, text(t, directory, "values.yaml")), false)
			for _, port := range parsed.Ports {
				if port.Unserved != "" {
					t.Errorf("%s is not served: %s", port.Frontend, port.Unserved)
				}
				if first, twice := claimed[port.Address]; twice && first != name {
					t.Errorf("%s is the address of %s too", port.Address, first)
				}
				claimed[port.Address] = name
			}
			examplePolicy(t, text(t, directory, "networkpolicy.yaml"), parsed)
			exampleClient(t, text(t, directory, "client.yaml"), parsed)
		})
	}
}

func text(t *testing.T, directory, file string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(directory, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// strictly decodes a manifest, in which no key is unknown.
func strictly(t *testing.T, manifest string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(manifest), into); err != nil {
		t.Fatalf("%v\nin\n%s", err, manifest)
	}
}

func examplePolicy(t *testing.T, manifest string, parsed config.Config) {
	t.Helper()
	var policy networkingv1.NetworkPolicy
	strictly(t, manifest, &policy)
	selector, err := metav1.LabelSelectorAsSelector(&policy.Spec.PodSelector)
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, port := range parsed.Ports {
		targets, err := labels.Parse(port.SelectorText)
		if err != nil {
			t.Fatal(err)
		}
		if policy.Namespace != port.Namespace || selector.String() != targets.String() {
			t.Errorf("the policy is for %s in %s, and the targets are %s in %s", selector, policy.Namespace, targets, port.Namespace)
		}
		want = append(want, fmt.Sprintf("%s %d", strings.ToUpper(string(port.Protocol)), port.TargetPort))
	}
	for _, rule := range policy.Spec.Ingress {
		for _, port := range rule.Ports {
			got = append(got, fmt.Sprintf("%s %s", *port.Protocol, port.Port))
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ports of the policy (-of the targets +of the policy):\n%s", diff)
	}
}

func exampleClient(t *testing.T, manifest string, parsed config.Config) {
	t.Helper()
	address := parsed.Ports[0].Address.String()
	if !strings.Contains(manifest, address) {
		t.Errorf("the client does not ask %s", address)
	}
	ports := map[string]bool{}
	for _, port := range parsed.Ports {
		ports[fmt.Sprint(port.Port)] = true
	}
	asked := regexp.MustCompile(regexp.QuoteMeta(address)+`:(\d+)|_PORT: "(\d+)"`).FindAllStringSubmatch(manifest, -1)
	for _, match := range asked {
		if port := match[1] + match[2]; !ports[port] {
			t.Errorf("the client asks port %s, which is none of %s", port, address)
		}
	}
	switch kind := parse(t, manifest)["kind"]; kind {
	case "Pod":
		var pod corev1.Pod
		strictly(t, manifest, &pod)
		if !ports["53"] || pod.Spec.DNSPolicy != corev1.DNSNone || pod.Spec.DNSConfig.Nameservers[0] != address {
			t.Errorf("the pod asks %+v first", pod.Spec.DNSConfig)
		}
	case "ConfigMap":
		var settings corev1.ConfigMap
		strictly(t, manifest, &settings)
		if len(asked) == 0 {
			t.Error("the client asks at no port")
		}
		if err := sources(manifest); err != nil {
			t.Error(err)
		}
	default:
		t.Errorf("%v is no kind that these tests know", kind)
	}
}

// sources is an error where a setting of a ConfigMap has no comment with an address above it.
func sources(manifest string) (err error) {
	_, data, _ := strings.Cut(manifest, "\ndata:\n")
	above := ""
	for line := range strings.Lines(data) {
		if !strings.HasPrefix(strings.TrimSpace(line), "#") && !strings.Contains(above, "https://") {
			err = errors.Join(err, fmt.Errorf("no source stands above: %s", strings.TrimSpace(line)))
		}
		above = line
	}
	return err
}
