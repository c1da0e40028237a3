// Package conflist tries the installer on network configurations as they are out there: testdata has one directory of
// such in each file, with where its facts are from. Each is loaded as libcni, containerd and CRI-O load it, before and after
// all that its owner and the installer do.
//
// It is a module of its own because of containerd's loader. That of CRI-O is not to be had as a module; its rules are here.
package conflist

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	gocni "github.com/containerd/go-cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/install"
)

// program answers as a CNI plugin does.
const program = `#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["%s0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}' ;;
esac
`

// network is what a runtime makes of a directory.
type network struct {
	Name, Version string
	Plugins       []string // as JSON, in order
}

func networkOf(list *libcni.NetworkConfigList) *network {
	n := &network{Name: list.Name, Version: list.CNIVersion}
	for _, p := range list.Plugins {
		n.Plugins = append(n.Plugins, normalized(p.Bytes))
	}
	return n
}

func normalized(data []byte) string {
	var value any
	if err := json.Unmarshal(data, &value); err != nil {
		return err.Error()
	}
	text, _ := json.Marshal(value)
	return string(text)
}

// loaders are the rules by which a configuration is chosen. A loader that finds none returns nil.
var loaders = map[conflist.Runtime]func(ctx context.Context, dir, bin string) *network{
	conflist.Containerd: byContainerd,
	conflist.CRIO:       byCRIO,
}

// byContainerd is go-cni itself, as containerd calls it.
func byContainerd(_ context.Context, dir, bin string) *network {
	cni, err := gocni.New(gocni.WithMinNetworkCount(1), gocni.WithPluginConfDir(dir), gocni.WithPluginDir([]string{bin}), gocni.WithPluginMaxConfNum(1))
	if err != nil {
		return nil
	}
	if err := cni.Load(gocni.WithDefaultConf); err != nil {
		return nil
	}
	config := cni.GetConfig().Networks[0].Config
	n := &network{Name: config.Name, Version: config.CNIVersion}
	for _, p := range config.Plugins {
		n.Plugins = append(n.Plugins, normalized([]byte(p.Source)))
	}
	return n
}

// byCRIO has the rules of loadNetworks in https://github.com/cri-o/ocicni/blob/18fd1eb65da5e08b9be18d7be139edc1bc0b00cf/pkg/ocicni/ocicni.go
func byCRIO(ctx context.Context, dir, bin string) *network {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil
	}
	sort.Strings(files)
	cni := libcni.NewCNIConfig([]string{bin}, nil)
	for _, file := range files {
		var list *libcni.NetworkConfigList
		if strings.HasSuffix(file, ".conflist") {
			list, err = libcni.ConfListFromFile(file)
		} else {
			var single *libcni.NetworkConfig
			if single, err = libcni.ConfFromFile(file); err == nil { //nolint:staticcheck // what ocicni does
				list, err = libcni.ConfListFromConf(single) //nolint:staticcheck // likewise
			}
		}
		if err != nil || len(list.Plugins) == 0 {
			continue
		}
		if _, err := cni.ValidateNetworkList(ctx, list); err != nil {
			continue
		}
		return networkOf(list)
	}
	return nil
}

// byName is libcni, which is told a network by name, as Multus, Podman and cnitool do.
func byName(dir, name string) *network {
	list, err := libcni.LoadNetworkConf(dir, name)
	if err != nil {
		return nil
	}
	return networkOf(list)
}

// site is a directory of configurations that the installer changes, and one beside it in which only their owner acts.
type site struct {
	*testing.T
	load          func(ctx context.Context, dir, bin string) *network
	dir, ref, bin string
	options       install.Options
	byName        bool
}

const agent = "default.magic-ip"

