package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/DataDog/datadog-go/v5/statsd"
	"github.com/DataDog/dd-trace-go/v2/ddtrace/tracer"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	zipkin "github.com/openzipkin/zipkin-go"
	zipkinhttp "github.com/openzipkin/zipkin-go/reporter/http"
	"go.elastic.co/apm/v2"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/sdk/journal"
)

// otlp is the OpenTelemetry SDK with its own batches and retries.
type otlp struct{ provider *sdktrace.TracerProvider }

func newOTLP(ctx context.Context) (client, error) {
	var transport otlptrace.Client
	switch protocol := os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"); protocol {
	case "grpc":
		transport = otlptracegrpc.NewClient()
	case "http/protobuf":
		transport = otlptracehttp.NewClient()
	default:
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_PROTOCOL is %q, want grpc or http/protobuf", protocol)
	}
	exporter, err := otlptrace.New(ctx, transport)
	if err != nil {
		return nil, err
	}
	return otlp{sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter))}, nil
}

func (o otlp) Send(name string) error {
	_, span := o.provider.Tracer("app").Start(context.Background(), name)
	span.End()
	return nil
}

func (o otlp) Close(ctx context.Context) error { return o.provider.Shutdown(ctx) }

// zipkinReporter is Zipkin's reporter: it keeps a batch until the server has taken it.
type zipkinReporter struct {
	tracer *zipkin.Tracer
	close  func() error
}

func newZipkin() (client, error) {
	reporter := zipkinhttp.NewReporter(os.Getenv("OTEL_EXPORTER_ZIPKIN_ENDPOINT"))
	local, err := zipkin.NewEndpoint("app", "")
	if err != nil {
		return nil, err
	}
	made, err := zipkin.NewTracer(reporter, zipkin.WithLocalEndpoint(local))
	return zipkinReporter{made, reporter.Close}, err
}

func (z zipkinReporter) Send(name string) error {
	z.tracer.StartSpan(name).Finish()
	return nil
}

func (z zipkinReporter) Close(context.Context) error { return z.close() }

// counts is Datadog's client of statsd and DogStatsD: datagrams, and nobody answers.
type counts struct{ client *statsd.Client }

func newStatsd() (client, error) {
	return newCounts(net.JoinHostPort(os.Getenv("STATSD_HOST"), os.Getenv("STATSD_PORT")))
}

// newDogStatsd takes the address from DD_AGENT_HOST and DD_DOGSTATSD_PORT.
func newDogStatsd() (client, error) { return newCounts("") }

func newCounts(address string) (client, error) {
	// Each count is to be seen by the server, and not the sum of some.
	made, err := statsd.New(address, statsd.WithoutClientSideAggregation(), statsd.WithoutTelemetry())
	return counts{made}, err
}

func (c counts) Send(name string) error { return c.client.Count(name, 1, nil, 1) }

func (c counts) Close(context.Context) error { return errors.Join(c.client.Flush(), c.client.Close()) }

// attempts is how often Datadog's tracer sends a batch again, a second later each time, where it is told to; by itself it does not.
const attempts = 60

type datadogTraces struct{}

// newDatadogTraces takes the address from DD_AGENT_HOST and DD_TRACE_AGENT_PORT.
func newDatadogTraces(retries int) (client, error) {
	return datadogTraces{}, tracer.Start(tracer.WithSendRetries(retries), tracer.WithRetryInterval(1), tracer.WithService("app"))
}

func (datadogTraces) Send(name string) error {
	tracer.StartSpan("load", tracer.ResourceName(name)).Finish()
	return nil
}

func (datadogTraces) Close(context.Context) error {
	tracer.Flush()
	tracer.Stop()
	return nil
}

// elastic is Elastic's agent: one request after the other, each of up to ten seconds of events.
type elastic struct{ tracer *apm.Tracer }

func newElastic() (client, error) {
	made, err := apm.NewTracer("app", "e2e")
	return elastic{made}, err
}

func (e elastic) Send(name string) error {
	e.tracer.StartTransaction(name, "load").End()
	return nil
}

func (e elastic) Close(ctx context.Context) error {
	e.tracer.Flush(ctx.Done())
	e.tracer.Close()
	return ctx.Err()
}

// metadata is Amazon's SDK, which asks for the name of the instance.
type metadata struct {
	client   *imds.Client
	answered *journal.Journal
}

func newMetadata(ctx context.Context, answered *journal.Journal) (client, error) {
	loaded, err := config.LoadDefaultConfig(ctx)
	return metadata{imds.NewFromConfig(loaded), answered}, err
}

func (m metadata) Send(name string) error {
	answer, err := m.client.GetMetadata(context.Background(), &imds.GetMetadataInput{Path: "instance-id"})
	if err != nil {
		return err
	}
	return errors.Join(answer.Content.Close(), m.answered.Received(name))
}

func (metadata) Close(context.Context) error { return nil }
