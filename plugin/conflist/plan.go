package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"
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
	from string // the file that is renamed to path
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
			err = p.harmless(before)
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
		unknown = f.foreign
	}
	return p, errors.Join(p.withdraw("", agent, runtimeDir), p.follow(), unknown)
}

// Has says whether a file has the key of an agent.
func (d *Directory) Has(name, agent, runtimeDir string) bool {
	f := d.find(name)
	return f != nil && has(f.data, agent, runtimeDir)
}

// isOwn says whether a file is a list of our own.
func isOwn(f file) bool {
	_, own := originalOf(f.name)
	return own
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

// folderOnly says whether all plugins of a list are in the folder of its network.
func (p *Plan) folderOnly(f file) bool {
	list, err := parse(f.data)
	return err == nil && (list.plugins() == nil || len(list.plugins().Elements) == 0)
}

// own makes or changes the list of our own of a single-plugin configuration.
func (p *Plan) own(original file, key Key) error {
	var before []byte
	there := p.d.find(ownName(original.name))
	if there != nil {
		before = there.data
	}
	data := before
	if there == nil || !synced(p.d, *there, original) {
		var err error
		if data, err = listOf(original.data, before); err != nil {
			return err
		}
	}
	data, err := with(data, key)
	if err != nil {
		return err
	}
	p.File = ownName(original.name)
	p.replaceOwn(original, data)
	return nil
}

// replaceOwn gives the list of our own of a single-plugin configuration this content.
func (p *Plan) replaceOwn(original file, data []byte) {
	name := ownName(original.name)
	if there := p.d.find(name); there != nil {
		p.write(*there, data)
		return
	}
	p.create(name, data, original)
}

// synced says whether a list of our own begins with the plugin of its original. Others may have added plugins to it.
func synced(d *Directory, own, original file) bool {
	is, err := d.load(own)
	should, errOriginal := d.load(original)
	return err == nil && errOriginal == nil && is.Name == should.Name && is.CNIVersion == should.CNIVersion &&
		equal(is.Plugins[0].Bytes, should.Plugins[0].Bytes)
}

// equal compares two JSON objects by what they mean.
func equal(a, b []byte) bool {
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

// folderEntry is the name of the file with the entry in the folder of a network, where it is the last one there.
const folderEntry = "zz-" + entry.Type + ".conf"

// folder makes or changes the file with the entry in the folder of a network: the last one there.
func (p *Plan) folder(list file, key Key) error {
	folder := folderOf(list)
	for _, f := range p.d.folders[folder] {
		if d, err := parse(f.data); err == nil && isEntry(&d.Value) && !f.first(p.d.folders[folder]) {
			data, err := with(f.data, key)
			p.File = f.name
			p.write(f, data)
			return err
		}
	}
	name := folderEntry
	files := p.d.folders[folder]
	if last := filepath.Base(files[len(files)-1].name); last >= name {
		name = last + "~" + entry.Type + ".conf"
	}
	p.File = folder + "/" + name
	p.create(p.File, []byte(key.entry(style{before: "\n", unit: "  ", colon: ": ", comma: ", "})+"\n"), files[len(files)-1])
	return nil
}

func (f file) first(files []file) bool { return len(files) > 0 && files[0].name == f.name }

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

// removeEntries removes whole entries from the network of a file: those of all agents. It says whether there were any.
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
		if d, err := parse(g.data); err == nil && isEntry(&d.Value) {
			p.write(g, nil)
			removed = true
		}
	}
	return removed
}

func ownNameOf(name string) string {
	if filepath.Ext(name) == listExt {
		return ""
	}
	return ownName(name)
}

// removeOrphans removes the lists of our own whose original is gone or cannot be used.
func (p *Plan) removeOrphans() {
	for _, f := range slices.Clone(p.d.files) {
		if name, own := originalOf(f.name); own {
			original := p.d.find(name)
			if original == nil || original.foreign == nil && original.unusable != nil && time.Since(original.modified) > settleTime {
				p.write(f, nil)
			}
		}
	}
}