func newSite(t *testing.T, archive *txtar.Archive, runtime conflist.Runtime) *site {
	t.Helper()
	root := t.TempDir()
	s := &site{T: t, load: loaders[runtime], dir: filepath.Join(root, "net.d"), ref: filepath.Join(root, "ref", "net.d"), bin: filepath.Join(root, "bin"), byName: true}
	s.options = install.Options{
		RuntimeDir: filepath.Join(root, "run"), BinDir: s.bin, ConfDir: s.dir, Runtime: runtime, Plugin: filepath.Join(root, "plugin"), Version: "v1.0.0",
		Load: func() (install.Config, error) {
			return install.Config{Name: agent, Selectors: []entry.Selector{{Namespace: "default", Selector: "app=echo"}}}, nil
		},
		Log: slog.New(slog.DiscardHandler),
	}
	s.must(os.MkdirAll(s.bin, 0o755), os.WriteFile(s.options.Plugin, fmt.Appendf(nil, program, ""), 0o755))
	missing := map[string]bool{}
	var links [][2]string
	for line := range strings.Lines(string(archive.Comment)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "missing": // plugins that are not installed
			for name := range strings.FieldsSeq(value) {
				missing[name] = true
			}
		case "link": // NAME TARGET
			name, target, _ := strings.Cut(value, " ")
			links = append(links, [2]string{name, target})
		case "not by name": // why
			s.byName = false
		}
	}
	for _, dir := range []string{s.dir, s.ref} {
		s.must(os.MkdirAll(dir, 0o755))
		for i, file := range archive.Files {
			s.write(dir, file.Name, file.Data, []fs.FileMode{0o644, 0o600, 0o640}[i%3])
			for _, kind := range types(file.Data) {
				if !missing[kind] && kind != entry.Type {
					s.must(os.WriteFile(filepath.Join(s.bin, kind), fmt.Appendf(nil, program, `0.1.0","0.2.0","`), 0o755))
				}
			}
		}
		for _, link := range links {
			s.must(os.Symlink(link[1], filepath.Join(dir, link[0])))
		}
	}
	return s
}

func (s *site) must(errs ...error) {
	s.Helper()
	if err := errors.Join(errs...); err != nil {
		s.Fatal(err)
	}
}

// write writes a file as if it had been there for a while, and belonged to another user.
func (s *site) write(dir, name string, data []byte, mode fs.FileMode) {
	s.Helper()
	path, past := filepath.Join(dir, name), time.Now().Add(-time.Hour)
	s.must(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path+".new", data, mode), os.Chmod(path+".new", mode), os.Chtimes(path+".new", past, past))
	if os.Geteuid() == 0 {
		s.must(os.Chown(path+".new", 1234, 2345))
	}
	s.must(os.Rename(path+".new", path))
}

// types are the plugins that a configuration names.
func types(data []byte) (all []string) {
	var conf struct {
		Type    string
		Plugins []struct{ Type string }
	}
	_ = json.Unmarshal(data, &conf)
	for _, p := range conf.Plugins {
		all = append(all, p.Type)
	}
	return slices.DeleteFunc(append(all, conf.Type), func(kind string) bool { return kind == "" })
}

// sync lets the installer look, as it does after each change.
func (s *site) sync() {
	s.Helper()
	err := install.Once(s.Context(), s.options)
	if err != nil && s.load(s.Context(), s.ref, s.bin) != nil && !strings.Contains(err.Error(), "cniVersion is") {
		s.Errorf("install: %v", err)
	}
}

// wantEntry compares what is loaded with what would be without us: one plugin more, behind the others.
func (s *site) wantEntry(when string) {
	s.Helper()
	s.want(when, s.load(s.Context(), s.ref, s.bin), s.load(s.Context(), s.dir, s.bin))
	if first := s.load(s.Context(), s.ref, s.bin); first != nil && s.byName {
		s.want(when+", by name", byName(s.ref, first.Name), byName(s.dir, first.Name))
	}
	for name, file := range files(s.T, s.ref) { // what we do not edit is as its owner left it
		is := files(s.T, s.dir)[name]
		is.Content, file.Content = "", ""
		if diff := cmp.Diff(file, is); diff != "" {
			s.Errorf("%s: %s (-owner's +is):\n%s", when, name, diff)
		}
	}
}

