package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent"
)

func statusCommand() *cobra.Command {
	var runtimeDir, name, output string
	var watch, probe bool
	command := &cobra.Command{
		Use:   "status",
		Short: "Show what this node's agents serve, and whether they run",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q is not allowed; allowed: table, json", output)
			}
			for {
				status, err := agent.ReadStatus(runtimeDir, name)
				if err != nil {
					return err
				}
				switch {
				case probe:
					return probeStatus(status)
				case output == "json":
					encoder := json.NewEncoder(cmd.OutOrStdout())
					encoder.SetIndent("", "  ")
					err = encoder.Encode(status)
				default:
					err = status.Write(cmd.OutOrStdout(), time.Now())
				}
				if err != nil || !watch {
					return err
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
	f.BoolVar(&probe, "probe", false, "print nothing where all is well, else the reason, with exit status 1: for a kubelet's exec probe")
	return command
}

// probeStatus is an error, and so exit status 1, where an agent does not do its work.
func probeStatus(status agent.Status) error {
	if len(status.Agents) == 0 {
		return errors.New("no agent has published anything")
	}
	for _, a := range status.Agents {
		if reason := a.Unhealthy(time.Now()); reason != "" {
			return fmt.Errorf("agent %s: %s", a.Name, reason)
		}
	}
	return nil
}
