package agent

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
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

// with are the records after the file has said this.
func (r records) with(file state.File) records {
	lost := r.lost
	if !file.Since.Equal(r.since) {
		lost = r.list
	}
	lost = slices.DeleteFunc(slices.Clone(lost), func(l state.Attachment) bool {
		return l.HostInterface == "" || slices.ContainsFunc(file.Attachments, func(a state.Attachment) bool {
			return a.Key() == l.Key() || a.HostInterface == l.HostInterface
		})
	})
	return records{list: slices.Concat(lost, file.Attachments), lost: lost, since: file.Since, known: true}
}

// on are the records on a node with these interfaces: without the lost ones whose interface is not there any
// more, and never will be again.
func (r records) on(interfaces map[string]bool) records {
	present := r.list[len(r.lost):]
	r.lost = endpoint.Standing(r.lost, interfaces)
	r.list = slices.Concat(r.lost, present)
	return r
}

// pods is what the Kubernetes API said last, and what the records have told since.
type pods struct {
	inventory.View
	// withdrawn are the addresses that DEL has taken from a pod, by UID: its podIP counts no more until the
	// API reports another one.
	withdrawn map[string][]netip.Addr
	// told is what the API has said of pods with a record, by the UID in it: it counts for as long as the record
	// does, although the API may have forgotten the pod.
	told map[string]inventory.Pod
	// missing is since when the pod of a record is not in the API.
	missing map[state.Key]time.Time
}

// read takes in the sources that have changed, and says whether there can be news. What cannot be read leaves what
// was known of it.
func (a *Agent) read(ctx context.Context, changed Source) (news bool) {
	if changed&(Settings|Poll) != 0 {
		a.readSettings()
	}
	if changed&(Records|Poll) != 0 {
		file, err := state.ReadFile(a.RuntimeDir)
		switch {
		case err == nil:
			a.setRecords(a.records.with(file))
		case errors.Is(err, fs.ErrNotExist) && len(a.records.list) == 0:
			// No pod has been added yet, unless this agent knew of one before it was restarted.
			a.records.known, err = a.records.known || !a.restoredRecords(), nil
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
			if a.records.known {
				a.setRecords(a.records.on(network.Interfaces))
			}
		}
	}
	if changed&(Others|Poll) != 0 {
		news = a.readOthers()
	}
	if changed&(Pods|Poll) != 0 && a.API != nil {
		a.readPods(ctx, changed)
	}
	return news || changed != Others // this agent's own file wakes it too
}

func (a *Agent) setRecords(r records) {
	a.withdraw(r.list)
	a.records = r
}

// withdraw notes the addresses of records that count no more, now that these do.
func (a *Agent) withdraw(list []state.Attachment) {
	if a.API == nil {
		return // nobody tells a podIP
	}
	here := map[state.Key]bool{}
	for _, record := range list {
		here[record.Key()] = true
	}
	for _, record := range a.records.list {
		if !here[record.Key()] && record.UID != "" {
			a.pods.withdrawn[record.UID] = append(a.pods.withdrawn[record.UID], record.IPs...)
		}
	}
	if a.records.known || a.restored == nil {
		return
	}
	for _, m := range a.restored.MagicIPs { // DEL has come while this agent was away
		for _, e := range m.Endpoints {
			if e.Recorded && e.UID != "" && !slices.ContainsFunc(list, func(r state.Attachment) bool { return r.UID == e.UID }) {
				a.pods.withdrawn[e.UID] = append(a.pods.withdrawn[e.UID], e.Address.Addr())
			}
		}
	}
}

func (a *Agent) restoredRecords() bool {
	return a.restored != nil && slices.ContainsFunc(a.restored.MagicIPs, func(m published.MagicIP) bool {
		return slices.ContainsFunc(m.Endpoints, func(e published.Endpoint) bool { return e.Recorded })
	})
}

func (a *Agent) readPods(ctx context.Context, changed Source) {
	if changed&Poll != 0 {
		a.API.Select(a.config.Namespaces())
		a.API.Poll(ctx)
	}
	a.remember() // a new record's pod may be gone from the API by now
	a.pods.View = a.API.View()
	var problem error
	if len(a.pods.Problems) > 0 {
		problem = errors.New(strings.Join(a.pods.Problems, "; "))
	}
	a.note("Kubernetes API", problem)
	a.remember()
	listed := map[string]inventory.Pod{}
	for _, pod := range a.pods.Pods {
		listed[pod.UID] = pod
		if pod.ConfigHash != "" {
			listed[pod.ConfigHash] = pod
		}
	}
	for uid, taken := range a.pods.withdrawn {
		pod, here := listed[uid]
		another := slices.ContainsFunc(pod.IPs, func(ip netip.Addr) bool { return !slices.Contains(taken, ip) })
		if another || !here && a.pods.Spoken && a.pods.Reachable {
			delete(a.pods.withdrawn, uid)
		}
	}
	missing := map[state.Key]time.Time{}
	for _, record := range a.records.list {
		if _, here := listed[record.UID]; here || record.UID == "" || !a.serves(record.Namespace) {
			continue
		}
		since, known := a.pods.missing[record.Key()]
		if !known {
			if !inventory.Covers(a.pods.Current, record.Namespace) {
				continue
			}
			since = time.Now()
		}
		missing[record.Key()] = since
	}
	a.pods.missing = missing
}

