package agent

import (
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

	"github.com/fsnotify/fsnotify"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// sources is what the sources reported last, other than of pods, and why they cannot be read now.
type sources struct {
	snapshot      node.Snapshot
	network       node.Network // what follows from snapshot and records
	networkSynced bool
	// uplinks are the links that stay uplinks until they are gone, as remembered over the restart.
	uplinks []int
	// namespace is the network namespace that remembered ifindexes are of.
	namespace    string
	others       []other
	othersSynced bool
	// cilium are Cilium's settings as read last; nil: they have not been read since the node was started. ciliumErr is why they cannot
	// be read now.
	cilium    *dataplane.Settings
	ciliumErr error

	settingsErr, recordsErr, networkErr, apiErr error
	othersErrs                                  []problem
}

// other is another agent of the node.
type other struct {
	name   string
	claims []runtimedir.Claim
	unread bool // its claims could not be read yet
}

// unread are the agents of which it is not known what they claim.
func (s *sources) unread() (names []string) {
	for _, o := range s.others {
		if o.unread {
			names = append(names, o.name)
		}
	}
	return names
}

// failing reports whether a source of the node itself is to be read again soon.
func (s *sources) failing() bool {
	return s.recordsErr != nil || s.networkErr != nil || len(s.othersErrs) > 0 || s.ciliumErr != nil && !errors.Is(s.ciliumErr, fs.ErrNotExist)
}

func (s *sources) problems() []problem {
	cilium := s.ciliumErr
	if errors.Is(cilium, fs.ErrNotExist) {
		cilium = nil
	}
	return append(failed(
		problem{"configuration", "configuration", s.settingsErr}, problem{"state_file", "state file", s.recordsErr},
		problem{"network", "network of the node", s.networkErr}, problem{"api", "Kubernetes API", s.apiErr},
		problem{"data_plane", "Cilium's settings", cilium},
	), s.othersErrs...)
}

// hasLink reports whether the node has a link of this name.
func (s *sources) hasLink(name string) bool { return s.network.IfIndex[name] != 0 }

// read takes in the sources that have changed, and reports whether there can be news. What a source that cannot be read
// reported before counts on, and it is read again each time.
func (a *agent) read(ctx context.Context, changed Source, now time.Time) (news bool) {
	s := &a.sources
	if changed&(Settings|Poll) != 0 {
		a.readSettings()
	}
	if changed&(Records|Poll) != 0 || s.recordsErr != nil {
		a.readRecords(now)
		changed |= Records
	}
	// After the records: the record of a new pod may come before the event of its link.
	localRoutes := changed&(LocalRoutes|Poll) != 0 || s.networkErr != nil
	if localRoutes || changed&Network != 0 || changed&Records != 0 && a.pods.HasNewLink() {
		a.readNetwork(localRoutes)
		changed |= Network
	}
	if changed&(Records|Network) != 0 && s.networkSynced {
		before := s.network.Links
		s.network = node.Classify(s.snapshot, node.Known{Attachments: a.attachments(now), Uplinks: s.uplinks})
		s.uplinks = s.network.Keep
		a.logLinks(before)
	}
	if changed&Network != 0 && s.networkSynced {
		a.pods.SetOwnAddresses(s.network.Addresses)
	}
	if changed&(Others|Poll) != 0 || len(s.othersErrs) > 0 {
		news = a.readOthers() || len(s.othersErrs) > 0 // an error is to be reported, and tried again
	}
	if changed&(DataPlane|Network|Poll|Settings) != 0 || s.ciliumErr != nil {
		a.readDataPlane()
	}
	if changed&(Pods|Poll|Settings) != 0 && a.API != nil { // the configuration names the namespaces
		if changed&Poll != 0 {
			a.API.Select(a.query)
			a.API.Poll(ctx)
		}
		view := a.API.View()
		a.pods.SetPods(view, now)
		s.apiErr = nil
		if len(view.Problems) > 0 {
			s.apiErr = errors.New(strings.Join(view.Problems, "; "))
		}
	}
	return news || changed != Others // the file of this agent wakes it too
}

// readNetwork reads the node's links, addresses and routes. What a dump lacks that changes have interrupted each time may be
// there all the same: the links of before stay. Local routes, of which there may be thousands, are read only where they may have changed.
func (a *agent) readNetwork(localRoutes bool) {
	s := &a.sources
	read := a.Node.Snapshot
	if !localRoutes {
		read = a.Node.SnapshotWithoutLocalRoutes
	}
	snapshot, err := read()
	if err == nil && !localRoutes && snapshot.Namespace != s.namespace {
		snapshot, err = a.Node.Snapshot() // those of another network
	}
	if s.networkErr = err; err != nil {
		return
	}
	if len(snapshot.Torn) > 0 {
		s.networkErr = fmt.Errorf("changes interrupted the reading of %s each time; what is missing is taken to be as before", strings.Join(snapshot.Torn, ", "))
		for _, l := range s.snapshot.Links {
			if !slices.ContainsFunc(snapshot.Links, func(m node.LinkState) bool { return m.Index == l.Index || m.Name == l.Name }) {
				snapshot.Links = append(snapshot.Links, l)
			}
		}
		snapshot.Addresses = union(snapshot.Addresses, s.snapshot.Addresses)
		snapshot.Routes = union(snapshot.Routes, s.snapshot.Routes)
		snapshot.LocalRoutes = union(snapshot.LocalRoutes, s.snapshot.LocalRoutes)
		snapshot.IPv6 = snapshot.IPv6 || s.snapshot.IPv6
	}
	if s.namespace != snapshot.Namespace {
		s.namespace, s.uplinks, s.cilium, a.kernel.hairpins = snapshot.Namespace, nil, nil, nil
	} else if !localRoutes {
		snapshot.LocalRoutes = s.network.LocalRoutes
	}
	gone := func(port int) bool {
		return !slices.ContainsFunc(snapshot.Links, func(l node.LinkState) bool { return l.Index == port })
	}
	a.kernel.hairpins = slices.DeleteFunc(a.kernel.hairpins, gone)
	s.snapshot, s.networkSynced = snapshot, true
	links := map[string]int{}
	for _, l := range snapshot.Links {
		links[l.Name] = l.Index
	}
	a.pods.SetLinks(links)
}

// union is what is in either.
func union[T comparable](a, b []T) []T {
	there := map[T]bool{}
	for _, v := range a {
		there[v] = true
	}
	return append(a, slices.DeleteFunc(slices.Clone(b), func(v T) bool { return there[v] })...)
}

// readDataPlane reads Cilium's settings, and chooses what brings packets of pods to the rules. While the file cannot be read, what it
// said before counts: Cilium's agent writes it anew at each start.
func (a *agent) readDataPlane() {
	s := &a.sources
	s.ciliumErr = nil
	if !s.networkSynced {
		return
	}
	known := dataplane.Known{Link: s.hasLink(node.CiliumLink)}
	if known.Link || a.config.DataPlane == dataplane.Cilium {
		settings, err := a.Cilium()
		if s.ciliumErr = err; err == nil {
			s.cilium = &settings
		}
		known.Settings, known.Unreadable = s.cilium, err
	}
	choice := dataplane.Choose(a.config.DataPlane, known)
	if choice != a.plane {
		a.Log.Info("data plane", "dataPlane", choice.Plane, "reason", choice.Reason, "localRoutes", choice.LocalRoutes,
			"masquerade", choice.Masquerade4 || choice.Masquerade6)
	}
	a.plane = choice
}

// logLinks logs which links have another role than before, or another reason for it. That a pod's new link is served is no
// news to people.
func (a *agent) logLinks(before []node.Link) {
	known := map[int]node.Link{}
	for _, l := range before {
		known[l.Index] = l
	}
	for _, l := range a.sources.network.Links {
		was, there := known[l.Index]
		if there && was.Role == l.Role && was.Reason == l.Reason {
			continue
		}
		level := slog.LevelInfo
		if !there && (l.Port || l.Role == node.Served && l.Kind != "bridge") || there && was.Role == l.Role {
			level = slog.LevelDebug
		}
		a.Log.Log(context.Background(), level, "link", "interface", l.Name, "kind", l.Kind, "role", l.Role, "reason", l.Reason, "was", was.Role)
	}
}

// attachments are the recorded ones, as evidence of which links are pods'.
func (a *agent) attachments(now time.Time) (attachments []node.Attachment) {
	for _, r := range a.pods.Live(now) {
		attachments = append(attachments, node.Attachment{HostInterface: r.HostInterface, HostIfIndex: r.Link, Addresses: r.IPs})
	}
	return attachments
}

func (a *agent) readRecords(now time.Time) {
	file, err := a.dir.ReadState()
	switch {
	case err == nil:
		a.pods.SetRecords(file, now)
	case errors.Is(err, fs.ErrNotExist) && a.pods.SetNoRecords():
		err = nil // no pod has been added yet
	}
	a.sources.recordsErr = err
}

func (a *agent) readSettings() {
	loaded, err := a.Load()
	if err == nil && loaded.Name != a.config.Name {
		err = errors.New("name: the name of a running agent cannot change from " + a.config.Name + " to " + loaded.Name + "; restart it")
	}
	if a.sources.settingsErr = err; err == nil {
		a.configure(loaded)
	}
	a.Meter.Configured(a.config.Hash, err)
}

func (a *agent) configure(c config.Config) {
	a.config, a.query, a.services.inOrder, a.services.sorted = c, c.Query(), nil, nil
	a.pods.SetNamespaces(c.Namespaces())
	a.pods.SetMagicIPs(c.Addresses())
	if a.API != nil {
		a.API.Select(a.query)
	}
}

// readOthers reads the claims of the other agents on this node, and reports whether they are news.
func (a *agent) readOthers() (news bool) {
	s := &a.sources
	names, err := a.dir.Agents()
	if err != nil {
		s.othersErrs = []problem{{"claims", "agents of the node", err}}
		return false
	}
	var others []other
	s.othersErrs = nil
	for _, name := range names {
		if name == a.config.Name {
			continue
		}
		claims, err := a.dir.Agent(name).ReadClaims()
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.othersErrs = append(s.othersErrs, problem{"claims", "agent " + name, err})
			o := other{name: name, unread: true}
			if i := slices.IndexFunc(s.others, func(o other) bool { return o.name == name }); i >= 0 {
				o = s.others[i]
			}
			others = append(others, o)
			continue
		}
		others = append(others, other{name: name, claims: claims})
	}
	news = !s.othersSynced || !reflect.DeepEqual(s.others, others)
	s.others, s.othersSynced = others, true
	return news
}

