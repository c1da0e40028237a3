package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"
)

// ownName is the name of our list of a single-plugin configuration. It sorts before that, since '-' sorts before '.'.
func ownName(original string) string {
	ext := filepath.Ext(original)
	return strings.TrimSuffix(original, ext) + "-" + ext[1:] + ownExt
}

// originalOf is the single-plugin configuration that a list of our own is of.
func originalOf(name string) (original string, ok bool) {
	stem, ok := strings.CutSuffix(name, ownExt)
	for _, ext := range []string{"conf", "json"} {
		if stem, found := strings.CutSuffix(stem, "-"+ext); ok && found {
			return stem + "." + ext, true
		}
	}
	return "", false
}

// isOwn reports whether a file is a list of our own.
func isOwn(f file) bool {
	_, own := originalOf(f.name)
	return own
}

// own makes or changes the list of our own of a single-plugin configuration.
func (p *Plan) own(original file, key Key) error {
	data, err := p.ownList(original)
	if err == nil {
		data, err = with(data, key)
	}
	if err != nil {
		return err
	}
	p.File = ownName(original.name)
	p.replaceOwn(original, data)
	return nil
}

// ownList is the list of our own of a single-plugin configuration, with the entries that it has: the one that is there,
// if it begins with that plugin, or a new one.
func (p *Plan) ownList(original file) ([]byte, error) {
	there := p.d.find(ownName(original.name))
	if there == nil {
		return listOf(original.data, nil)
	}
	if synced(p.d, *there, original) {
		return there.data, nil
	}
	return listOf(original.data, there.data)
}

// replaceOwn gives the list of our own of a single-plugin configuration this content.
func (p *Plan) replaceOwn(original file, data []byte) {
	name := ownName(original.name)
	there := p.d.find(name)
	if there == nil {
		p.create(name, data, original)
		return
	}
	f := *there
	f.mode = original.mode // its owner may be one whom we cannot give files to
	p.write(f, data)
}

// synced reports whether a list of our own begins with the plugin of its original. Others may have added plugins to it.
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
			if original == nil || original.foreign == nil && original.unusable != nil && original.settlesIn(time.Now()) == 0 {
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
		if f.unusable != nil || f.foreign != nil || ownNameOf(f.name) == "" || own == nil && !p.d.refersTo(ownNameOf(f.name)) {
			continue
		}
		list, err := p.ownList(f)
		if err == nil {
			p.replaceOwn(f, list)
		}
		all = errors.Join(all, err)
	}
	for _, original := range p.d.originals { // whose file has no entry any more, because its owner has written it anew
		if !slices.ContainsFunc(p.d.files, func(f file) bool { return f.target+originalExt == original.name && hasEntries(f.data) }) &&
			!slices.ContainsFunc(p.changes, func(c change) bool { return c.from == original.name }) {
			p.changes = append(p.changes, change{path: original.name, old: original.data})
		}
	}
	for _, f := range p.d.files {
		if isOwn(f) && !hasEntries(f.data) {
			p.Notes = append(p.Notes, fmt.Sprintf("%s stays, without the entry, because another file refers to it", filepath.Join(p.d.path, f.name)))
		}
	}
	return all
}

// originalOf is what was kept of a file when it got our entry, nil where that was not needed.
func (d *Directory) originalOf(f file) *file {
	for i := range d.originals {
		if d.originals[i].name == f.target+originalExt {
			return &d.originals[i]
		}
	}
	return nil
}

// refersTo reports whether another file names this one, as the thick Multus does (clusterNetwork). It may know the directory by
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

// isListOf reports whether a list is that of a single-plugin configuration and nothing but our entry.
func isListOf(list, single []byte) bool {
	bare, err := withoutEntries(list)
	want, errSingle := listOf(single, nil)
	return err == nil && errSingle == nil && equal(bare, want)
}