func (s *site) want(when string, want, got *network) {
	s.Helper()
	ours := 0
	if got != nil {
		for i := len(got.Plugins) - 1; i > 0; i-- {
			if types([]byte(got.Plugins[i]))[0] == entry.Type {
				got.Plugins = slices.Delete(got.Plugins, i, i+1)
				ours++
			}
		}
	}
	wanted := 1
	if want == nil || !slices.Contains([]string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}, want.Version) {
		wanted = 0 // the plugin does not speak that
	}
	if ours != wanted {
		s.Errorf("%s: %d entries, want %d: %v", when, ours, wanted, slices.Sorted(maps.Keys(files(s.T, s.dir))))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		s.Errorf("%s (-without us +with us):\n%s", when, diff)
	}
}

// file is what has to come back.
type file struct {
	Content, Link string
	Mode          fs.FileMode
	UID, GID      uint32
}

func files(t *testing.T, dir string) map[string]file {
	t.Helper()
	all := map[string]file{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		f := file{Mode: info.Mode(), UID: info.Sys().(*syscall.Stat_t).Uid, GID: info.Sys().(*syscall.Stat_t).Gid}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			f.Link, err = os.Readlink(path)
		case info.Mode().IsRegular():
			var data []byte
			data, err = os.ReadFile(path)
			f.Content = string(data)
		}
		name, _ := filepath.Rel(dir, path)
		all[name] = f
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func (s *site) uninstall(when string) {
	s.Helper()
	s.must(install.Remove(s.Context(), s.dir, conflist.Options{}, conflist.AnyRuntimeDir, agent, "", s.options.Log))
	if diff := cmp.Diff(files(s.T, s.ref), files(s.T, s.dir)); diff != "" {
		s.Errorf("%s (-never installed +uninstalled):\n%s", when, diff)
	}
}

// owned is the file that the runtime loads without us.
func (s *site) owned() string {
	s.Helper()
	loaded := s.load(s.Context(), s.ref, s.bin)
	paths, err := libcni.ConfFiles(s.ref, []string{".conf", ".conflist", ".json"})
	s.must(err)
	sort.Strings(paths)
	for _, path := range paths {
		dir := s.TempDir()
		s.must(os.CopyFS(filepath.Join(dir, "x"), os.DirFS(s.ref)))
		for _, other := range paths {
			if other != path {
				s.must(os.Remove(filepath.Join(dir, "x", filepath.Base(other))))
			}
		}
		if n := s.load(s.Context(), filepath.Join(dir, "x"), s.bin); loaded != nil && cmp.Equal(n, loaded) {
			return filepath.Base(path)
		}
	}
	return ""
}

func TestCorpus(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) < 60 {
		t.Errorf("%d configurations: %v", len(paths), err)
	}
	for _, path := range paths {
		archive, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(archive.Comment), "https://") {
			t.Errorf("%s does not say where it is from", path)
		}
		for runtime := range loaders {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar")+"/"+string(runtime), func(t *testing.T) {
				t.Parallel()
				s := newSite(t, archive, runtime)
				s.sync()
				s.wantEntry("installed")
				s.uninstall("uninstalled")
				s.sync()
				name := s.owned()
				if name == "" {
					return
				}
				data, err := os.ReadFile(filepath.Join(s.ref, name))
				s.must(err)
				// Its owner writes it anew: another version of it, laid out in another way.
				var content map[string]any
				s.must(json.Unmarshal(data, &content))
				content["x-release"] = 2
				if plugins, ok := content["plugins"].([]any); ok {
					plugins[0].(map[string]any)["x-release"] = 2
				}
				data, err = json.MarshalIndent(content, "", "   ")
				s.must(err)
				for _, dir := range []string{s.dir, s.ref} {
					target, err := filepath.EvalSymlinks(filepath.Join(dir, name))
					s.must(err)
					target, err = filepath.Rel(dir, target)
					s.must(err)
					s.write(dir, target, data, 0o604)
				}
				s.sync()
				s.wantEntry("written anew")
				for _, dir := range []string{s.dir, s.ref} {
					s.must(os.Remove(filepath.Join(dir, name)))
				}
				s.sync()
				s.wantEntry("deleted")
				for _, dir := range []string{s.dir, s.ref} {
					s.write(dir, name, data, 0o600)
				}
				s.sync()
				s.wantEntry("back again")
				s.uninstall("uninstalled at the end")
			})
		}
	}
}
