package config

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

const validConfig = `name: default.magic-ip
magicIPs:
- ipAddress: 169.254.210.210
  namespace: default
  selector: app=echo
  ports: [{port: 9200, targetPort: 8080}]
`

func TestParse(t *testing.T) {
	config, err := Parse(strings.NewReader(validConfig), true)
	if err != nil {
		t.Fatal(err)
	}
	if config.Name != "default.magic-ip" || config.PollInterval != 5*time.Second || len(config.Ports) != 1 {
		t.Errorf("got %+v", config)
	}
	port := config.Ports[0]
	if port.String() != "169.254.210.210:9200/tcp" || port.TargetPort != 8080 || !port.HostClients || port.ExcludeTarget ||
		port.NoEndpoint != plan.Reject || port.HoldFor != 10*time.Second || port.Spread || port.HostInterface != nil || port.Readiness != "prefer" {
		t.Errorf("defaults: got %+v", port)
	}
}

// TestParseErrors changes one thing in a valid file. Every message names the line, the key and what is allowed.
func TestParseErrors(t *testing.T) {
	long := strings.Repeat("a", 118)
	for _, tt := range []struct{ name, old, new, want string }{
		{"empty", validConfig, "", "the file is empty"},
		{"no YAML", validConfig, "{", "line 1"},
		{"two documents", "name:", "name: x\n---\nname:", "more than one YAML document"},
		{"unknown key", "magicIPs:", "magicIps:", `line 2: unknown key "magicIps"; did you mean magicIPs?`},
		{"unknown key of a port", "targetPort", "target", `line 6: magicIPs[0].ports[0]: unknown key "target"; did you mean targetPort?`},
		{"unknown key that is near none", "targetPort", "ttl", `line 6: magicIPs[0].ports[0]: unknown key "ttl"; allowed: port, targetPort, protocol`},
		{"a key twice", "  selector:", "  namespace: x\n  selector:", "line 5: magicIPs[0].namespace: is there twice, first in line 4; allowed: once"},
		{"a list twice, the first longer", "  ports:", "  ports: [{port: 1}, x]\n  ports:", `magicIPs[0].ports[1]: "x" is not allowed; allowed: a mapping`},
		{"text for a number", "port: 9200", "port: x", `line 6: magicIPs[0].ports[0].port: "x" is not allowed; allowed: a whole number`},
		{"text for a list", "[{port: 9200, targetPort: 8080}]", "9200", `line 6: magicIPs[0].ports: "9200" is not allowed; allowed: a list`},
		{"text for an entry", "{port: 9200, targetPort: 8080}", "9200", `line 6: magicIPs[0].ports[0]: "9200" is not allowed; allowed: a mapping`},
		{"text for yes or no", "  ports:", "  hostClients: maybe\n  ports:", `line 6: magicIPs[0].hostClients: "maybe" is not allowed; allowed: true or false`},
		{"mapping for text", "selector: app=echo", "selector: {app: echo}", "line 5: magicIPs[0].selector: a mapping is not allowed; allowed: a single value, and no list or mapping"},
		{"list for the file", validConfig, "- name: a\n", "line 1: a list is not allowed; allowed: a mapping"},
		{"merged keys", "  selector:", "  <<: {nonsense: 1}\n  selector:", `line 5: magicIPs[0]: unknown key "nonsense"; allowed: ipAddress`},
		{"name", "default.magic-ip", "Default_", `line 1: name: "Default_" is not allowed; allowed: 1 to 117 of a-z`},
		{"long name", "default.magic-ip", long, "line 1: name:"},
		{"poll interval", "magicIPs:", "pollInterval: 5\nmagicIPs:", `line 2: pollInterval: "5" is not allowed; allowed: a duration from 1s to 1h`},
		{"no magic IPs", validConfig, "name: a\nmagicIPs: []\n", "line 2: magicIPs: is empty"},
		{"address", "169.254.210.210", "169.254.210", "line 3: magicIPs[0].ipAddress: \"169.254.210\" is not allowed"},
		{"zone", "169.254.210.210", "fe80::1%eth0", "line 3: magicIPs[0].ipAddress"},
		{"namespace", "namespace: default", "namespace: a/b", `line 4: magicIPs[0].namespace: "a/b" is not allowed; allowed: the name of a namespace, or "*"`},
		{"no selector", "  selector: app=echo\n", "", "line 3: magicIPs[0].selector: is missing"},
		{"selector", "app=echo", "'app in'", "line 5: magicIPs[0].selector: \"app in\" is not a Kubernetes label selector"},
		{"empty selector", "app=echo", "''", "line 5: magicIPs[0].selector: selects every pod"},
		{"owner", "  ports:", "  owner: x\n  ports:", "line 6: magicIPs[0].owner"},
		{"owner without the API", "  ports:", "  owner: DaemonSet/x\n  ports:", "line 6: magicIPs[0].owner: needs the Kubernetes API, which --no-api rules out"},
		{"interface", "  ports:", "  hostInterface: a b\n  ports:", "line 6: magicIPs[0].hostInterface"},
		{"readiness", "  ports:", "  readiness: maybe\n  ports:", `line 6: magicIPs[0].readiness: "maybe" is not allowed; allowed: prefer, require, ignore`},
		{"readiness without the API", "  ports:", "  readiness: require\n  ports:", "line 6: magicIPs[0].readiness: require needs the Kubernetes API"},
		{"distribution", "  ports:", "  distribution: all\n  ports:", "allowed: single, random"},
		{"noEndpoint", "  ports:", "  noEndpoint: drop\n  ports:", "allowed: reject, hold, pass"},
		{"holdFor", "  ports:", "  holdFor: 1500ms\n  ports:", "allowed: whole seconds from 1s to 1h"},
		{"no ports", "[{port: 9200, targetPort: 8080}]", "[]", "line 6: magicIPs[0].ports: is empty"},
		{"port", "port: 9200", "port: 65536", "line 6: magicIPs[0].ports[0].port: 65536 is not allowed; allowed: 1 to 65535"},
		{"negative port", "port: 9200", "port: -1", "ports[0].port: -1"},
		{"protocol", "port: 9200", "port: 9200, protocol: icmp", `ports[0].protocol: "icmp" is not allowed; allowed: tcp, udp, sctp`},
		{"target port", "8080", "0", `ports[0].targetPort: "0" is not allowed`},
		{"target port name", "8080", "Http", `ports[0].targetPort: "Http" is not allowed`},
		{"target port name without the API", "8080", "http", `the name "http" needs the Kubernetes API`},
		{"target port of another kind", "8080", "[1]", "line 6: magicIPs[0].ports[0].targetPort: a list is not allowed; allowed: 1 to 65535, or the name of a container port"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := strings.Replace(validConfig, tt.old, tt.new, 1)
			if text == validConfig {
				t.Fatal("nothing changed")
			}
			_, err := Parse(strings.NewReader(text), true)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
		})
	}
}

