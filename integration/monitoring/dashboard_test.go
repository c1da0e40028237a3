package monitoring

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
)

var update = flag.Bool("update", false, "draw the picture of the dashboard anew")

const picture = "../../docs/images/dashboard.svg"

// panel is one of the dashboard's.
type panel struct {
	ID          int
	Title, Type string
	GridPos     struct{ X, Y, W, H int }
	FieldConfig struct{ Defaults struct{ Unit string } }
	Targets     []struct{ Expr, LegendFormat string }
}

func panels(t *testing.T) []panel {
	t.Helper()
	data, err := os.ReadFile(files + "dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct{ Panels []panel }
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	return dashboard.Panels
}

// filled is a query with what Grafana puts into it.
func filled(expr string) string {
	return strings.NewReplacer("$__rate_interval", "2m", "$job", ".*").Replace(expr)
}

// dashboard returns the queries of the dashboard.
func dashboard(t *testing.T) (queries []string) {
	t.Helper()
	seen := map[int]bool{}
	for _, panel := range panels(t) {
		if len(panel.Targets) == 0 || panel.Title == "" || seen[panel.ID] {
			t.Errorf("panel %d, %q, has %d queries", panel.ID, panel.Title, len(panel.Targets))
		}
		seen[panel.ID] = true
		for _, target := range panel.Targets {
			queries = append(queries, filled(target.Expr))
		}
	}
	return queries
}

// rollout is what three agents report in half an hour: samples each 30 s, of which the update of a DaemonSet takes those from 20 on, a node
// after the other; node3's target does not come back for five minutes.
func rollout() string {
	var load strings.Builder
	load.WriteString("load 30s\n")
	add := func(metric, labels, samples string) {
		fmt.Fprintf(&load, "  %s{job=\"agents\", %s} %s\n", metric, labels, samples)
	}
	for i, node := range []string{"node1", "node2", "node3"} {
		on := fmt.Sprintf("node=%q", node)
		port := on + `, magic_ip="169.254.210.210", port="9200", protocol="tcp"`
		at := 20 + 2*i
		late := 59 - at
		add("up", on, "1x60")
		add("magic_ip_agent_info", on+`, version="1.0.0", backend="nftables"`, "1x60")
		add("magic_ip_agent_heartbeat_timestamp_seconds", on, "0+30x60")
		add("magic_ip_installed", on, "1x60")
		endpoints, pending := fmt.Sprintf("1x%d 0 1x%d", at-1, late), fmt.Sprintf("0x%d 1 0x%d", at-1, late)
		failing := "0x60"
		if node == "node3" {
			endpoints, pending = fmt.Sprintf("1x%d 0x10 1x%d", at-1, late-10), fmt.Sprintf("0x%d 1x10 0x%d", at-1, late-10)
			failing = "0x40 1x4 0x15"
		}
		add("magic_ip_endpoints", port, endpoints)
		add("magic_ip_connections", port, fmt.Sprintf("%dx%d %d+%dx%d", 20+5*i, at-1, 2, 2, late/4)+fmt.Sprintf(" %dx%d", 20+4*i, late-late/4-1))
		add("magic_ip_connections_opened_total", port, fmt.Sprintf("0+%dx60", 90+30*i))
		refused := fmt.Sprintf("0x%d 0+4x1 4x%d", at-1, late-1)
		if node == "node3" {
			refused = fmt.Sprintf("0x%d 0+60x10 600x%d", at-1, late-11)
		}
		add("magic_ip_refused_packets_total", port, refused)
		add("magic_ip_endpoint_changes_total", port, fmt.Sprintf("1x%d 2 3x%d", at-1, late))
		add("magic_ip_ports", on+`, state="served"`, endpoints)
		add("magic_ip_ports", on+`, state="without_endpoint"`, pending)
		add("magic_ip_ports", on+`, state="unserved"`, "0x60")
		add("magic_ip_targets", on+`, state="ready"`, endpoints)
		add("magic_ip_targets", on+`, state="not_ready"`, pending)
		add("magic_ip_targets", on+`, state="terminating"`, fmt.Sprintf("0x%d 1 0x%d", at-1, late))
		add("magic_ip_agent_failing", on, failing)
		for _, kind := range []string{"api", "bypass", "unserved_link"} {
			samples := map[string]string{"api": failing, "bypass": "0x60", "unserved_link": "1x60"}
			add("magic_ip_problem", on+fmt.Sprintf(", kind=%q", kind), samples[kind])
		}
		add("magic_ip_api_watch_healthy", on+`, namespace="kube-system"`, strings.NewReplacer("0x", "1x", "1x", "0x").Replace(failing))
		for kind, samples := range map[string]string{"list": "1x60", "watch": "1+0.1x60", "poll": "0x40 0+6x20"} {
			add("magic_ip_api_requests_total", on+fmt.Sprintf(", kind=%q", kind), samples)
		}
		for bucket, share := range map[string]int{"0.00025": 1, "0.0005": 3, "0.001": 4, "0.0025": 4, "+Inf": 4} {
			add("magic_ip_record_to_rule_seconds_bucket", on+fmt.Sprintf(", le=%q", bucket), fmt.Sprintf("%dx%d %dx%d", share, at, 2*share, late))
			add("magic_ip_sync_duration_seconds_bucket", on+fmt.Sprintf(`, backend="nftables", le=%q`, bucket), fmt.Sprintf("%dx%d %d+0x%d", 2*share, at, 4*share, late))
		}
		add("magic_ip_sync_duration_seconds_count", on+`, backend="nftables"`, fmt.Sprintf("8x%d 16x%d", at, late))
		add("magic_ip_sync_failures_total", on+`, backend="nftables"`, "0x60")
		add("magic_ip_flows_deleted_total", on, fmt.Sprintf("3x%d 17x%d", at, late))
		add("magic_ip_rules_restored_total", on, "0x30 1x30")
		add("magic_ip_conflist_restored_total", on, "0x60")
		add("magic_ip_plugin_log_lines_total", on+`, level="warn"`, "0x50 2x10")
		add("magic_ip_config_info", on+`, hash="3f9c0a71d2be"`, fmt.Sprintf("1x%d stale", 44+i))
		add("magic_ip_config_info", on+`, hash="a01f77c4e590"`, fmt.Sprintf("_x%d 1x%d", 44+i, 15-i))
		add("magic_ip_config_last_reload_successful", on, "1x60")
		add("process_resident_memory_bytes", on, fmt.Sprintf("%d+%dx60", 41_000_000+i*1_000_000, 10_000))
		add("process_cpu_seconds_total", on, "0+0.05x20 1.12+0.12x19 3.45+0.05x19")
	}
	return load.String()
}

// TestDashboard: Prometheus' engine has an answer to each query of the dashboard during a rollout, and its picture shows that.
func TestDashboard(t *testing.T) {
	storage := promqltest.LoadedStorage(t, rollout())
	defer func() { _ = storage.Close() }()
	engine := promqltest.NewTestEngine(t, false, 0, 1_000_000)
	answers := map[string]promql.Matrix{}
	for _, panel := range panels(t) {
		for _, target := range panel.Targets {
			query, err := engine.NewRangeQuery(context.Background(), storage, nil, filled(target.Expr), time.Unix(0, 0), time.Unix(1800, 0), step)
			if err != nil {
				t.Fatalf("%s: %v", panel.Title, err)
			}
			matrix, err := query.Exec(context.Background()).Matrix()
			if err != nil {
				t.Fatalf("%s: %s: %v", panel.Title, target.Expr, err)
			}
			values := 0
			for _, series := range matrix {
				for _, point := range series.Floats {
					if point.F == point.F { // NaN: a quantile of nothing
						values++
					}
				}
			}
			if values == 0 {
				t.Errorf("%s: no answer to %s", panel.Title, target.Expr)
			}
			answers[target.Expr] = matrix
		}
	}
	drawn := draw(panels(t), answers)
	if *update {
		if err := os.WriteFile(picture, []byte(drawn), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if shown, err := os.ReadFile(picture); err != nil || string(shown) != drawn {
		t.Errorf("%s is not as the dashboard is (%v): run make docs", picture, err)
	}
}
