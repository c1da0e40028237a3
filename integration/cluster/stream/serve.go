package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// serve answers each message with the server's name and the client's address until SIGTERM, and goes on for the time of the drain. Then
// it ends each stream after the answer that it is about to give, and the clients open others. The journal is that of `echo serve`.
func serve(ctx context.Context, started time.Time, args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	tcp := flags.String("tcp", ":8082", "`ADDRESS` to listen at")
	unix := flags.String("unix", "", "`PATH` of a socket; it is taken over from a server that has it")
	delay := flags.Duration("delay", 0, "how long each answer takes")
	drain := flags.Duration("drain", 0, "go on for this time after SIGTERM")
	journalFile := flags.String("journal", os.DevNull, "`FILE` to append to")
	if err := flags.Parse(args); err != nil {
		return err
	}
	journal, err := os.OpenFile(*journalFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	write := func(what string, at time.Time) { fmt.Fprintln(journal, what, at.UTC().Format(time.RFC3339Nano)) }
	write("started", started)

	e := &echo{name: lab.Instance(os.Getenv("POD_NAME"), started), delay: *delay, closing: make(chan struct{})}
	server := grpc.NewServer()
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: service, HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{StreamName: method, ServerStreams: true, ClientStreams: true, Handler: e.handle}},
	}, e)
	listener, err := net.Listen("tcp", *tcp)
	if err != nil {
		return err
	}
	listeners := []net.Listener{listener}
	if *unix != "" {
		local, err := lab.ListenUnix(*unix)
		if err != nil {
			return err
		}
		listeners = append(listeners, local)
	}
	for _, l := range listeners {
		go func() { _ = server.Serve(l) }()
	}
	write("listening", time.Now())

	<-ctx.Done()
	write("terminated", time.Now())
	time.Sleep(*drain)
	write("closed", time.Now())
	close(e.closing)
	time.AfterFunc(time.Second, server.Stop)
	server.GracefulStop()
	return journal.Close()
}

type echo struct {
	name    string
	delay   time.Duration
	closing chan struct{}
}

func (e *echo) handle(_ any, stream grpc.ServerStream) error {
	client := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
	if p, known := peer.FromContext(stream.Context()); known {
		if address, err := netip.ParseAddrPort(p.Addr.String()); err == nil {
			client = address
		}
	}
	messages := make(chan error)
	go func() {
		for {
			err := stream.RecvMsg(new(message))
			select {
			case messages <- err:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case <-e.closing:
			return status.Error(codes.Unavailable, "the server stops")
		case err := <-messages:
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			time.Sleep(e.delay)
			if err := stream.SendMsg(&message{Value: e.name + " " + client.String()}); err != nil {
				return err
			}
		}
	}
}
