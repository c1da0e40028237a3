// Package chart tests the Helm chart against what it is for: the agent must take what the chart renders. It is
// a module of its own, since Helm is no dependency of the product. What templates say of values is tested by the
// suites in charts/magic-ip-address/tests.
package chart

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
)

const (
	root     = "../.."
	chartDir = root + "/charts/magic-ip-address"
)

// everything sets each option of a magic IP to something that is not its default.
const everything = `
config:
  reservedAddresses: [10.1.2.3, fd00:1::/64]
  dataPlane: cilium
  magicIPs:
    - ipAddress: fd00:a9fe:d2d2::1
      namespace: "*"
      selector: app in (a, b),!c
      owner: StatefulSet/db
      serviceAccount: db
      hostInterface: cni0,cali+
      readiness: require
      distribution: random
      noEndpoint: hold
      holdFor: 1m
      hostClients: false
      excludeTarget: true
      allowReserved: true
      ports:
        - {port: 53, targetPort: dns, protocol: UDP}
        - {port: 54, targetPort: 8054, protocol: sctp}
`

func TestLint(t *testing.T) {
	linter := lint.AllWithKubeVersion(chartDir, set(t, "config.selector=app=apm-server"), "kube-system", &chartutil.KubeVersion{Version: "v1.36.3", Major: "1", Minor: "36"})
	for _, message := range linter.Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}

