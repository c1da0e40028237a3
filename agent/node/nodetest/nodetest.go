// Package nodetest gives a test a network namespace of its own to be the node.
package nodetest

import (
	"errors"
	"fmt"
	"os"
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

// Another makes a network namespace beside the test's, for the far ends of links. It returns a path that ip(8) takes for
// its name; the namespace ends with the test.
func Another(t *testing.T) string {
	t.Helper()
	made := make(chan error, 1)
	var file *os.File
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			file, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		t.Fatalf("a network namespace (needs root): %v", err)
	}
	t.Cleanup(func() { _ = file.Close() })
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), file.Fd())
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
