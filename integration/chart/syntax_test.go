package chart

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"sigs.k8s.io/yaml"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
)

// TestSyntaxIsTheAgents: the chart accepts a value if the agent does, so that a mistake is an error of helm and not of every node.
// Addresses that are reserved are the exception: the notes name them.
func TestSyntaxIsTheAgents(t *testing.T) {
	for key, values := range map[string][]string{
		"ipAddress": append(variants("169.254.210.210", "fd00:a9fe:d2d2::1", "::ffff:169.254.7.8", "1:2:3:4:5:6:7:8", "fd00::192.0.2.1"),
			"", " 169.254.1.2", "169.254.1", "1.2.3.4.5", "256.1.1.1", "1.2.3.04", "0x7f.1.1.1", "10.0.0.1/32", "fd00::1%eth0", "[fd00::1]", "localhost",
			"::", "::1", "0:0:0:0:0:0:0:1", "0.0.0.0", "127.1.2.3", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "255.255.255.254",
			"ff02::1", "fe80::1", "febf::1", "fec0::1", "FE80::1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:0:1", "1::2::3", ":::", ":1", "1:", "12345::",
			"1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:8::", "1:2:3:4::5:6:7:8", "::1.2.3.256", "1.2.3.4::", "fd00::1.2.3", "64:ff9b::1.2.3.4"),
		"selector": append(variants("app=apm-server", "app in (a, b),!c", "example.org/x notin (1)", "n>5", "a==b,c!=d"),
			"", " ", "app", "app=", "=app", "a=b=c", "a=b,", ",a=b", "a=b,,c=d", "a in b", "a in ()", "a in (,)", "a in (a", "a in(a)", "a  in  ( a )", "a notin (a,)",
			"!a", "! a", "!a=b", "!", "a<", "a<b", "a<-1", "a > 12", "a<1.5", "a=(b)", "a=-b", "a=b-", "a=b.c", "a/b=c", "/b=c", "a/=c", "A/b=c", "a.b/c=d", "a..b/c=d", "a/b/c=d",
			"a=b c", "a b", "a=ä", "app=apm-server\n", "a=*", "a!=", "a==", "a!b", "a=b;c=d", strings.Repeat("a", 63), strings.Repeat("a", 64), "a="+strings.Repeat("b", 63), "a="+strings.Repeat("b", 64)),
		"hostInterface": append(variants("auto", "cni0,cali+", "eth0"),
			"", "a b", "+", "abcdefghijklmno", "abcdefghijklmnop", "abcdefghijklmno+", "abcdefghijklmn+", " abcdefghijklmno ", "abcdefghijklmnop+", ",", "cni0,", "cni0, cali+", "a+b", "a:1", "a/b", "a*", `a"b`, "auto,cni0", "veth.1", "über"),
		// Without the fractions of Go's durations.
		"holdFor": slices.DeleteFunc(append(variants("10s", "1m30s", "1h"),
			"", "0s", "1s", "3600s", "3601s", "60m", "61m", "1h1s", "10", "s", "-1s", "1m-1s", "00010s", "1h0m0s", "1d"),
			func(value string) bool { return strings.Contains(value, ".") }),
	} {
		t.Run(key, func(t *testing.T) {
			chart, err := loader.Load(chartDir)
			if err != nil {
				t.Fatal(err)
			}
			accepted := 0
			for _, value := range values {
				agent, ours := agentAccepts(t, key, value), chartAccepts(chart, key, value)
				if (agent == nil) != (ours == nil) {
					t.Errorf("%s %q: the agent says %v, the chart %v", key, value, agent, ours)
				}
				if agent == nil {
					accepted++
				}
			}
			t.Logf("%d values, %d of them accepted", len(values), accepted)
			if accepted < 5 || accepted > len(values)-5 {
				t.Errorf("of %d values %d are accepted: that shows little", len(values), accepted)
			}
		})
	}
}

