package runtimedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The layout before had the files of all writers side by side:
//
//	<dir>/state.json, state.lock, plugin.log, …
//	<dir>/agents/<name>.json, <name>.lock (of the agent), <name>.install, <name>.install-lock (of its installer)
//
// An upgrade goes through it without a gap:
//
//   - A writer that takes its lock copies what its predecessor has left into its own directory, and then makes that
//     directory private (0700; kubelet makes it 0755). A private directory shows that its files count, and not the
//     ones of the layout before. While a process of the version before holds its lock (a release that is not upgraded
//     yet, a downgrade), its files count again.
//   - The plugin, which alone may write at the top, moves the records with its next update, and removes what has been
//     taken over.

const oldWait = 100 * time.Millisecond // longer than the plugin of the version before holds its lock

// oldFiles are the files of the plugin at the top. state.json is first: it is what is waited for.
var oldFiles = []string{stateFile, stateFile + tempExt, stateFile + corruptExt, logFile, logFile + oldLogExt, stateLock} //nolint:gochecknoglobals // a constant

// isOld reports whether the files of the layout before count for a writer.
func (w writer) isOld() bool {
	if _, err := w.oldTime(); err != nil {
		return false
	}
	f, err := w.open()
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.close()
	private, err := f.private()
	return err == nil && !private || w.oldLive()
}

// oldIsNewer reports whether the layout before has something newer than the directory f of the writer. The lock is not held.
func (w writer) oldIsNewer(f *folder) (bool, error) {
	old, err := w.oldTime()
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	private, privateErr := f.private()
	stat, statErr := f.stat()
	return !private || old.After(modTime(&stat)), errors.Join(err, privateErr, statErr)
}

// private reports whether f is closed to other users.
func (f *folder) private() (bool, error) {
	stat, err := f.stat()
	return stat.Mode&0o077 == 0, err
}

// oldTime is when the file of the layout before was last written or renewed.
func (w writer) oldTime() (time.Time, error) {
	f, err := w.dir.open(agentsDir)
	if err != nil {
		return time.Time{}, err
	}
	defer f.close()
	stat, err := f.lookup(w.oldFile)
	if err == nil && stat.Mode&unix.S_IFMT == unix.S_IFDIR { // of an agent called "<name>.json"
		err = fs.ErrNotExist
	}
	return modTime(&stat), err
}

// oldLive reports whether a process of the version before is the writer.
func (w writer) oldLive() bool {
	f, err := w.dir.open(agentsDir)
	if err != nil {
		return false
	}
	defer f.close()
	return f.held(w.oldLock)
}

