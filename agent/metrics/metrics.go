// Package metrics serves what an agent does to Prometheus.
//
// Series are made of the configuration alone, never of pods or clients; of more than MostPorts ports of magic IPs
// there are only the sums.
package metrics

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/net/netutil"

	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// MostPorts is how many ports of magic IPs have series of their own.
const MostPorts = 500

// API is the client of the Kubernetes API.
type API interface {
	Feeds() []kube.Feed
	// Requests is how many have been made, by kind: list, watch, poll.
	Requests() map[string]uint64
}

// Options of Metrics.
type Options struct {
	RuntimeDir, Name, Version, Backend string
	API                                API // nil without one
	// Connections counts the flows that the kernel translates now; nil: they are not counted.
	Connections func([]runtimedir.Frontend) (map[runtimedir.Frontend]int, error)
	Log         *slog.Logger
}

// Metrics counts what an agent does. It is a prometheus.Collector of what is known when it is asked.
type Metrics struct {
	Options
	registry *prometheus.Registry

	syncs   *prometheus.HistogramVec
	failed  *prometheus.CounterVec
	synced  prometheus.Gauge
	routed  prometheus.Histogram
	deleted prometheus.Counter

	restored   prometheus.Counter
	changes    *prometheus.CounterVec
	pluginLog  *prometheus.CounterVec
	reloaded   prometheus.Gauge // whether the last one has succeeded
	reloadedAt prometheus.Gauge

	mu       sync.Mutex
	status   *runtimedir.Status
	polledAt time.Time
	problem  string
	hash     string // of the configuration
	// uncounted is why connections could not be counted last; empty where they could.
	uncounted string

	logMu sync.Mutex // held while the plugin's log is read and compared
	log   []byte     // as read last; nil before
}

// buckets are those of durations in seconds: a change of the rules takes from 0.2 ms on.
func buckets() []float64 {
	return []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
}

// New makes metrics of which nothing is counted yet.
func New(options Options) *Metrics {
	m := &Metrics{
		Options: options, registry: prometheus.NewRegistry(),
		syncs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "magic_ip_sync_duration_seconds", Help: "How long it took to bring the rules in the kernel to a new state, by backend.",
			Buckets: buckets(),
		}, []string{"backend"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "magic_ip_sync_failures_total", Help: "Attempts to bring the rules in the kernel to a new state that have failed, by backend.",
		}, []string{"backend"}),
		synced: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "magic_ip_last_successful_sync_timestamp_seconds", Help: "When the rules in the kernel were last changed with success; they are changed only where something has.",
		}),
		routed: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "magic_ip_record_to_rule_seconds", Help: "From the CNI plugin's record of a pod to its rule in the kernel, where the magic IP had no endpoint before.",
			Buckets: buckets(),
		}),
		deleted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "magic_ip_flows_deleted_total", Help: "Conntrack entries deleted because their endpoint is gone.",
		}),
	}
	m.restored = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "magic_ip_rules_restored_total", Help: "How often rules that another program had changed were restored.",
	})
	m.changes = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "magic_ip_endpoint_changes_total", Help: "Changes of the endpoints of a port of a magic IP, to none included.",
	}, []string{"magic_ip", "port", "protocol"})
	m.pluginLog = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "magic_ip_plugin_log_lines_total", Help: "Lines that the CNI plugin has written to plugin.log since the agent started, by level: warn, error.",
	}, []string{"level"})
	m.reloaded = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "magic_ip_config_last_reload_successful", Help: "1 where the configuration that was read last is in force, 0 where it cannot be used.",
	})
	m.reloadedAt = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "magic_ip_config_last_reload_success_timestamp_seconds", Help: "When the configuration in force was first read.",
	})
	m.failed.WithLabelValues(m.Backend)
	for _, level := range []string{"warn", "error"} {
		m.pluginLog.WithLabelValues(level)
	}
	m.readLog()
	m.registry.MustRegister(m, m.syncs, m.failed, m.synced, m.routed, m.deleted, m.restored, m.changes, m.pluginLog, m.reloaded, m.reloadedAt, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Synced counts an attempt to bring the rules to a new state.
func (m *Metrics) Synced(took time.Duration, err error) {
	m.syncs.WithLabelValues(m.Backend).Observe(took.Seconds())
	if err != nil {
		m.failed.WithLabelValues(m.Backend).Inc()
	} else {
		m.synced.SetToCurrentTime()
	}
}

// Swept counts conntrack entries that were deleted.
func (m *Metrics) Swept(flows int) { m.deleted.Add(float64(flows)) }

// Restored counts a restoration of externally modified rules.
func (m *Metrics) Restored() { m.restored.Inc() }

// Configured notes whether the configuration can be used; hash is of the one in force.
func (m *Metrics) Configured(hash string, err error) {
	m.reloaded.Set(one(err == nil))
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil && m.hash != hash {
		m.hash = hash
		m.reloadedAt.SetToCurrentTime()
	}
}

// readLog counts the lines that the plugin's log has had since it was read last. Lines of a log that was replaced twice meanwhile
// are not counted.
func (m *Metrics) readLog() {
	m.logMu.Lock()
	defer m.logMu.Unlock()
	now, err := runtimedir.New(m.RuntimeDir).ReadLog()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return // status and doctor show it
	}
	now = now[:bytes.LastIndexByte(now, '\n')+1] // a line that is just being written may be there in part
	before := m.log
	m.log = append([]byte{}, now...)
	if before == nil {
		return
	}
	fresh, _ := bytes.CutPrefix(now, before) // else another log has taken its place
	for line := range strings.Lines(string(fresh)) {
		_, rest, _ := strings.Cut(line, " ") // behind the time
		for _, level := range []string{"warn", "error"} {
			if strings.HasPrefix(rest, "level="+strings.ToUpper(level)+" ") {
				m.pluginLog.WithLabelValues(level).Inc()
			}
		}
	}
}

