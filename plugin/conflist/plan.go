package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tailscale/hujson"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// ErrNone says that there is no network configuration that a runtime could use.
var ErrNone = errors.New("no network configuration is there that a runtime could use")

// ErrVersion says that the plugin does not speak the version of a list.
var ErrVersion = errors.New("the plugin does not speak its version of CNI")

// Plan is what has to be changed in a directory.
type Plan struct {
	// File has the key once the changes are made; empty where none has.
	File string
	// Lost: File is there, and has no key of this agent.
	Lost bool
	// Again is when to look again although nothing happens; 0 is never.
	Again time.Duration
	// Notes are what an operator should know, one sentence each.
	Notes []string

	changes []change
	d       *Directory // as it is once the changes are made
}

// change is a change of one file. Before and after it a loader finds the one or the other.
type change struct {
	path string // from the directory
	from string // the file that is put in its place
	old  []byte // nil: it is not there yet
	data []byte // nil: it goes
	like file   // whose mode and owner it has
}

// Empty says that nothing has to be changed.
func (p Plan) Empty() bool { return len(p.changes) == 0 }

// Postponed is the plan without its changes: to look again after a while.
func (p Plan) Postponed(wait time.Duration) Plan { return Plan{Again: wait, Notes: p.Notes} }

// Paths are the files that are changed.
func (p Plan) Paths() (paths []string) {
	for _, c := range p.changes {
		paths = append(paths, c.path)
	}
	return paths
}

// Entry is the entry in File, as it is once the changes are made.
func (p Plan) Entry() []byte {
	f := p.d.find(p.File)
	if f == nil {
		return nil
	}
	d, err := parse(f.data)
	if err != nil || len(d.entries()) == 0 {
		return nil
	}
	return hujson.Value{Value: d.entries()[0].Value}.Pack()
}

// Put returns how the key of an agent comes into the entry of the network that the runtime loads, and out of all other
// files. versions are those of CNI that the plugin speaks. With an error that is ErrVersion, the changes remove
// the entry: with it no pod would start.
func (d *Directory) Put(key Key, versions []string) (Plan, error) {
	p := Plan{d: d.clone()}
	p.takeOver()
	p.removeOrphans()
	target, again, notes, err := p.d.target(time.Now())
	p.Again, p.Notes = again, notes
	switch {
	case err != nil || again > 0:
	case target == nil:
		err = ErrNone
		for _, note := range notes {
			err = fmt.Errorf("%w; %s", err, note)
		}
	default:
		before := *target
		if err = p.put(before, key, versions); err == nil {
			err = p.validate(before)
		}
		if errors.Is(err, ErrVersion) && p.removeEntries(before) {
			err = fmt.Errorf("%w: pods would fail with the entry in it, so that it is removed; the agent knows pods by the API only until that is corrected", err)
		} else if err != nil {
			p = Plan{Notes: notes, d: d.clone()}
			p.removeOrphans()
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", filepath.Join(d.path, before.name), err)
		}
	}
	p.Lost = !d.Has(p.File, key.Agent, key.RuntimeDir)
	if p.File != "" {
		err = errors.Join(err, p.withdraw(p.File, key.Agent, key.RuntimeDir))
	}
	return p, errors.Join(err, p.follow())
}

// put puts the key into the entry of the network of one file.
func (p *Plan) put(target file, key Key, versions []string) error {
	offered, err := speaks(p.d, target, versions)
	switch {
	case err != nil:
		return err
	case offered != "":
		p.Notes = append(p.Notes, fmt.Sprintf("%s offers CNI %s (cniVersions), which the plugin does not speak: with a runtime that does, pods would fail", target.name, offered))
	}
	switch {
	case filepath.Ext(target.name) != listExt:
		return p.own(target, key)
	case p.folderOnly(target):
		return p.folder(target, key)
	}
	for _, f := range p.d.folders[folderOf(target)] { // one entry is enough
		if isEntryFile(f) {
			p.write(f, nil)
		}
	}
	data, err := with(target.data, key)
	if err == nil {
		p.File = target.name
		p.write(target, data)
	}
	return err
}