// TestAllParseErrors: wrong keys, types and values are reported together, in the order of their lines, and each once.
func TestAllParseErrors(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"keys, types and values", `names: a
pollInterval: [5s]
magicIPs:
- ipAddress: 169.254.210
  Namespace: default
  selektor: app=echo
  excludeTarget: si
  ports: [{port: 9200, protocol: icmp}, {port: x, targetport: http, targetPort: 0}]
`, `line 1: unknown key "names"; did you mean name?
line 2: pollInterval: a list is not allowed; allowed: a single value, and no list or mapping
line 4: magicIPs[0].ipAddress: "169.254.210" is not allowed; allowed: an IPv4 or IPv6 address such as 169.254.210.210 or fd00:a9fe:d2d2::1
line 5: magicIPs[0]: unknown key "Namespace"; did you mean namespace?
line 6: magicIPs[0]: unknown key "selektor"; did you mean selector?
line 7: magicIPs[0].excludeTarget: "si" is not allowed; allowed: true or false
line 8: magicIPs[0].ports[1].port: "x" is not allowed; allowed: a whole number
line 8: magicIPs[0].ports[1]: unknown key "targetport"; did you mean targetPort?
line 8: magicIPs[0].ports[0].protocol: "icmp" is not allowed; allowed: tcp, udp, sctp`},
		// The second entry would be taken for the first.
		{"an entry of a wrong type", `name: a
magicIPs:
- 169.254.210.210
- {ipAddress: x, nonsense: 1}
`, `line 3: magicIPs[0]: "169.254.210.210" is not allowed; allowed: a mapping
line 4: magicIPs[1]: unknown key "nonsense"; allowed: ipAddress, namespace, selector, owner, serviceAccount, hostInterface, ports, readiness, distribution, noEndpoint, holdFor, hostClients, excludeTarget, allowReserved`},
		{"aliases", `name: a
magicIPs:
- {ipAddress: 169.254.210.210, namespace: &n [default], selector: *n, ports: [{port: 1}]}
`, `line 3: magicIPs[0].namespace: a list is not allowed; allowed: a single value, and no list or mapping
line 3: magicIPs[0].selector: a list is not allowed; allowed: a single value, and no list or mapping`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse(strings.NewReader(tt.text), true)
			if err == nil {
				t.Fatal("no error")
			}
			if diff := cmp.Diff(strings.Split(tt.want, "\n"), strings.Split(err.Error(), "\n")); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseWithAPI(t *testing.T) {
	text := strings.Replace(validConfig, "8080", "http", 1) + "  owner: DaemonSet/echo\n  readiness: require\n"
	config, err := Parse(strings.NewReader(text), false)
	if err != nil {
		t.Fatal(err)
	}
	if port := config.Ports[0]; port.PortName != "http" || port.TargetPort != 0 || port.Owner != "DaemonSet/echo" {
		t.Errorf("got %+v", port)
	}
}

func TestFromEnv(t *testing.T) {
	env := map[string]string{
		"MAGIC_IP": "169.254.210.211", "SELECTOR": "app=apm-server", "NAMESPACE": "kube-system", "HOST_INTERFACE": "cni0",
		"PORT": "9200", "TARGET_PORT": "8200", "PROTOCOL": "TCP", "POLL_INTERVAL": "7", "VERBOSE": "1",
	}
	config, err := FromEnv(func(name string) string { return env[name] }, true)
	if err != nil {
		t.Fatal(err)
	}
	port := config.Ports[0]
	if config.Name != "kube-system.169-254-210-211" || config.PollInterval != 7*time.Second || !config.Verbose ||
		port.String() != "169.254.210.211:9200/tcp" || port.TargetPort != 8200 || port.Namespace != "kube-system" ||
		port.SelectorText != "app=apm-server" || len(port.HostInterface) != 1 || port.HostInterface[0] != "cni0" {
		t.Errorf("got %+v", config)
	}
	_, err = FromEnv(func(string) string { return "" }, true)
	if err == nil || !strings.HasPrefix(err.Error(), "--config FILE is missing.") {
		t.Errorf("with nothing set: %v, want the flag first", err)
	}
	for name, broken := range map[string]string{"PORT": "http", "POLL_INTERVAL": "0", "SELECTOR": "app in", "MAGIC_IP": "x", "PROTOCOL": "icmp"} {
		_, err := FromEnv(func(asked string) string {
			if asked == name {
				return broken
			}
			return env[asked]
		}, true)
		if err == nil || !strings.HasPrefix(err.Error(), "without --config, ") || strings.Contains(err.Error(), "line ") {
			t.Errorf("%s=%s: %v, want an error that says where this comes from, which is no line", name, broken, err)
		}
	}
}

// TestLoad: errors in a file name it, and without a file the environment counts.
func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	if _, err := Load(path, true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	for text, want := range map[string]string{validConfig: "", "name: _": path + ":\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		config, err := Load(path, true)
		if want == "" && (err != nil || config.Name != "default.magic-ip") || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%q: %+v, %v", text, config, err)
		}
	}
	t.Setenv("SELECTOR", "app=echo")
	t.Setenv("PORT", "80")
	t.Setenv("NAMESPACE", "of-the-environment")
	if config, err := Load("", true); err != nil || config.Ports[0].Namespace != "of-the-environment" {
		t.Errorf("without a file: %+v, %v", config, err)
	}
}

