package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/magic-ip-address/magic-ip-address/agent/backend"
	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/install"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// directories are those that installing and uninstalling have in common.
type directories struct{ runtime, conf string }

func (d *directories) flags(f *pflag.FlagSet) {
	f.StringVar(&d.runtime, "runtime-dir", defaultRuntimeDir, "`DIR` that the CNI plugin and the agents share")
	f.StringVar(&d.conf, "cni-conf-dir", cniConfDir(), "`DIR` of the network configurations that the container runtime reads")
}

// cniConfDir and cniBinDir are the directories of the node that the environment names, or the usual ones: the commands that are
// started in the installer's container look where it does.
func cniConfDir() string { return cmp.Or(os.Getenv("CNI_CONF_DIR"), conflist.DefaultDir) }
func cniBinDir() string  { return cmp.Or(os.Getenv("CNI_BIN_DIR"), conflist.DefaultBinDir) }

// runtimeFlag is whose rules decide which file is loaded.
func runtimeFlag(f *pflag.FlagSet, runtime *string) {
	f.StringVar(runtime, "runtime", string(conflist.Auto), "`NAME` of the container runtime, by whose rules a network configuration is loaded: containerd, crio, or auto, which looks for it")
}

type installFlags struct {
	directories
	runtimeName, config, binDir, plugin, daemonSet, kubeconfig, logLevel string
	watch, noAPI                                                         bool
}

func installCommand() *cobra.Command {
	var flags installFlags
	command := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugin and its entry in the network configuration in place",
		Long: `Put the CNI plugin and its entry in the network configuration in place.

The entry goes into the network that the container runtime loads: that of the first of *.conf, *.conflist and *.json that it can
use. A list of plugins is edited; a single plugin's configuration stays as it is, and gets a list beside it that is loaded first.
Without --config the configuration comes from the environment, as for run.

With --watch it is kept so, until SIGTERM: when the primary CNI writes its file anew, when the plugin goes, when
the configuration changes. With --daemonset, it is taken out again when that DaemonSet is deleted.`,
		Example: `  magic-ip-agent install --config config.yaml
  magic-ip-agent install --watch --config config.yaml --plugin bin/magic-ip-address`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return flags.run(cmd.Context()) },
	}
	f := command.Flags()
	flags.flags(f)
	f.StringVar(&flags.config, "config", "", "configuration `FILE` of the agent (YAML)")
	f.StringVar(&flags.binDir, "cni-bin-dir", cniBinDir(), "`DIR` of the CNI plugins that the container runtime runs")
	f.StringVar(&flags.plugin, "plugin", "/usr/local/bin/"+entry.Type, "the plugin `FILE` to install")
	runtimeFlag(f, &flags.runtimeName)
	f.BoolVar(&flags.watch, "watch", false, "keep it so, until SIGTERM")
	f.StringVar(&flags.daemonSet, "daemonset", "", "`NAMESPACE/NAME` of the DaemonSet that this installer belongs to; when it is deleted, the entry is taken out")
	f.StringVar(&flags.kubeconfig, "kubeconfig", "", "`FILE` with credentials for the Kubernetes API; without it the pod's service account")
	f.BoolVar(&flags.noAPI, "no-api", false, "the agent does without the Kubernetes API: what only that can tell is an error in the configuration")
	f.StringVar(&flags.logLevel, "log-level", "info", "`LEVEL`: debug, info, warn or error")
	command.MarkFlagsMutuallyExclusive("daemonset", "no-api")
	completed(command, "runtime", string(conflist.Auto), string(conflist.Containerd), string(conflist.CRIO))
	completed(command, "log-level", "debug", "info", "warn", "error")
	return command
}

func (f *installFlags) run(ctx context.Context) error {
	log, err := newLogger(f.logLevel, false)
	if err != nil {
		return err
	}
	runtime, err := conflist.ParseRuntime(f.runtimeName)
	if err != nil {
		return fmt.Errorf("--runtime: %w", err)
	}
	options := install.Options{
		RuntimeDir: f.runtime, Runtime: runtime, BinDir: f.binDir, ConfDir: f.conf, Plugin: f.plugin, Version: version,
		Load: func() (install.Config, error) {
			loaded, err := config.Load(f.config, f.noAPI)
			return toInstall(loaded), err
		},
		ConfigFile: f.config,
		Log:        log,
	}
	if !f.watch {
		if f.daemonSet != "" {
			return errors.New("--daemonset needs --watch")
		}
		return install.Once(ctx, options)
	}
	if f.daemonSet != "" {
		own, err := kube.ConnectDaemonSet(f.kubeconfig, f.daemonSet, log)
		if err != nil {
			return err
		}
		if own.Await(ctx, f.hasInstalled()); ctx.Err() != nil {
			return nil
		}
		options.Removed = own.Deleted
	}
	return install.Watch(ctx, options)
}

