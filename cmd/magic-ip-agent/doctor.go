package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/doctor"
	"github.com/magic-ip-address/magic-ip-address/agent/screen"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
)

func doctorCommand() *cobra.Command {
	options := doctor.Options{Version: version}
	var output, runtime string
	command := &cobra.Command{
		Use:   "doctor",
		Short: "Look at this node, and say what is wrong and what to do next",
		Long: `Look at this node, and say what is wrong and what to do next. It changes nothing that stays.

Each line begins with ok, warn, FAIL, or -- for what cannot be seen from where it runs; the last line names the first cause.
Exit status: 0 nothing failed, 1 a check failed, 2 the command line is wrong, 3 nothing failed and a check could not look.
Run it as root on the node, or in the agent's or the installer's container, which see less.
With -o json it prints one object; docs/doctor.schema.json is its schema.`,
		Example: `  magic-ip-agent doctor
  magic-ip-agent doctor --from-pod default/client
  magic-ip-agent doctor -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOf("--output", output, "table", "json"); err != nil {
				return err
			}
			var err error
			if options.Runtime, err = conflist.ParseRuntime(runtime); err != nil {
				return fmt.Errorf("--runtime: %w", err)
			}
			report := doctor.Examine(cmd.Context(), options)
			out := cmd.OutOrStdout()
			if output == "json" {
				err = report.WriteJSON(out)
			} else {
				err = report.WriteTable(out, screen.Coloured(out))
			}
			if err != nil {
				return err
			}
			return exitCode(report.Verdict.ExitCode)
		},
	}
	f := command.Flags()
	f.StringVar(&options.RuntimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&options.Name, "name", "", "only the agent called `NAME`")
	f.StringVar(&options.ConfDir, "cni-conf-dir", os.Getenv("CNI_CONF_DIR"), "`DIR` of the CNI configuration; without it the installer's, or "+conflist.DefaultDir)
	f.StringVar(&options.BinDir, "cni-bin-dir", os.Getenv("CNI_BIN_DIR"), "`DIR` of the CNI plugins; without it the installer's, or "+conflist.DefaultBinDir)
	f.StringVar(&options.CiliumStateDir, "cilium-state-dir", dataplane.StateDir, "`DIR` that Cilium's agent keeps its state in")
	runtimeFlag(f, &runtime)
	f.StringVar(&options.FromPod, "from-pod", "", "probe from the network namespace of this pod, `NAMESPACE/NAME`; needs CAP_SYS_ADMIN")
	f.StringVar(&options.NetNS, "netns", "", "probe from the network namespace at this `PATH`; needs CAP_SYS_ADMIN")
	command.MarkFlagsMutuallyExclusive("from-pod", "netns")
	f.StringVarP(&output, "output", "o", "table", "`FORMAT`: table or json")
	completed(command, "output", "table", "json")
	completedNames(command, &options.RuntimeDir)
	return command
}
