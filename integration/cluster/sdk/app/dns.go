package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"

	"github.com/miekg/dns"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/sdk/journal"
)

// zone has an address for each name, and a long text.
const zone = "e2e.test."

// resolver asks for names of which each is asked for once, and writes into the journal which of them were answered.
type resolver struct {
	ask      func(context.Context, string) error
	answered *journal.Journal
	asking   sync.WaitGroup
}

func newResolver(answered *journal.Journal, ask func(context.Context, string) error) (client, error) {
	return &resolver{ask: ask, answered: answered}, nil
}

// Send asks in the background, as one of many requests of an application.
func (r *resolver) Send(name string) error {
	r.asking.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), flushLimit)
		defer cancel()
		err := r.ask(ctx, strings.ReplaceAll(name, ".", "-")+"."+zone)
		if err == nil {
			err = r.answered.Received(name)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "app:", err)
		}
	})
	return nil
}

func (r *resolver) Close(context.Context) error {
	r.asking.Wait()
	return nil
}

// askGo is the resolver of Go, which reads /etc/resolv.conf.
func askGo(ctx context.Context, name string) error {
	_, err := (&net.Resolver{PreferGo: true}).LookupNetIP(ctx, "ip4", name)
	return err
}

// askGlibc is the resolver of the C library.
func askGlibc(ctx context.Context, name string) error {
	printed, err := exec.CommandContext(ctx, "/usr/bin/getent", "ahostsv4", name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("getent %s: %w: %s", name, err, printed)
	}
	return nil
}

// once asks the first name server for the long text, as dig +tries=1 does: nothing is asked again.
func once(network string) func(context.Context, string) error {
	return func(ctx context.Context, name string) error {
		configuration, err := dns.ClientConfigFromFile("/etc/resolv.conf")
		if err != nil {
			return err
		}
		question := new(dns.Msg)
		question.SetQuestion(name, dns.TypeTXT)
		question.SetEdns0(4096, false)
		asked := dns.Client{Net: network, Timeout: flushLimit / 2}
		answer, _, err := asked.ExchangeContext(ctx, question, net.JoinHostPort(configuration.Servers[0], configuration.Port))
		if err != nil {
			return err
		}
		if size := answer.Len(); answer.Rcode != dns.RcodeSuccess || answer.Truncated || size <= 1232 {
			return fmt.Errorf("%s by %s: %s, %d bytes, truncated: %v", name, network, dns.RcodeToString[answer.Rcode], size, answer.Truncated)
		}
		return nil
	}
}
