package main

import (
	"context"
	"encoding/json"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/screen"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func statusCommand() *cobra.Command {
	const interval = time.Second
	var runtimeDir, name, output string
	var watch, probe bool
	command := &cobra.Command{
		Use:   "status",
		Short: "Show what this node's agents serve, and whether they run",
		Long: `Show what this node's agents serve, and whether they run.

Exit status: 0 all of them run and have polled within three intervals, 1 one does not, or none is there, 2 the command line is wrong.
With -o json it prints one object; docs/status.schema.json is its schema.`,
		Example: `  magic-ip-agent status
  magic-ip-agent status --watch
  magic-ip-agent status -o json
  magic-ip-agent status --probe --name default.magic-ip`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("--output", output, "table", "json"); err != nil {
				return err
			}
			look := func() (status.Status, error) {
				read, err := status.Read(runtimedir.New(runtimeDir), name)
				if err == nil && (watch || output == "json") {
					read.Count(conntrack.Table{}.Count)
				}
				read.Judge(time.Now())
				return read, err
			}
			if watch && output == "table" {
				var unhealthy error
				err := screen.Watch(cmd.Context(), cmd.OutOrStdout(), "magic-ip-agent status", interval, func(context.Context) (screen.Frame, error) {
					read, err := look()
					if err != nil {
						return screen.Frame{}, err
					}
					unhealthy = read.Unhealthy(time.Now())
					return read.Frame(time.Now())
				})
				if err == nil && unhealthy != nil { // which has been shown
					err = exitCode(1)
				}
				return err
			}
			for {
				read, err := look()
				switch {
				case err != nil:
				case probe:
					return read.Unhealthy(time.Now())
				case output == "json":
					err = writeJSON(cmd.OutOrStdout(), read)
				default:
					err = read.Write(cmd.OutOrStdout(), time.Now(), screen.Coloured(cmd.OutOrStdout()))
				}
				if err != nil {
					return err
				}
				if watch {
					select {
					case <-cmd.Context().Done():
					case <-time.After(interval):
						continue
					}
				}
				if read.Unhealthy(time.Now()) != nil { // which has been shown
					return exitCode(1)
				}
				return nil
			}
		},
	}
	f := command.Flags()
	f.StringVar(&runtimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&name, "name", "", "only the agent called `NAME`")
	f.StringVarP(&output, "output", "o", "table", "`FORMAT`: table or json")
	f.BoolVar(&watch, "watch", false, "again every second, until Ctrl-C; on a terminal one screen, with marks at what has changed")
	f.BoolVar(&probe, "probe", false, "print nothing where all is well, else the reason, with exit status 1: for a kubelet's exec probe")
	command.MarkFlagsMutuallyExclusive("probe", "watch")
	completed(command, "output", "table", "json")
	completedNames(command, &runtimeDir)
	return command
}

func writeJSON(w io.Writer, read status.Status) error {
	data, err := json.MarshalIndent(read, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(append(quote.JSON(data), '\n'))
	return err
}