// oldWriters are the names for which the files of the layout before count.
func (d Dir) oldWriters(of func(name string) writer) (names []string, err error) {
	f, err := d.open(agentsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.close()
	entries, err := f.list()
	for _, entry := range entries {
		name, ok := strings.CutSuffix(entry.Name(), path.Ext(of("").oldFile))
		if ok && !entry.IsDir() && of(name).isOld() {
			names = append(names, name)
		}
	}
	return names, err
}

// removeOld removes files of the layout before, where the file system can be written.
func (w writer) removeOld(names ...string) error {
	f, err := w.dir.open(agentsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.close()
	return f.removeOld(names...)
}

// removeOld removes files, directories excepted. In a read-only mount they stay for the plugin.
func (f *folder) removeOld(names ...string) (all error) {
	for _, name := range names {
		err := unix.Unlinkat(f.fd, name, 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EISDIR) {
			all = errors.Join(all, &fs.PathError{Op: "remove", Path: f.join(name), Err: err})
		}
	}
	return all
}

// oldAgent is the content of agents/<name>.json.
type oldAgent struct {
	Version      int                          `json:"version"`
	StartedAt    time.Time                    `json:"startedAt"`
	LastSync     time.Time                    `json:"lastSync"`
	LastError    string                       `json:"lastError"`
	Backend      string                       `json:"backend"`
	BackendNote  string                       `json:"backendNote"`
	PollInterval string                       `json:"pollInterval"`
	MagicIPs     []oldMagicIP                 `json:"magicIPs"`
	Labels       map[string]map[string]string `json:"labels"`
	Told         map[string]oldPod            `json:"told"`
	Dead         []Key                        `json:"dead"`
	Records      []Attachment                 `json:"records"`
	RecordsSince time.Time                    `json:"recordsSince"`
	Lost         []Attachment                 `json:"lost"`
	Withdrawn    map[string][]netip.Addr      `json:"withdrawn"`
	Notes        []string                     `json:"notes"`
}

type oldMagicIP struct {
	Frontend
	Namespace string     `json:"namespace"`
	Selector  string     `json:"selector"`
	ClaimedAt time.Time  `json:"claimedAt"`
	Refused   string     `json:"refused"`
	Action    string     `json:"action"`
	Endpoints []Endpoint `json:"endpoints"`
	LostAt    time.Time  `json:"lostAt"`
}

type oldPod struct {
	CreatedAt time.Time         `json:"createdAt"`
	Owner     string            `json:"owner"`
	Ports     map[string]uint16 `json:"ports"`
	Finished  bool              `json:"finished"`
}

func (o *oldAgent) version() *int { return &o.Version }

func (w writer) readOldInto(limit int64, content document) error {
	f, err := w.dir.open(agentsDir)
	if err != nil {
		return err
	}
	defer f.close()
	data, err := f.read(w.oldFile, limit)
	if err != nil {
		return err
	}
	return decode(f.join(w.oldFile), data, content)
}

func (a Agent) readOld() (*oldAgent, error) {
	var old oldAgent
	return &old, a.readOldInto(statusLimit, &old)
}

func (i Installer) readOld() (*Record, error) {
	var old Record
	return &old, i.readOldInto(recordLimit, &old)
}

// takeOver copies what the version before has left of an agent into its directory.
func (a Agent) takeOver(f *folder) error {
	old, err := a.readOld()
	if err != nil {
		return err
	}
	pods := old.pods()
	pods.bound()
	status := old.status()
	status.Name = a.name
	return errors.Join(
		f.put(memoryFile, memoryLimit, old.memory()),
		f.put(claimsFile, claimsLimit, &Claims{Claims: old.claims()}),
		f.put(podsFile, podsLimit, pods),
		f.put(statusFile, statusLimit, status),
	)
}

func (i Installer) takeOver(f *folder) error {
	old, err := i.readOld()
	if err != nil {
		return err
	}
	return f.put(recordFile, recordLimit, old)
}

func (o *oldAgent) status() *Status {
	status := &Status{
		Version: o.Version, StartedAt: o.StartedAt, LastSync: o.LastSync, LastError: o.LastError, Backend: o.Backend,
		BackendNote: o.BackendNote, PollInterval: o.PollInterval, MagicIPs: []MagicIP{}, Notes: o.Notes,
	}
	for _, m := range o.MagicIPs {
		action := m.Action
		if action == "refuse" {
			action = "reject"
		}
		status.MagicIPs = append(status.MagicIPs, MagicIP{
			Frontend: m.Frontend, Namespace: m.Namespace, Selector: m.Selector, Reason: m.Refused, Action: action, Endpoints: m.Endpoints,
		})
	}
	return status
}

func (o *oldAgent) claims() (claims []Claim) {
	for _, m := range o.MagicIPs {
		claims = append(claims, Claim{Frontend: m.Frontend, ClaimedAt: m.ClaimedAt, Served: m.Refused == ""})
	}
	return claims
}

func (o *oldAgent) pods() *Pods {
	pods := &Pods{Version: o.Version, Dead: o.Dead}
	for _, uid := range slices.Sorted(maps.Keys(o.Labels)) {
		pods.Labels = append(pods.Labels, PodLabels{PodID: PodID{UID: uid}, Labels: o.Labels[uid]})
	}
	return pods
}

func (o *oldAgent) memory() *Memory {
	memory := &Memory{Version: o.Version, Records: o.Records, RecordsSince: o.RecordsSince, Lost: o.Lost}
	pods := map[string]*Pod{} // by UID
	pod := func(uid string) *Pod {
		if pods[uid] == nil {
			pods[uid] = &Pod{PodID: PodID{UID: uid}, Labels: o.Labels[uid]}
		}
		return pods[uid]
	}
	for uid := range o.Labels {
		pod(uid)
	}
	for uid, known := range o.Told {
		p := pod(uid)
		p.CreatedAt, p.Finished = known.CreatedAt, known.Finished
		if known.Owner != "" {
			p.Owners = []string{known.Owner}
		}
		for name, port := range known.Ports {
			for _, protocol := range []Protocol{TCP, UDP, SCTP} { // which it is was not written
				p.Ports = append(p.Ports, NamedPort{Name: name, Protocol: protocol, Port: port})
			}
		}
	}
	for _, m := range o.MagicIPs {
		for _, e := range m.Endpoints {
			if e.UID == "" {
				continue
			}
			// It stays the endpoint until the API reports otherwise.
			p := pod(e.UID)
			p.Namespace, p.Name, _ = strings.Cut(e.Pod, "/")
			p.Running, p.Ready = true, true
			if ip := e.Address.Addr(); !slices.Contains(p.IPs, ip) {
				p.IPs = append(p.IPs, ip)
			}
		}
	}
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		memory.Pods = append(memory.Pods, *pods[uid])
	}
	for _, uid := range slices.Sorted(maps.Keys(o.Withdrawn)) {
		memory.Withdrawn = append(memory.Withdrawn, Withdrawn{PodID: PodID{UID: uid}, Addresses: o.Withdrawn[uid]})
	}
	return memory
}

// oldState is the state file at the top, locked: its records belong to the list in plugin/ until that has them.
type oldState struct {
	top  *folder
	list lines
	// err is why there is no list; fs.ErrNotExist mostly.
	err  error
	lock func()
}

// takeOldState reads the state file at the top for the plugin, which is about to move it.
func (d Dir) takeOldState() (*oldState, error) {
	top, err := d.open()
	if err != nil {
		return nil, err
	}
	old := &oldState{top: top, lock: func() {}}
	if _, old.err = top.lookup(stateFile); old.err != nil {
		return old, nil
	}
	// A plugin of the version before may be writing. Any process may hold this lock, so that it does not delay for long,
	// and only this once.
	if file, _, err := top.open(stateLock, unix.O_RDONLY, 0); err == nil && wait(file, oldWait) == nil {
		old.lock = func() { _ = file.Close() }
	}
	_, old.list, old.err = load(top)
	return old, nil
}

func (o *oldState) close() {
	o.lock()
	o.top.close()
}

// clear removes what has been taken over into f, the directory of the plugin, from the top and from the agents' files.
func (o *oldState) clear(d Dir, f *folder) error {
	var all error
	var corrupt *CorruptError
	if errors.As(o.err, &corrupt) {
		all = unix.Renameat(o.top.fd, stateFile, f.fd, stateFile+corruptExt)
	}
	for _, name := range oldFiles {
		if _, err := o.top.lookup(name); err != nil {
			continue
		}
		kept := name == logFile || name == logFile+oldLogExt || name == stateFile+corruptExt
		if _, err := f.lookup(name); kept && errors.Is(err, fs.ErrNotExist) && unix.Renameat(o.top.fd, name, f.fd, name) == nil {
			continue
		}
		all = errors.Join(all, o.top.removeOld(name))
	}
	return errors.Join(all, d.clearAgents())
}

func (d Dir) clearAgents() error {
	f, err := d.open(agentsDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.close()
	entries, err := f.list()
	for _, entry := range entries {
		if entry.IsDir() {
			continue
		}
		for _, of := range []func(string) writer{d.installerWriter, d.agentWriter} {
			name, ok := cutOldExt(entry.Name(), of)
			if ok && of(name).takenOver() {
				err = errors.Join(err, f.removeOld(entry.Name()))
			}
		}
	}
	return err
}

// cutOldExt returns the name of the writer that a file of the layout before belongs to.
func cutOldExt(file string, of func(string) writer) (name string, ok bool) {
	for _, ext := range of("").oldFiles() {
		if name, ok := strings.CutSuffix(file, ext); ok {
			return name, true
		}
	}
	return "", false
}

// takenOver reports whether a writer of this version counts.
func (w writer) takenOver() bool {
	f, err := w.open()
	if err != nil {
		return false
	}
	defer f.close()
	private, err := f.private()
	return err == nil && private && !w.oldLive()
}

// oldFiles are the files of the layout before of a writer.
func (w writer) oldFiles() []string {
	return []string{w.oldFile, w.oldFile + tempExt, w.oldFile + corruptExt, w.oldLock}
}

// readOldState is what is recorded at the top.
func (d Dir) readOldState() (File, error) {
	top, err := d.open()
	if err != nil {
		return File{}, err
	}
	defer top.close()
	return readState(top)
}

// merge adds the records of another list that are not in l.
func (l *lines) merge(other lines) error {
	for _, record := range other.records {
		var key Key
		if err := json.Unmarshal(record, &key); err != nil {
			return fmt.Errorf("a record of the version before: %w", err)
		}
		start, err := start(key)
		if err != nil {
			return err
		}
		if !l.has(start) {
			l.records = append(l.records, record)
		}
	}
	return nil
}

// mergeFiles is merge for what is read.
func mergeFiles(file, old File) File {
	for _, attachment := range old.Attachments {
		if !slices.ContainsFunc(file.Attachments, func(a Attachment) bool { return a.Key() == attachment.Key() }) {
			file.Attachments = append(file.Attachments, attachment)
		}
	}
	return file
}
