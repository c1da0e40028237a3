// Command stream is a gRPC server and its client, as those of package lab are for HTTP: one call, a stream in both
// directions that lasts as long as it can, and a message with its answer after the other. `make compare` runs both. It is
// a module of its own, so that gRPC is none of the project's.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const usage = `usage: stream serve [--tcp ADDRESS] [--unix PATH] [--delay D] [--drain D] [--journal FILE]
       stream load [--for D] ADDRESS:PORT|PATH`

// Kind is what outcomes of the client are noted as.
const kind = "grpc-stream"

const (
	service = "echo.Echo"
	method  = "Stream"
)

// message is what both sides send: text.
type message = wrapperspb.StringValue

var call = grpc.StreamDesc{StreamName: method, ServerStreams: true, ClientStreams: true} //nolint:gochecknoglobals // a constant

func main() { os.Exit(run(time.Now(), os.Args[1:])) }

func run(started time.Time, args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	err := errors.New(usage)
	if len(args) > 0 {
		switch args[0] {
		case "serve":
			err = serve(ctx, started, args[1:])
		case "load":
			err = load(ctx, args[1:])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stream:", err)
		return 1
	}
	return 0
}
