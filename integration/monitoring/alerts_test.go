// Package monitoring tests the chart's alerts and dashboard by Prometheus' own engine. It is a module of its own, since Prometheus is
// no dependency of the product.
package monitoring

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
)

const files = "../../charts/magic-ip-address/files/"

// step is the time between two evaluations of the rules, and two samples.
const step = 30 * time.Second

// alerts are the rules of the chart, as they are for a job called agents.
func alerts(t *testing.T) []rulefmt.Rule {
	t.Helper()
	data, err := os.ReadFile(files + "rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// It checks expressions and templates too.
	groups, errs := rulefmt.Parse([]byte(strings.ReplaceAll(string(data), "JOB", "agents")), false, model.UTF8Validation, parser.NewParser(parser.Options{}), slog.Default())
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return groups.Groups[0].Rules
}

// TestAlerts: each alert fires when it should, and none does on a healthy rollout or on a node without a target by design. Samples are 30 s
// apart, from the moment 0 on; "1x20" are 21 of them.
func TestAlerts(t *testing.T) {
	const endpoint = `magic_ip="169.254.210.210", port="9200", protocol="tcp"`
	fired := map[string]bool{}
	for _, test := range []struct {
		name   string
		series map[string]string
		// firing is what fires at a moment, by alert and its labels; alerts that need an agent which is not in the test do not count.
		firing map[time.Duration][]string
	}{
		{"all is well", map[string]string{
			`up{node="node1"}`:                                         "1x120",
			`up{node="node2", pod="old"}`:                              "1x40 stale",
			`up{node="node2", pod="new"}`:                              "_x42 0x1 1x70",
			`magic_ip_agent_heartbeat_timestamp_seconds{node="node1"}`: "0+30x120",
			`magic_ip_endpoints{node="node1", ` + endpoint + `}`:       "1x40 0x2 1x80", // a rollout without a surge
			`magic_ip_endpoints{node="node2", ` + endpoint + `}`:       "0x120",         // no target by design
			`magic_ip_ports{node="node1", state="unserved"}`:           "0x120",
			`magic_ip_agent_failing{node="node1"}`:                     "0x40 1x4 0x80",
			`magic_ip_installed{node="node1"}`:                         "1x120",
			`magic_ip_api_watch_healthy{node="node1", namespace="n"}`:  "1x40 0x10 1x80",
			`magic_ip_rules_restored_total{node="node1"}`:              "0x40 1x40 2x40", // kube-proxy or an administrator, once in a while
			`magic_ip_problem{node="node1", kind="bypass"}`:            "0x120",
			`magic_ip_problem{node="node1", kind="unserved_link"}`:     "1x120",
		}, map[time.Duration][]string{15 * time.Minute: nil, 21 * time.Minute: nil, 22 * time.Minute: nil, 25 * time.Minute: nil, time.Hour: nil}},

		{"an agent ends, and another one hangs", map[string]string{
			`up{node="node1"}`: "1x20 0x100",
			`up{node="node2"}`: "1x120",
			`magic_ip_agent_heartbeat_timestamp_seconds{node="node2"}`: "0+30x20 600x100",
		}, map[time.Duration][]string{
			10 * time.Minute: nil,
			20 * time.Minute: {"MagicIPAgentDown node=node1", "MagicIPAgentDown node=node2"},
		}},

		{"nothing is scraped", map[string]string{`other{node="node1"}`: "1x120"}, map[time.Duration][]string{
			9 * time.Minute:  nil,
			15 * time.Minute: {"MagicIPAgentsAbsent"},
		}},

		// The agent of node1 is replaced meanwhile, so the series is another one. A day later the node has no target by design.
		{"a node loses its endpoint", map[string]string{
			`up{node="node1"}`: "1x3200",
			`magic_ip_endpoints{pod="old", node="node1", ` + endpoint + `}`: "1x60 0x10 stale",
			`magic_ip_endpoints{pod="new", node="node1", ` + endpoint + `}`: "_x72 0x3200",
			`magic_ip_endpoints{node="node2", ` + endpoint + `}`:            "1x3300",
		}, map[time.Duration][]string{
			33 * time.Minute: nil,
			40 * time.Minute: {"MagicIPEndpointLost magic_ip=169.254.210.210 node=node1 port=9200 protocol=tcp"},
			26 * time.Hour:   nil,
		}},

		{"a magic IP has no endpoint on any node, another one has one", map[string]string{
			`up{node="node1"}`: "1x120",
			`magic_ip_endpoints{node="node1", ` + endpoint + `}`:                                        "0x120",
			`magic_ip_endpoints{node="node2", ` + endpoint + `}`:                                        "0x120",
			`magic_ip_endpoints{node="node1", magic_ip="169.254.210.211", port="9200", protocol="tcp"}`: "1x120",
			`magic_ip_endpoints{node="node2", magic_ip="169.254.210.211", port="9200", protocol="tcp"}`: "0x120",
		}, map[time.Duration][]string{
			10 * time.Minute: nil,
			20 * time.Minute: {"MagicIPWithoutEndpoint magic_ip=169.254.210.210 port=9200 protocol=tcp"},
		}},

		{"what agents report", map[string]string{
			`up{node="node1"}`: "1x120",
			`magic_ip_ports{node="node1", state="unserved"}`:          "2x120",
			`magic_ip_ports{node="node1", state="without_endpoint"}`:  "1x120",
			`magic_ip_agent_failing{node="node1"}`:                    "1x120",
			`magic_ip_installed{node="node1"}`:                        "0x120",
			`magic_ip_api_watch_healthy{node="node1", namespace="n"}`: "0x120",
			`magic_ip_rules_restored_total{node="node1"}`:             "0+1x120",
			`magic_ip_problem{node="node1", kind="foreign_rule"}`:     "1x120",
		}, map[time.Duration][]string{
			4 * time.Minute: nil,
			20 * time.Minute: {
				"MagicIPAPIUnavailable namespace=n node=node1", "MagicIPAgentFailing node=node1", "MagicIPBypassed kind=foreign_rule node=node1", "MagicIPNotInstalled node=node1",
				"MagicIPRulesContested node=node1", "MagicIPUnserved node=node1 state=unserved",
			},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			firing := evaluate(t, test.series, slices.Max(slices.Collect(maps.Keys(test.firing))))
			for at, want := range test.firing {
				if diff := cmp.Diff(want, firing[at]); diff != "" {
					t.Errorf("firing after %s (-want +got):\n%s", at, diff)
				}
				for _, alert := range want {
					fired[strings.Fields(alert)[0]] = true
				}
			}
		})
	}
	for _, rule := range alerts(t) {
		if !fired[rule.Alert] {
			t.Errorf("no test expects that %s fires", rule.Alert)
		}
	}
}

// evaluate returns what fires at each step: an alert fires whose expression has had the same labels for its time.
func evaluate(t *testing.T, series map[string]string, until time.Duration) map[time.Duration][]string {
	t.Helper()
	var load strings.Builder
	fmt.Fprintf(&load, "load %s\n", model.Duration(step))
	for name, samples := range series {
		fmt.Fprintf(&load, "  %s %s\n", strings.Replace(name, "{", `{job="agents", `, 1), samples)
	}
	storage := promqltest.LoadedStorage(t, load.String())
	defer func() { _ = storage.Close() }()
	engine := promqltest.NewTestEngine(t, false, 0, 1_000_000)
	firing := map[time.Duration][]string{}
	for _, rule := range alerts(t) {
		query, err := engine.NewRangeQuery(context.Background(), storage, nil, rule.Expr, time.Unix(0, 0), time.Unix(0, 0).Add(until), step)
		if err != nil {
			t.Fatal(err)
		}
		matrix, err := query.Exec(context.Background()).Matrix()
		if err != nil {
			t.Fatalf("%s: %v", rule.Alert, err)
		}
		for _, alert := range matrix {
			for _, at := range sinceFor(alert.Floats, time.Duration(rule.For)) {
				firing[at] = append(firing[at], describe(rule, alert))
			}
		}
		query.Close()
	}
	for at := range firing {
		slices.Sort(firing[at])
	}
	return firing
}

// sinceFor are the moments at which the condition has held for a time, at each step of it.
func sinceFor(samples []promql.FPoint, hold time.Duration) (moments []time.Duration) {
	var since, last time.Duration
	for i, sample := range samples {
		at := time.Duration(sample.T) * time.Millisecond
		if i == 0 || at-last > step {
			since = at
		}
		last = at
		if at-since >= hold {
			moments = append(moments, at)
		}
	}
	return moments
}

func describe(rule rulefmt.Rule, alert promql.Series) string {
	words := []string{rule.Alert}
	for name, value := range alert.Metric.Map() {
		if name != "__name__" && name != "job" {
			words = append(words, name+"="+value)
		}
	}
	slices.Sort(words[1:])
	return strings.Join(words, " ")
}

// TestAnnotations: each alert says what happened and what that means, and its labels are those that its text names.
func TestAnnotations(t *testing.T) {
	for _, rule := range alerts(t) {
		for _, key := range []string{"summary", "description"} {
			if rule.Annotations[key] == "" {
				t.Errorf("%s has no %s", rule.Alert, key)
			}
		}
		if rule.Labels["severity"] == "" || rule.For == 0 {
			t.Errorf("%s has the labels %v, and fires after %s", rule.Alert, rule.Labels, rule.For)
		}
	}
}

// TestMetrics: the agent has each metric that alerts and dashboard name, and Prometheus can parse each query of the dashboard.
func TestMetrics(t *testing.T) {
	source, err := os.ReadFile("../../agent/metrics/metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	has := map[string]bool{"up": true, "process_resident_memory_bytes": true, "process_cpu_seconds_total": true}
	for _, match := range regexp.MustCompile(`"(magic_ip_[a-z_]+)"`).FindAllSubmatch(source, -1) {
		has[string(match[1])] = true
	}
	queries := dashboard(t)
	for _, rule := range alerts(t) {
		queries = append(queries, rule.Expr)
	}
	used := 0
	for _, query := range queries {
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
		if err != nil {
			t.Errorf("%s: %v", query, err)
			continue
		}
		for _, selectors := range parser.ExtractSelectors(expr) {
			for _, matcher := range selectors {
				if matcher.Name != "__name__" {
					continue
				}
				used++
				if base := regexp.MustCompile(`_(bucket|count|sum)$`).ReplaceAllString(matcher.Value, ""); !has[matcher.Value] && !has[base] {
					t.Errorf("the agent has no metric %s", matcher.Value)
				}
			}
		}
	}
	if used < 20 {
		t.Errorf("found %d metrics in %q", used, queries)
	}
}
