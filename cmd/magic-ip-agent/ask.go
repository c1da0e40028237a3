package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/ask"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func askCommand() *cobra.Command {
	var runtimeDir, name, daemonSet, kubeconfig string
	var timeout time.Duration
	command := &cobra.Command{
		Use:   "ask",
		Short: "Connect to the magic IPs of this node as a client, and compare the outcome with the status",
		Long: `Connect to the magic IPs of this node as a client, and compare the outcome with the status of the agent: each
port with an endpoint must accept, each port without one must refuse at once. A port of UDP must not refuse. It does
not see which pod has accepted. While an outcome is wrong, it asks again; exit status 1 if one still is at the end.

With --nodes it asks nothing itself: it waits until the pods of a DaemonSet, which run this command on their nodes, have ended,
and prints their results.`,
		Example: `  magic-ip-agent ask --name default.magic-ip
  magic-ip-agent ask --nodes kube-system/asker --timeout 2m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if daemonSet != "" {
				return askNodes(ctx, cmd.OutOrStdout(), kubeconfig, daemonSet)
			}
			return askHere(ctx, cmd.OutOrStdout(), runtimedir.New(runtimeDir).Agent(name))
		},
	}
	f := command.Flags()
	f.StringVar(&runtimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&name, "name", "", "`NAME` of the agent")
	f.StringVar(&daemonSet, "nodes", "", "`NAMESPACE/NAME` of a DaemonSet whose pods run this command on all nodes")
	f.StringVar(&kubeconfig, "kubeconfig", "", "`FILE` with credentials for the Kubernetes API, with --nodes; without it the pod's service account")
	f.DurationVar(&timeout, "timeout", 30*time.Second, "how long to ask again, or to wait for the nodes")
	command.MarkFlagsMutuallyExclusive("name", "nodes")
	command.MarkFlagsOneRequired("name", "nodes")
	completedNames(command, &runtimeDir)
	return command
}

// askHere asks until every outcome is right, or ctx ends: between a look at the status and the connection, endpoints change.
func askHere(ctx context.Context, out io.Writer, agent runtimedir.Agent) error {
	for {
		outcomes, err := askOnce(context.WithoutCancel(ctx), agent)
		if err == nil || ctx.Err() != nil || errors.Is(err, fs.ErrPermission) {
			for _, o := range outcomes {
				fmt.Fprintln(out, o)
			}
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// askOnce returns the wrong outcomes last: kubelet keeps the end of what a container has printed.
func askOnce(ctx context.Context, agent runtimedir.Agent) ([]ask.Outcome, error) {
	status, err := agent.ReadStatus()
	if err != nil {
		return nil, err
	}
	if len(status.MagicIPs) == 0 {
		return nil, errors.New("the status of the agent has no magic IP")
	}
	var right, wrong []ask.Outcome
	for _, o := range ask.All(ctx, status.MagicIPs) {
		if o.Wrong {
			wrong = append(wrong, o)
		} else {
			right = append(right, o)
		}
	}
	if len(wrong) > 0 {
		err = fmt.Errorf("not as the status of the agent says: %d of %d ports", len(wrong), len(status.MagicIPs))
	}
	return append(right, wrong...), err
}

func askNodes(ctx context.Context, out io.Writer, kubeconfig, daemonSet string) error {
	askers, err := kube.ConnectAskers(kubeconfig, daemonSet)
	if err != nil {
		return err
	}
	results, err := askers.Await(ctx)
	failed := 0
	for _, r := range results {
		if r.Passed {
			fmt.Fprintf(out, "ok    %s\n", r.Node)
			continue
		}
		failed++
		fmt.Fprintf(out, "FAIL  %s\n      %s\n", r.Node, strings.ReplaceAll(quote.Lines(r.Message), "\n", "\n      "))
	}
	if err == nil && failed > 0 {
		err = fmt.Errorf("failed: %d of %d nodes", failed, len(results))
	}
	return err
}