func TestAgentTakesTheConfiguration(t *testing.T) {
	for _, test := range []struct {
		name   string
		values map[string]any
		noAPI  bool
		want   []string
	}{
		{name: "the command in the README", values: set(t, "config.ipAddress=169.254.210.210,config.port=9200,config.selector=app=apm-server"),
			want: []string{"169.254.210.210:9200/tcp -> 9200 of app=apm-server in kube-system"}},
		{name: "defaults", values: set(t, ""), want: []string{"169.254.210.210:9200/tcp -> 9200 of app=myapp in kube-system"}},
		{name: "without the API", values: set(t, "api.enabled=false"), noAPI: true,
			want: []string{"169.254.210.210:9200/tcp -> 9200 of app=myapp in kube-system"}},
		{name: "texts for numbers", values: setStrings(t, "config.port=80,config.targetPort=8080,config.pollInterval=7,config.hostClients=false"),
			want: []string{"169.254.210.210:80/tcp -> 8080 of app=myapp in kube-system"}},
		{name: "emptied options", values: set(t, "config.owner=,config.hostInterface=,config.holdFor=,config.readiness=,config.hostClients=null,config.pollInterval=null"),
			want: []string{"169.254.210.210:9200/tcp -> 9200 of app=myapp in kube-system"}},
		{name: "everything", values: parse(t, everything), want: []string{
			"[fd00:a9fe:d2d2::1]:53/udp -> dns of app in (a, b),!c in *",
			"[fd00:a9fe:d2d2::1]:54/sctp -> 8054 of app in (a, b),!c in *",
		}},
		{name: "both", values: chartutil.CoalesceTables(set(t, "config.selector=app=apm-server"), parse(t, everything)), want: []string{
			"169.254.210.210:9200/tcp -> 9200 of app=apm-server in kube-system",
			"[fd00:a9fe:d2d2::1]:53/udp -> dns of app in (a, b),!c in *",
			"[fd00:a9fe:d2d2::1]:54/sctp -> 8054 of app in (a, b),!c in *",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			parsed := configuration(t, test.values, test.noAPI)
			var got []string
			for _, port := range parsed.Ports {
				target := port.PortName
				if target == "" {
					target = fmt.Sprint(port.TargetPort)
				}
				got = append(got, fmt.Sprintf("%s -> %s of %s in %s", port.Frontend, target, port.SelectorText, port.Namespace))
				if port.Unserved != "" {
					t.Error(port.Unserved)
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if parsed.Name != "kube-system.169-254-210-210" {
				t.Errorf("the agent is called %q", parsed.Name)
			}
		})
	}
}

// The defaults in values.yaml are written out: they must be the agent's own.
func TestDefaultsAreTheAgents(t *testing.T) {
	written := configuration(t, set(t, ""), false)
	own, err := config.Parse(strings.NewReader(`
name: kube-system.169-254-210-210
magicIPs:
  - {ipAddress: 169.254.210.210, namespace: kube-system, selector: app=myapp, ports: [{port: 9200}]}
`), false)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", written), fmt.Sprintf("%+v", own); got != want {
		t.Errorf("from the chart:\n%s\nthe agent's:\n%s", got, want)
	}
}

// Every key that the agent's YAML has is a value, flat and in the list, and is passed on.
func TestEveryOptionIsAValue(t *testing.T) {
	source, err := os.ReadFile(root + "/agent/config/config.go")
	if err != nil {
		t.Fatal(err)
	}
	schema := schema(t)
	flat, listed := keys(t, schema, "properties", "config", "properties"), keys(t, schema, "definitions", "magicIP", "properties")
	ports := keys(t, schema, "definitions", "magicIP", "properties", "ports", "items", "properties")
	rendered := configMap(t, parse(t, everything))
	for structure, wanted := range map[string][][]string{"rawConfig": {flat}, "rawMagicIP": {listed, append(flat, "ports")}, "rawPort": {ports, flat}} {
		body := regexp.MustCompile(`(?s)type ` + structure + ` struct \{.*?\n\}`).Find(source)
		tags := regexp.MustCompile(`yaml:"(\w+)"`).FindAllSubmatch(body, -1)
		if len(tags) == 0 {
			t.Fatalf("agent/config.go has no %s", structure)
		}
		for _, tag := range tags {
			key := string(tag[1])
			for _, properties := range wanted {
				if !slices.Contains(properties, key) {
					t.Errorf("%s of the agent's %s is missing in %q", key, structure, properties)
				}
			}
			if !strings.Contains(rendered, key+":") {
				t.Errorf("%s of the agent's %s is not passed on:\n%s", key, structure, rendered)
			}
		}
	}
}

// Each of the words that the schema allows is one of the agent's.
func TestEveryWordIsTheAgents(t *testing.T) {
	for _, option := range []string{"readiness", "distribution", "noEndpoint"} {
		words, _ := at(t, schema(t), "definitions", option)["enum"].([]any)
		if len(words) < 3 {
			t.Fatalf("%s has the words %q", option, words)
		}
		for _, word := range words {
			if word != nil {
				configuration(t, set(t, fmt.Sprintf("config.%s=%s", option, word)), false)
			}
		}
	}
}

// The commands of the pod's containers and probes have all the flags that the chart gives them.
func TestCommandsKnowTheirFlags(t *testing.T) {
	for _, values := range []string{"", "api.enabled=false,backend=iptables", "metrics.enabled=true,config.verbose=1"} {
		var daemonSet struct {
			Spec struct {
				Template struct {
					Spec struct {
						Containers []struct {
							Args                                        []string
							StartupProbe, ReadinessProbe, LivenessProbe struct{ Exec struct{ Command []string } }
						}
					}
				}
			}
		}
		unmarshal(t, render(t, set(t, values))["daemonset.yaml"], &daemonSet)
		commands := [][]string{}
		for _, c := range daemonSet.Spec.Template.Spec.Containers {
			commands = append(commands, c.Args)
			for _, probe := range [][]string{c.StartupProbe.Exec.Command, c.ReadinessProbe.Exec.Command, c.LivenessProbe.Exec.Command} {
				if len(probe) > 0 {
					commands = append(commands, probe[1:])
				}
			}
		}
		commands = append(commands, testCommands(t, values)...)
		if len(commands) != 7 {
			t.Fatalf("found %q", commands)
		}
		for _, command := range commands {
			// Flags are parsed in their order, and help is the last of them.
			if out, err := exec.Command(root+"/bin/magic-ip-agent", append(command, "--help")...).CombinedOutput(); err != nil {
				t.Errorf("magic-ip-agent %s: %v\n%s", strings.Join(command, " "), err, out)
			}
		}
	}
}

// testCommands are those of the pods of helm test.
func testCommands(t *testing.T, values string) (commands [][]string) {
	t.Helper()
	type pod struct{ Containers []struct{ Args []string } }
	for _, document := range strings.Split(render(t, set(t, values))["test.yaml"], "\n---\n") {
		var object struct {
			Spec struct {
				Containers []struct{ Args []string }
				Template   struct{ Spec pod }
			}
		}
		unmarshal(t, document, &object)
		for _, c := range append(object.Spec.Containers, object.Spec.Template.Spec.Containers...) {
			commands = append(commands, c.Args)
		}
	}
	return commands
}

func TestREADMEIsGenerated(t *testing.T) {
	command := exec.Command(root+"/bin/chart/helm-docs", "--chart-search-root", root+"/charts", "--dry-run", "--log-level", "warning")
	want, err := command.Output()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(chartDir + "/README.md")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(bytes.TrimSpace(want)), string(bytes.TrimSpace(got))); diff != "" {
		t.Errorf("charts/magic-ip-address/README.md is not what `make generate` writes (-want +got):\n%s", diff)
	}
}

