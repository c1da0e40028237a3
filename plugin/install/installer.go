// Package install puts the CNI plugin on a node: its binary, and its entry in the network configuration that the
// container runtime uses. And it takes the entry out again.
//
// The entry is shared by all agents of a node; each installer adds, changes and removes only the key of its own agent.
// Files are edited by changing the bytes that are ours and no others, so that what a person or the primary CNI wrote
// comes back as it was.
//
// Limits: it edits the file that sorts first, as runtimes choose it that are not told a network by name. The binary stays
// behind, inert: runtimes may still call DEL through configurations that they have cached.
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// Config is the part of an agent's configuration that is installed.
type Config struct {
	Name      string // of the agent
	Selectors []Selector
}

// Options say what to install, and where.
type Options struct {
	RuntimeDir string
	BinDir     string // of the node's CNI plugins
	ConfDir    string // of its network configurations
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
var errWaiting = errors.New("no network configuration is there that a runtime could use: waiting for the primary CNI to write one")

type installer struct {
	Options
	config  Config
	binary  binary
	record  Record
	written *Record // as it is in the file; nil before it is
	// present is the file in which the key was last seen; empty before, and after it was seen to be lost.
	present string
	quarrel quarrel
}

func newInstaller(options Options) (*installer, error) {
	config, err := options.Load()
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	i := &installer{
		Options: options, config: config,
		binary: binary{source: options.Plugin, dir: options.BinDir, version: options.Version},
	}
	digest, err := i.binary.digest()
	if err != nil {
		return nil, fmt.Errorf("plugin to install (--plugin): %w", err)
	}
	i.record = Record{Version: RecordVersion, Binary: i.binary.path(), PluginVersion: options.Version, PluginSHA256: digest}
	return i, nil
}

// begin takes what an installer of this name has noted before.
func (i *installer) begin() {
	before, err := ReadRecord(i.RuntimeDir, i.config.Name)
	switch {
	case err == nil:
		i.record.Conflist, i.record.InstalledAt = before.Conflist, before.InstalledAt
	case !errors.Is(err, fs.ErrNotExist):
		i.Log.Warn("what was noted before cannot be used", "error", err)
	}
}

// Once installs and returns. Where there is no network configuration yet, that is an error.
func Once(ctx context.Context, options Options) error {
	i, err := newInstaller(options)
	if err != nil {
		return err
	}
	locked, err := Lock(i.RuntimeDir, i.config.Name)
	if errors.Is(err, published.ErrLocked) {
		return fmt.Errorf("another installer of agent %s is running on this node", i.config.Name)
	}
	if err != nil {
		return err
	}
	defer func() { _ = published.Unlock(locked) }()
	i.begin()
	for {
		again, err := i.sync(ctx, nil)
		if err != nil && i.record.InstalledAt.IsZero() {
			// Nothing of ours is anywhere but the binary: no note is left that would have to be uninstalled.
			return errors.Join(err, published.LeaveFiles(i.RuntimeDir, i.files()...))
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
	i.record.Notes = nil
	again, err = i.install(ctx)
	err = errors.Join(problem, err)
	i.record.LastError = ""
	if err != nil {
		i.record.LastError = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return again, errors.Join(err, i.note())
}

// note writes the record where it has changed.
func (i *installer) note() error {
	if _, err := os.Stat(RecordPath(i.RuntimeDir, i.config.Name)); i.written != nil && err == nil && reflect.DeepEqual(*i.written, i.record) {
		return nil
	}
	if err := writeRecord(i.RuntimeDir, i.config.Name, i.record); err != nil {
		return err
	}
	written := i.record
	i.written = &written
	return nil
}

func (i *installer) install(ctx context.Context) (again time.Duration, err error) {
	if err := i.note(); err != nil { // before anything of ours is anywhere
		return 0, err
	}
	replaced, err := i.binary.ensure(ctx, func() ([]*Record, error) { return otherInstallers(i.RuntimeDir, i.config.Name) })
	if err != nil {
		return 0, err // a configuration never names a plugin that is not there
	}
	if replaced {
		i.Log.Info("plugin put in place", "binary", i.binary.path(), "version", i.Version)
	}
	unlock, err := lock(ctx, i.ConfDir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("%s: %w", i.ConfDir, errWaiting)
	}
	if err != nil {
		return 0, err
	}
	defer unlock()
	for range 5 {
		if again, err = i.configure(ctx); !errors.Is(err, errChanged) {
			break
		}
	}
	return again, err
}

// explain adds what to do about a directory that cannot be written.
func explain(err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%w: the directory of network configurations cannot be written; name the one that the runtime uses with --cni-conf-dir "+
			"(value cni.confDir of the chart)", err)
	}
	return err
}

// configure puts the key into the file that the runtime takes, and out of all others. The caller holds the directory's lock.
func (i *installer) configure(ctx context.Context) (again time.Duration, err error) {
	d, err := readDirectory(i.ConfDir)
	if err != nil {
		return 0, err
	}
	if err := d.removeTemps(); err != nil {
		return 0, err
	}
	chosen, again, notes, err := d.pick(time.Now())
	i.record.Notes = notes
	if err != nil || again > 0 { // a file that is just being written may be the one
		return again, err
	}
	if chosen == nil {
		i.record.Conflist = ""
		return 0, fmt.Errorf("%s: %w", i.ConfDir, errWaiting)
	}
	if len(i.config.Selectors) == 0 {
		i.record.Notes = append(i.record.Notes, "no magic IP of this agent can be served, so that no pod has to be recorded: its key is in no network configuration")
		i.record.Conflist, i.present = "", ""
		return 0, i.withdraw(d, "")
	}
	key := Key{Agent: i.config.Name, RuntimeDir: i.RuntimeDir, Selectors: i.config.Selectors}
	after, err := chosen.With(key, i.binary.speaks)
	if err == nil {
		after, err = d.rename(chosen.File, after)
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", i.ConfDir, err)
	}
	if after.Name != chosen.Name || !bytes.Equal(after.Data, chosen.Data) {
		if wait := i.lost(chosen); wait > 0 {
			return wait, nil
		}
		err := harmless(chosen.File, after)
		if err == nil {
			err = i.binary.accepts(ctx, after)
		}
		if err == nil {
			err = explain(d.place(*chosen, after))
		}
		if err != nil {
			return 0, err
		}
		i.record.InstalledAt = time.Now().UTC().Truncate(time.Millisecond)
		i.Log.Info("entry put in place", "conflist", filepath.Join(i.ConfDir, after.Name), "agent", i.config.Name)
	}
	i.quarrel.stands()
	i.present, i.record.Conflist = after.Name, filepath.Join(i.ConfDir, after.Name)
	if i.record.InstalledAt.IsZero() { // it had outlived what was noted of it
		i.record.InstalledAt = time.Now().UTC().Truncate(time.Millisecond)
	}
	if note := i.quarrel.note(); note != "" {
		i.record.Notes = append(i.record.Notes, note)
	}
	return 0, i.withdraw(d, after.Name)
}

// lost notes that a key that was there is so no more, if it is not, and returns how long to leave it at that.
func (i *installer) lost(chosen *candidate) (wait time.Duration) {
	if l, err := parseList(chosen.Data); i.present == "" || err == nil && l.has(i.config.Name, i.RuntimeDir) {
		return 0 // not lost: never there yet, or with other selectors
	}
	now := time.Now()
	if i.quarrel.lost(now, filepath.Join(i.ConfDir, chosen.Name)) {
		i.Log.Warn("somebody has removed the entry of this agent", "conflist", chosen.Name, "times", i.quarrel.times, "backIn", i.quarrel.until.Sub(now))
	}
	if note := i.quarrel.note(); note != "" {
		i.record.Notes = append(i.record.Notes, note)
	}
	return max(0, i.quarrel.until.Sub(now))
}

// withdraw takes the key out of every file but one.
func (i *installer) withdraw(d directory, except string) error {
	var all error
	for _, c := range d.files {
		if c.Name == except || c.foreign != nil {
			continue
		}
		err := withdraw(d, c, i.config.Name, i.RuntimeDir, i.Log)
		all = errors.Join(all, err)
	}
	return all
}

func withdraw(d directory, c candidate, agent, runtimeDir string, log *slog.Logger) error {
	if l, err := parseList(c.Data); filepath.Ext(c.Name) != listExt || err != nil || !l.has(agent, runtimeDir) {
		return nil // nothing of ours is in there
	}
	after, err := c.Without(agent, runtimeDir)
	if err != nil {
		return err
	}
	// The one that was kept does not come back where its owner has written it anew.
	if after.Name != c.Name && d.exists(after.Name) {
		if err := os.Remove(filepath.Join(d.path, c.Name)); err != nil {
			return err
		}
		return errors.Join(os.Remove(filepath.Join(d.path, c.KeptName+keptExt)), syncDir(d.path))
	}
	if c.unusable == nil {
		if err := harmless(c.File, after); err != nil {
			return err
		}
	}
	if err := d.place(c, after); err != nil {
		return explain(err)
	}
	log.Info("entry taken out", "conflist", filepath.Join(d.path, after.Name), "agent", agent)
	return nil
}

// Remove takes the key of an agent out of all network configurations of a directory.
func Remove(ctx context.Context, confDir, runtimeDir, agent string, log *slog.Logger) error {
	unlock, err := lock(ctx, confDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	for range 5 {
		if err = removeFrom(confDir, runtimeDir, agent, log); !errors.Is(err, errChanged) {
			break
		}
	}
	return err
}

func removeFrom(confDir, runtimeDir, agent string, log *slog.Logger) error {
	d, err := readDirectory(confDir)
	if err != nil {
		return err
	}
	err = d.removeTemps()
	for _, c := range d.files {
		if c.foreign == nil {
			err = errors.Join(err, withdraw(d, c, agent, runtimeDir, log))
		}
	}
	if err != nil {
		return err
	}
	return d.removeKept()
}

// removeKept removes what was kept of files whose list has nothing of ours any more, because its owner has written it
// anew, or removed it.
func (d directory) removeKept() error {
	d, err := readDirectory(d.path)
	if err != nil {
		return err
	}
	for _, original := range d.kept {
		ours := slices.ContainsFunc(d.files, func(c candidate) bool {
			l, err := parseList(c.Data)
			return c.KeptName == original && (err != nil || len(l.ours) > 0)
		})
		if !ours {
			err = errors.Join(err, os.Remove(filepath.Join(d.path, original+keptExt)))
		}
	}
	return err
}

// files are what an installer has in the runtime dir.
func (i *installer) files() []string { return Files(i.RuntimeDir, i.config.Name) }

// Files are what the installer of an agent has in the runtime dir.
func Files(runtimeDir, name string) []string {
	path := RecordPath(runtimeDir, name)
	return []string{path, path + ".tmp", recordLock(runtimeDir, name)}
}
