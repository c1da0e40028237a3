// Package install puts the CNI plugin on a node, and keeps it there: its binary, and by package conflist its entry in the
// network configuration that the container runtime loads. And it removes the entry again.
//
// The entry is shared by all agents of a node; each installer adds, changes and removes only the key of its own agent.
//
// Limits: the binary stays behind, inert: runtimes may still call DEL through configurations that they have cached.
package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Config is the part of an agent's configuration that is installed.
type Config struct {
	Name      string // of the agent
	Selectors []entry.Selector
}

// Options say what to install, and where.
type Options struct {
	RuntimeDir string
	BinDir     string // of the node's CNI plugins
	ConfDir    string // of its network configurations
	Runtime    conflist.Runtime
	Plugin     string // the binary to install
	Version    string // of that
	// Load reads and validates the configuration of the agent; ConfigFile is watched for it.
	Load       func() (Config, error)
	ConfigFile string
	// Removed waits until the installation is to be undone, and returns true then; false when ctx has ended before.
	// Nil: never.
	Removed func(ctx context.Context) bool
	Log     *slog.Logger
}

// errWaiting says that there is no network configuration to add to yet.
var errWaiting = errors.New("waiting for the primary CNI to write one")

type installer struct {
	Options
	config  Config
	binary  binary
	files   runtimedir.Installer
	record  runtimedir.Record
	written *runtimedir.Record // as it is in the file; nil before it is
	// present is the file in which the key was last seen; empty before, and after it was seen to be lost.
	present string
	backoff backoff
	// planned is what was noted of the configurations when they were last looked at.
	planned []string
}

func newInstaller(options Options) (*installer, error) {
	config, err := options.Load()
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	i := &installer{
		Options: options, config: config, files: runtimedir.New(options.RuntimeDir).Installer(config.Name),
		binary: binary{source: options.Plugin, dir: options.BinDir, version: options.Version},
	}
	digest, err := i.binary.digest()
	if err != nil {
		return nil, fmt.Errorf("plugin to install (--plugin): %w", err)
	}
	i.record = runtimedir.Record{Version: runtimedir.Version, Binary: i.binary.path(), PluginVersion: options.Version, PluginSHA256: digest}
	return i, nil
}

// begin takes what an installer of this name has recorded before.
func (i *installer) begin(lock *runtimedir.Lock) {
	before, err := i.files.ReadRecord()
	switch err = errors.Join(lock.Lost, err); {
	case err == nil:
		i.record.Conflist, i.record.InstalledAt = before.Conflist, before.InstalledAt
	case lock.Lost != nil || !errors.Is(err, fs.ErrNotExist):
		i.Log.Warn("the record of this installer cannot be used and begins anew", "error", err)
	}
}

// Once installs and returns. Where there is no network configuration yet, that is an error.
func Once(ctx context.Context, options Options) error {
	i, err := newInstaller(options)
	if err != nil {
		return err
	}
	lock, err := i.files.Lock()
	if errors.Is(err, runtimedir.ErrLocked) {
		return fmt.Errorf("another installer of agent %s is running on this node", i.config.Name)
	}
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	i.begin(lock)
	for {
		again, err := i.sync(ctx, nil)
		if err != nil && i.record.InstalledAt.IsZero() {
			// Nothing of ours is anywhere but the binary: no record is left that would have to be uninstalled.
			return errors.Join(err, i.files.Leave())
		}
		if err != nil || again == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(again):
		}
	}
}

