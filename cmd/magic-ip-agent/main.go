// Command magic-ip-agent keeps a node's magic IPs leading to the node's own pods.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
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
		Use:   "magic-ip-agent",
		Short: "Keeps a node's magic IPs leading to the node's own pods",
		Long: `Keeps a node's magic IPs leading to the node's own pods.

Exit status of all commands: 0 for success, 1 for a failure, 2 for a wrong command line. doctor has one more.`,
		Example: `  magic-ip-agent run --config /etc/magic-ip-address/config.yaml
  magic-ip-agent status
  magic-ip-agent doctor`,
		Version:       fmt.Sprintf("%s %s %s/%s", version, runtime.Version(), runtime.GOOS, runtime.GOARCH),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetVersionTemplate("magic-ip-agent {{.Version}}\n")
	root.AddCommand(runCommand(), installCommand(), uninstallCommand(), statusCommand(), doctorCommand(), askCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "magic-ip-agent %s\n", root.Version)
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
		fmt.Fprintf(root.ErrOrStderr(), "magic-ip-agent: %s%s\n", needsRoot(err), quote.Lines(strings.ReplaceAll(err.Error(), "\n\t", "\n    ")))
	}
	return code.code
}

// needsRoot begins the message of an error whose cause is the user; empty where it is another.
func needsRoot(err error) string {
	if uid := os.Geteuid(); uid != 0 && errors.Is(err, fs.ErrPermission) {
		return fmt.Sprintf("this needs root, and runs as user %d: ", uid)
	}
	return ""
}

// completed has a shell complete the value of a flag by words.
func completed(command *cobra.Command, flag string, words ...string) {
	_ = command.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // fails without the flag
}

// completedNames has a shell complete --name by the agents of the node.
func completedNames(command *cobra.Command, runtimeDir *string) {
	_ = command.RegisterFlagCompletionFunc("name", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, err := runtimedir.New(*runtimeDir).Agents()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}) // fails without the flag
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
