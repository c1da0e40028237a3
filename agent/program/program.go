// Package program runs the programs that load and list rules of the kernel, and says which of their failures may pass.
package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Timeout is how long a program may take before it is killed: ten times as long as nft takes for 10,000 magic IPs on a busy node. A shorter
// one would kill the same load again and again where it is only slow.
const Timeout = time.Minute

// Output runs a program with this standard input to its end, and returns its standard output. What it says on standard error goes into the
// error, as does that it was killed because it did not end within timeout.
func Output(ctx context.Context, timeout time.Duration, stdin, name string, args ...string) (stdout string, err error) {
	var out, stderr bytes.Buffer
	err = Within(ctx, timeout, func(ctx context.Context) error {
		command := exec.CommandContext(ctx, name, args...)
		command.Stdin, command.Stdout, command.Stderr = strings.NewReader(stdin), &out, &stderr
		command.WaitDelay = time.Second // a child of it may hold its output open
		return command.Run()
	})
	if err == nil {
		return out.String(), nil
	}
	if said := strings.TrimSpace(stderr.String()); said != "" {
		err = fmt.Errorf("%w: %s", err, said)
	}
	return "", fmt.Errorf("%s: %w", strings.Join(append([]string{name}, args...), " "), err)
}

// Within calls run with a context that ends after timeout, and says so in the error where that is why it has failed.
func Within(ctx context.Context, timeout time.Duration, run func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := run(bounded)
	if err != nil && bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("killed, since it did not end within %v: %w: %w", timeout, bounded.Err(), err)
	}
	return err
}

// Transient reports whether a failure may pass by itself, and says nothing about what the program and the kernel can do: the machine lacks
// memory, files or time, the kernel is busy, or the program was killed.
func Transient(err error) bool {
	if err == nil {
		return false
	}
	exit := new(exec.ExitError)
	if errors.As(err, &exit) && !exit.Exited() || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	return Says(err, syscall.EAGAIN, syscall.EBUSY, syscall.EINTR, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM)
}

// Says reports whether one of these is the cause of an error, by what programs print for it (strerror(3)).
func Says(err error, causes ...syscall.Errno) bool {
	for _, cause := range causes {
		if errors.Is(err, cause) || strings.Contains(strings.ToLower(err.Error()), strings.ToLower(cause.Error())) {
			return true
		}
	}
	return false
}

// Retry calls f until it succeeds or fails for a reason that does not pass, three times at most and a second apart.
func Retry(ctx context.Context, f func() error) error {
	const attempts, pause = 3, time.Second
	for attempt := 1; ; attempt++ {
		err := f()
		if attempt == attempts || !Transient(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
	}
}