// hasInstalled reports whether an installer of this name has put anything on the node that is still there.
func (f *installFlags) hasInstalled() bool {
	loaded, err := config.Load(f.config, f.noAPI)
	if err != nil {
		return false
	}
	_, err = runtimedir.New(f.runtime).Installer(loaded.Name).ReadRecord()
	return err == nil
}

// toInstall is what the plugin has to know of a configuration: whose pods to record.
func toInstall(c config.Config) install.Config {
	wanted := install.Config{Name: c.Name}
	for _, port := range c.Ports {
		selector := entry.Selector{Namespace: port.Namespace, Selector: port.SelectorText}
		if port.Unserved == "" && !slices.Contains(wanted.Selectors, selector) {
			wanted.Selectors = append(wanted.Selectors, selector)
		}
	}
	return wanted
}

type uninstallFlags struct {
	directories
	config, name, binDir, backend, logLevel string
	force                                   bool
}

func uninstallCommand() *cobra.Command {
	var flags uninstallFlags
	command := &cobra.Command{
		Use:   "uninstall",
		Short: "Take an agent's entry, rules and files out of this node",
		Long: `Take an agent's key out of the network configuration, with the last one the entry, and then its rules and files.

The plugin stays where it is: runtimes may still call it for pods that they have added with it, and it does nothing then.
Stop the agent and its installer first.`,
		Example: `  magic-ip-agent uninstall --name default.magic-ip
  magic-ip-agent uninstall --config config.yaml --force`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return flags.run(cmd.Context()) },
	}
	f := command.Flags()
	flags.flags(f)
	f.StringVar(&flags.config, "config", "", "configuration `FILE` of the agent (YAML), for its name")
	f.StringVar(&flags.name, "name", "", "`NAME` of the agent")
	f.StringVar(&flags.backend, "backend", backend.Auto, "`NAME` of what rules are removed with first: auto, nftables or iptables; those of the other are removed as well")
	f.StringVar(&flags.binDir, "cni-bin-dir", cniBinDir(), "`DIR` of the CNI plugins; the plugin stays, what an installer that was killed has left of it goes")
	f.BoolVar(&flags.force, "force", false, "although the agent or its installer runs or hangs, or something stays: it puts back what it can")
	f.StringVar(&flags.logLevel, "log-level", "info", "`LEVEL`: debug, info, warn or error")
	command.MarkFlagsMutuallyExclusive("config", "name")
	command.MarkFlagsOneRequired("config", "name")
	completed(command, "backend", backend.Auto, backend.NFTables, backend.IPTables)
	completedNames(command, &flags.runtime)
	return command
}

func (f *uninstallFlags) run(ctx context.Context) error {
	log, err := newLogger(f.logLevel, false)
	if err != nil {
		return err
	}
	name := f.name
	if name == "" {
		loaded, err := config.Load(f.config, false)
		if err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
		name = loaded.Name
	}
	if err := config.CheckName(name); err != nil {
		return err
	}
	if !f.known(ctx, name) {
		return fmt.Errorf("nothing of an agent called %s is on this node: no files in %s, no selectors in the entries of %s, no rules; see magic-ip-agent status for those that are",
			name, f.runtime, f.conf)
	}
	// Their locks are held from here on, so that none of them comes back meanwhile.
	dir := runtimedir.New(f.runtime)
	for _, take := range []func() (*runtimedir.Lock, error){dir.Agent(name).Lock, dir.Installer(name).Lock} {
		lock, err := take()
		switch {
		case err == nil:
			defer func() { _ = lock.Close() }()
		case !errors.Is(err, runtimedir.ErrLocked):
			return err
		case !f.force:
			return fmt.Errorf("agent %s or its installer is running on this node: stop it first (helm uninstall does all of this), or use --force", name)
		}
	}
	return f.remove(ctx, name, log)
}

// known reports whether anything of the agent is on this node: files, selectors in an entry, or rules.
func (f *uninstallFlags) known(ctx context.Context, name string) bool {
	dir := runtimedir.New(f.runtime)
	for _, list := range []func() ([]string, error){dir.Agents, dir.Installers} {
		if names, err := list(); err != nil || slices.Contains(names, name) {
			return true // what cannot be read may be there
		}
	}
	if directory, err := conflist.Read(f.conf, conflist.Options{}); err == nil {
		for _, found := range directory.View().Entries {
			if all, err := found.ByAgent(); err != nil || all[name] != nil {
				return true
			}
		}
	}
	selected, err := backend.Select(ctx, f.backend, name)
	if err != nil {
		return true
	}
	exists, err := selected.Exists(ctx)
	return exists || err != nil
}

