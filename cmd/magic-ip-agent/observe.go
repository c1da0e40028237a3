package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/event"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/agent/metrics"
)

// reportEvents has the agent send Events about its own pod, where it knows which that is.
func (f *runFlags) reportEvents(ctx context.Context, options *agent.Options, pods *kube.Pods, fallback string) {
	self := kube.Self{Namespace: os.Getenv("POD_NAMESPACE"), Name: os.Getenv("POD_NAME"), UID: os.Getenv("POD_UID")}
	if !self.Known() {
		options.Log.Info("no Events: POD_NAME, POD_NAMESPACE and POD_UID do not name the agent's own pod")
		return
	}
	events := pods.Events(ctx, self, options.Log)
	reporter := event.New(event.Options{Send: events.Send, Delay: rand.N(event.Spread), Node: f.nodeName, Fallback: fallback})
	options.Observers = append(options.Observers, reporter.Observe)
	options.Notes = append(options.Notes, func() []agent.Note { return noted("events_dropped", "Events are not sent: ", events.Problem()) })
	options.Tasks = append(options.Tasks, func(ctx context.Context, _ func(agent.Source)) error {
		reporter.Run(ctx)
		return nil
	})
}

// serveMetrics counts what the agent does, where --metrics-address says where to serve that.
func (f *runFlags) serveMetrics(options *agent.Options, pods *kube.Pods, name string) error {
	if f.metricsAddress == "" {
		return nil
	}
	if _, err := net.ResolveTCPAddr("tcp", f.metricsAddress); err != nil {
		return fmt.Errorf("--metrics-address %q is not allowed; allowed: HOST:PORT: %w", f.metricsAddress, err)
	}
	about := metrics.Options{RuntimeDir: f.runtimeDir, Name: name, Version: version, Backend: options.Backend.Name(), Log: options.Log}
	if pods != nil {
		about.API = pods
	}
	about.Connections = conntrack.Table{}.Count
	m := metrics.New(about)
	options.Meter = m
	options.Observers = append(options.Observers, m.Observe)
	options.Notes = append(options.Notes, func() []agent.Note { return noted("metrics", "", m.Problem()) })
	options.Tasks = append(options.Tasks, func(ctx context.Context, _ func(agent.Source)) error {
		m.Serve(ctx, f.metricsAddress)
		return nil
	})
	return nil
}

// noted is a note of text behind prefix; none where there is no text.
func noted(kind, prefix, text string) []agent.Note {
	if text == "" {
		return nil
	}
	return []agent.Note{{Kind: kind, Text: prefix + text}}
}
