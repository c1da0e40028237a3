// Command app is an application as users have it: it makes spans, counts or DNS queries, and its SDK sends them to where the
// environment says. It writes into a journal how many it has made.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/sdk/journal"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := load(ctx, args); err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		return 1
	}
	return 0
}

// client is an SDK that sends to a server.
type client interface {
	// Send hands the SDK an item of this name.
	Send(name string) error
	// Close sends what the SDK still has, for at most as long as the context.
	Close(context.Context) error
}

// clients are the SDKs by the name of what they send; where to stands in the environment, or in /etc/resolv.conf. The
// journal is for those that see themselves whether they were answered.
func clients() map[string]func(context.Context, *journal.Journal) (client, error) {
	return map[string]func(context.Context, *journal.Journal) (client, error){
		"otlp":                 func(ctx context.Context, _ *journal.Journal) (client, error) { return newOTLP(ctx) },
		"zipkin":               func(context.Context, *journal.Journal) (client, error) { return newZipkin() },
		"statsd":               func(context.Context, *journal.Journal) (client, error) { return newStatsd() },
		"dogstatsd":            func(context.Context, *journal.Journal) (client, error) { return newDogStatsd() },
		"datadog-traces":       func(context.Context, *journal.Journal) (client, error) { return newDatadogTraces(0) },
		"datadog-traces-retry": func(context.Context, *journal.Journal) (client, error) { return newDatadogTraces(attempts) },
		"elastic":              func(context.Context, *journal.Journal) (client, error) { return newElastic() },
		"metadata":             newMetadata,
		"dns-go":               func(_ context.Context, j *journal.Journal) (client, error) { return newResolver(j, askGo) },
		"dns-glibc":            func(_ context.Context, j *journal.Journal) (client, error) { return newResolver(j, askGlibc) },
		"dns-udp":              func(_ context.Context, j *journal.Journal) (client, error) { return newResolver(j, once("udp")) },
		"dns-tcp":              func(_ context.Context, j *journal.Journal) (client, error) { return newResolver(j, once("tcp")) },
	}
}

// flushLimit is for how long an SDK may go on sending after the last item.
const flushLimit = time.Minute

// load sends until SIGTERM, and then writes the file NAME.sent into the directory of the journals: the number of items. What
// the SDK says stands in NAME.log there.
func load(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("app", flag.ContinueOnError)
	what := flags.String("send", "", "spans, counts or queries of which `SDK`")
	name := flags.String("name", "", "of this application, in the names of what it sends")
	directory := flags.String("journals", "", "`DIRECTORY` of the journals")
	every := flags.Duration("every", 20*time.Millisecond, "send one item per this time")
	if err := flags.Parse(args); err != nil {
		return err
	}
	start, known := clients()[*what]
	if !known {
		return fmt.Errorf("--send %q is none of %s", *what, strings.Join(slices.Sorted(maps.Keys(clients())), ", "))
	}
	answered, err := journal.Open(*directory, *name)
	if err != nil {
		return err
	}
	said, err := os.Create(filepath.Join(*directory, *name+".log"))
	if err != nil {
		return err
	}
	if err := syscall.Dup3(int(said.Fd()), int(os.Stderr.Fd()), 0); err != nil {
		return err
	}
	sdk, err := start(context.WithoutCancel(ctx), answered)
	if err != nil {
		return err
	}
	sent := 0
	for ticker := time.NewTicker(*every); ctx.Err() == nil; <-ticker.C {
		// An application does not look at the error: the SDK has taken the item all the same, or has dropped it.
		if err := sdk.Send(journal.Name(*name, sent)); err != nil {
			fmt.Fprintln(os.Stderr, "app:", err)
		}
		sent++
	}
	limited, cancel := context.WithTimeout(context.Background(), flushLimit)
	defer cancel()
	err = sdk.Close(limited)
	temporary := filepath.Join(*directory, "."+*name)
	return errors.Join(err, os.WriteFile(temporary, fmt.Appendln(nil, sent), 0o644), os.Rename(temporary, filepath.Join(*directory, *name+".sent")))
}
