package integration

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// scrape returns the metrics at an address of the node.
func (w *world) scrape(address string) (string, error) {
	client := &http.Client{Transport: &http.Transport{DialContext: w.Dial(lab.Host), DisableKeepAlives: true}, Timeout: 5 * time.Second}
	response, err := client.Get("http://" + address + "/metrics")
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// TestNoPort: without an address for metrics, neither the agent nor a pod's ADD listens anywhere.
func TestNoPort(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "bridge", config())
	w.addTarget("echo")
	if sockets := w.run(`set -e; ss -Hlntup; sockets=$(ss -Hlxp); echo "$sockets" | grep magic-ip || true`); sockets != "" {
		t.Errorf("listening on the node:\n%s", sockets)
	}
}

// TestMetrics: what Prometheus is told of a node's agent, and that the next process of that name takes the port over.
func TestMetrics(t *testing.T) {
	t.Parallel()
	const address = lab.NodeIPv4 + ":9550"
	w := newWorld(t, "nftables", "bridge")
	w.flags = append(w.flags, "--metrics-address", address)
	w.start(config())
	tells := func(lines ...string) {
		t.Helper()
		err := lab.Eventually(patience(t), func() error {
			text, err := w.scrape(address)
			for _, line := range lines {
				if err == nil && !strings.Contains("\n"+text, "\n"+line+"\n") {
					err = fmt.Errorf("no line %q:\n%s", line, text)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	const endpoints = `magic_ip_endpoints{magic_ip="169.254.210.210",port="8080",protocol="tcp"} `
	tells(endpoints+"0", `magic_ip_ports{state="without_endpoint"} 4`, `magic_ip_ports{state="served"} 0`, "magic_ip_agent_failing 0")
	w.addClient()
	w.addTarget("echo")
	w.awaitEndpoint("echo")
	w.echo("echo")
	if err := w.want("client", magic(false), "answered by echo"); err != nil {
		t.Fatal(err)
	}
	tells(endpoints+"1", `magic_ip_ports{state="served"} 4`, `magic_ip_connections_opened_total{magic_ip="169.254.210.210",port="8080",protocol="tcp"} 1`, "magic_ip_record_to_rule_seconds_count 1", `magic_ip_sync_failures_total{backend="nftables"} 0`)

	if _, err := w.StartAgent(config(), w.flags...); err != nil { // it stands by
		t.Fatal(err)
	}
	killed := time.Now()
	w.agent.Kill()
	w.await("to be taken over, with its metrics", func(a *runtimedir.Status) bool {
		return a.StartedAt.After(killed) && !strings.Contains(strings.Join(a.Notes, ""), "metrics are not served")
	})
	tells(endpoints+"1", "magic_ip_record_to_rule_seconds_count 0")
}
