// Package conflist knows the file that the container runtime loads, and the plugin's entry in it: which file that is,
// what it says, and how it is changed so that nothing else differs.
//
// A list of plugins is edited in place, byte by byte. A single-plugin configuration stays as it is: beside it stands a
// list of our own, which loaders take before it (they sort by whole name) and which follows it. A network whose plugins are
// all in a folder beside its list (CNI 1.1) has the entry in a file of that folder.
//
// Limits: a containerd whose max_conf_num is not 1 also loads the configuration that our list was made of, as a second network.
// A runtime that is told a network by name takes it from our list too, where the single-plugin configuration is the first
// file. Which plugins of others speak a list's version, as CRI-O asks, is not known here. While no installer runs, a list
// of our own does not follow.
package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// Where runtimes look for network configurations and for plugins, unless they are told otherwise.
const (
	DefaultDir    = "/etc/cni/net.d"
	DefaultBinDir = "/opt/cni/bin"
)

const (
	listExt = ".conflist"
	// keptExt is behind the name of a single-plugin configuration that a version before this one renamed. No loader reads such a name.
	keptExt = "." + entry.Type
	// ownExt ends the name of a list of our own.
	ownExt = "." + entry.Type + listExt

	maxSize = 1 << 20
)

// settleTime is how long a file may be unusable before it counts as such: a writer that does not replace its file
// as a whole leaves it empty for a moment.
const settleTime = 2 * time.Second

// settlesIn is how long the file may still be under its writer's hands; 0 where its time of change lies ahead: clocks are set back.
func (f *file) settlesIn(now time.Time) time.Duration {
	if age := now.Sub(f.modified); age >= 0 && age < settleTime {
		return settleTime - age
	}
	return 0
}

// Options say how a directory is read.
type Options struct {
	Runtime Runtime
	// BinDir has the plugins that the runtime runs. Empty: which are installed is not known.
	BinDir string
	// Force is told that another installer does not give its lock back, as one that hangs does, and the work goes on. Nil: it ends.
	Force func(held error)
}

// Directory is a directory of network configurations, as it was read.
type Directory struct {
	path      string
	options   Options
	files     []file            // those that a loader reads, in its order
	folders   map[string][]file // of CNI 1.1: the *.conf of each folder that a list is merged with, by its name
	broken    map[string]error  // why a folder cannot be read
	kept      []file            // single-plugin configurations that a version before this one renamed
	originals []file            // of files that have our entry, where only these can have the owner that they had
	aside     []file            // those with an entry that no loader reads: what a link led to, copies that others keep
}

// file is a file of the directory.
type file struct {
	name     string // in the directory, or folder/name
	target   string // the file that has the content, from the directory: name, unless that is a symbolic link
	data     []byte
	mode     fs.FileMode
	uid, gid int
	modified time.Time
	foreign  error // it is not known what a loader finds here
	unread   error // no loader can read it
	unusable error // no loader takes it, for that or for what it says
}

var errEmpty = errors.New("the file is empty")

// Read reads what a loader reads: *.conf, *.conflist and *.json. fs.ErrNotExist where there is no directory.
func Read(path string, options Options) (*Directory, error) {
	if options.Runtime == "" {
		options.Runtime = Auto
	}
	entries, err := os.ReadDir(path) // in lexical order, as the loaders sort
	if err != nil {
		return nil, err
	}
	d := &Directory{path: path, options: options, folders: map[string][]file{}, broken: map[string]error{}}
	for _, e := range entries {
		if original, ok := strings.CutSuffix(e.Name(), keptExt); ok && isConfiguration(original) {
			if f := d.read(e.Name()); f.foreign == nil && f.data != nil {
				d.kept = append(d.kept, f)
			}
		}
		if strings.HasSuffix(e.Name(), originalExt) {
			if f := d.read(e.Name()); f.foreign == nil && f.data != nil {
				d.originals = append(d.originals, f)
			}
		}
		if !e.IsDir() && !isConfiguration(e.Name()) && !IsOurs(e.Name()) {
			if f := d.read(e.Name()); e.Type().IsRegular() && bytes.Contains(f.data, []byte(quote(entry.Type))) && hasEntries(f.data) {
				d.aside = append(d.aside, f)
			}
		}
		if e.IsDir() || !isConfiguration(e.Name()) {
			continue
		}
		f := d.read(e.Name())
		if errors.Is(f.unread, fs.ErrNotExist) && e.Type()&fs.ModeSymlink == 0 {
			continue // gone since
		}
		d.files = append(d.files, f)
	}
	d.aside = slices.DeleteFunc(d.aside, func(f file) bool {
		return slices.ContainsFunc(d.files, func(g file) bool { return g.target == f.target })
	})
	for _, f := range d.files {
		if name := folderOf(f); name != "" && d.folders[name] == nil && d.broken[name] == nil {
			d.readFolder(name)
		}
	}
	d.judge()
	return d, nil
}

