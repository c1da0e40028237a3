package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// load sends messages on one stream, and opens another when it ends. It prints what became of each as `echo load --lines` does.
func load(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	during := flags.Duration("for", 10*time.Second, "how long")
	every := flags.Duration("every", pace.Interval, "send a message once per this time")
	if err := flags.Parse(args); err != nil {
		return err
	}
	client := lab.Client{Kind: kind}
	network := "unix"
	if !strings.HasPrefix(flags.Arg(0), "/") {
		to, err := netip.ParseAddrPort(flags.Arg(0))
		if err != nil {
			return fmt.Errorf("%w\n%s", err, usage)
		}
		client.To, network = to, "tcp"
	}
	s, err := newStream(network, flags.Arg(0))
	if err != nil {
		return err
	}
	probe := lab.StartAsking(s.ask, *every)
	select {
	case <-ctx.Done():
	case <-time.After(*during):
	}
	outcomes := probe.Stop()
	return errors.Join(lab.WriteRequests(json.NewEncoder(os.Stdout), client, outcomes), s.conn.Close())
}

// pace is that of a keep-alive client.
var pace = lab.Loads[lab.KeepAlive] //nolint:gochecknoglobals // a constant

// stream is a client with one stream.
type stream struct {
	conn    *grpc.ClientConn
	cancel  context.CancelFunc // nil: there is no stream
	open    grpc.ClientStream
	answers chan received // closed after the end of the stream
	// refused is when the last attempt to connect that has failed began; 0 before.
	refused atomic.Int64
}

// newStream makes a client that has not connected yet. gRPC waits for a second before it connects again to a server that has refused, and
// longer each time. Here it does not, so that what is measured is the network and not that.
func newStream(network, address string) (*stream, error) {
	s := &stream{}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		began := time.Now()
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			s.refused.Store(began.UnixNano())
		}
		return conn, err
	}
	var err error
	s.conn, err = grpc.NewClient("passthrough:///"+address, grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: pace.Interval, Multiplier: 1, MaxDelay: pace.Interval}, MinConnectTimeout: time.Second,
		}))
	return s, err
}

type received struct {
	text string
	err  error
}

// ask sends a message and waits for its answer. A stream that has ended meanwhile is opened anew before; one that does not
// answer in time is given up.
func (s *stream) ask(ctx context.Context) (lab.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, pace.Timeout)
	defer cancel()
	if s.cancel != nil {
		select {
		case <-s.answers:
			s.close()
		default:
		}
	}
	if s.cancel == nil {
		if err := s.connect(ctx); err != nil {
			return lab.Answer{}, err
		}
	}
	// At io.EOF the stream has ended, and the answer says why.
	if err := s.open.SendMsg(&message{Value: "echo"}); err != nil && !errors.Is(err, io.EOF) {
		s.close()
		return lab.Answer{}, err
	}
	select {
	case answer := <-s.answers:
		if answer.err != nil {
			s.close()
			return lab.Answer{}, answer.err
		}
		server, address, _ := strings.Cut(answer.text, " ")
		from, err := netip.ParseAddrPort(address)
		return lab.Answer{Server: server, Client: from}, err
	case <-ctx.Done():
		s.close()
		return lab.Answer{}, context.Cause(ctx)
	}
}

// connect opens a stream. Between two attempts to connect gRPC answers with the error of the last one: that of one from before this
// message says nothing about it, so the next one is waited for.
func (s *stream) connect(asked context.Context) error {
	const pause = time.Millisecond
	began := time.Now().UnixNano()
	ctx, cancel := context.WithCancel(context.Background())
	open, err := s.conn.NewStream(ctx, &call, "/"+service+"/"+method)
	for status.Code(err) == codes.Unavailable && s.refused.Load() < began && asked.Err() == nil {
		time.Sleep(pause)
		open, err = s.conn.NewStream(ctx, &call, "/"+service+"/"+method)
	}
	if err != nil {
		cancel()
		return err
	}
	answers := make(chan received, 1)
	s.open, s.answers, s.cancel = open, answers, cancel
	go func() {
		defer close(answers)
		for {
			answer := new(message)
			err := open.RecvMsg(answer)
			select {
			case answers <- received{answer.Value, err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return nil
}

func (s *stream) close() {
	s.cancel()
	s.cancel = nil
}
