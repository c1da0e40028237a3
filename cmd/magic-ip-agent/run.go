package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/agent/backend"
	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/doctor"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const defaultRuntimeDir = "/run/magic-ip-address"

type runFlags struct {
	config, runtimeDir, nodeName, kubeconfig, backend, logLevel string
	metricsAddress, ciliumStateDir                              string
	noAPI                                                       bool
	daemonSet                                                   string
}

func runCommand() *cobra.Command {
	var flags runFlags
	command := &cobra.Command{
		Use:   "run",
		Short: "Keep the rules of this node in step with its pods, until SIGTERM",
		Long: `Keep the rules of this node in step with its pods, until SIGTERM; the rules then stay in place.

Without --config the configuration comes from the environment: MAGIC_IP, SELECTOR, NAMESPACE,
HOST_INTERFACE, PORT, MAGIC_PORT, TARGET_PORT, PROTOCOL, POLL_INTERVAL (seconds) and VERBOSE.

It needs root, or CAP_NET_ADMIN in the network namespace of the node.`,
		Example: `  magic-ip-agent run --config /etc/magic-ip-address/config.yaml
  magic-ip-agent run --config config.yaml --no-api --log-level debug
  SELECTOR=app=apm-server PORT=8200 magic-ip-agent run`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return flags.run(cmd.Context()) },
	}
	f := command.Flags()
	f.StringVar(&flags.config, "config", "", "configuration `FILE` (YAML)")
	f.StringVar(&flags.runtimeDir, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&flags.nodeName, "node-name", os.Getenv("NODE_NAME"), "`NAME` of this node in the Kubernetes API")
	f.StringVar(&flags.kubeconfig, "kubeconfig", "", "`FILE` with credentials for the Kubernetes API; without it the pod's service account")
	f.BoolVar(&flags.noAPI, "no-api", false, "do without the Kubernetes API: what the CNI plugin records is all that is known")
	f.StringVar(&flags.backend, "backend", backend.Auto, "`NAME` of what rules are made with: auto, nftables or iptables; auto takes iptables only where nftables cannot be used")
	f.StringVar(&flags.daemonSet, "daemonset", "", "`NAMESPACE/NAME` of the DaemonSet that this agent belongs to; when it is deleted, rules and files go")
	f.StringVar(&flags.metricsAddress, "metrics-address", "", "`HOST:PORT` to serve metrics for Prometheus at, /metrics; nowhere where empty")
	f.StringVar(&flags.ciliumStateDir, "cilium-state-dir", dataplane.StateDir, "`DIR` that Cilium's agent keeps its state in, for its settings; it need not be there")
	f.StringVar(&flags.logLevel, "log-level", "info", "`LEVEL`: debug, info, warn or error")
	command.MarkFlagsMutuallyExclusive("kubeconfig", "no-api")
	command.MarkFlagsMutuallyExclusive("daemonset", "no-api")
	completed(command, "backend", backend.Auto, backend.NFTables, backend.IPTables)
	completed(command, "log-level", "debug", "info", "warn", "error")
	return command
}

func (f *runFlags) run(ctx context.Context) error {
	load := func() (config.Config, error) { return config.Load(f.config, f.noAPI) }
	initial, err := load()
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	log, err := newLogger(f.logLevel, initial.Verbose)
	if err != nil {
		return err
	}
	if !doctor.NetAdmin() {
		return fmt.Errorf("run needs root, or CAP_NET_ADMIN in the network namespace of the node; this is user %d without it", os.Geteuid())
	}
	selected, err := backend.Select(ctx, f.backend, initial.Name)
	if err != nil {
		return err
	}
	if selected.NoZones == nil {
		selected.NoZones = program.Retry(ctx, conntrack.Table{}.Zones)
	}
	log.Info("starting", "version", version, "name", initial.Name, "node", f.nodeName, "backend", selected.Name(), "reason", selected.Reason, "runtimeDir", f.runtimeDir)
	options := agent.Options{
		RuntimeDir:  f.runtimeDir,
		Load:        load,
		Backend:     selected,
		BackendNote: selected.Note(),
		Zones:       selected.NoZones == nil,
		Flows:       conntrack.Table{},
		Node:        node.Kernel{},
		Cilium:      func() (dataplane.Settings, error) { return dataplane.Read(f.ciliumStateDir) },
		Uptime:      uptime,
		Tasks: []agent.Task{
			agent.WatchFiles(f.runtimeDir, f.config, f.ciliumStateDir, func(err error) {
				log.Error("changes of files are seen by polling only until they can be watched; see fs.inotify.max_user_instances and max_user_watches", "error", err)
			}),
			func(ctx context.Context, wake func(agent.Source)) error {
				return node.Watch(ctx, func(localRoutes bool) {
					if localRoutes {
						wake(agent.LocalRoutes)
					}
					wake(agent.Network)
				}, func(err error) {
					log.Error("changes of links, addresses and routes are seen by polling only until the kernel reports them again", "error", err)
				})
			},
			func(ctx context.Context, wake func(agent.Source)) error {
				selected.Watch(ctx, func() { wake(agent.Rules) }, func(err error) {
					log.Error("changes of this agent's rules by others are seen by polling only until the kernel reports them again", "error", err)
				})
				return nil
			},
		},
		Log: log,
	}
	var pods *kube.Pods
	if !f.noAPI {
		pods, err = kube.Connect(f.kubeconfig, f.nodeName)
		if err != nil {
			return err
		}
		options.API = pods
		options.Tasks = append(options.Tasks, func(ctx context.Context, wake func(agent.Source)) error {
			return pods.Run(ctx, func() { wake(agent.Pods) })
		})
		f.reportEvents(ctx, &options, pods, selected.Fallback)
	}
	newLookout(log).join(&options)
	if err := f.serveMetrics(&options, pods, initial.Name); err != nil {
		return err
	}
	if f.daemonSet != "" {
		own, err := kube.ConnectDaemonSet(f.kubeconfig, f.daemonSet, log)
		if err != nil {
			return err
		}
		_, err = runtimedir.New(f.runtimeDir).Agent(initial.Name).ReadStatus()
		if own.Await(ctx, err == nil); ctx.Err() != nil {
			return nil
		}
		options.Uninstall = agent.Uninstall{Wanted: own.Deleted, Rules: func(ctx context.Context) error {
			if selected.Unread != "" {
				log.Info(unreadLeftovers, "reason", selected.Unread)
			}
			return selected.Remove(ctx)
		}}
	}
	err = agent.Run(ctx, options)
	if errors.Is(err, agent.ErrStandby) {
		return nil
	}
	return err
}

// uptime is the time since the node was started.
func uptime() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails for a clock that is not there, and Linux has had this one since 2.6.39
	return time.Duration(now.Nano())
}

func newLogger(name string, verbose bool) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(name)); err != nil {
		return nil, fmt.Errorf("--log-level %q is not allowed; allowed: debug, info, warn, error", name)
	}
	if verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}