// Polled notes that the loop has gone through all sources.
func (m *Metrics) Polled() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.polledAt = time.Now()
}

// Observe takes in a status of the agent and the one before it.
func (m *Metrics) Observe(before, now *runtimedir.Status) {
	for _, added := range newlyRouted(before, now) {
		if took := time.Since(added); took >= 0 { // else the clock was set back in between
			m.routed.Observe(took.Seconds())
		}
	}
	m.countChanges(before, now)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = now
}

// countChanges counts the ports whose endpoints are others than before; those that are new begin at 0.
func (m *Metrics) countChanges(before, now *runtimedir.Status) {
	if len(now.MagicIPs) > MostPorts {
		m.changes.Reset()
		return
	}
	since := map[runtimedir.Frontend]time.Time{}
	if before != nil {
		for _, port := range before.MagicIPs {
			since[port.Frontend] = port.Since
		}
	}
	there := map[runtimedir.Frontend]bool{}
	for _, port := range now.MagicIPs {
		there[port.Frontend] = true
		if port.Reason != "" {
			continue
		}
		counter := m.changes.WithLabelValues(labels(port.Frontend)...)
		if at, known := since[port.Frontend]; known && !at.IsZero() && !at.Equal(port.Since) {
			counter.Inc()
		}
	}
	for frontend := range since {
		if !there[frontend] {
			m.changes.DeleteLabelValues(labels(frontend)...)
		}
	}
}

// labels are the values of magic_ip, port and protocol.
func labels(f runtimedir.Frontend) []string {
	return []string{f.Address.String(), strconv.Itoa(int(f.Port)), string(f.Protocol)}
}

// newlyRouted are the times of the ADDs that have ended a time without an endpoint.
func newlyRouted(before, now *runtimedir.Status) (added []time.Time) {
	if before == nil {
		return nil
	}
	without := map[runtimedir.Frontend]bool{}
	for _, m := range before.MagicIPs {
		without[m.Frontend] = m.Reason == "" && len(m.Endpoints) == 0
	}
	routed := map[string]bool{} // UIDs
	for _, m := range now.MagicIPs {
		for _, e := range m.Endpoints {
			if without[m.Frontend] && e.Recorded && !routed[e.UID] && e.AddedAt.After(now.StartedAt) {
				routed[e.UID] = true
				added = append(added, e.AddedAt)
			}
		}
	}
	return added
}

// Problem is why nobody can ask for the metrics; empty where they can.
func (m *Metrics) Problem() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.problem
}

