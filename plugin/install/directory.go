package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// settleTime is how long a file may be unusable before it counts as such: a writer that does not replace its file
// as a whole leaves it empty for a moment.
const settleTime = 2 * time.Second

// directory is the CNI configuration directory as it was read.
type directory struct {
	path  string
	files []candidate // those that a loader reads, in its order
	kept  []string    // single-plugin configurations that became lists, by the name that they had
}

// candidate is a file that a loader reads.
type candidate struct {
	File
	target   string // the file to replace: Name, unless that is a symbolic link
	mode     fs.FileMode
	modified time.Time
	foreign  error // it cannot be told what a loader finds here
	unusable error // no loader takes it
}

// readDirectory reads what a loader reads: *.conf, *.conflist and *.json. fs.ErrNotExist where there is no directory.
func readDirectory(path string) (directory, error) {
	d := directory{path: path}
	entries, err := os.ReadDir(path) // in lexical order, as the loaders sort
	if err != nil {
		return d, err
	}
	for _, entry := range entries {
		name := entry.Name()
		if original, ok := strings.CutSuffix(name, keptExt); ok {
			d.kept = append(d.kept, original)
		}
		if ext := filepath.Ext(name); entry.IsDir() || ext != ".conf" && ext != listExt && ext != ".json" {
			continue
		}
		c := d.read(name, entry.Type()&fs.ModeSymlink != 0)
		if c.foreign == nil && errors.Is(c.unusable, fs.ErrNotExist) {
			continue // gone since
		}
		d.files = append(d.files, c)
	}
	for i, c := range d.files {
		for _, original := range d.kept {
			if c.Name != d.listNameOf(original) {
				continue
			}
			data, err := os.ReadFile(filepath.Join(path, original+keptExt))
			if err != nil {
				return d, err
			}
			d.files[i].KeptName, d.files[i].Kept = original, data
		}
	}
	return d, nil
}

func (d directory) read(name string, link bool) candidate {
	c := candidate{File: File{Name: name}, target: name}
	path := filepath.Join(d.path, name)
	if link {
		// In a container an absolute link leads somewhere else than it does for the runtime.
		target, err := os.Readlink(path)
		if err != nil || target != filepath.Base(target) {
			c.foreign = fmt.Errorf("%s is a symbolic link that leads out of the directory, to %s: put the file itself there", path, target)
			return c
		}
		c.target, path = target, filepath.Join(d.path, target)
	}
	info, err := os.Lstat(path)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("is no regular file but %s", info.Mode())
	}
	if err == nil {
		c.mode, c.modified = info.Mode().Perm(), info.ModTime()
		c.Data, err = os.ReadFile(path)
	}
	if err == nil {
		_, err = load(c.Name, c.Data)
	}
	c.unusable = err
	return c
}

// load reads a file as runtimes do.
func load(name string, data []byte) (*libcni.NetworkConfigList, error) {
	if len(data) == 0 {
		return nil, errors.New("the file is empty")
	}
	if filepath.Ext(name) == listExt {
		list, err := libcni.NetworkConfFromBytes(data)
		if err == nil && len(list.Plugins) == 0 {
			err = errors.New("no plugins in the list")
		}
		return list, err
	}
	single, err := libcni.ConfFromBytes(data) //nolint:staticcheck // deprecated, and what runtimes call for *.conf
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromConf(single) //nolint:staticcheck // likewise
}

// pick returns the file that the runtime takes: the first that it can use. notes say what is odd about that.
//
// CRI-O passes over what it cannot use. containerd does not: it starts no pod then, whatever we do, until the file is
// mended or removed, and this is looked at again. So an entry in the first usable file is right for both. A file that was just
// written is given time; again is how much.
func (d directory) pick(now time.Time) (chosen *candidate, again time.Duration, notes []string, err error) {
	for i := range d.files {
		c := &d.files[i]
		switch {
		case c.foreign != nil:
			return nil, 0, nil, c.foreign
		case c.unusable == nil:
			return c, again, notes, nil
		}
		if age := now.Sub(c.modified); age >= 0 && age < settleTime {
			again = max(again, settleTime-age)
		}
		notes = append(notes, fmt.Sprintf("%s cannot be used (%v): CRI-O passes it over, containerd starts no pod until it is mended or removed",
			filepath.Join(d.path, c.Name), strings.ReplaceAll(c.unusable.Error(), "\n", " ")))
	}
	return nil, again, notes, nil
}

func (d directory) exists(name string) bool {
	return slices.ContainsFunc(d.files, func(c candidate) bool { return c.Name == name })
}

// listNameOf is the name of the list that a kept file has become.
func (d directory) listNameOf(original string) string {
	if long := original + listExt; d.exists(long) {
		return long
	}
	return listName(original)
}

// rename gives the list that a file is to become a name that is free and has its place in the order.
func (d directory) rename(before, after File) (File, error) {
	if before.Name == after.Name {
		return after, nil
	}
	short := listName(before.Name)
	for _, name := range []string{short, before.Name + listExt} {
		ours := slices.Contains(d.kept, before.Name) && name == d.listNameOf(before.Name)
		first := !slices.ContainsFunc(d.files, func(c candidate) bool {
			return c.unusable == nil && c.Name != before.Name && c.Name < name
		})
		if first && (ours || !d.exists(name)) {
			after.Name = name
			return after, nil
		}
	}
	return after, fmt.Errorf("%s holds a single plugin, and as %s it would not be the file that the runtime takes, or replace another one: rename or remove the others",
		before.Name, short)
}

// harmless checks that a runtime loads the file after a change, and that nothing but our own entry differs.
func harmless(before, after File) error {
	then, err := load(before.Name, before.Data)
	if err != nil {
		return err
	}
	now, err := load(after.Name, after.Data)
	if err != nil {
		return fmt.Errorf("%s would not load any more: %w", after.Name, err)
	}
	others := func(list *libcni.NetworkConfigList) (plugins []string) {
		for _, p := range list.Plugins {
			if p.Network.Type != PluginType {
				plugins = append(plugins, string(p.Bytes)) // in an order of its own, so that only meaning counts
			}
		}
		return plugins
	}
	if then.Name != now.Name || then.CNIVersion != now.CNIVersion || then.DisableCheck != now.DisableCheck || then.DisableGC != now.DisableGC ||
		!reflect.DeepEqual(others(then), others(now)) {
		return fmt.Errorf("%s would change in more than our entry: it is left alone", before.Name)
	}
	return nil
}