// WatchFiles watches the plugin's state file, the agents' claims, the configuration file (none where empty) and Cilium's file. It watches
// their directories, since all of them are replaced by rename. What cannot be watched is reported, and tried again each second.
func WatchFiles(runtimeDir, configFile, ciliumStateDir string, report func(error)) Task {
	dir := runtimedir.New(runtimeDir)
	return func(ctx context.Context, wake func(Source)) error {
		reported := ""
		check := func(err error) {
			text := ""
			if err != nil {
				text = err.Error()
			}
			if text != reported && text != "" {
				report(err)
			}
			reported = text
		}
		watcher, err := fsnotify.NewWatcher()
		for ; err != nil; watcher, err = fsnotify.NewWatcher() { // most likely fs.inotify.max_user_instances
			check(err)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
		}
		defer func() { _ = watcher.Close() }()
		// A directory that was replaced, or is there only now, is watched within a second. What happened before is
		// read by then too, or by the next poll.
		arm := func() (added bool) {
			folders := append(dir.Folders(), ciliumStateDir)
			if configFile != "" {
				folders = append(folders, filepath.Dir(configFile))
			}
			watched := watcher.WatchList()
			var errs []error
			for _, folder := range folders {
				err := watcher.Add(folder)
				added = err == nil && !slices.Contains(watched, folder) || added
				if err != nil && !errors.Is(err, fs.ErrNotExist) { // most likely fs.inotify.max_user_watches
					errs = append(errs, fmt.Errorf("%s: %w", folder, err))
				}
			}
			check(errors.Join(errs...))
			return added
		}
		arm()
		wake(Records | Others | Settings | DataPlane)
		rearm := time.NewTicker(time.Second)
		defer rearm.Stop()
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-rearm.C:
				if arm() {
					wake(Records | Others | Settings | DataPlane)
				}
			case _, open := <-watcher.Errors: // an overflow of the queue, or a directory that is gone
				if !open {
					return nil
				}
				wake(Records | Others | Settings | DataPlane)
			case event := <-watcher.Events:
				if event.Op == fsnotify.Chmod {
					continue // a heartbeat
				}
				switch {
				case filepath.Dir(event.Name) == filepath.Clean(ciliumStateDir):
					if filepath.Base(event.Name) == dataplane.File {
						wake(DataPlane)
					}
				case dir.IsState(event.Name):
					wake(Records)
				case event.Has(fsnotify.Create) && isFolder(event.Name) && arm(): // it is watched from now on
					wake(Records | Others)
				case dir.IsClaims(event.Name):
					wake(Others)
				case configFile != "" && filepath.Dir(event.Name) == filepath.Dir(configFile):
					wake(Settings)
				}
			}
		}
	}
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}