// follow brings the lists of our own in step with their originals. One that has no entry any more goes, unless another
// file refers to it: then it is there for as long as the original is, without the entry.
func (p *Plan) follow() error {
	var all error
	for _, f := range slices.Clone(p.d.files) {
		if isOwn(f) {
			if !p.d.refersTo(f.name) && !hasEntries(f.data) {
				p.write(f, nil)
			}
			continue
		}
		own := p.d.find(ownNameOf(f.name))
		if f.unusable != nil || f.foreign != nil || ownNameOf(f.name) == "" || own == nil && !p.d.refersTo(ownNameOf(f.name)) || own != nil && synced(p.d, *own, f) {
			continue
		}
		var before []byte
		if own != nil {
			before = own.data
		}
		list, err := listOf(f.data, before)
		if err == nil {
			p.replaceOwn(f, list)
		}
		all = errors.Join(all, err)
	}
	for _, f := range p.d.files {
		if isOwn(f) && !hasEntries(f.data) {
			p.Notes = append(p.Notes, fmt.Sprintf("%s stays, without the entry, because another file refers to it", filepath.Join(p.d.path, f.name)))
		}
	}
	return all
}

// refersTo says whether another file names this one, as the thick Multus does (clusterNetwork). It may know the directory by
// another path than we do.
func (d *Directory) refersTo(name string) bool {
	return slices.ContainsFunc(d.files, func(g file) bool { return !isOwn(g) && bytes.Contains(g.data, []byte(name)) })
}

// takeOver undoes what a version before this one did with a single-plugin configuration: it renamed it, and put a list
// in its place. The list goes last, so that at each moment a loader finds one of the two.
func (p *Plan) takeOver() {
	for _, kept := range p.d.kept {
		name := strings.TrimSuffix(kept.name, keptExt)
		var derived *file
		for _, list := range []string{name + listExt, strings.TrimSuffix(name, filepath.Ext(name)) + listExt} {
			if f := p.d.find(list); f != nil && derived == nil && isListOf(f.data, kept.data) {
				derived = &file{}
				*derived = *f
			}
		}
		switch {
		case derived == nil || p.d.find(name) != nil: // its owner has written it anew, or has changed the list
			p.changes = append(p.changes, change{path: kept.name, old: kept.data})
		default:
			p.changes = append(p.changes, change{path: name, from: kept.name})
			kept.name, kept.target = name, name
			p.d.insert(kept)
		}
		if derived == nil {
			continue
		}
		if original := p.d.find(name); original.unusable == nil && p.d.find(ownName(name)) == nil {
			if list, err := listOf(original.data, derived.data); err == nil {
				p.create(ownName(name), list, *original)
			}
		}
		if p.d.refersTo(derived.name) {
			bare, _ := withoutEntries(derived.data)
			p.write(*derived, bare)
		} else {
			p.write(*derived, nil)
		}
	}
}

// isListOf says whether a list is that of a single-plugin configuration and nothing but our entry.
func isListOf(list, single []byte) bool {
	bare, err := withoutEntries(list)
	want, errSingle := listOf(single, nil)
	return err == nil && errSingle == nil && equal(bare, want)
}