// Take returns how the key of an agent is removed from all files. What cannot be removed is an error; the changes are
// the rest. last is the file that had the key last, if that is known.
func (d *Directory) Take(agent, runtimeDir, last string) (Plan, error) {
	p := Plan{d: d.clone()}
	p.takeOver()
	p.removeOrphans()
	var unknown error
	if f := d.find(last); f != nil {
		unknown = errors.Join(f.foreign, f.unread)
	}
	return p, errors.Join(p.withdraw("", agent, runtimeDir), p.follow(), unknown)
}

// Has reports whether a file has the key of an agent.
func (d *Directory) Has(name, agent, runtimeDir string) bool {
	f := d.find(name)
	return f != nil && has(f.data, agent, runtimeDir)
}

// target returns the file whose network is to have the entry: the one that the runtime would take without us.
//
// The thin Multus takes over the first list that is not its own as its default network, by a copy in its configuration. A
// list of our own before that would be what it takes next, and call Multus by Multus. So the entry goes where the copy is from.
func (d *Directory) target(now time.Time) (*file, time.Duration, []string, error) {
	f, again, notes, err := d.first(now, isOwn)
	if f == nil || err != nil || filepath.Ext(f.name) == listExt || !strings.HasPrefix(f.name, "00-multus.conf") {
		return f, again, notes, err
	}
	var multus struct {
		Type      string
		Delegates []struct{ Name string }
	}
	if json.Unmarshal(f.data, &multus) != nil || multus.Type != "multus" || len(multus.Delegates) == 0 {
		return f, again, notes, nil
	}
	master, again, more, err := d.first(now, func(g file) bool { return isOwn(g) || g.name == f.name })
	if err != nil || master == nil {
		return f, again, notes, nil
	}
	list, err := d.load(*master)
	if err != nil || list.Name != multus.Delegates[0].Name {
		return f, again, notes, nil
	}
	return master, again, slices.Concat(notes, more, []string{fmt.Sprintf("%s is Multus': the entry is in %s, which Multus takes for its default network", f.name, master.name)}), nil
}

// folderOnly reports whether all plugins of a list are in the folder of its network.
func (p *Plan) folderOnly(f file) bool {
	list, err := parse(f.data)
	return err == nil && (list.plugins() == nil || len(list.plugins().Elements) == 0)
}

// folderEntry is the name of the file with the entry in the folder of a network, where it is the last one there.
const folderEntry = "zz-" + entry.Type + ".conf"

// folder makes or changes the file with the entry in the folder of a network: one that is not the first there.
func (p *Plan) folder(list file, key Key) error {
	folder := folderOf(list)
	var others []file
	var there *file
	data := []byte(key.entry(style{before: "\n", unit: "  ", colon: ": ", comma: ", "}) + "\n")
	for _, f := range slices.Clone(p.d.folders[folder]) {
		switch {
		case !isEntryFile(f):
			others = append(others, f)
		case there == nil && len(others) > 0:
			there = &f
		default: // it is the first, or one of several
			data = f.data
			p.write(f, nil)
		}
	}
	if len(others) == 0 {
		return errAlone
	}
	if there != nil {
		data = there.data
	}
	data, err := with(data, key)
	if err != nil {
		return err
	}
	if there != nil {
		p.File = there.name
		p.write(*there, data)
		return nil
	}
	last := others[len(others)-1]
	name := folderEntry
	if base := filepath.Base(last.name); base >= name {
		name = base + "~" + entry.Type + ".conf"
	}
	p.File = folder + "/" + name
	p.create(p.File, data, last)
	return nil
}

// isEntryFile reports whether a file of a folder is an entry of the plugin.
func isEntryFile(f file) bool {
	d, err := parse(f.data)
	return err == nil && isEntry(&d.Value)
}

