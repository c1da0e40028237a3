package metrics

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// api is an API of which RBAC refuses one namespace.
type api struct{}

func (api) Feeds() []kube.Feed {
	return []kube.Feed{{Namespace: "default", Healthy: true, LastSeen: time.UnixMilli(1500)}, {Namespace: "other", Forbidden: true}}
}
func (api) Requests() map[string]uint64 {
	return map[string]uint64{"list": 1, "watch": 2, "poll": 3}
}

func magicIP(port uint16, endpoints ...runtimedir.Endpoint) runtimedir.MagicIP {
	return runtimedir.MagicIP{Frontend: runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Port: port, Protocol: "tcp"}, Endpoints: endpoints}
}

// scrape returns the lines of our metrics, but for histogram buckets and times of now.
func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	answer := httptest.NewRecorder()
	m.Handler().ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	var lines []string
	for line := range strings.Lines(answer.Body.String()) {
		line = strings.TrimSpace(line)
		varies := strings.Contains(line, "_bucket{") || strings.Contains(line, "_sum") || strings.HasPrefix(line, "magic_ip_last_successful")
		if strings.HasPrefix(line, "magic_ip_") && !varies {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	m := New(Options{RuntimeDir: dir, Name: "a", Version: "v1", Backend: "nftables", API: api{}, Log: slog.New(slog.DiscardHandler)})
	for _, err := range []error{nil, errors.New("broken"), nil} {
		m.Synced(time.Millisecond, err)
	}
	m.Swept(3)
	m.Restored()
	m.Configured("abc", nil)
	m.Configured("def", errors.New("broken"))
	m.reloadedAt.Set(7)

	start := time.Now().Add(-time.Minute)
	endpoint := runtimedir.Endpoint{Address: netip.MustParseAddrPort("10.244.1.2:8080"), UID: "u", Recorded: true, AddedAt: time.Now()}
	ahead := endpoint // of a clock that was set back since
	ahead.UID, ahead.AddedAt = "v", time.Now().Add(time.Hour)
	m.Connections = func(frontends []runtimedir.Frontend) (map[runtimedir.Frontend]int, error) {
		counts := map[runtimedir.Frontend]int{}
		for _, f := range frontends {
			counts[f] = int(f.Port)
		}
		return counts, nil
	}
	before, after := magicIP(80), magicIP(80, endpoint)
	m.Observe(&runtimedir.Status{StartedAt: start, MagicIPs: []runtimedir.MagicIP{magicIP(81)}}, &runtimedir.Status{StartedAt: start, MagicIPs: []runtimedir.MagicIP{magicIP(81, ahead)}})
	after.Count = &runtimedir.Count{Opened: 5, Refused: 7}
	before.Since, after.Since = start, start.Add(time.Second)
	unserved := magicIP(82)
	unserved.Reason = "claimed"
	now := &runtimedir.Status{Problems: []string{"bypass", "rules"}, Targets: runtimedir.Targets{Ready: 3, NotReady: 2, Terminating: 1}, StartedAt: start, MagicIPs: []runtimedir.MagicIP{after, magicIP(81), unserved}, LastError: "broken"}
	m.Observe(&runtimedir.Status{StartedAt: start, MagicIPs: []runtimedir.MagicIP{before, magicIP(81), unserved}}, now)
	m.Observe(now, now)
	if got := scrape(t, m); strings.Contains(got, "heartbeat") {
		t.Errorf("a heartbeat before the first poll:\n%s", got)
	}
	begun := time.Now()
	m.Polled() // whether or not the status file can be written
	if m.polledAt.Before(begun) {
		t.Errorf("polled at %v", m.polledAt)
	}
	m.polledAt = time.UnixMilli(2500)
	if err := runtimedir.New(dir).Installer("a").WriteRecord(runtimedir.Record{LastError: "read-only", Restored: 2}); err != nil {
		t.Fatal(err)
	}
	log := func(level string) {
		t.Helper()
		if err := runtimedir.New(dir).Log([]byte("time=2026-01-31T12:00:00Z level=" + level + " msg=\"x level=WARN \"\n")); err != nil {
			t.Fatal(err)
		}
	}
	err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "plugin"), 0o700),
		os.WriteFile(runtimedir.New(dir).LogPath(), []byte("time=2026-01-31T12:00:00Z level=WARN msg=before\n"), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	m.readLog()
	log("WARN")
	log("ERROR")
	m.readLog()
	if err := os.Remove(runtimedir.New(dir).LogPath()); err != nil {
		t.Fatal(err)
	}
	log("ERROR")
	want := `magic_ip_agent_failing 1
magic_ip_agent_heartbeat_timestamp_seconds 2.5
magic_ip_agent_info{backend="nftables",name="a",version="v1"} 1
magic_ip_api_forbidden{namespace="default"} 0
magic_ip_api_forbidden{namespace="other"} 1
magic_ip_api_requests_total{kind="list"} 1
magic_ip_api_requests_total{kind="poll"} 3
magic_ip_api_requests_total{kind="watch"} 2
magic_ip_api_watch_healthy{namespace="default"} 1
magic_ip_api_watch_healthy{namespace="other"} 0
magic_ip_api_watch_last_event_timestamp_seconds{namespace="default"} 1.5
magic_ip_config_info{hash="abc"} 1
magic_ip_config_last_reload_success_timestamp_seconds 7
magic_ip_config_last_reload_successful 0
magic_ip_conflist_restored_total 2
magic_ip_connections{magic_ip="169.254.210.210",port="80",protocol="tcp"} 80
magic_ip_connections{magic_ip="169.254.210.210",port="81",protocol="tcp"} 81
magic_ip_connections_opened_total{magic_ip="169.254.210.210",port="80",protocol="tcp"} 5
magic_ip_endpoint_changes_total{magic_ip="169.254.210.210",port="80",protocol="tcp"} 1
magic_ip_endpoint_changes_total{magic_ip="169.254.210.210",port="81",protocol="tcp"} 0
magic_ip_endpoints{magic_ip="169.254.210.210",port="80",protocol="tcp"} 1
magic_ip_endpoints{magic_ip="169.254.210.210",port="81",protocol="tcp"} 0
magic_ip_flows_deleted_total 3
magic_ip_installed 0
magic_ip_plugin_log_lines_total{level="error"} 2
magic_ip_plugin_log_lines_total{level="warn"} 2
magic_ip_ports{state="served"} 1
magic_ip_ports{state="unserved"} 1
magic_ip_ports{state="without_endpoint"} 1
magic_ip_problem{kind="api"} 0
magic_ip_problem{kind="bypass"} 1
magic_ip_problem{kind="claims"} 0
magic_ip_problem{kind="configuration"} 0
magic_ip_problem{kind="conntrack"} 0
magic_ip_problem{kind="data_plane"} 0
magic_ip_problem{kind="events_dropped"} 0
magic_ip_problem{kind="files"} 0
magic_ip_problem{kind="foreign_rule"} 0
magic_ip_problem{kind="hairpin"} 0
magic_ip_problem{kind="local_route"} 0
magic_ip_problem{kind="metrics"} 0
magic_ip_problem{kind="network"} 0
magic_ip_problem{kind="record_lost"} 0
magic_ip_problem{kind="rules"} 1
magic_ip_problem{kind="state_file"} 0
magic_ip_problem{kind="unfiltered_bridge"} 0
magic_ip_problem{kind="unlabelled_pods"} 0
magic_ip_problem{kind="unnamed_link"} 0
magic_ip_problem{kind="unrecorded_endpoint"} 0
magic_ip_problem{kind="unseen"} 0
magic_ip_problem{kind="unserved_link"} 0
magic_ip_problem{kind="verify"} 0
magic_ip_problem{kind="waiting"} 0
magic_ip_record_to_rule_seconds_count 1
magic_ip_refused_packets_total{magic_ip="169.254.210.210",port="80",protocol="tcp"} 7
magic_ip_rules_restored_total 1
magic_ip_sync_duration_seconds_count{backend="nftables"} 3
magic_ip_sync_failures_total{backend="nftables"} 1
magic_ip_targets{state="not_ready"} 2
magic_ip_targets{state="ready"} 3
magic_ip_targets{state="terminating"} 1`
	if diff := cmp.Diff(want, scrape(t, m)); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// TestPluginLogInParts: a line of which a reader has met the first part, as it can where pages of the file meet, is counted when it is whole.
func TestPluginLogInParts(t *testing.T) {
	t.Parallel()
	dir := runtimedir.New(t.TempDir())
	m := New(Options{RuntimeDir: dir.Path(), Name: "a", Log: slog.New(slog.DiscardHandler)})
	if err := os.MkdirAll(filepath.Dir(dir.LogPath()), 0o700); err != nil {
		t.Fatal(err)
	}
	const line = "time=2026-01-31T12:00:00Z level=WARN msg=x\n"
	want := 0.0
	for cut := range len(line) {
		for _, part := range []string{line[:cut], line[cut:]} {
			if err := dir.Log([]byte(part)); err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(part, "\n") {
				want++
			}
			m.readLog()
			if got := testutil.ToFloat64(m.pluginLog.WithLabelValues("warn")); got != want {
				t.Fatalf("cut at %d, after %q: %v lines counted, want %v", cut, part, got, want)
			}
		}
	}
}

// TestPluginLogAtOnce: requests at once count each line of the plugin's log once.
func TestPluginLogAtOnce(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	m := New(Options{RuntimeDir: dir.Path(), Name: "a", Log: slog.New(slog.DiscardHandler)})
	if err := os.MkdirAll(filepath.Dir(dir.LogPath()), 0o700); err != nil {
		t.Fatal(err)
	}
	const lines = 2000
	var written atomic.Bool
	var readers sync.WaitGroup
	for range 3 {
		readers.Go(func() {
			for !written.Load() {
				m.readLog()
			}
		})
	}
	for range lines {
		if err := dir.Log([]byte("time=2026-01-31T12:00:00Z level=WARN msg=x\n")); err != nil {
			t.Error(err)
			break
		}
	}
	written.Store(true)
	readers.Wait()
	m.readLog()
	if got := testutil.ToFloat64(m.pluginLog.WithLabelValues("warn")); got != lines {
		t.Errorf("%v lines counted of %d", got, lines)
	}
}

// TestConventions: every metric has a help text, and a name that Prometheus' own linter finds nothing wrong with.
func TestConventions(t *testing.T) {
	t.Parallel()
	m := New(Options{RuntimeDir: t.TempDir(), API: api{}, Log: slog.New(slog.DiscardHandler)})
	m.Observe(nil, &runtimedir.Status{MagicIPs: []runtimedir.MagicIP{magicIP(80)}})
	m.Polled()
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("%s: %s", problem.Metric, problem.Text)
	}
	families, err := m.gather()
	if err != nil {
		t.Fatal(err)
	}
	process := 0
	for _, family := range families {
		if strings.HasPrefix(family.GetName(), "process_network_") {
			t.Errorf("%s counts the whole node", family.GetName())
		} else if strings.HasPrefix(family.GetName(), "process_") {
			process++
		}
	}
	if process == 0 {
		t.Error("there is nothing about the process")
	}
}

