// Command standin takes what Datadog's tracer and Elastic's APM agent send, and writes into a journal what it has received.
// It stands in for the Datadog Agent and for APM Server, whose receivers cannot be had as Go modules here: it knows their
// intake alone.
package main

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	pb "github.com/DataDog/datadog-agent/pkg/proto/pbgo/trace"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/sdk/journal"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := serve(ctx, args); err != nil {
		fmt.Fprintln(os.Stderr, "standin:", err)
		return 1
	}
	return 0
}

// shutdown is for how long requests may go on after SIGTERM, as APM Server's shutdown_timeout.
const shutdown = 30 * time.Second

// serve answers until SIGTERM, and then finishes what it has been asked.
func serve(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("standin", flag.ContinueOnError)
	listen := flags.String("listen", "", "`ADDRESS`")
	directory := flags.String("journals", "", "`DIRECTORY` of the journals")
	name := flags.String("name", "", "of the journal")
	if err := flags.Parse(args); err != nil {
		return err
	}
	opened, err := journal.Open(*directory, *name)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/v0.4/traces", answer(opened, datadog, http.StatusOK, `{"rate_by_service":{}}`))
	mux.HandleFunc("POST /intake/v2/events", answer(opened, elastic, http.StatusAccepted, ""))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"version":"8.19.0"}`) })
	server := &http.Server{Addr: *listen, Handler: mux, ReadHeaderTimeout: time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	limited, cancel := context.WithTimeout(context.Background(), shutdown)
	defer cancel()
	return server.Shutdown(limited)
}

// answer is a handler that journals what it has read of a request, even where the rest does not come.
func answer(j *journal.Journal, read func(io.Reader, func(...string) error) error, status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, request *http.Request) {
		if err := read(request.Body, j.Received); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

// datadog reads traces as MessagePack: https://docs.datadoghq.com/tracing/guide/send_traces_to_agent_by_api/
func datadog(body io.Reader, received func(...string) error) error {
	data, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	var traces pb.Traces
	if _, err := traces.UnmarshalMsg(data); err != nil {
		return err
	}
	var names []string
	for _, trace := range traces {
		for _, span := range trace {
			names = append(names, span.Resource)
		}
	}
	return received(names...)
}

// elastic reads lines of JSON, which come for as long as the request lasts:
// https://www.elastic.co/guide/en/apm/guide/current/api-events.html
func elastic(body io.Reader, received func(...string) error) error {
	inflated, err := zlib.NewReader(body)
	if err != nil {
		return err
	}
	for lines := bufio.NewReader(inflated); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(bytes.TrimSpace(line)) == 0 {
			return nil
		}
		if err != nil {
			return err
		}
		var event struct {
			Transaction struct {
				Name string `json:"name"`
			} `json:"transaction"`
		}
		if err := json.Unmarshal(line, &event); err != nil {
			return err
		}
		if err := received(event.Transaction.Name); err != nil {
			return err
		}
	}
}