// DirOf is the directory of configurations that an installer has put the entry in: into a list, or into a file in the folder of a
// network.
func DirOf(file string) string {
	if filepath.Ext(file) != listExt {
		file = filepath.Dir(file)
	}
	return filepath.Dir(file)
}

func isConfiguration(name string) bool {
	return slices.Contains([]string{".conf", listExt, ".json"}, filepath.Ext(name))
}

// judge says of each file whether a loader takes it.
func (d *Directory) judge() {
	for i := range d.files {
		f := &d.files[i]
		if f.unusable = f.unread; f.unread == nil && f.foreign == nil {
			_, f.unusable = d.load(*f)
		}
	}
}

// folderOf is the name of the folder whose plugins a list is merged with, empty where there is none.
func folderOf(f file) string {
	var list struct {
		Name   string
		Inline any `json:"loadOnlyInlinedPlugins"`
	}
	if filepath.Ext(f.name) != listExt || json.Unmarshal(f.data, &list) != nil || list.Name != filepath.Base(list.Name) || list.Name == "." || list.Name == ".." {
		return ""
	}
	if inline := fmt.Sprint(list.Inline); strings.EqualFold(inline, "true") {
		return ""
	}
	return list.Name
}

// readFolder reads the plugins in the folder of a network.
func (d *Directory) readFolder(name string) {
	target, err := d.resolve(name)
	if err != nil {
		d.broken[name] = err
		return
	}
	entries, err := os.ReadDir(filepath.Join(d.path, target))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.broken[name] = err
	}
	for _, e := range entries {
		if !e.IsDir() && filepath.Ext(e.Name()) == ".conf" {
			d.folders[name] = append(d.folders[name], d.read(name+"/"+e.Name()))
		}
	}
}

// resolve follows symbolic links, as the runtime does: in a container an absolute one leads somewhere else than it does
// there, so that only those that stay in the directory can be followed.
func (d *Directory) resolve(name string) (target string, err error) {
	rest, done := strings.Split(name, "/"), []string{}
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(done) == 0 {
				// Up and down again is no way out.
				if len(rest) > 0 && rest[0] == filepath.Base(d.path) {
					rest = rest[1:]
					continue
				}
				return "", d.leadsOut(name)
			}
			done = done[:len(done)-1]
			continue
		}
		link, err := os.Readlink(filepath.Join(append([]string{d.path}, append(slices.Clone(done), part)...)...))
		if err != nil { // none, or nothing there
			done = append(done, part)
			continue
		}
		if links++; links > 40 { // as the kernel does
			return "", fmt.Errorf("%s: %w", filepath.Join(d.path, name), unix.ELOOP)
		}
		if filepath.IsAbs(link) {
			inside, ok := strings.CutPrefix(filepath.Clean(link), filepath.Clean(d.path)+"/")
			if !ok {
				return "", d.leadsOut(name)
			}
			link, done = inside, nil
		}
		rest = append(strings.Split(link, "/"), rest...)
	}
	return filepath.Join(done...), nil
}

func (d *Directory) leadsOut(name string) error {
	path := filepath.Join(d.path, name)
	target, _ := os.Readlink(path)
	return fmt.Errorf("%s is a symbolic link that leads out of the directory, to %s: what the runtime finds there cannot be seen from here; put the file itself there",
		path, target)
}

func (d *Directory) read(name string) (f file) {
	f = file{name: name, target: name}
	target, err := d.resolve(name)
	if err != nil {
		f.foreign = err
		return f
	}
	f.target = target
	if f.data, f.unread = d.content(&f); errors.Is(f.unread, fs.ErrPermission) {
		f.foreign = fmt.Errorf("%w: what the runtime finds there cannot be seen from here; let root read it (chmod), whom a container denies what others own", f.unread)
	}
	return f
}

// content reads a file without waiting for a pipe, and without more memory than a configuration needs.
func (d *Directory) content(f *file) ([]byte, error) {
	opened, err := os.OpenFile(filepath.Join(d.path, f.target), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = opened.Close() }()
	info, err := opened.Stat()
	if err != nil {
		return nil, err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(opened.Fd()), &stat); err != nil {
		return nil, err
	}
	f.mode, f.modified, f.uid, f.gid = info.Mode().Perm(), info.ModTime(), int(stat.Uid), int(stat.Gid)
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("is no regular file but %s", info.Mode())
	}
	if info.Size() > maxSize {
		return nil, tooLarge(info.Size())
	}
	return io.ReadAll(io.LimitReader(opened, maxSize))
}

