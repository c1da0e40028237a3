package main

import (
	"encoding/json"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func statusCommand() *cobra.Command {
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
			for {
				read, err := status.Read(runtimedir.New(runtimeDir), name)
				if err != nil {
					return err
				}
				switch {
				case probe:
					return read.Unhealthy(time.Now())
				case output == "json":
					err = writeJSON(cmd.OutOrStdout(), read)
				default:
					err = read.Write(cmd.OutOrStdout(), time.Now(), coloured(cmd.OutOrStdout()))
				}
				if err != nil {
					return err
				}
				if !watch {
					if read.Unhealthy(time.Now()) != nil { // which has been shown
						return exitCode(1)
					}
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(time.Second):
				}
			}
		},
	}
	f := command.Flags()
	f.StringVar(&runtimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&name, "name", "", "only the agent called `NAME`")
	f.StringVarP(&output, "output", "o", "table", "`FORMAT`: table or json")
	f.BoolVar(&watch, "watch", false, "again every second")
	completed(command, "output", "table", "json")
	completedNames(command, &runtimeDir)
	f.BoolVar(&probe, "probe", false, "print nothing where all is well, else the reason, with exit status 1: for a kubelet's exec probe")
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
