package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/doctor"
)

func doctorCommand() *cobra.Command {
	options := doctor.Options{Version: version}
	command := &cobra.Command{
		Use:   "doctor",
		Short: "Look at this node, and say what is wrong and what to do next",
		Long: `Look at this node, and say what is wrong and what to do next. It changes nothing.

Each line begins with ok, warn, FAIL, or -- for what cannot be seen from where it runs; the exit status is 1 where
anything has failed. Run it as root on the node, or in the agent's container.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			failed, err := doctor.Write(cmd.OutOrStdout(), doctor.Examine(cmd.Context(), options))
			if err == nil && failed > 0 {
				err = fmt.Errorf("%d checks have failed", failed)
			}
			return err
		},
	}
	f := command.Flags()
	f.StringVar(&options.RuntimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&options.Name, "name", "", "only the agent called `NAME`")
	f.StringVar(&options.ConfDir, "cni-conf-dir", "/etc/cni/net.d", "`DIR` of the CNI configuration")
	f.StringVar(&options.BinDir, "cni-bin-dir", "/opt/cni/bin", "`DIR` of the CNI plugins")
	return command
}
