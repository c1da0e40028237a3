// Command magic-ip-agent keeps a node's magic IPs leading to the node's own pods.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// version is set by the linker.
var version = "devel" //nolint:gochecknoglobals // -X needs a variable

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	return execute(ctx, rootCommand())
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "magic-ip-agent",
		Short:         "Keeps a node's magic IPs leading to the node's own pods",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(runCommand(), installCommand(), uninstallCommand(), statusCommand(), doctorCommand(), askCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "magic-ip-agent %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		},
	})
	return root
}

// execute runs the command and returns the exit status: 0, 2 where the command line is wrong, what an exitError says, or else 1.
func execute(ctx context.Context, root *cobra.Command) int {
	started := false
	for _, command := range root.Commands() {
		if run := command.RunE; run != nil {
			command.RunE = func(cmd *cobra.Command, args []string) error {
				started = true
				return run(cmd, args)
			}
		}
	}
	err := root.ExecuteContext(ctx)
	code := exitError{code: 1, error: err}
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
	case !started:
		code.code = exitUsage
	}
	if code.error != nil {
		fmt.Fprintln(root.ErrOrStderr(), "magic-ip-agent:", quote.Lines(err.Error()))
	}
	return code.code
}

// exitUsage is the exit status where the command line is wrong.
const exitUsage = 2

// exitError is an exit status, with nothing to print where there is no error in it.
type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }

// exitCode is an error that ends the command with this status and prints nothing; nil where it is 0.
func exitCode(code int) error {
	if code == 0 {
		return nil
	}
	return exitError{code: code}
}

// oneOf is a usage error where the value of a flag is not allowed.
func oneOf(flag, value string, allowed ...string) error {
	if slices.Contains(allowed, value) {
		return nil
	}
	return exitError{fmt.Errorf("%s %q is not allowed; allowed: %s", flag, value, strings.Join(allowed, ", ")), exitUsage}
}
