package install

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

var update = flag.Bool("update", false, "write installed and cleaned anew")

// plugin is what these tests install: it answers as the real one does, which integration/ installs. %s is a line of its own.
const plugin = `#!/bin/sh
# %s
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}' ;;
STATUS) grep -q '"selectors"' ;;
esac
`

// node is a node's directories. Its agent is default.magic-ip unless a test says otherwise.
type node struct {
	*testing.T
	options Options
	config  Config
	log     *lockedBuffer
	ended   <-chan error // of the last installer that was started
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{T: t, log: &lockedBuffer{}, config: Config{Name: "default.magic-ip", Selectors: []entry.Selector{
		{Namespace: "default", Selector: "app=echo,tier in (a,b),x<3"}, {Namespace: "*", Selector: "app=statsd"},
	}}}
	n.options = Options{
		RuntimeDir: filepath.Join(dir, "run"), BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"), Plugin: filepath.Join(dir, "plugin"),
		Version: "v1.0.0", Load: func() (Config, error) { return n.config, nil },
		Log: slog.New(slog.NewTextHandler(n.log, nil)),
	}
	for _, d := range []string{n.options.BinDir, n.options.ConfDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.put(n.options.Plugin, fmt.Sprintf(plugin, "v1.0.0"))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", n.log)
		}
	})
	return n
}

func (n *node) dir() runtimedir.Dir { return runtimedir.New(n.options.RuntimeDir) }

// recordPath is the record of the installer of an agent.
func (n *node) recordPath(agent string) string {
	return filepath.Join(n.options.RuntimeDir, "install", agent, "record.json")
}

func (n *node) put(path, content string) {
	n.Helper()
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		n.Fatal(err)
	}
}

// conf puts a file into the configuration directory, as if it had been there for a while.
func (n *node) conf(name, content string) {
	n.Helper()
	path := filepath.Join(n.options.ConfDir, name)
	n.put(path, content)
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(path, past, past); err != nil {
		n.Fatal(err)
	}
}

// read is the files of a directory. /run/magic-ip-address stands for the runtime dir of the test.
func (n *node) read(dir string) map[string]string {
	n.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.Fatal(err)
	}
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a temporary one
		}
		if err != nil {
			n.Fatal(err)
		}
		files[entry.Name()] = strings.ReplaceAll(string(data), n.options.RuntimeDir, "/run/magic-ip-address")
	}
	return files
}

func (n *node) confs() map[string]string { n.Helper(); return n.read(n.options.ConfDir) }

func (n *node) once() error { return Once(n.Context(), n.options) }

// installer is one that keeps running: each call of its look is an event.
func (n *node) installer() *installer {
	n.Helper()
	i, err := newInstaller(n.options)
	if err != nil {
		n.Fatal(err)
	}
	return i
}

func (n *node) install() {
	n.Helper()
	if err := n.once(); err != nil {
		n.Fatal(err)
	}
}

func (n *node) uninstall() {
	n.Helper()
	if err := Remove(n.Context(), n.options.ConfDir, conflist.Options{}, n.options.RuntimeDir, n.config.Name, "", n.options.Log); err != nil {
		n.Fatal(err)
	}
	if err := RemoveFiles(n.options.ConfDir, n.dir(), n.config.Name); err != nil {
		n.Fatal(err)
	}
}

func (n *node) want(what string, want, got map[string]string) {
	n.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		n.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// TestCases: testdata/<case>/before is a configuration directory, installed is it with the agent's key, and cleaned after
// that is gone. The file error has what the installer refuses, and then nothing may have changed.
func TestCases(t *testing.T) {
	t.Parallel()
	cases, err := filepath.Glob("testdata/*/before")
	if err != nil || len(cases) < 30 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	for _, before := range cases {
		path := filepath.Dir(before)
		t.Run(filepath.Base(path), func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			given := n.read(before)
			for name, content := range given {
				n.conf(name, strings.ReplaceAll(content, "/run/magic-ip-address", n.options.RuntimeDir))
			}
			n.golden(filepath.Join(path, "error"), n.once())
			n.goldens(filepath.Join(path, "installed"), n.confs())
			again := n.confs()
			stamps := n.stamps()
			n.golden(filepath.Join(path, "error"), n.once())
			n.want("the second time", again, n.confs())
			if diff := cmp.Diff(stamps, n.stamps()); diff != "" {
				t.Errorf("written although nothing differs (-before +after):\n%s", diff)
			}
			n.uninstall()
			n.goldens(filepath.Join(path, "cleaned"), n.confs())
			if rest := n.read(n.options.RuntimeDir); len(rest) > 0 {
				t.Errorf("left in the runtime dir: %v", rest)
			}
		})
	}
}

// TestCleanedIsAsBefore: the cases whose configuration is not as it was, to the byte, are these and no others.
func TestCleanedIsAsBefore(t *testing.T) {
	t.Parallel()
	differ := map[string]bool{
		"as-wanted": true, "duplicates": true, "entry-first": true, "entry-without-selectors": true, "entry-with-odd-selectors": true,
		"left-behind-by-a-killed-installer": true, "other-selectors-before": true, "primary-wrote-its-conf-anew": true,
	}
	n := newNode(t)
	cases, _ := filepath.Glob("testdata/*/before")
	for _, before := range cases {
		path := filepath.Dir(before)
		if same := cmp.Equal(n.read(before), n.read(filepath.Join(path, "cleaned"))); same == differ[filepath.Base(path)] {
			t.Errorf("%s: cleaned is as before: %t", path, same)
		}
	}
}

// stamps are what every write changes.
func (n *node) stamps() map[string]string {
	n.Helper()
	all := map[string]string{}
	for _, dir := range []string{n.options.ConfDir, n.options.BinDir} {
		for name := range n.read(dir) {
			id, err := identify(filepath.Join(dir, name))
			if err != nil {
				n.Fatal(err)
			}
			all[name] = fmt.Sprint(id)
		}
	}
	return all
}

func (n *node) golden(path string, err error) {
	n.Helper()
	got := ""
	if err != nil {
		got = strings.NewReplacer(n.options.ConfDir, "/etc/cni/net.d", n.options.RuntimeDir, "/run/magic-ip-address").Replace(err.Error()) + "\n"
	}
	if *update {
		_ = os.Remove(path)
		if got != "" {
			n.put(path, got)
		}
	}
	want, _ := os.ReadFile(path)
	if diff := cmp.Diff(string(want), got); diff != "" {
		n.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func (n *node) goldens(path string, got map[string]string) {
	n.Helper()
	if *update {
		if err := errors.Join(os.RemoveAll(path), os.MkdirAll(path, 0o755)); err != nil {
			n.Fatal(err)
		}
		for name, content := range got {
			if err := os.WriteFile(filepath.Join(path, name), []byte(content), 0o644); err != nil {
				n.Fatal(err)
			}
		}
	}
	n.want(path, n.read(path), got)
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