// TestUncounted: why connections cannot be counted is logged once, and the other metrics are there.
func TestUncounted(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	m := New(Options{RuntimeDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	err := errors.New("not permitted")
	m.Connections = func([]runtimedir.Frontend) (map[runtimedir.Frontend]int, error) { return nil, err }
	m.Observe(nil, &runtimedir.Status{MagicIPs: []runtimedir.MagicIP{magicIP(80)}})
	for range 2 {
		if got := scrape(t, m); strings.Contains(got, "magic_ip_connections") || !strings.Contains(got, "magic_ip_ports") {
			t.Errorf("metrics:\n%.2000s", got)
		}
	}
	if n := strings.Count(log.String(), "not permitted"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, &log)
	}
	if err = nil; !strings.Contains(scrape(t, m), "magic_ip_ports") {
		t.Error("no metrics once they can be counted")
	}
	err = errors.New("not permitted")
	if scrape(t, m); strings.Count(log.String(), "not permitted") != 2 {
		t.Errorf("a new failure is not logged:\n%s", &log)
	}
}

// TestManyPorts: ten thousand magic IPs do not make ten thousand series.
func TestManyPorts(t *testing.T) {
	t.Parallel()
	m := New(Options{RuntimeDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	view := &runtimedir.Status{}
	for port := range 10000 {
		view.MagicIPs = append(view.MagicIPs, magicIP(uint16(port+1)))
	}
	m.Observe(nil, view)
	got := scrape(t, m)
	if lines := strings.Count(got, "\n"); lines > 50 || !strings.Contains(got, `magic_ip_ports{state="without_endpoint"} 10000`) {
		t.Errorf("%d lines, want few and the sum:\n%.2000s", lines, got)
	}
}

// TestServe: the address of the process before this one is taken over when that ends.
func TestServe(t *testing.T) {
	t.Parallel()
	before, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := before.Addr().String()
	m := New(Options{RuntimeDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		m.Serve(ctx, address)
	}()
	eventually(t, func() bool { return strings.Contains(m.Problem(), "address already in use") })
	_ = before.Close()
	eventually(t, func() bool {
		response, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return false
		}
		defer func() { _ = response.Body.Close() }()
		body, _ := io.ReadAll(response.Body)
		return strings.Contains(string(body), "process_resident_memory_bytes") && m.Problem() == ""
	})
	response, err := http.Get("http://" + address + "/debug/pprof/")
	if err != nil || response.StatusCode != http.StatusNotFound {
		t.Errorf("another path: %v, %v", response, err)
	}
	_ = response.Body.Close()
	stop()
	<-ended
}

// TestIdleConnections: clients that hold connections open cost a bounded number of files, and are cut off so that others are answered.
func TestIdleConnections(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener := &countingListener{Listener: inner}
	m := New(Options{RuntimeDir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- m.serve(ctx, listener) }()
	for i := range 4 * maxConnections {
		client, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		if i%2 == 0 { // one half sends a request slowly, or reads no answer
			_, _ = client.Write([]byte("GET /metrics HTTP/1.1\r\nHost: a\r\n"))
		}
	}
	// The queue before this request is as long as four rounds of connections that send nothing.
	client := http.Client{Timeout: 10 * headerTimeout}
	response, err := client.Get("http://" + inner.Addr().String() + "/metrics")
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("another client: %v, %v", response, err)
	}
	_ = response.Body.Close()
	if most := listener.most.Load(); most > maxConnections {
		t.Errorf("%d connections at once, want at most %d", most, maxConnections)
	}
	stop()
	<-ended
}

// countingListener counts the connections that are open.
type countingListener struct {
	net.Listener
	open, most atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.most.Store(max(l.most.Load(), l.open.Add(1)))
	}
	return &countedConn{Conn: c, listener: l}, err
}

type countedConn struct {
	net.Conn
	listener *countingListener
	closed   atomic.Bool
}

func (c *countedConn) Close() error {
	if c.closed.CompareAndSwap(false, true) {
		c.listener.open.Add(-1)
	}
	return c.Conn.Close()
}

func eventually(t *testing.T, is func() bool) {
	t.Helper()
	limit, cancel := lab.Patience(t.Context(), 10*time.Second)
	defer cancel()
	err := lab.Eventually(limit, func() error {
		if !is() {
			return errors.New("it is not so")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