// Serve answers GET /metrics at address until ctx ends. Where the address is taken, by the process before this one
// say, it tries again.
func (m *Metrics) Serve(ctx context.Context, address string) {
	const retry = time.Second
	for ctx.Err() == nil {
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
		if err == nil {
			m.note("")
			err = m.serve(ctx, listener)
		}
		if ctx.Err() == nil {
			m.note("metrics are not served: " + err.Error())
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
	}
}

func (m *Metrics) note(problem string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if problem != "" && m.problem == "" {
		m.Log.Warn(problem)
	}
	m.problem = problem
}

const (
	// maxConnections bounds the files that clients can make the agent hold open; a scraper needs one.
	maxConnections = 16
	// headerTimeout bounds the time until a request is complete.
	headerTimeout = 3 * time.Second
)

func (m *Metrics) serve(ctx context.Context, listener net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.Handler())
	server := &http.Server{Handler: mux, ReadTimeout: headerTimeout, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 16 << 10}
	server.SetKeepAlivesEnabled(false) // idle clients would keep others out
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	m.Log.Info("metrics are served", "addr", listener.Addr())
	return server.Serve(netutil.LimitListener(listener, maxConnections))
}

// Handler answers with the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(prometheus.GathererFunc(m.gather), promhttp.HandlerOpts{MaxRequestsInFlight: 3, ErrorHandling: promhttp.ContinueOnError})
}

// gather leaves out what the library counts for the whole node in the agent's place.
func (m *Metrics) gather() ([]*dto.MetricFamily, error) {
	m.readLog()
	families, err := m.registry.Gather()
	return slices.DeleteFunc(families, func(f *dto.MetricFamily) bool { return strings.HasPrefix(f.GetName(), "process_network_") }), err
}

// desc are what is told as of the moment of asking.
type desc struct {
	info, heartbeat, failing, endpoints, ports, healthy, heard, refused, requests, installed *prometheus.Desc
	connections, opened, refusedPackets, targets, problem, config, conflist                  *prometheus.Desc
}

func descs() desc {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return desc{
		info:           d("magic_ip_agent_info", "Always 1: name, version and backend of the agent.", "name", "version", "backend"),
		heartbeat:      d("magic_ip_agent_heartbeat_timestamp_seconds", "When the agent last went through its loop; it does so every pollInterval."),
		failing:        d("magic_ip_agent_failing", "1 where `magic-ip-agent status` shows an error, else 0."),
		endpoints:      d("magic_ip_endpoints", "Pods that the traffic to a port of a magic IP goes to now.", "magic_ip", "port", "protocol"),
		ports:          d("magic_ip_ports", "Ports of magic IPs by state: served, without_endpoint, unserved (claimed by another agent, or not allowed).", "state"),
		healthy:        d("magic_ip_api_watch_healthy", "1 while the watch of a namespace's pods brings what it should, else 0.", "namespace"),
		heard:          d("magic_ip_api_watch_last_event_timestamp_seconds", "When the watch last brought an event or a bookmark.", "namespace"),
		refused:        d("magic_ip_api_forbidden", "1 where RBAC refuses the pods of a namespace, else 0.", "namespace"),
		requests:       d("magic_ip_api_requests_total", "Requests to the Kubernetes API: list, watch, poll (the lists made while the watch is not healthy) and owner.", "kind"),
		connections:    d("magic_ip_connections", "Flows that the kernel translates now: open TCP connections, and the flows of UDP and SCTP that it remembers.", "magic_ip", "port", "protocol"),
		opened:         d("magic_ip_connections_opened_total", "New connections, and new flows of UDP and SCTP, that led to an endpoint, as of the last poll.", "magic_ip", "port", "protocol"),
		refusedPackets: d("magic_ip_refused_packets_total", "Packets that were rejected or held because there was no endpoint, as of the last poll.", "magic_ip", "port", "protocol"),
		targets:        d("magic_ip_targets", "Pods of the node that a magic IP selects, by state: ready, not_ready, terminating.", "state"),
		problem:        d("magic_ip_problem", "1 while status shows an error, a note or a link of this kind, else 0.", "kind"),
		config:         d("magic_ip_config_info", "Always 1: hash of the configuration in force.", "hash"),
		conflist:       d("magic_ip_conflist_restored_total", "How often the installer has put an entry back that another program had removed; absent without an installer."),
		installed:      d("magic_ip_installed", "1 where the installer has put the plugin in place and reports no error, 0 where it reports one; absent without an installer."),
	}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(c chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, c) }

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	status, polledAt, hash := m.status, m.polledAt, m.hash
	m.mu.Unlock()
	d := descs()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	if status != nil {
		gauge(d.failing, one(status.LastError != ""))
		collectPorts(status, d, gauge)
		collectCounts(status, d, c)
		for kind := range runtimedir.ProblemKinds() {
			gauge(d.problem, one(slices.Contains(status.Problems, kind)), kind)
		}
		gauge(d.targets, float64(status.Targets.Ready), "ready")
		gauge(d.targets, float64(status.Targets.NotReady), "not_ready")
		gauge(d.targets, float64(status.Targets.Terminating), "terminating")
		m.collectConnections(status, d, gauge)
	}
	if hash != "" {
		gauge(d.config, 1, hash)
	}
	gauge(d.info, 1, m.Name, m.Version, m.Backend)
	if !polledAt.IsZero() {
		gauge(d.heartbeat, seconds(polledAt))
	}
	if installed, err := runtimedir.New(m.RuntimeDir).Installer(m.Name).ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
		gauge(d.installed, one(err == nil && installed.LastError == ""))
		if err == nil {
			c <- prometheus.MustNewConstMetric(d.conflist, prometheus.CounterValue, float64(installed.Restored))
		}
	}
	if m.API == nil {
		return
	}
	for _, feed := range m.API.Feeds() {
		gauge(d.healthy, one(feed.Healthy), feed.Namespace)
		gauge(d.refused, one(feed.Forbidden), feed.Namespace)
		if !feed.LastSeen.IsZero() {
			gauge(d.heard, seconds(feed.LastSeen), feed.Namespace)
		}
	}
	for kind, count := range m.API.Requests() {
		c <- prometheus.MustNewConstMetric(d.requests, prometheus.CounterValue, float64(count), kind)
	}
}

