package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestServersReplaced: one server after the other at one socket. A message while none is there fails, the others are answered, by the
// server that has the socket; a stream that its server ends between two messages costs none.
func TestServersReplaced(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "socket")
	ctx, cancel := lab.Patience(t.Context(), time.Minute)
	defer cancel()
	s, err := newStream("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.conn.Close() }()
	ask := func(want string) {
		t.Helper()
		err := lab.Eventually(ctx, func() error {
			answer, err := s.ask(ctx)
			if err == nil && answer.Server != want {
				err = fmt.Errorf("answered by %s, want %s", answer.Server, want)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 {
		started := time.Now().Add(time.Duration(i) * time.Hour)
		served, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- serve(served, started, []string{"--tcp", "127.0.0.1:0", "--unix", path}) }()
		ask(lab.Instance("", started))
		for range 3 { // on the same stream
			if answer, err := s.ask(ctx); err != nil || answer.Server != lab.Instance("", started) {
				t.Fatalf("answered by %+v, %v", answer, err)
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			// The end of the stream has left the server, and may not have come to the client yet: a message would be lost by it.
			if err := lab.Eventually(ctx, func() error {
				if len(s.answers) == 0 {
					return errors.New("the client's stream has not ended")
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				began := time.Now().UnixNano()
				if answer, err := s.ask(ctx); err == nil {
					t.Errorf("answered by %+v although no server is there", answer)
				} else if s.refused.Load() < began {
					t.Errorf("%v, of an attempt from before the message", err)
				}
			}
			if _, err := net.Dial("unix", path); err == nil {
				t.Error("the socket of a server that has ended takes connections")
			}
		}
	}
}
