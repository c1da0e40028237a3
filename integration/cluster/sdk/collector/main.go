// Command collector is an OpenTelemetry Collector with the receivers of what applications send in the tests, and with an
// exporter that writes into a journal what they have received.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/open-telemetry/opentelemetry-collector-contrib/extension/healthcheckextension"
	"github.com/open-telemetry/opentelemetry-collector-contrib/receiver/statsdreceiver"
	"github.com/open-telemetry/opentelemetry-collector-contrib/receiver/zipkinreceiver"
	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/provider/envprovider"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/exporter"
	"go.opentelemetry.io/collector/extension"
	"go.opentelemetry.io/collector/otelcol"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.opentelemetry.io/collector/service/telemetry/otelconftelemetry"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/sdk/journal"
)

func main() { os.Exit(run()) }

func run() int {
	command := otelcol.NewCommand(otelcol.CollectorSettings{
		BuildInfo: component.BuildInfo{Command: "collector", Description: "OpenTelemetry Collector of the tests", Version: "e2e"},
		Factories: factories,
		ConfigProviderSettings: otelcol.ConfigProviderSettings{ResolverSettings: confmap.ResolverSettings{
			ProviderFactories: []confmap.ProviderFactory{envprovider.NewFactory()},
		}},
	})
	if err := command.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "collector:", err)
		return 1
	}
	return 0
}

func factories() (f otelcol.Factories, err error) {
	f.Telemetry = otelconftelemetry.NewFactory()
	if f.Receivers, err = otelcol.MakeFactoryMap[receiver.Factory](otlpreceiver.NewFactory(), zipkinreceiver.NewFactory(), statsdreceiver.NewFactory()); err != nil {
		return f, err
	}
	if f.Extensions, err = otelcol.MakeFactoryMap[extension.Factory](healthcheckextension.NewFactory()); err != nil {
		return f, err
	}
	f.Exporters, err = otelcol.MakeFactoryMap[exporter.Factory](exporter.NewFactory(component.MustNewType("journal"), func() component.Config { return new(config) },
		exporter.WithTraces(newTraces, component.StabilityLevelDevelopment), exporter.WithMetrics(newMetrics, component.StabilityLevelDevelopment)))
	return f, err
}

// config is that of the exporter: where its journal is.
type config struct {
	Directory string `mapstructure:"directory"`
	Name      string `mapstructure:"name"`
}

// journaling writes the names of spans and metrics, and returns when they are in the file: a client's request has not been
// answered before.
type journaling struct {
	component.StartFunc
	component.ShutdownFunc
	journal *journal.Journal
}

func (journaling) Capabilities() consumer.Capabilities { return consumer.Capabilities{} }

func open(c component.Config) (journaling, error) {
	opened, err := journal.Open(c.(*config).Directory, c.(*config).Name)
	return journaling{journal: opened}, err
}

type traces struct{ journaling }

func newTraces(_ context.Context, _ exporter.Settings, c component.Config) (exporter.Traces, error) {
	opened, err := open(c)
	return traces{opened}, err
}

func (t traces) ConsumeTraces(_ context.Context, received ptrace.Traces) error {
	var names []string
	for _, resource := range received.ResourceSpans().All() {
		for _, scope := range resource.ScopeSpans().All() {
			for _, span := range scope.Spans().All() {
				names = append(names, span.Name())
			}
		}
	}
	return t.journal.Received(names...)
}

type metrics struct{ journaling }

func newMetrics(_ context.Context, _ exporter.Settings, c component.Config) (exporter.Metrics, error) {
	opened, err := open(c)
	return metrics{opened}, err
}

func (m metrics) ConsumeMetrics(_ context.Context, received pmetric.Metrics) error {
	var names []string
	for _, resource := range received.ResourceMetrics().All() {
		for _, scope := range resource.ScopeMetrics().All() {
			for _, metric := range scope.Metrics().All() {
				names = append(names, metric.Name())
			}
		}
	}
	return m.journal.Received(names...)
}