// variants are some texts, and each of them with one or two random changes.
func variants(texts ...string) []string {
	random := rand.New(rand.NewPCG(1, 2))
	all := slices.Clone(texts)
	for range 60 {
		for _, text := range texts {
			for range 1 + random.IntN(2) {
				at := random.IntN(len(text) + 1)
				switch random.IntN(3) {
				case 0:
					text = text[:at] + string(":.,=!()<> 0123459abfinAF-_/+shm"[random.IntN(31)]) + text[at:]
				case 1:
					text = text[:at] + text[min(at+1, len(text)):]
				default:
					other := texts[random.IntN(len(texts))]
					text = text[:at] + other[random.IntN(len(other)):]
				}
			}
			all = append(all, text)
		}
	}
	return all
}

func agentAccepts(t *testing.T, key, value string) error {
	t.Helper()
	magicIP := map[string]any{"ipAddress": "169.254.210.210", "namespace": "n", "selector": "a=b", "allowReserved": true, "ports": []any{map[string]any{"port": 1}}}
	magicIP[key] = value
	text, err := yaml.Marshal(map[string]any{"name": "n.r", "magicIPs": []any{magicIP}})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := config.Parse(strings.NewReader(string(text)), false)
	if err != nil {
		return err
	}
	if reason := parsed.Ports[0].Unserved; reason != "" {
		return fmt.Errorf("unserved: %s", reason)
	}
	return nil
}

func chartAccepts(c *chart.Chart, key, value string) error {
	_, err := renderChart(c, map[string]any{"config": map[string]any{key: value}})
	return err
}

// TestReservedAddressesAreTheAgents: the notes name the addresses that the agent does not serve.
func TestReservedAddressesAreTheAgents(t *testing.T) {
	source, err := os.ReadFile(root + "/agent/config/reserved.go")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(chartDir + "/files/reserved.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, want := map[string][]string{}, map[string][]string{}
	unmarshal(t, string(data), &got)
	for _, call := range regexp.MustCompile(`reserve\(("[^"]*"(?:, "[^"]*")+)\)`).FindAllStringSubmatch(string(source), -1) {
		var words []string
		unmarshal(t, "["+call[1]+"]", &words)
		want[words[0]] = words[1:]
	}
	if len(want) < 10 {
		t.Fatalf("found %v in agent/config/reserved.go", want)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files/reserved.yaml is not agent/config/reserved.go (-want +got):\n%s", diff)
	}

	for address, named := range map[string]bool{
		"169.254.169.254": true, "169.254.172.1": true, "169.254.175.255": true, "169.254.176.0": false, "169.254.2.77": true, "169.254.169.7": true, "169.254.169.8": false,
		"fd00:ec2:0:0::254": true, "fd00::ac:0": true, "fd00::ac:3ff": true, "fd00::ac:400": false, "fd69::7": true, "fd69::8": false,
		"::ffff:169.254.169.254": true, "10.1.2.3": true, "10.1.3.3": false, "10.1.4.7": true, "10.1.5.7": false, "169.254.210.210": false,
	} {
		for _, allowed := range []bool{false, true} {
			values := map[string]any{"config": map[string]any{"ipAddress": address, "allowReserved": allowed, "reservedAddresses": []any{"10.1.2.0/24", "::ffff:10.1.4.0/120", "::ffff:10.1.5.0/90"}}}
			port := configuration(t, values, false).Ports[0]
			notes := render(t, values)["NOTES.txt"]
			if unserved := strings.Contains(notes, "NOT SERVED"); unserved != (port.Unserved != "") || unserved != (named && !allowed) {
				t.Errorf("%s, allowReserved %v: the agent: %q; the notes:\n%s", address, allowed, port.Unserved, notes)
			}
			if warned := strings.Contains(notes, "WARNING"); warned != (named && allowed) {
				t.Errorf("%s, allowReserved %v: the notes:\n%s", address, allowed, notes)
			}
		}
	}
}