// sync brings the node to the state that is wanted, where it differs. again is when to look again although nothing
// happens; 0 is never. problem is what was wrong before, and is reported along.
func (i *installer) sync(ctx context.Context, problem error) (again time.Duration, err error) {
	again, err = i.install(ctx)
	err = errors.Join(problem, err)
	i.record.LastError = ""
	if err != nil {
		i.record.LastError = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return again, errors.Join(err, i.write())
}

// write writes the record where it has changed, or is gone.
func (i *installer) write() error {
	if i.written != nil && reflect.DeepEqual(*i.written, i.record) {
		if _, err := i.files.ReadRecord(); err == nil {
			return nil
		}
	}
	if err := i.files.WriteRecord(i.record); err != nil {
		return err
	}
	written := i.record
	i.written = &written
	return nil
}

func (i *installer) install(ctx context.Context) (again time.Duration, err error) {
	if err := i.write(); err != nil { // before anything of ours is anywhere, and with what was noted last
		return 0, err
	}
	replaced, err := i.binary.ensure(ctx, func() ([]*runtimedir.Record, error) {
		return otherInstallers(runtimedir.New(i.RuntimeDir), i.config.Name)
	})
	if err != nil {
		i.note()
		return 0, err // an entry never names a plugin that is not there
	}
	if replaced {
		i.Log.Info("plugin put in place", "binary", i.binary.path(), "version", i.Version)
	}
	return i.configure(ctx)
}

// configure puts the key into the network that the runtime loads, and out of all others.
func (i *installer) configure(ctx context.Context) (again time.Duration, err error) {
	plan, err := conflist.Update(ctx, i.ConfDir, i.conflistOptions(), func(d *conflist.Directory) (conflist.Plan, error) {
		if len(i.config.Selectors) == 0 {
			return d.Take(i.config.Name, i.RuntimeDir, filepath.Base(i.record.Conflist))
		}
		plan, err := d.Put(conflist.Key{Agent: i.config.Name, RuntimeDir: i.RuntimeDir, Selectors: i.config.Selectors}, i.binary.speaks)
		if err == nil && plan.File != "" && !plan.Empty() {
			if wait := i.lost(plan); wait > 0 {
				return plan.Postponed(wait), nil
			}
			if refused := i.binary.accepts(ctx, plan.Entry()); refused != nil {
				return plan.Postponed(0), fmt.Errorf("%s: %w", filepath.Join(i.ConfDir, plan.File), refused)
			}
		}
		return plan, err
	})
	i.planned = plan.Notes
	i.note()
	if len(i.config.Selectors) == 0 {
		i.record.Notes = append(i.record.Notes, "no magic IP of this agent can be served, so that no pod has to be recorded: its key is in no network configuration")
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && !errors.Is(err, conflist.ErrChanged):
		return 0, fmt.Errorf("%s is not there: %w", i.ConfDir, errWaiting)
	case errors.Is(err, conflist.ErrNone):
		i.record.Conflist, i.present = "", ""
		return 0, fmt.Errorf("%s: %w: %w", i.ConfDir, err, errWaiting)
	case errors.Is(err, conflist.ErrVersion), err == nil && plan.Again == 0 && plan.File == "":
		i.record.Conflist, i.present = "", ""
		return 0, err
	case err != nil || plan.Again > 0:
		return plan.Again, err
	}
	if !plan.Empty() {
		i.Log.Info("entry put in place", "conflist", filepath.Join(i.ConfDir, plan.File), "agent", i.config.Name)
	}
	if !plan.Empty() || i.record.InstalledAt.IsZero() { // or it had outlived what was noted of it
		i.record.InstalledAt = time.Now().UTC().Truncate(time.Millisecond)
	}
	if i.backoff.lost {
		i.record.Restored++
	}
	i.backoff.restored()
	i.present, i.record.Conflist = plan.File, filepath.Join(i.ConfDir, plan.File)
	return 0, nil
}

// note brings the notes of the record up to what is known now.
func (i *installer) note() {
	i.record.Notes = slices.Clone(i.planned)
	if note := i.backoff.note(); note != "" {
		i.record.Notes = append(i.record.Notes, note)
	}
}

func (i *installer) conflistOptions() conflist.Options {
	return conflist.Options{Runtime: i.Runtime, BinDir: i.BinDir}
}

// lost records a loss of the key, and returns how long to wait before it is put back. A key that moves to another file,
// which sorts first now, is not lost.
func (i *installer) lost(plan conflist.Plan) (wait time.Duration) {
	if !plan.Lost || plan.File != i.present {
		return 0
	}
	now := time.Now()
	if i.backoff.lose(now, filepath.Join(i.ConfDir, plan.File)) {
		i.Log.Warn("the entry of this agent was removed by another program; until it is back, the agent knows new pods by the API only",
			"conflist", filepath.Join(i.ConfDir, plan.File), "times", i.backoff.losses, "backIn", i.backoff.until.Sub(now))
	}
	return max(0, i.backoff.until.Sub(now))
}

// Remove removes the key of an agent from all network configurations of a directory. That it is still there, or that this
// cannot be told, is an error. recorded is the file that has the key, as far as that was recorded. Of options, Force counts.
func Remove(ctx context.Context, confDir string, options conflist.Options, runtimeDir, agent, recorded string, log *slog.Logger) error {
	plan, err := conflist.Update(ctx, confDir, options, func(d *conflist.Directory) (conflist.Plan, error) {
		return d.Take(agent, runtimeDir, filepath.Base(recorded))
	})
	if errors.Is(err, conflist.ErrHeld) {
		return err // and what else is to do needs that lock as well
	}
	elsewhere := recorded != "" && !strings.HasPrefix(recorded, filepath.Clean(confDir)+"/")
	if elsewhere {
		if d, errRecorded := conflist.Read(filepath.Dir(recorded), conflist.Options{}); errRecorded == nil && d.Has(filepath.Base(recorded), agent, runtimeDir) {
			err = errors.Join(err, fmt.Errorf("%s has the entry, and is not in %s: name its directory with --cni-conf-dir", recorded, confDir))
		}
	}
	if errors.Is(err, fs.ErrNotExist) && plan.Empty() {
		if !elsewhere {
			return nil // it is gone with the directory
		}
		return fmt.Errorf("%s is not there, and the entry was last in %s: name the directory of that file with --cni-conf-dir", confDir, recorded)
	}
	if err == nil && !plan.Empty() {
		log.Info("entry removed", "directory", confDir, "files", strings.Join(plan.Paths(), ", "), "agent", agent)
	}
	for _, note := range plan.Notes {
		log.Warn(note)
	}
	return errors.Join(err, conflist.RemoveTemps(ctx, confDir, options))
}

// otherInstallers are the records of the installers of other agents that run on this node; an error where one is of a newer
// build.
func otherInstallers(dir runtimedir.Dir, name string) (others []*runtimedir.Record, err error) {
	names, err := dir.Installers()
	if err != nil {
		return nil, err
	}
	for _, other := range names {
		if other == name || !dir.Installer(other).Live() {
			continue
		}
		record, err := dir.Installer(other).ReadRecord()
		if err != nil {
			return nil, err
		}
		others = append(others, record)
	}
	return others, nil
}

// RemoveFiles removes what the installer of an agent has in the runtime directory, after its key: the record first, which the
// agent waits for, and what the plugin has written where no agent has a key any more. The caller holds the installer's lock.
func RemoveFiles(confDir string, dir runtimedir.Dir, name string) error {
	return errors.Join(forget(confDir, dir, name), dir.Installer(name).Leave())
}

// forget removes the record of an installer, and what the plugin has written.
func forget(confDir string, dir runtimedir.Dir, name string) error {
	return errors.Join(dir.Installer(name).RemoveRecord(), removeState(confDir, dir))
}

// stateWait is longer than a pod keeps the lock of the state file.
const stateWait = 2 * time.Second

// removeState removes what the plugin has written, unless an agent has a key in an entry, or an installer that will put one
// there.
func removeState(confDir string, dir runtimedir.Dir) error {
	if installers, err := dir.Installers(); err != nil || len(installers) > 0 {
		return err
	}
	d, err := conflist.Read(confDir, conflist.Options{})
	if err == nil && slices.ContainsFunc(d.View().Entries, func(e conflist.Found) bool {
		entryDir, err := e.Dir()
		return err != nil || strings.HasSuffix(dir.Path(), entryDir) // in a container the directory may have a prefix
	}) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the records of pods stay in %s: whether another agent needs them is not known: %w", dir.Path(), err)
	}
	return dir.RemoveState(stateWait)
}
