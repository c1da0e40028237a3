package program

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// standIn is a program that does this.
func standIn(t *testing.T, script string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "stand-in")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOutput(t *testing.T) {
	if out, err := Output(t.Context(), Timeout, "in", "cat"); err != nil || out != "in" {
		t.Errorf("%q, %v", out, err)
	}
	_, err := Output(t.Context(), Timeout, "", standIn(t, "echo broken >&2; exit 4"), "-x")
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 4 || !strings.Contains(err.Error(), "stand-in -x: ") || !strings.HasSuffix(err.Error(), ": broken") {
		t.Errorf("a program that fails: %v", err)
	}
	if _, err := Output(t.Context(), Timeout, "", "no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("no program: %v", err)
	}
}

// TestHungProgram: a program that does not end is killed, also where a child of it keeps its output open.
func TestHungProgram(t *testing.T) {
	for _, script := range []string{"exec sleep 600", "sleep 600"} {
		_, err := Output(t.Context(), 50*time.Millisecond, "", standIn(t, script))
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "killed, since it did not end within 50ms") || !Transient(err) {
			t.Errorf("%s: %v", script, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Output(ctx, Timeout, "", standIn(t, "exec sleep 600")); !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "did not end") {
		t.Errorf("ended by its caller: %v", err)
	}
}

func TestRetry(t *testing.T) {
	busy := errors.New("nft: Error: Could not process rule: Device or resource busy")
	unsupported := errors.New("nft: Error: Could not process rule: Operation not supported")
	for _, tt := range []struct {
		errs  []error
		calls int
	}{
		{[]error{nil}, 1},
		{[]error{busy, nil}, 2},
		{[]error{unsupported}, 1},
		{[]error{fmt.Errorf("too many: %w", busy), unsupported}, 2},
		{[]error{busy, busy, busy}, 3},
	} {
		synctest.Test(t, func(t *testing.T) {
			calls, began := 0, time.Now()
			err := Retry(t.Context(), func() error { calls++; return tt.errs[calls-1] })
			if calls != tt.calls || !errors.Is(err, tt.errs[calls-1]) || time.Since(began) != time.Duration(calls-1)*time.Second {
				t.Errorf("%v: %d calls in %v, then %v", tt.errs, calls, time.Since(began), err)
			}
		})
	}
}
