package config

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestLimits: values at the ends of what is allowed, and those next to them. The message names the key.
func TestLimits(t *testing.T) {
	name, link := strings.Repeat("a", 117), strings.Repeat("v", 15)
	for _, tt := range []struct {
		key, old, new   string
		allowed, beyond []string
	}{
		{"pollInterval", "magicIPs:", "pollInterval: VALUE\nmagicIPs:", []string{"1s", "1h"}, []string{"999ms", "3601s"}},
		{"holdFor", "  ports:", "  holdFor: VALUE\n  ports:", []string{"1s", "1h"}, []string{"0s", "-1s", "3601s"}},
		{"name", "default.magic-ip", "VALUE", []string{"a", "0", "a-.a", name}, []string{name + "a", "-a", "a."}},
		{"port", "9200", "VALUE", []string{"1", "65535"}, []string{"0", "65536"}},
		{"targetPort", "8080", "VALUE", []string{"1", "65535", "a", link}, []string{"0", "65536", "-1", link + "v", "a-"}},
		{"namespace", "namespace: default", "namespace: VALUE", []string{"a", strings.Repeat("n", 63)}, []string{strings.Repeat("n", 64), "-a"}},
		{"hostInterface", "  ports:", "  hostInterface: VALUE\n  ports:", []string{"e", link, link[1:] + "+"}, []string{link + "v", link + "+", "+"}},
		{"serviceAccount", "  ports:", "  serviceAccount: VALUE\n  ports:", []string{"a", strings.Repeat("s", 253)}, []string{strings.Repeat("s", 254), "a-"}},
	} {
		parse := func(value string) error {
			text := strings.Replace(validConfig, tt.old, strings.Replace(tt.new, "VALUE", value, 1), 1)
			_, err := Parse(strings.NewReader(text), false)
			return err
		}
		for _, value := range tt.allowed {
			if err := parse(value); err != nil {
				t.Errorf("%s %q: %v", tt.key, value, err)
			}
		}
		for _, value := range tt.beyond {
			if err := parse(value); err == nil || !strings.Contains(err.Error(), tt.key+": ") {
				t.Errorf("%s %q: error %v, want one of %s", tt.key, value, err, tt.key)
			}
		}
	}
}

// TestHostInterface: names in order, each once, without the blanks around them; auto is no name.
func TestHostInterface(t *testing.T) {
	for text, want := range map[string][]string{
		"''": nil, "auto": nil, "cni0": {"cni0"}, "' eth1 ,cali+, eth1'": {"cali+", "eth1"}, "auto0": {"auto0"},
	} {
		config, err := Parse(strings.NewReader(validConfig+"  hostInterface: "+text+"\n"), true)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if diff := cmp.Diff(want, config.Ports[0].HostInterface); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
	}
}

// TestPolicy: each value of the keys that have a few.
func TestPolicy(t *testing.T) {
	parse := func(key, value string) Port {
		config, err := Parse(strings.NewReader(validConfig+"  "+key+": "+value+"\n"), false)
		if err != nil {
			t.Fatalf("%s %s: %v", key, value, err)
		}
		return config.Ports[0]
	}
	for value, want := range map[string]plan.Action{"reject": plan.Reject, "hold": plan.Hold, "pass": plan.Pass} {
		if got := parse("noEndpoint", value).NoEndpoint; got != want {
			t.Errorf("noEndpoint %s is %q", value, got)
		}
	}
	for value, want := range map[string]bool{"single": false, "random": true} {
		if got := parse("distribution", value).Spread; got != want {
			t.Errorf("distribution %s: spread %t", value, got)
		}
	}
	for value, want := range map[string]bool{"true": true, "false": false} {
		if got := parse("hostClients", value).HostClients; got != want {
			t.Errorf("hostClients %s is %t", value, got)
		}
		if got := parse("excludeTarget", value).ExcludeTarget; got != want {
			t.Errorf("excludeTarget %s is %t", value, got)
		}
	}
	if got := parse("holdFor", "7s").HoldFor; got != 7*time.Second {
		t.Errorf("holdFor 7s is %s", got)
	}
}