// render returns the templates of release 169-254-210-210 in kube-system by their file names, checked against the schema.
func render(t *testing.T, values map[string]any) map[string]string {
	t.Helper()
	chart, err := loader.Load(chartDir)
	if err != nil {
		t.Fatal(err)
	}
	rendered, err := renderChart(chart, values)
	if err != nil {
		t.Fatal(err)
	}
	return rendered
}

func renderChart(chart *chart.Chart, values map[string]any) (map[string]string, error) {
	if err := chartutil.ProcessDependencies(chart, values); err != nil {
		return nil, err
	}
	release := chartutil.ReleaseOptions{Name: "169-254-210-210", Namespace: "kube-system", IsInstall: true}
	all, err := chartutil.ToRenderValues(chart, values, release, nil)
	if err != nil {
		return nil, err
	}
	rendered, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	byName := map[string]string{}
	for name, text := range rendered {
		byName[path.Base(name)] = text
	}
	return byName, nil
}

func configMap(t *testing.T, values map[string]any) string {
	t.Helper()
	var object struct{ Data map[string]string }
	unmarshal(t, render(t, values)["configmap.yaml"], &object)
	return object.Data["config.yaml"]
}

// configuration is what the agent makes of the rendered file.
func configuration(t *testing.T, values map[string]any, noAPI bool) config.Config {
	t.Helper()
	text := configMap(t, values)
	parsed, err := config.Parse(strings.NewReader(text), noAPI)
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, text)
	}
	return parsed
}

// set parses what --set takes, setStrings what --set-string takes, parse a file of values.
func set(t *testing.T, text string) map[string]any {
	t.Helper()
	values, err := strvals.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

func setStrings(t *testing.T, text string) map[string]any {
	t.Helper()
	values, err := strvals.ParseString(text)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

func parse(t *testing.T, text string) map[string]any {
	t.Helper()
	values := map[string]any{}
	unmarshal(t, text, &values)
	return values
}

func unmarshal(t *testing.T, text string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v\nin\n%s", err, text)
	}
}

func schema(t *testing.T) map[string]any {
	t.Helper()
	data, err := os.ReadFile(chartDir + "/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	return schema
}

// at descends into an object of objects.
func at(t *testing.T, object map[string]any, steps ...string) map[string]any {
	t.Helper()
	for _, step := range steps {
		next, isObject := object[step].(map[string]any)
		if !isObject {
			t.Fatalf("values.schema.json has no %s in %s", step, strings.Join(steps, "."))
		}
		object = next
	}
	return object
}

func keys(t *testing.T, object map[string]any, steps ...string) []string {
	t.Helper()
	return slices.Collect(maps.Keys(at(t, object, steps...)))
}
