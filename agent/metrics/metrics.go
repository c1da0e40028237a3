// Package metrics serves what an agent does to Prometheus.
//
// Series are made of the configuration alone, never of pods or clients; of more than MostPorts ports of magic IPs
// there are only the sums.
package metrics

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
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
	Log                                *slog.Logger
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

	mu       sync.Mutex
	status   *runtimedir.Status
	polledAt time.Time
	problem  string
}

// New makes metrics of which nothing is counted yet.
func New(options Options) *Metrics {
	m := &Metrics{
		Options: options, registry: prometheus.NewRegistry(),
		syncs: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "magic_ip_sync_duration_seconds", Help: "How long it took to bring the rules in the kernel to a new state, by backend.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}, []string{"backend"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "magic_ip_sync_failures_total", Help: "Attempts to bring the rules in the kernel to a new state that have failed, by backend.",
		}, []string{"backend"}),
		synced: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "magic_ip_last_successful_sync_timestamp_seconds", Help: "When the rules in the kernel were last changed with success; they are changed only where something has.",
		}),
		routed: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "magic_ip_record_to_rule_seconds", Help: "From the CNI plugin's record of a pod to its rule in the kernel, where the magic IP had no endpoint before.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 14),
		}),
		deleted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "magic_ip_flows_deleted_total", Help: "Conntrack entries deleted because their endpoint is gone.",
		}),
	}
	m.failed.WithLabelValues(m.Backend)
	m.registry.MustRegister(m, m.syncs, m.failed, m.synced, m.routed, m.deleted, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
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

// Polled notes that the loop has gone through all sources.
func (m *Metrics) Polled() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.polledAt = time.Now()
}

// Observe takes in a status of the agent and the one before it.
func (m *Metrics) Observe(before, now *runtimedir.Status) {
	for _, added := range newlyRouted(before, now) {
		m.routed.Observe(time.Since(added).Seconds())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = now
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
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 3, ErrorHandling: promhttp.ContinueOnError})
}

// desc are what is told as of the moment of asking.
type desc struct{ info, heartbeat, failing, endpoints, ports, healthy, heard, refused, requests, installed *prometheus.Desc }

func descs() desc {
	d := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return desc{
		info:      d("magic_ip_agent_info", "Always 1: name, version and backend of the agent.", "name", "version", "backend"),
		heartbeat: d("magic_ip_agent_heartbeat_timestamp_seconds", "When the agent last went through its loop; it does so every pollInterval."),
		failing:   d("magic_ip_agent_failing", "1 where `magic-ip-agent status` shows an error, else 0."),
		endpoints: d("magic_ip_endpoints", "Pods that the traffic to a port of a magic IP goes to now.", "magic_ip", "port", "protocol"),
		ports:     d("magic_ip_ports", "Ports of magic IPs by state: served, without_endpoint, unserved (claimed by another agent, or not allowed).", "state"),
		healthy:   d("magic_ip_api_watch_healthy", "1 while the watch of a namespace's pods brings what it should, else 0.", "namespace"),
		heard:     d("magic_ip_api_watch_last_event_timestamp_seconds", "When the watch last brought an event or a bookmark.", "namespace"),
		refused:   d("magic_ip_api_forbidden", "1 where RBAC refuses the pods of a namespace, else 0.", "namespace"),
		requests:  d("magic_ip_api_requests_total", "Requests to the Kubernetes API: list, watch, poll (the lists made while the watch is not healthy) and owner.", "kind"),
		installed: d("magic_ip_installed", "1 where the installer has put the plugin in place and reports no error, 0 where it reports one; absent without an installer."),
	}
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(c chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, c) }

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(c chan<- prometheus.Metric) {
	m.mu.Lock()
	status, polledAt := m.status, m.polledAt
	m.mu.Unlock()
	d := descs()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	if status != nil {
		gauge(d.failing, one(status.LastError != ""))
		collectPorts(status, d, gauge)
	}
	gauge(d.info, 1, m.Name, m.Version, m.Backend)
	if !polledAt.IsZero() {
		gauge(d.heartbeat, seconds(polledAt))
	}
	if installed, err := runtimedir.New(m.RuntimeDir).Installer(m.Name).ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
		gauge(d.installed, one(err == nil && installed.LastError == ""))
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
			gauge(d.endpoints, float64(len(m.Endpoints)), m.Address.String(), strconv.Itoa(int(m.Port)), string(m.Protocol))
		}
	}
	for state, count := range states {
		gauge(d.ports, float64(count), state)
	}
}

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