// remember keeps what the API tells of the pods with a record.
func (a *Agent) remember() {
	told := map[string]inventory.Pod{}
	if !a.records.known {
		maps.Copy(told, a.pods.told)
	}
	recorded := map[string]bool{}
	for _, record := range a.records.list {
		recorded[record.UID] = record.UID != ""
		if pod, before := a.pods.told[record.UID]; before {
			told[record.UID] = pod
		}
	}
	for _, pod := range a.pods.Pods {
		for _, uid := range []string{pod.UID, pod.ConfigHash} {
			if recorded[uid] {
				told[uid] = pod
			}
		}
	}
	a.pods.told = told
}

// dead are the records that the plugin may drop: their pod has been gone from the API for a minute, and
// their host interface is gone from the node.
func (a *Agent) dead(now time.Time) []published.Attachment {
	var dead []published.Attachment
	for _, record := range a.records.list {
		since, missing := a.pods.missing[record.Key()]
		if missing && now.Sub(since) >= endpoint.UnknownPodGrace && record.HostInterface != "" && !a.network.Interfaces[record.HostInterface] {
			dead = append(dead, published.Attachment{ContainerID: record.ContainerID, IfName: record.IfName})
		}
	}
	return dead
}

func (a *Agent) serves(namespace string) bool {
	return slices.ContainsFunc(a.config.Namespaces(), func(n string) bool { return n == namespace || n == inventory.AllNamespaces })
}

func (a *Agent) readSettings() {
	loaded, err := a.Load()
	if err == nil && loaded.Name != a.config.Name {
		err = errors.New("name: the name of a running agent cannot change from " + a.config.Name + " to " + loaded.Name + "; restart it")
	}
	a.note("configuration", err)
	if err != nil {
		return
	}
	a.config, a.serving = loaded, nil
	if a.API != nil {
		a.API.Select(a.config.Namespaces())
	}
}

// readOthers reads what the other agents on this node have published, and says whether it is news.
func (a *Agent) readOthers() (news bool) {
	names, err := published.Names(a.RuntimeDir)
	a.note("agents of the node", err)
	if err != nil {
		return false
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
	news = !reflect.DeepEqual(a.others, others)
	a.others = others
	return news
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
	a.restored, a.restoredOf = restored, map[plan.Frontend][]published.MagicIP{}
	if a.API != nil {
		maps.Copy(a.pods.withdrawn, restored.Withdrawn)
		a.pods.told = map[string]inventory.Pod{}
		for uid, pod := range restored.Told {
			a.pods.told[uid] = inventory.Pod{
				Labels: restored.Labels[uid], CreatedAt: pod.CreatedAt, Owner: pod.Owner, Ports: pod.Ports, Finished: pod.Finished,
			}
		}
	}
	a.records = records{list: slices.Concat(restored.Lost, restored.Records), lost: restored.Lost, since: restored.RecordsSince}
	for _, m := range restored.MagicIPs {
		a.restoredOf[frontendOf(m)] = append(a.restoredOf[frontendOf(m)], m)
		a.services[frontendOf(m)] = &service{claimedAt: m.ClaimedAt, lostAt: m.LostAt}
	}
}

// restoredLabels are those that the API told before the restart, for as long as it has told nothing since. A
// record made before the API told of its pod bears none of its own.
func (a *Agent) restoredLabels() map[string]map[string]string {
	if a.API == nil || a.restored == nil || a.pods.Spoken {
		return nil
	}
	return a.restored.Labels
}

// labelled are the records, with the labels from before a restart where nobody has told others.
func (a *Agent) labelled() []state.Attachment {
	restored := a.restoredLabels()
	if len(restored) == 0 {
		return a.records.list
	}
	list := slices.Clone(a.records.list)
	for i, record := range list {
		if record.Labels == nil && record.UID != "" {
			list[i].Labels = restored[record.UID]
		}
	}
	return list
}

// restoredEndpoints are those from before the restart that nothing contradicts: their record stands, or
// the source that told of them has not spoken yet.
func (a *Agent) restoredEndpoints(port config.Port) []published.Endpoint {
	if a.restored == nil || a.records.known && a.told(port.Namespace) {
		return nil
	}
	var endpoints []published.Endpoint
	for _, m := range a.restoredOf[port.Frontend] {
		if m.Namespace != port.Namespace || m.Selector != port.SelectorText {
			continue
		}
		for _, e := range m.Endpoints {
			// What number a port's name stands for, the API alone can tell again.
			samePort := port.TargetPortName != "" || e.Address.Port() == port.TargetPort
			if samePort && (!a.records.known || !e.Recorded || a.recorded(e.Address.Addr())) {
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

// told says whether the API has told of a namespace's pods, where it is asked.
func (a *Agent) told(namespace string) bool {
	return a.API == nil || inventory.Covers(a.pods.Told, namespace)
}

// settled says whether every source has spoken.
func (a *Agent) settled() bool { return a.records.known && (a.API == nil || a.pods.Spoken) }

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
			_ = watcher.Add(filepath.Dir(state.Path(runtimeDir))) // missing until the first pod
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
				case event.Name == filepath.Dir(state.Path(runtimeDir)):
					_ = arm()
					wake(Records)
				case event.Name == state.Path(runtimeDir), event.Name == filepath.Join(runtimeDir, filepath.Base(state.Path(""))):
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
