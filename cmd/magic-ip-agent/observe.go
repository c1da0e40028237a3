package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync/atomic"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/event"
	"github.com/magic-ip-address/magic-ip-address/agent/foreign"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/agent/metrics"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
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

// lookAround looks once for rules of others that translate a magic IP, and for what bypasses the rules of this agent. The first
// is a look at all rules of the node: the doctor command repeats it.
func lookAround(options *agent.Options, initial config.Config) {
	var frontends []plan.Frontend
	for _, port := range initial.Ports {
		frontends = append(frontends, port.Frontend)
	}
	var found atomic.Pointer[[]agent.Note]
	options.Notes = append(options.Notes, func() []agent.Note {
		if notes := found.Load(); notes != nil {
			return *notes
		}
		return nil
	})
	options.Tasks = append(options.Tasks, func(ctx context.Context, wake func(agent.Source)) error {
		rules, _ := foreign.Rules(ctx, frontends)
		var notes []agent.Note
		for _, rule := range rules {
			options.Log.Warn("another program translates a magic IP too: where its rule comes first, clients do not reach the endpoint; remove it", "rule", rule.Text)
			notes = append(notes, agent.Note{Kind: "foreign_rule", Text: "when the agent started, another program translated a magic IP too; remove the rule: " + rule.Text})
		}
		for _, bypass := range node.Bypasses() {
			options.Log.Warn("packets of pods may bypass the rules", "reason", bypass)
			notes = append(notes, agent.Note{Kind: "bypass", Text: bypass})
		}
		found.Store(&notes)
		wake(agent.Notes)
		return nil
	})
}

// noted is a note of text behind prefix; none where there is no text.
func noted(kind, prefix, text string) []agent.Note {
	if text == "" {
		return nil
	}
	return []agent.Note{{Kind: kind, Text: prefix + text}}
}