func collectPorts(status *runtimedir.Status, d desc, gauge func(d *prometheus.Desc, value float64, labels ...string)) {
	states := map[string]int{"served": 0, "without_endpoint": 0, "unserved": 0}
	seen := map[runtimedir.Frontend]bool{}
	for _, m := range status.MagicIPs {
		switch {
		case m.Reason != "":
			states["unserved"]++
			continue
		case len(m.Endpoints) == 0:
			states["without_endpoint"]++
		default:
			states["served"]++
		}
		if !seen[m.Frontend] && len(status.MagicIPs) <= MostPorts {
			seen[m.Frontend] = true
			gauge(d.endpoints, float64(len(m.Endpoints)), labels(m.Frontend)...)
		}
	}
	for state, count := range states {
		gauge(d.ports, float64(count), state)
	}
}

// collectCounts tells how often each port was asked for, where the kernel counts it.
func collectCounts(status *runtimedir.Status, d desc, c chan<- prometheus.Metric) {
	for _, m := range status.MagicIPs {
		if m.Count != nil && m.Reason == "" {
			c <- prometheus.MustNewConstMetric(d.opened, prometheus.CounterValue, float64(m.Count.Opened), labels(m.Frontend)...)
			c <- prometheus.MustNewConstMetric(d.refusedPackets, prometheus.CounterValue, float64(m.Count.Refused), labels(m.Frontend)...)
		}
	}
}

// collectConnections counts the connections of the ports that are served, where there are not too many.
func (m *Metrics) collectConnections(status *runtimedir.Status, d desc, gauge func(d *prometheus.Desc, value float64, labels ...string)) {
	if m.Connections == nil || len(status.MagicIPs) > MostPorts {
		return
	}
	var frontends []runtimedir.Frontend
	for _, port := range status.MagicIPs {
		if port.Reason == "" {
			frontends = append(frontends, port.Frontend)
		}
	}
	counts, err := m.Connections(frontends)
	if m.noteUncounted(err); err != nil {
		return
	}
	for frontend, count := range counts {
		gauge(d.connections, float64(count), labels(frontend)...)
	}
}

// noteUncounted logs why connections cannot be counted, once for as long as that stays the same.
func (m *Metrics) noteUncounted(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if text != "" && text != m.uncounted {
		m.Log.Warn("connections cannot be counted: magic_ip_connections is absent", "error", err)
	}
	m.uncounted = text
}

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