// withdraw removes the key of an agent from every file but one.
func (p *Plan) withdraw(except, agent, runtimeDir string) (all error) {
	remove := func(f file) {
		if ext := filepath.Ext(f.name); (ext == ".conf" || ext == ".json") && !strings.Contains(f.name, "/") {
			return // a single plugin, and not ours
		}
		if f.name == except || !has(f.data, agent, runtimeDir) {
			if err := errors.Join(f.foreign, f.unusable); except == "" && err != nil && bytes.Contains(f.data, []byte(quote(entry.Type))) && bytes.Contains(f.data, []byte(quote(agent))) && !has(f.data, agent, AnyRuntimeDir) {
				all = errors.Join(all, fmt.Errorf("%s has the name of agent %s and cannot be read, so that the entry cannot be removed from it: correct it or remove it: %w",
					filepath.Join(p.d.path, f.name), agent, err))
			}
			return
		}
		data, left, err := without(f.data, agent, runtimeDir)
		if err != nil {
			all = errors.Join(all, fmt.Errorf("%s: %w", filepath.Join(p.d.path, f.name), err))
			return
		}
		if isOwn(f) && left == 0 && !p.d.refersTo(f.name) {
			data = nil
		}
		p.write(f, data)
	}
	for _, f := range slices.Clone(p.d.files) {
		remove(f)
	}
	if except == "" {
		for _, f := range p.d.aside {
			remove(f)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(p.d.folders)) {
		for _, f := range slices.Clone(p.d.folders[name]) {
			remove(f)
		}
	}
	return all
}

// removeEntries removes whole entries from the network of a file: those of all agents. It reports whether there were any.
func (p *Plan) removeEntries(f file) (removed bool) {
	if own := p.d.find(ownNameOf(f.name)); own != nil {
		p.write(*own, nil)
		return true
	}
	if hasEntries(f.data) {
		if data, err := withoutEntries(f.data); err == nil {
			p.write(f, data)
			removed = true
		}
	}
	for _, g := range slices.Clone(p.d.folders[folderOf(f)]) {
		if isEntryFile(g) {
			p.write(g, nil)
			removed = true
		}
	}
	return removed
}

func (d *Directory) clone() *Directory {
	c := *d
	c.files, c.folders = slices.Clone(d.files), map[string][]file{}
	for name, files := range d.folders {
		c.folders[name] = slices.Clone(files)
	}
	return &c
}

// insert puts a file into the directory as it will be.
func (d *Directory) insert(f file) {
	files := &d.files
	if folder, _, ok := strings.Cut(f.name, "/"); ok {
		list := d.folders[folder]
		defer func() { d.folders[folder] = list }()
		files = &list
	}
	i, there := slices.BinarySearchFunc(*files, f.name, func(g file, name string) int { return strings.Compare(g.name, name) })
	if there {
		(*files)[i] = f
	} else {
		*files = slices.Insert(*files, i, f)
	}
	d.judge()
}

// write notes the change of a file that is there, to this content and to the mode of f; nil removes it.
func (p *Plan) write(f file, data []byte) {
	was := f
	if there := p.d.find(f.name); there != nil {
		was = *there
	}
	if data != nil && bytes.Equal(was.data, data) && f.mode == was.mode {
		return
	}
	i := slices.IndexFunc(p.changes, func(c change) bool { return c.path == f.target && c.from == "" })
	original := p.d.originalOf(f)
	switch {
	case original != nil && bytes.Equal(original.data, data):
		p.changes = append(p.changes, change{path: f.target, from: original.name, old: was.data})
		f.mode, f.uid, f.gid = original.mode, original.uid, original.gid
	case i >= 0 && p.changes[i].old == nil && data == nil: // not even made
		p.changes = slices.Delete(p.changes, i, i+1)
	case i >= 0:
		p.changes[i].data, p.changes[i].like = data, f
	default:
		p.changes = append(p.changes, change{path: f.target, old: was.data, data: data, like: f})
	}
	if data == nil {
		p.d.delete(f.name)
		return
	}
	if f.data = data; isConfiguration(f.name) { // and not aside
		p.d.insert(f)
	}
}

// create notes a new file with the mode and the owner of another.
func (p *Plan) create(name string, data []byte, like file) {
	p.changes = slices.Insert(p.changes, 0, change{path: name, data: data, like: like})
	p.d.insert(file{name: name, target: name, data: data, mode: like.mode, uid: like.uid, gid: like.gid})
}

func (d *Directory) delete(name string) {
	same := func(f file) bool { return f.name == name }
	if folder, _, ok := strings.Cut(name, "/"); ok {
		d.folders[folder] = slices.DeleteFunc(d.folders[folder], same)
	} else {
		d.files = slices.DeleteFunc(d.files, same)
	}
	d.judge()
}
