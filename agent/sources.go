package agent

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// records is what the plugin's state file said last.
type records struct {
	// list is all that count: lost, then the file's.
	list []state.Attachment
	// lost were in a file that was lost: the one that began anew does not tell when they go. Their host
	// interfaces do.
	lost  []state.Attachment
	since time.Time // when the list in the file was begun
	// known: the file has spoken since this agent started. A missing or unreadable file is a source that
	// is silent, and what it said before counts on.
	known bool
}

// take takes in what the file says.
func (r *records) take(file state.File) {
	if !file.Since.Equal(r.since) {
		r.lost = r.list
	}
	r.lost = slices.DeleteFunc(slices.Clone(r.lost), func(l state.Attachment) bool {
		return l.HostInterface == "" || slices.ContainsFunc(file.Attachments, func(a state.Attachment) bool {
			return a.Key() == l.Key() || a.HostInterface == l.HostInterface
		})
	})
	r.list = slices.Concat(r.lost, file.Attachments)
	r.since, r.known = file.Since, true
}

// forget drops the lost records whose interface is not there any more, for good.
func (r *records) forget(interfaces map[string]bool) {
	present := r.list[len(r.lost):]
	r.lost = endpoint.Standing(r.lost, interfaces)
	r.list = slices.Concat(r.lost, present)
}

// read takes in the sources that have changed. What cannot be read leaves what was known of it.
func (a *Agent) read(changed Source) {
	if changed&(Settings|Poll) != 0 {
		a.readSettings()
	}
	if changed&(Records|Poll) != 0 {
		file, err := state.ReadFile(a.RuntimeDir)
		switch {
		case err == nil:
			a.records.take(file)
		case errors.Is(err, fs.ErrNotExist) && len(a.records.list) == 0:
			err = nil // no pod has been added yet
		}
		a.note("state file", err)
	}
	// The record of a new pod may come before the event of its link.
	newLink := func(r state.Attachment) bool { return r.HostInterface != "" && !a.network.Interfaces[r.HostInterface] }
	if changed&(Network|Poll) != 0 || changed&Records != 0 && slices.ContainsFunc(a.records.list, newLink) {
		network, err := a.Node.Read()
		a.note("network of the node", err)
		if err == nil {
			a.network = network
			a.records.forget(network.Interfaces)
		}
	}
	if changed&(Others|Poll) != 0 {
		a.readOthers()
	}
}

func (a *Agent) readSettings() {
	config, err := a.Load()
	if err == nil && config.Name != a.config.Name {
		err = errors.New("name: the name of a running agent cannot change from " + a.config.Name + " to " + config.Name + "; restart it")
	}
	a.note("configuration", err)
	if err == nil {
		a.config = config
	}
}

// readOthers reads what the other agents on this node have published.
func (a *Agent) readOthers() {
	names, err := published.Names(a.RuntimeDir)
	a.note("agents of the node", err)
	if err != nil {
		return
	}
	var others []*published.Agent
	for _, name := range names {
		if name == a.config.Name {
			continue
		}
		other, err := published.Read(a.RuntimeDir, name)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil // gone since it was listed
		} else if err != nil {
			// What it said before counts on.
			for _, known := range a.others {
				if known.Name == name {
					others = append(others, known)
				}
			}
		}
		a.note("agent "+name, err)
		if other != nil {
			others = append(others, other)
		}
	}
	a.others = others
}

// restore begins with what this agent published before it was restarted.
func (a *Agent) restore() {
	restored, err := published.Read(a.RuntimeDir, a.config.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return
	case err != nil:
		path := published.Path(a.RuntimeDir, a.config.Name)
		a.Log.Warn("what this agent published before cannot be used; starting without it", "err", err, "keptAs", path+".corrupt")
		if err := os.Rename(path, path+".corrupt"); err != nil {
			a.Log.Warn("the file stays where it is", "err", err)
		}
		return
	}
	a.restored = restored
	a.records = records{list: slices.Concat(restored.Lost, restored.Records), lost: restored.Lost, since: restored.RecordsSince}
	for _, m := range restored.MagicIPs {
		a.services[frontendOf(m)] = &service{claimedAt: m.ClaimedAt, lostAt: m.LostAt}
	}
}

// restoredEndpoints are those from before the restart that nothing contradicts: their record stands, or
// the source that told of them has not spoken yet.
func (a *Agent) restoredEndpoints(port Port) []published.Endpoint {
	if a.restored == nil || a.settled() {
		return nil
	}
	var endpoints []published.Endpoint
	for _, m := range a.restored.MagicIPs {
		if frontendOf(m) != port.Frontend || m.Namespace != port.Namespace || m.Selector != port.SelectorText {
			continue
		}
		for _, e := range m.Endpoints {
			if e.Address.Port() == port.TargetPort && (!a.records.known || !e.Recorded || a.recorded(e.Address.Addr())) {
				endpoints = append(endpoints, e)
			}
		}
	}
	return endpoints
}

func (a *Agent) recorded(address netip.Addr) bool {
	return slices.ContainsFunc(endpoint.Standing(a.records.list, a.network.Interfaces), func(r state.Attachment) bool {
		return slices.Contains(r.IPs, address)
	})
}

// settled says whether every source has spoken.
func (a *Agent) settled() bool { return a.records.known }

// WatchFiles watches the plugin's state file, the agents' files and the configuration file (none where
// empty). It watches their folders, since all of them are replaced by rename.
func WatchFiles(runtimeDir, configFile string) Watcher {
	return func(ctx context.Context, wake func(Source)) error {
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			return err
		}
		defer func() { _ = watcher.Close() }()
		folders := []string{runtimeDir, published.Dir(runtimeDir)}
		if configFile != "" {
			folders = append(folders, filepath.Dir(configFile))
		}
		// A folder that was replaced is watched again within a poll. What happened before it was watched
		// is read by then too: the poll reads everything.
		arm := func() (missing error) {
			for _, folder := range folders {
				missing = errors.Join(missing, watcher.Add(folder))
			}
			return missing
		}
		if err := arm(); err != nil {
			return err
		}
		wake(Records | Others | Settings)
		rearm := time.NewTicker(time.Second)
		defer rearm.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-rearm.C:
				_ = arm()
			case _, open := <-watcher.Errors: // an overflow of the queue, or a folder that is gone
				if !open {
					return nil
				}
				wake(Records | Others | Settings)
			case event := <-watcher.Events:
				if event.Op == fsnotify.Chmod {
					continue // a heartbeat
				}
				switch folder := filepath.Dir(event.Name); {
				case event.Name == state.Path(runtimeDir):
					wake(Records)
				case folder == published.Dir(runtimeDir) && strings.HasSuffix(event.Name, ".json"):
					wake(Others)
				case configFile != "" && folder == filepath.Dir(configFile):
					wake(Settings)
				}
			}
		}
	}
}
