//go:build clients

package clients_test

import (
	"debug/buildinfo"
	"encoding/csv"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Where the report goes, with its raw data.
const (
	reportFile = "docs/benchmarks/clients.md"
	rawFile    = "docs/benchmarks/clients.csv"
)

// report prints what was lost, and writes the report where that is asked for and everything was measured.
func report(t *testing.T, outcomes []outcome) {
	t.Helper()
	tables := ""
	for _, how := range []strategy{rolling, surging} {
		tables += lossTable(how, outcomes)
	}
	fmt.Println(tables)
	if !*update || t.Failed() {
		return
	}
	setting, err := setting(t)
	if err != nil {
		t.Fatal(err)
	}
	var raw strings.Builder
	writer := csv.NewWriter(&raw)
	lines := [][]string{{"client", "update", "by", "sent", "lost", "twice"}}
	for _, o := range inOrder(outcomes) {
		lines = append(lines, []string{o.load.name, string(o.how), string(o.by), strconv.Itoa(o.sent), strconv.Itoa(o.lost), strconv.Itoa(o.twice)})
	}
	if err := writer.WriteAll(lines); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{rawFile: raw.String(), reportFile: fmt.Sprintf(page, setting, tables)} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// page is the report: what was measured where, and the tables.
const page = `# Spans, counts and DNS answers lost by an update

Written by ` + "`make e2e-clients`" + `: do not edit. Raw data: [clients.csv](clients.csv).

%s

Each server is updated once, one after the other, while an application sends 50 items a second (DNS: 20 queries) by its SDK and the settings of
its [example](../../examples), for some seconds before and afterwards. The name of each item is counted in what the server has written down. The
same application runs beside itself by the magic IP as the example has it (connections are refused while there is no target), by a Service with
` + "`internalTrafficPolicy: Local`" + `, and where that makes a difference by a magic IP with ` + "`noEndpoint: hold`" + ` and ` + "`readiness: require`" + `.

Without retries an SDK loses what it sends while no server runs: the longer the gap, the more. Here it was a second or two.
Magic IP and Service refuse connections then. Go's OTLP exporter over HTTP sends again after a time-out and some answers of servers, and not after a
refusal, as Datadog's tracer by default: for such clients ` + "`noEndpoint: hold`" + ` is the better setting, and a surge with a server that drains
is better still. The datagrams that the Service loses in a surge follow each other: one gap of half a second here. "Asked once" may lose an answer that is under
way when its flow moves to the new pod; on a busy machine its time-outs come on top.
%s
## What was run

- Servers: an OpenTelemetry Collector with the receivers otlp, zipkin and statsd, and an exporter that writes the names down. The collector's statsd
  receiver forgets what it has not passed on when it ends: its interval is 50 ms here. CoreDNS with the plugins cache and forward.
- **Stand-ins**: Datadog's traces and Elastic's intake are taken by a program of the tests that knows these two endpoints, for the
  collector's receivers for them are not to be had as Go modules by the registry that the tests use. DogStatsD goes to the collector's statsd receiver.
- A maxSurge update has a server that drains: a preStop hook of ten seconds, and CoreDNS' ` + "`lameduck`" + `.
- Not the SDKs' defaults: OpenTelemetry sends batches every half second instead of every five, and gives them up after a minute instead of ten seconds;
  Datadog's client of statsd sends each count by itself. "Retries set" is ` + "`tracer.WithSendRetries`" + `, which is 0 by default.
- "Asked once" is a client that does not ask again. The resolvers have a second name server, the cluster's, as in the example.
`

// inOrder sorts outcomes as the tables have them.
func inOrder(outcomes []outcome) (sorted []outcome) {
	for _, how := range []strategy{rolling, surging} {
		for _, l := range loads() {
			for _, o := range outcomes {
				if o.how == how && o.load.name == l.name {
					sorted = append(sorted, o)
				}
			}
		}
	}
	return sorted
}

// lossTable are the outcomes of one kind of update, as lost/sent.
func lossTable(how strategy, outcomes []outcome) string {
	var table strings.Builder
	fmt.Fprintf(&table, "\n## %s%s\n\n| client | sends again | magic IP | magic IP, `hold` | Service |\n|---|---|--:|--:|--:|\n", strings.ToUpper(string(how[:1])), how[1:])
	for _, l := range loads() {
		cells := map[way]string{}
		for _, o := range outcomes {
			if o.load.name == l.name && o.how == how {
				cells[o.by] = fmt.Sprintf("%d of %d", o.lost, o.sent)
				if o.twice > 0 {
					cells[o.by] += fmt.Sprintf(" (%d came twice)", o.twice)
				}
			}
		}
		again := "no"
		if l.retries {
			again = "yes"
		}
		fmt.Fprintf(&table, "| %s | %s | %s | %s | %s |\n", l.name, again, cells[byMagicIP], cells[holding], cells[byService])
	}
	return table.String()
}

// setting is when and on what it was measured, and by which versions.
func setting(t *testing.T) (string, error) {
	t.Helper()
	kubernetes, err := cluster.Admin.Discovery().ServerVersion()
	if err != nil {
		return "", err
	}
	model := runtime.GOARCH // not every architecture names its model
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, rest, found := strings.Cut(string(info), "model name\t: "); found {
			model, _, _ = strings.Cut(rest, "\n")
		}
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	text := fmt.Sprintf("%s, %s, %d cores, Linux %s, load average at the end %s; Kubernetes %s, kube-proxy (nftables), one node with %s.",
		time.Now().UTC().Format(time.DateOnly), model, runtime.NumCPU(), strings.TrimSpace(string(kernel)), strings.Fields(string(load))[0], kubernetes.GitVersion, node.Runtime())
	for _, program := range []struct {
		file    string
		modules []string
	}{
		{"bin/sdk/collector", []string{"go.opentelemetry.io/collector/otelcol"}},
		{"bin/coredns/coredns", []string{"github.com/coredns/coredns"}},
		{"bin/sdk/app", []string{
			"go.opentelemetry.io/otel/sdk", "github.com/openzipkin/zipkin-go", "github.com/DataDog/datadog-go/v5", "github.com/DataDog/dd-trace-go/v2",
			"go.elastic.co/apm/v2", "github.com/miekg/dns",
		}},
	} {
		info, err := buildinfo.ReadFile(program.file)
		if err != nil {
			return "", err
		}
		for _, module := range program.modules {
			found := false
			for _, dependency := range info.Deps {
				if dependency.Path == module {
					text += fmt.Sprintf("\n%s %s,", module, dependency.Version)
					found = true
				}
			}
			if !found {
				return "", fmt.Errorf("%s has no module %s", program.file, module)
			}
		}
	}
	return strings.TrimSuffix(text, ",") + ".", nil
}
