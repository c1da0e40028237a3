// Package nodetest gives a test a network namespace of its own to be the node.
package nodetest

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Namespace moves the test's goroutine into a new network namespace, for good: its thread ends with it. Commands
// are those of IP.
func Namespace(t *testing.T, commands string) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("a network namespace (needs root): %v", err)
	}
	IP(t, commands)
}

// IP runs ip(8) with the arguments on each line.
func IP(t *testing.T, commands string) {
	t.Helper()
	for line := range strings.Lines(commands) {
		if fields := strings.Fields(line); len(fields) > 0 {
			Run(t, "ip", fields...)
		}
	}
}

// Run runs a command and returns what it printed.
func Run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).Output()
	if err != nil {
		exit := &exec.ExitError{}
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
	}
	return string(out)
}