const unreadLeftovers = "rules that this agent made while iptables-legacy was its backend stay, if there are any: run magic-ip-agent uninstall as root on the node"

// remove does what it can, also where a part fails: the entry first, so that nothing is recorded any more.
func (f *uninstallFlags) remove(ctx context.Context, name string, log *slog.Logger) error {
	dir, recorded := runtimedir.New(f.runtime), ""
	if record, err := dir.Installer(name).ReadRecord(); err == nil {
		recorded = record.Conflist
	}
	options := conflist.Options{}
	if f.force {
		options.Force = func(held error) { log.Warn("going on without the lock, by force", "error", held) }
	}
	// In a container the node's directories may have other paths than the entry says.
	if err := install.Remove(ctx, f.conf, options, conflist.AnyRuntimeDir, name, recorded, log); err != nil {
		if errors.Is(err, conflist.ErrHeld) {
			err = fmt.Errorf("%w; end that installer, or use --force", err)
		}
		return fmt.Errorf("the entry of agent %s is still in %s, so that nothing else is uninstalled: %w", name, f.conf, err)
	}
	if err := conflist.RemoveTemps(ctx, f.binDir, options); err != nil {
		return err
	}
	selected, err := backend.Select(ctx, f.backend, name)
	if err == nil {
		err = selected.Remove(ctx)
	}
	if err != nil {
		return fmt.Errorf("the rules are still there: %w", err)
	}
	if selected.Unread != "" {
		log.Warn(unreadLeftovers, "reason", selected.Unread)
	}
	if err := endFlows(ctx, dir.Agent(name)); err != nil {
		log.Warn("flows that the rules translated are still there: a UDP client that goes on sending reaches the endpoint of before", "error", err)
	}
	// Before the files, by which the next attempt knows that something of the agent is here.
	switch err := errors.Join(endHairpins(dir.Agent(name)), endLocalRoutes(dir, name)); {
	case err != nil && !f.force:
		return fmt.Errorf("the files of agent %s stay, so that it can be uninstalled again, or with --force: %w", name, err)
	case err != nil:
		log.Warn("going on by force although not all is removed", "error", err)
	}
	if err := errors.Join(install.RemoveFiles(f.conf, dir, name), dir.Agent(name).Leave()); err != nil {
		return err
	}
	fmt.Fprintf(os.Stdout, "agent %s is uninstalled; the plugin stays, and does nothing\n", name)
	return nil
}

// endFlows deletes the flows to the magic IPs that the agent has served: a datagram must not find its old way for as long as its client keeps
// the flow alive. Established TCP may finish.
func endFlows(ctx context.Context, agent runtimedir.Agent) error {
	claims, err := agent.ReadClaims()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var change plan.Change
	for _, c := range claims {
		if c.Served {
			change.Removed = append(change.Removed, c.Frontend)
		}
	}
	_, err = conntrack.Table{}.Sweep(ctx, &plan.Plan{}, change)
	return err
}

// endLocalRoutes removes the local routes that no other agent wants. Where it cannot be read which these are, all of them stay.
func endLocalRoutes(dir runtimedir.Dir, name string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("local routes stay: pods are refused at these addresses: %w", err)
		}
	}()
	kernel := node.Kernel{}
	snapshot, err := kernel.Snapshot()
	if err = errors.Join(err, snapshot.Complete()); err != nil || len(snapshot.LocalRoutes) == 0 {
		return err
	}
	names, err := dir.Agents()
	if err != nil {
		return err
	}
	wanted := map[netip.Addr]bool{}
	for _, other := range names {
		if other == name {
			continue
		}
		claims, err := dir.Agent(other).ReadClaims()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, c := range claims {
			wanted[c.Address] = wanted[c.Address] || c.LocalRoute
		}
	}
	for _, route := range snapshot.LocalRoutes {
		if !wanted[route.Address] {
			err = errors.Join(err, kernel.RemoveLocalRoute(route))
		}
	}
	return err
}

// endHairpins switches hairpin mode off where the agent had switched it on.
func endHairpins(agent runtimedir.Agent) error {
	kernel := node.Kernel{}
	memory, err := agent.ReadMemory()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("hairpin mode may stay on at ports of pods: %w", err)
	case memory.Namespace != kernel.Namespace():
		return nil // its links are gone
	}
	for _, port := range memory.Hairpins {
		err = errors.Join(err, kernel.SetHairpin(port, false))
	}
	if err != nil {
		return fmt.Errorf("hairpin mode stays on at ports of pods, which has no effect on other traffic than a pod's to itself: %w", err)
	}
	return nil
}