// speaks checks that the plugin understands every version that a runtime chooses for this list: one it does not
// know would fail each ADD. The list's own version is never changed, because that is the runtime's business too.
//
// A runtime that knows cniVersions takes the newest of them that it speaks itself; an older one takes cniVersion.
func speaks(d *Directory, f file, versions []string) (offered string, err error) {
	list, err := d.load(f)
	if err != nil {
		return "", err
	}
	var own struct {
		CNIVersion  string
		CNIVersions []string
	}
	if err := json.Unmarshal(f.data, &own); err != nil {
		return "", err
	}
	chosen := []string{list.CNIVersion}
	if own.CNIVersion != "" {
		chosen = append(chosen, own.CNIVersion)
	}
	for _, v := range chosen {
		switch {
		case slices.Contains(versions, v):
		case v == "":
			return "", fmt.Errorf("its cniVersion is missing, which means 0.1.0: %w, it speaks %s", ErrVersion, strings.Join(versions, ", "))
		default:
			return "", fmt.Errorf("its cniVersion is %q: %w, it speaks %s", v, ErrVersion, strings.Join(versions, ", "))
		}
	}
	for _, v := range own.CNIVersions {
		if newer, err := version.GreaterThan(v, slices.MaxFunc(versions, compareCNI)); err == nil && newer {
			offered = v
		}
	}
	return offered, nil
}

func compareCNI(a, b string) int {
	if newer, err := version.GreaterThan(a, b); err == nil && newer {
		return 1
	}
	return -1
}

// harmless checks that the runtime loads the network of a file after the changes, with our entry in one place behind
// another plugin, and that nothing else of it differs.
func (p *Plan) harmless(before file) error {
	then, err := p.original(before)
	if err != nil {
		return err
	}
	name := p.File
	if folder, _, ok := strings.Cut(name, "/"); ok && folder != "" {
		name = before.name
	}
	now, err := p.d.load(*p.d.find(name))
	if err != nil {
		return fmt.Errorf("%s would not load any more: %w", p.File, err)
	}
	others := func(list *libcni.NetworkConfigList) (plugins []string) {
		for _, plugin := range list.Plugins {
			if plugin.Network.Type != entry.Type {
				plugins = append(plugins, string(plugin.Bytes)) // in an order of its own, so that only meaning counts
			}
		}
		return plugins
	}
	if then.Name != now.Name || then.CNIVersion != now.CNIVersion || then.DisableCheck != now.DisableCheck || then.DisableGC != now.DisableGC ||
		then.LoadOnlyInlinedPlugins != now.LoadOnlyInlinedPlugins || !reflect.DeepEqual(others(then), others(now)) ||
		len(now.Plugins) != len(others(now))+1 || now.Plugins[0].Network.Type == entry.Type {
		return fmt.Errorf("%s would change in more than our entry: it is left alone", before.name)
	}
	if name != before.name {
		if first, _, _, err := p.d.first(time.Time{}, func(f file) bool { return f.unusable != nil }); err != nil || first == nil || first.name != name {
			if multus, _, _, _ := p.d.first(time.Time{}, isOwn); multus == nil || multus.name == before.name {
				return fmt.Errorf("%s would not be the file that the runtime takes: it is left alone", name)
			}
		}
	}
	return nil
}

// original is what a file held before the changes; that of a list of our own, with what others have added to it.
func (p *Plan) original(before file) (*libcni.NetworkConfigList, error) {
	if own := p.d.find(ownNameOf(before.name)); own != nil {
		bare, err := withoutEntries(own.data)
		if err != nil {
			return nil, err
		}
		list, err := p.d.load(file{name: own.name, data: bare})
		if err == nil && !synced(p.d, *own, before) {
			err = fmt.Errorf("%s would not be %s and our entry", own.name, before.name)
		}
		return list, err
	}
	return p.d.load(before)
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

// write notes the change of a file that is there; nil removes it.
func (p *Plan) write(f file, data []byte) {
	if data != nil && bytes.Equal(f.data, data) {
		return
	}
	i := slices.IndexFunc(p.changes, func(c change) bool { return c.path == f.target && c.from == "" })
	switch {
	case i >= 0 && p.changes[i].old == nil && data == nil: // not even made
		p.changes = slices.Delete(p.changes, i, i+1)
	case i >= 0:
		p.changes[i].data = data
	default:
		p.changes = append(p.changes, change{path: f.target, old: f.data, data: data, like: f})
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