// TestTwice: of two ports with one frontend the first has it, and the other says so. Why an address cannot be served is said first.
func TestTwice(t *testing.T) {
	const text = `name: a
magicIPs:
- {ipAddress: 169.254.210.210, namespace: default, selector: app=a, ports: [{port: 80}, {port: 81}]}
- {ipAddress: 169.254.210.210, namespace: other, selector: app=b, ports: [{port: 80}, {port: 80, protocol: udp}]}
- {ipAddress: 169.254.169.254, namespace: default, selector: app=a, ports: [{port: 80}, {port: 80}]}
`
	config, err := Parse(strings.NewReader(text), true)
	if err != nil {
		t.Fatal(err)
	}
	const reserved = "169.254.169.254 belongs to the instance metadata service of most clouds; set allowReserved: true to use it anyway"
	want := []string{"", "", "169.254.210.210:80/tcp is claimed twice in this configuration: magicIPs[0] (default, app=a) has it", "", reserved, reserved}
	var got []string
	for _, port := range config.Ports {
		got = append(got, port.Unserved)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("why ports are not served (-want +got):\n%s", diff)
	}
}

// TestQuery: what the API is asked for, each once.
func TestQuery(t *testing.T) {
	const text = `name: a
magicIPs:
- {ipAddress: 169.254.210.210, namespace: default, selector: "app=a,tier", owner: DaemonSet/a, ports: [{port: 80, targetPort: http}, {port: 81}]}
- {ipAddress: 169.254.210.211, namespace: default, selector: app=b, owner: DaemonSet/a, ports: [{port: 80}]}
- {ipAddress: 169.254.210.212, namespace: other, selector: app=b, owner: DaemonSet/a, ports: [{port: 80}]}
`
	config, err := Parse(strings.NewReader(text), false)
	if err != nil {
		t.Fatal(err)
	}
	query := config.Query()
	if diff := cmp.Diff([]string{"default", "other"}, query.Namespaces); diff != "" {
		t.Errorf("namespaces (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"app": true, "tier": true}, query.LabelKeys); diff != "" {
		t.Errorf("label keys (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"http": true}, query.PortNames); diff != "" {
		t.Errorf("port names (-want +got):\n%s", diff)
	}
	var owners []string
	for _, owner := range query.Owners {
		owners = append(owners, owner.Namespace+" "+owner.String())
	}
	if diff := cmp.Diff([]string{"default DaemonSet/a", "other DaemonSet/a"}, owners); diff != "" {
		t.Errorf("owners (-want +got):\n%s", diff)
	}
}

// TestLimitsOfTheEnvironment are those of the original tool.
func TestLimitsOfTheEnvironment(t *testing.T) {
	for _, tt := range []struct {
		name    string
		value   string
		allowed bool
	}{
		{"PORT", "1", true}, {"PORT", "65535", true}, {"PORT", "0", false}, {"PORT", "65536", false}, {"PORT", "", false},
		{"POLL_INTERVAL", "1", true}, {"POLL_INTERVAL", "", true}, {"POLL_INTERVAL", "0", false}, {"POLL_INTERVAL", "5s", false},
		{"MAGIC_PORT", "9200", true}, {"MAGIC_PORT", "65536", false},
	} {
		env := map[string]string{"SELECTOR": "app=echo", "PORT": "80"}
		env[tt.name] = tt.value
		if _, err := FromEnv(func(name string) string { return env[name] }, true); (err == nil) != tt.allowed {
			t.Errorf("%s=%s: %v", tt.name, tt.value, err)
		}
	}
	for value, want := range map[string]bool{"": false, "0": false, "false": false, "1": true, "true": true} {
		env := map[string]string{"SELECTOR": "app=echo", "PORT": "80", "VERBOSE": value}
		if config, err := FromEnv(func(name string) string { return env[name] }, true); err != nil || config.Verbose != want {
			t.Errorf("VERBOSE=%s: verbose %t, %v", value, config.Verbose, err)
		}
	}
}