func tooLarge(bytes int64) error {
	return fmt.Errorf("has %d bytes, and no network configuration has more than %d", bytes, maxSize)
}

// load reads a file as runtimes do.
func (d *Directory) load(f file) (*libcni.NetworkConfigList, error) {
	switch {
	case len(f.data) == 0:
		return nil, errEmpty
	case len(f.data) > maxSize:
		return nil, tooLarge(int64(len(f.data)))
	}
	if filepath.Ext(f.name) != listExt {
		single, err := libcni.ConfFromBytes(f.data) //nolint:staticcheck // deprecated, and what runtimes call for *.conf
		if err != nil {
			return nil, err
		}
		return libcni.ConfListFromConf(single) //nolint:staticcheck // likewise
	}
	list, err := libcni.NetworkConfFromBytes(f.data)
	if err != nil {
		return nil, err
	}
	folder := folderOf(f)
	if err := d.broken[folder]; err != nil {
		return nil, err
	}
	for _, p := range d.folders[folder] {
		if err := errors.Join(p.foreign, p.unread); err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		plugin, err := libcni.NetworkPluginConfFromBytes(p.data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p.name, err)
		}
		list.Plugins = append(list.Plugins, plugin)
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("no plugins in the list")
	}
	return list, nil
}

// first returns the first file that the runtime can take, among those that skip leaves. notes say what is odd about
// those before it. A file that was just written is given time; again is how much.
func (d *Directory) first(now time.Time, skip func(file) bool) (chosen *file, again time.Duration, notes []string, err error) {
	effect := map[Runtime]string{
		Containerd: "containerd starts no pod until it is corrected or removed",
		CRIO:       "CRI-O passes it over; correct it or remove it",
		Auto:       "CRI-O passes it over, containerd starts no pod until it is corrected or removed",
	}[d.options.Runtime]
	var usable *file   // the first
	var lacks []string // plugins that it lacks
	var complete *file // the first that lacks none
	for i := range d.files {
		f := &d.files[i]
		switch {
		case skip(*f):
		case f.foreign != nil && usable == nil:
			return nil, 0, notes, f.foreign
		case f.unusable != nil && usable == nil:
			again = max(again, f.settlesIn(now))
			what := fmt.Sprintf("cannot be used (%s)", strings.ReplaceAll(f.unusable.Error(), "\n", " "))
			if errors.Is(f.unusable, errEmpty) {
				what = "is empty"
			}
			notes = append(notes, fmt.Sprintf("%s %s: %s", filepath.Join(d.path, f.name), what, effect))
		case f.foreign != nil || f.unusable != nil:
		case usable == nil:
			usable, lacks = f, d.notInstalled(*f)
			if len(lacks) == 0 {
				complete = f
			}
		case complete == nil && len(d.notInstalled(*f)) == 0:
			complete = f
		}
	}
	if complete == nil || complete == usable || d.options.Runtime == Containerd {
		return usable, again, notes, nil // where all lack plugins, these may be in another directory of CRI-O's
	}
	lack := fmt.Sprintf("%s names plugins that are not in %s (%s)", filepath.Join(d.path, usable.name), d.options.BinDir, strings.Join(lacks, ", "))
	if d.options.Runtime == CRIO {
		return complete, again, append(notes, fmt.Sprintf("%s: CRI-O passes it over until they are, and takes %s", lack, complete.name)), nil
	}
	return usable, again, append(notes, fmt.Sprintf("%s: containerd takes it all the same, CRI-O would take %s; say which it is with --runtime", lack, complete.name)), nil
}

// notInstalled are the plugins of others that a network names and the runtime cannot run.
func (d *Directory) notInstalled(f file) (missing []string) {
	list, err := d.load(f)
	if err != nil || d.options.BinDir == "" {
		return nil
	}
	for _, p := range list.Plugins {
		kind := p.Network.Type
		if kind == entry.Type || slices.Contains(missing, kind) {
			continue
		}
		if info, err := os.Stat(filepath.Join(d.options.BinDir, kind)); err != nil || !info.Mode().IsRegular() {
			if link, linkErr := os.Lstat(filepath.Join(d.options.BinDir, kind)); linkErr == nil && link.Mode()&fs.ModeSymlink != 0 {
				continue // which leads elsewhere on the node than here
			}
			missing = append(missing, kind)
		}
	}
	return missing
}

// find is the file of this name, nil where there is none.
func (d *Directory) find(name string) *file {
	files := d.files
	if folder, _, ok := strings.Cut(name, "/"); ok {
		files = d.folders[folder]
	}
	for i := range files {
		if files[i].name == name {
			return &files[i]
		}
	}
	return nil
}