// FuzzParse: no input crashes the parser, and what it accepts is whole.
func FuzzParse(f *testing.F) {
	f.Add(validConfig, true)
	f.Add(validConfig+"  hostInterface: cali+,eth0\n  noEndpoint: hold\n", false)
	f.Add("name: a\nmagicIPs: [{ipAddress: 'fd00::1', namespace: '*', selector: '!a', ports: [{port: 1}, {port: 1}]}]", true)
	f.Add("a: &a [*a]", true)
	f.Add("name: a\nmagicIP: [&n {<<: *n}]", true)
	f.Add("name: [a]\nmagicIPs: &m [{<<: {port: 1}, ports: x}, &n {<<: *n}]", true)
	f.Fuzz(func(t *testing.T, text string, noAPI bool) {
		config, err := Parse(strings.NewReader(text), noAPI)
		if err != nil {
			if err.Error() == "" || strings.Contains(err.Error(), "config.raw") {
				t.Errorf("an error without text, or in the terms of the source: %v", err)
			}
			return
		}
		if config.Name == "" || config.PollInterval < time.Second || len(config.Ports) == 0 {
			t.Errorf("accepted %+v", config)
		}
		for _, port := range config.Ports {
			if !port.Address.IsValid() || port.Port == 0 || port.Selector.Selector == nil || port.Namespace == "" ||
				port.TargetPort == 0 && port.PortName == "" || noAPI && port.PortName != "" {
				t.Errorf("accepted %+v", port)
			}
		}
	})
}

