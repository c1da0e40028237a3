package conflist

import (
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// View describes a directory, for people.
type View struct {
	// Loads is the file that the runtime loads; empty where there is none.
	Loads string
	// Blocked: a file before that keeps containerd from loading it.
	Blocked bool
	// Expected is the file that the entry belongs in.
	Expected string
	Entries  []Found
	Notes    []string
	// Unknown is why it is not known which file that is.
	Unknown error
}

// Found is an entry of the plugin in a file.
type Found struct {
	File  string
	First bool // in the chain that is loaded: there is no plugin before it that assigns addresses
	entry.Raw
}

// View returns what the runtime loads, and each entry.
func (d *Directory) View() (v View) {
	loads, _, notes, err := d.first(time.Time{}, func(file) bool { return false })
	v.Notes, v.Unknown = notes, err
	if loads != nil {
		v.Loads = loads.name
		v.Blocked = d.options.Runtime != CRIO && slices.ContainsFunc(d.files, func(f file) bool { return f.unusable != nil && f.name < loads.name })
	}
	target, _, notes, err := d.target(time.Time{})
	if v.Unknown == nil {
		v.Unknown = err
	}
	for _, note := range notes {
		if !slices.Contains(v.Notes, note) {
			v.Notes = append(v.Notes, note)
		}
	}
	all := slices.Clone(d.files)
	if target != nil {
		switch folder := folderOf(*target); {
		case filepath.Ext(target.name) != listExt:
			v.Expected = ownName(target.name)
		case (&Plan{d: d}).folderOnly(*target):
			v.Expected = folder + "/" + folderEntry
			all = append(all, d.folders[folder]...)
		default:
			v.Expected = target.name
		}
	}
	for _, f := range all {
		document, err := parse(f.data)
		if err != nil || filepath.Ext(f.name) != listExt && !strings.Contains(f.name, "/") {
			continue
		}
		for _, e := range document.entries() {
			found := Found{File: f.name, First: slices.Contains(document.ours(), 0), Raw: raw(e)}
			if folder, _, ok := strings.Cut(f.name, "/"); ok {
				found.First = d.folders[folder][0].name == f.name
				v.Expected = f.name
			}
			v.Entries = append(v.Entries, found)
		}
	}
	return v
}
