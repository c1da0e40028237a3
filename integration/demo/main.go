// Command demo shows on this machine what a magic IP does: it makes a node out of namespaces, with real
// CNI plugins, a real agent and pods, and tells what happens. Nothing is left behind, however it ends.
//
// It needs root, and the binaries that `make build tools` makes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func main() { os.Exit(run()) }

func run() int {
	rules := flag.Bool("rules", false, "show the rules in the kernel at the end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := demo(ctx, newStory(os.Stdout), *rules)
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil || interrupted(err):
		fmt.Fprintln(os.Stderr, "demo: interrupted; its node is gone")
		return 130
	}
	fmt.Fprintln(os.Stderr, "demo:", err)
	return 1
}

// interrupted says that a command was ended by the Ctrl-C that this process is still to hear of: a
// terminal sends it to both.
func interrupted(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGINT
}

func demo(ctx context.Context, s *story, rules bool) (err error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return err
	}
	agent := filepath.Join(root, "bin", "magic-ip-agent")
	node, err := lab.NewNode(ctx, lab.NodeOptions{Binaries: lab.Binaries{Agent: agent}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	t := &tour{story: s, node: node, agent: agent, rules: rules}
	for _, step := range []func(context.Context) error{
		t.setUp, t.firstTarget, t.whoIsServed, t.replaced, t.vanished, t.nobody, t.lookInside,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	if s.bad > 0 {
		return fmt.Errorf("%d outcomes, marked ✗, are not as they should be", s.bad)
	}
	return nil
}