// TestHash: the hash is that of the file's text, as `sha256sum` prints it.
func TestHash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	text := "name: a\nmagicIPs: [{ipAddress: 169.254.210.210, namespace: default, selector: app=a, ports: [{port: 80}]}]\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	config, err := Load(path, true)
	if want := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:12]; err != nil || config.Hash != want {
		t.Errorf("%q, %v, want %q", config.Hash, err, want)
	}
}

// TestNullEntries: an entry of a list that is null is an error, wherever it stands, beside all others.
func TestNullEntries(t *testing.T) {
	_, err := Parse(strings.NewReader(`name: a
reservedAddresses: [192.0.2.1, null]
magicIPs:
-
- {ipAddress: 169.254.210.210, namespace: default, selector: app=a, ports: [{port: 80}, null]}
- ipAddress: 169.254.210.211
  namespace: default
  selector: app=a
  ports:
  - ~
  - {port: http}
`), true)
	const want = `line 2: reservedAddresses[1]: null is not allowed; allowed: an address, or a prefix such as 169.254.100.0/24
line 4: magicIPs[0]: null is not allowed; allowed: a mapping
line 5: magicIPs[1].ports[1]: null is not allowed; allowed: a mapping
line 10: magicIPs[2].ports[0]: null is not allowed; allowed: a mapping
line 11: magicIPs[2].ports[1].port: "http" is not allowed; allowed: a whole number`
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}

// TestKeysAndWhatIsInThem: what is in a key that is meant to be another one is looked at too, and short keys are known again.
func TestKeysAndWhatIsInThem(t *testing.T) {
	_, err := Parse(strings.NewReader(`nam: a
pollIntervall: 5s
magicIps:
- ipadress: 169.254.1.2
  namespace: [x]
  selector: {app: x}
  ports:
  - {prot: 80, targetPort: [1]}
  - 80
`), true)
	const want = `line 1: unknown key "nam"; did you mean name?
line 2: unknown key "pollIntervall"; did you mean pollInterval?
line 3: unknown key "magicIps"; did you mean magicIPs?
line 4: magicIps[0]: unknown key "ipadress"; did you mean ipAddress?
line 5: magicIps[0].namespace: a list is not allowed; allowed: a single value, and no list or mapping
line 6: magicIps[0].selector: a mapping is not allowed; allowed: a single value, and no list or mapping
line 8: magicIps[0].ports[0]: unknown key "prot"; did you mean port?
line 8: magicIps[0].ports[0].targetPort: a list is not allowed; allowed: 1 to 65535, or the name of a container port
line 9: magicIps[0].ports[1]: "80" is not allowed; allowed: a mapping`
	if err == nil || err.Error() != want {
		t.Errorf("%v\nwant\n%s", err, want)
	}
}
