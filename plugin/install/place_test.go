package install

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const simple = `{
  "cniVersion": "1.0.0",
  "name": "a",
  "plugins": [
    {"type": "bridge"}
  ]
}
`

// TestParallelInstallers: of many installers that come and go at once on one node, none loses another's update.
func TestParallelInstallers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	const agents = 12
	name := func(i int) string { return fmt.Sprintf("default.agent-%d", i) }
	each := func(f func(i int) error) {
		t.Helper()
		var group sync.WaitGroup
		for i := range agents {
			group.Go(func() {
				if err := f(i); err != nil {
					t.Errorf("%s: %v", name(i), err)
				}
			})
		}
		group.Wait()
	}
	installAs := func(i int) error {
		options := n.options
		options.Load = func() (Config, error) {
			return Config{Name: name(i), Selectors: []entry.Selector{{Namespace: "default", Selector: "app=x"}}}, nil
		}
		return Once(t.Context(), options)
	}
	remove := func(i int) error {
		err := Remove(t.Context(), n.options.ConfDir, conflist.Options{}, n.options.RuntimeDir, name(i), "", n.options.Log)
		return errors.Join(err, RemoveFiles(n.options.ConfDir, n.dir(), name(i)))
	}
	wantKeys := func(when string, want func(i int) bool) {
		t.Helper()
		text := n.confs()["10-a.conflist"]
		if entries := strings.Count(text, `"magic-ip-address"`); entries != 1 {
			t.Fatalf("%s: %d entries:\n%s", when, entries, text)
		}
		for i := range agents {
			if n.has(name(i)) != want(i) {
				t.Errorf("%s: key of %s: %t", when, name(i), !want(i))
			}
		}
	}
	each(installAs)
	wantKeys("all installed", func(int) bool { return true })
	each(func(i int) error { // half of them go while the others look again
		if i%2 == 0 {
			return remove(i)
		}
		return installAs(i)
	})
	wantKeys("half gone", func(i int) bool { return i%2 == 1 })
	each(remove)
	n.want("all gone", map[string]string{"10-a.conflist": simple}, n.confs())
	if rest := n.read(n.options.RuntimeDir); len(rest) > 0 {
		t.Errorf("left in the runtime dir: %v", rest)
	}
}

// TestModeIsKept: a file that only root may read stays so, as a list and back again.
func TestModeIsKept(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conf", `{"cniVersion":"1.0.0","name":"a","type":"bridge"}`)
	if err := os.Chmod(filepath.Join(n.options.ConfDir, "10-a.conf"), 0o600); err != nil {
		t.Fatal(err)
	}
	mode := func(name string) {
		t.Helper()
		if info, err := os.Stat(filepath.Join(n.options.ConfDir, name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	n.install()
	mode("10-a-conf.magic-ip-address.conflist")
	n.uninstall()
	mode("10-a.conf")
}

func TestSymbolicLinks(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("cni.d", simple)
	link := filepath.Join(n.options.ConfDir, "10-a.conflist")
	if err := os.Symlink("cni.d", link); err != nil {
		t.Fatal(err)
	}
	n.install()
	if target, err := os.Readlink(link); err != nil || target != "cni.d" || !strings.Contains(n.confs()["cni.d"], entry.Type) {
		t.Errorf("the link leads to %q (%v), whose file is\n%s", target, err, n.confs()["cni.d"])
	}
	n.uninstall()
	n.want("after all", map[string]string{"cni.d": simple, "10-a.conflist": simple}, n.confs())

	// What a container sees behind such a link is not what the runtime sees; and the second file is not the one it takes.
	n.conf("20-b.conflist", simple)
	outside := filepath.Join(filepath.Dir(n.options.ConfDir), "outside")
	n.put(outside, simple)
	if err := errors.Join(os.Remove(link), os.Symlink(outside, link)); err != nil {
		t.Fatal(err)
	}
	before := n.confs()
	if err := n.once(); err == nil || !strings.Contains(err.Error(), "10-a.conflist is a symbolic link that leads out of the directory") {
		t.Errorf("install: %v", err)
	}
	n.want("a link that leads out", before, n.confs())
}

// TestDirectoriesAndPipes: what is no file is passed over, and nobody waits for a pipe.
func TestDirectoriesAndPipes(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if err := os.Mkdir(filepath.Join(n.options.ConfDir, "00-dir.conflist"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfifo", filepath.Join(n.options.ConfDir, "01-pipe.conflist")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(n.options.ConfDir, "01-pipe.conflist"), past, past); err != nil {
		t.Fatal(err)
	}
	n.conf("10-a.conflist", simple)
	n.install()
	record, err := n.dir().Installer(n.config.Name).ReadRecord()
	if err != nil || filepath.Base(record.Conflist) != "10-a.conflist" || len(record.Notes) != 1 || !strings.Contains(record.Notes[0], "is no regular file") {
		t.Errorf("record %+v, %v", record, err)
	}
}

// TestFileThatIsBeingWritten: a writer that does not replace its file as a whole is given time, before the next file is
// taken for the runtime's.
func TestFileThatIsBeingWritten(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	n.put(filepath.Join(n.options.ConfDir, "05-first.conflist"), "")
	go func() {
		time.Sleep(300 * time.Millisecond)
		_ = os.WriteFile(filepath.Join(n.options.ConfDir, "05-first.conflist"), []byte(simple), 0o644)
	}()
	n.install()
	if got := n.confs(); got["10-a.conflist"] != simple || !strings.Contains(got["05-first.conflist"], entry.Type) {
		t.Errorf("not in the first file: %v", got)
	}
}

// TestKeyMovesToTheFirstFile, when another one comes first.
func TestKeyMovesToTheFirstFile(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conf", `{"cniVersion":"1.0.0","name":"a","type":"bridge"}`)
	before := n.confs()
	n.install()
	n.conf("05-b.conflist", simple)
	n.install()
	got := n.confs()
	if !strings.Contains(got["05-b.conflist"], entry.Type) {
		t.Errorf("not in the first file:\n%s", got["05-b.conflist"])
	}
	delete(got, "05-b.conflist")
	n.want("the others", before, got)
}

func TestNoSelectors(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	n.install()
	n.config.Selectors = nil
	n.install()
	n.want("nothing to record", map[string]string{"10-a.conflist": simple}, n.confs())
	if record, err := n.dir().Installer(n.config.Name).ReadRecord(); err != nil || len(record.Notes) != 1 || record.Conflist != "" {
		t.Errorf("record %+v, %v", record, err)
	}
}

func (n *node) placed() string { n.Helper(); return n.read(n.options.BinDir)[entry.Type] }

// TestPluginThatDoesNotRun: no entry names it, and the one that was there before stays.
func TestPluginThatDoesNotRun(t *testing.T) {
	t.Parallel()
	for name, broken := range map[string]string{
		"another architecture": "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 100), "fails": "#!/bin/sh\nexit 1\n", "no plugin": "#!/bin/sh\necho hello\n", "empty": "",
	} {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.put(filepath.Join(n.options.BinDir, entry.Type), "before")
		n.put(n.options.Plugin, broken)
		if err := n.once(); err == nil {
			t.Errorf("%s: installed", name)
		}
		n.want(name, map[string]string{"10-a.conflist": simple}, n.confs())
		n.want(name, map[string]string{entry.Type: "before"}, n.read(n.options.BinDir))
	}
	// One that runs and would fail every pod because of what is in its entry.
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	n.put(n.options.Plugin, strings.Replace(fmt.Sprintf(plugin, "strict"), "grep -q '\"selectors\"'", "echo no; exit 1", 1))
	if err := n.once(); err == nil || !strings.Contains(err.Error(), "would not take its entry") {
		t.Errorf("install: %v", err)
	}
	n.want("refused by the plugin", map[string]string{"10-a.conflist": simple}, n.confs())
}

// TestPluginIsReplaced: a damaged one, an older one, and one that is running (ETXTBSY).
func TestPluginIsReplaced(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	path := filepath.Join(n.options.BinDir, entry.Type)
	sleep, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	n.put(path, string(sleep))
	running := exec.Command(path, "60")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = running.Process.Kill(); _ = running.Wait() }()
	n.put(path+".magic-ip-address.tmp", "left by an installer that was killed")
	n.install()
	n.want("the directory", map[string]string{entry.Type: fmt.Sprintf(plugin, "v1.0.0")}, n.read(n.options.BinDir))

	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	n.install()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o755 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestReleasesOfSeveralVersions share one plugin: the newest of those that run, and nobody takes turns.
func TestReleasesOfSeveralVersions(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	as := func(name, version, content string) func() {
		t.Helper()
		options := n.options
		options.Version = version
		options.Plugin = filepath.Join(t.TempDir(), "plugin")
		n.put(options.Plugin, fmt.Sprintf(plugin, content))
		options.Load = func() (Config, error) { return Config{Name: name, Selectors: n.config.Selectors}, nil }
		return func() {
			t.Helper()
			if err := Once(t.Context(), options); err != nil {
				t.Error(err)
			}
		}
	}
	running := func(name string) (stop func()) {
		t.Helper()
		lock, err := n.dir().Installer(name).Lock()
		if err != nil {
			t.Fatal(err)
		}
		return func() { _ = lock.Close() }
	}
	want := func(when, content string) {
		t.Helper()
		if got := n.placed(); got != fmt.Sprintf(plugin, content) {
			t.Errorf("%s: the plugin is\n%s", when, got)
		}
	}
	oldA, newB := as("a", "v1.2.0", "old"), as("b", "v1.10.0", "new")
	oldA()
	newB()
	want("upgraded by another release", "new")
	stop := running("b")
	oldA()
	want("the older one looks again", "new")
	stop()
	oldA()
	want("the newer one does not run any more", "old")

	// The same version with another content, as of a rebuild: the first one's stands while it runs.
	stop = running("a")
	as("c", "v1.2.0", "rebuilt")()
	want("the same version", "old")
	as("c", "devel", "unknown")()
	want("a version that cannot be compared", "old")
	newB()
	want("the newer one comes back", "new")
	record, err := os.ReadFile(n.recordPath("a"))
	if err != nil {
		t.Fatal(err)
	}
	n.put(n.recordPath("a"), strings.Replace(string(record), `"version": 1`, `"version": 2`, 1))
	as("d", "v9.0.0", "newest")()
	want("beside an installer that cannot be judged", "new")
	stop()
	// A release that is rolled back alone brings its older plugin.
	as("b", "v1.2.0", "back")()
	want("rolled back", "back")
}

func TestCompareVersions(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		a, b  string
		order int
		known bool
	}{
		{"v1.2.3", "v1.2.3", 0, true}, {"v1.2.3", "v1.2.10", -1, true}, {"v2.0.0", "v1.99.99", 1, true},
		{"v1.2.3-4-g0123abc", "v1.2.3", 1, true}, {"v1.2.3-4-g0123abc", "v1.2.3-12-gfff", -1, true}, {"v1.2.3-4-g0123abc", "v1.2.4", -1, true},
		{"v1.2.3-rc1", "v1.2.3", -1, true}, {"v1.2.3-rc1-2-gabc", "v1.2.3-rc1", 1, true}, {"v1.2.3-rc1-2-gabc", "v1.2.3", -1, true},
		{"devel", "v1.2.3", 0, false}, {"v1.2.3-dirty", "v1.2.3", 0, false}, {"v1.2.3-4-g0123abc-dirty", "v1.2.3", 0, false}, {"0123abc-dirty", "0123abc-dirty", 0, false}, {"v1.2", "v1.2.0", 0, false}, {"v1.2.x", "v1.2.0", 0, false},
	} {
		order, known := compareVersions(test.a, test.b)
		if known != test.known || order < 0 != (test.order < 0) || order > 0 != (test.order > 0) {
			t.Errorf("%s and %s: %d, %t", test.a, test.b, order, known)
		}
	}
}

// TestDirectoryOfPlugins: where it cannot be written, the error says what to do, and no entry names a plugin that is not there.
func TestDirectoryOfPlugins(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"/sys/kernel", "/does/not/exist"} {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.options.BinDir = dir
		if err := n.once(); err == nil || !strings.Contains(err.Error(), "--cni-bin-dir") {
			t.Errorf("%s: %v", dir, err)
		}
		n.want(dir, map[string]string{"10-a.conflist": simple}, n.confs())
		if _, err := n.dir().Installer(n.config.Name).ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: a record of what is not installed: %v", dir, err)
		}
	}
}

// TestRecordComesFirst: what is on the node has been noted before, so that whoever is killed in between leaves a note.
func TestRecordComesFirst(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	script := fmt.Sprintf(plugin, "v1.0.0")
	n.put(n.options.Plugin, strings.Replace(script, "case", "test -e "+n.recordPath(n.config.Name)+" || exit 1\ncase", 1))
	n.install()
}

// TestRecordStands: while nothing changes, the record is not written, and what it says of a standing fault is there all the
// time: status and doctor read it whenever they are called.
func TestRecordStands(t *testing.T) {
	t.Parallel()
	standing := map[string]func(n *node, i *installer){
		"an entry that is removed again and again": func(n *node, i *installer) {
			i.backoff = backoff{losses: 20, at: time.Now()}
			n.conf("10-a.conflist", simple)
		},
		"no selectors": func(n *node, _ *installer) { n.config.Selectors = nil },
		"no network configuration": func(n *node, _ *installer) {
			if err := os.RemoveAll(n.options.ConfDir); err != nil {
				n.Fatal(err)
			}
		},
	}
	for name, fault := range standing {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.conf("10-a.conflist", simple)
			i := n.installer()
			look := func() { _, _ = i.look(t.Context()) } // its error is in the record
			look()
			fault(n, i)
			look()
			said, err := n.dir().Installer(n.config.Name).ReadRecord()
			if err != nil || len(said.Notes) == 0 && said.LastError == "" {
				t.Fatalf("record %+v, %v", said, err)
			}
			// Open, so that its inode is not given to another file.
			before, err := os.Open(n.recordPath(n.config.Name))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = before.Close() }()
			look()
			was, err := before.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if is, err := os.Stat(before.Name()); err != nil || !os.SameFile(was, is) {
				t.Errorf("the record was written again, %v", err)
			}
		})
	}
}

// TestNotesStandBesideAnError: that the plugin cannot be put in place does not hide what is told of the entry, and nothing is told
// that holds no more.
func TestNotesStandBesideAnError(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	i := n.installer()
	look := func(when string, notes ...string) (lastError string) {
		t.Helper()
		_, _ = i.look(t.Context()) // its error is in the record
		record, err := n.dir().Installer(n.config.Name).ReadRecord()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.EqualFunc(record.Notes, notes, strings.Contains) {
			t.Errorf("%s: notes %q, want %q", when, record.Notes, notes)
		}
		return record.LastError
	}
	const removed, unwanted = "another program has removed the entry", "no magic IP of this agent can be served"
	look("installed")
	i.backoff = backoff{losses: 20, at: time.Now()}
	n.conf("10-a.conflist", simple)
	look("the entry was removed", removed)
	selectors := n.config.Selectors
	n.config.Selectors = nil
	look("no entry is wanted", removed, unwanted)
	n.config.Selectors = selectors
	if err := errors.Join(os.Remove(i.binary.path()), os.Rename(n.options.Plugin, n.options.Plugin+".away")); err != nil {
		t.Fatal(err)
	}
	if look("the plugin cannot be put in place", removed) == "" {
		t.Error("that the plugin cannot be put in place is not told")
	}
	i.backoff.at = i.backoff.at.Add(-2 * resetAfter)
	look("nor can it long after the entry was removed")
}

func TestRecordOfANewerBuild(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	n.install()
	path := n.recordPath(n.config.Name)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range []string{strings.Replace(string(data), `"version": 1`, `"version": 2`, 1), "{"} {
		n.put(path, content)
		if _, err := n.dir().Installer(n.config.Name).ReadRecord(); err == nil {
			t.Errorf("%s is read", content)
		}
		n.install() // which is this build's now
		if now, err := os.ReadFile(path); err != nil || !bytes.Contains(now, []byte(`"version": 1`)) {
			t.Errorf("%v: %s", err, now)
		}
	}
}

// TestRemoveWhateverRuntimeDir: uninstall in a container finds the node's directories at other paths than the entry names.
func TestRemoveWhateverRuntimeDir(t *testing.T) {
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	before := n.confs()
	n.install()
	if err := Remove(t.Context(), n.options.ConfDir, conflist.Options{}, "/host"+n.options.RuntimeDir, n.config.Name, "", n.options.Log); err != nil || reflect.DeepEqual(before, n.confs()) {
		t.Errorf("with another runtime directory: %v, %v", err, n.confs())
	}
	if err := Remove(t.Context(), n.options.ConfDir, conflist.Options{}, conflist.AnyRuntimeDir, n.config.Name, "", n.options.Log); err != nil {
		t.Error(err)
	}
	n.want("after any", before, n.confs())
}

// TestRemoveFiles: the plugin's files go with the last key of their runtime directory.
func TestRemoveFiles(t *testing.T) {
	t.Parallel()
	const key = `{"type": "magic-ip-address", "runtimeDir": "%s", "selectors": {"other": [{"namespace": "default", "selector": "app=echo"}]}}`
	list := func(entry string) string {
		return `{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "bridge"}` + entry + `]}`
	}
	for name, test := range map[string]struct {
		conf      func(n *node) string
		installer bool // another one has a record, and its key is not in place now
		stays     bool
	}{
		"no entry":                        {conf: func(*node) string { return list("") }},
		"no configuration":                {conf: func(*node) string { return "" }},
		"an entry of another agent":       {conf: func(n *node) string { return list(", " + fmt.Sprintf(key, n.options.RuntimeDir)) }, stays: true},
		"an entry of another directory":   {conf: func(*node) string { return list(", " + fmt.Sprintf(key, "/run/another")) }},
		"a key that another one will put": {conf: func(*node) string { return list("") }, installer: true, stays: true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			if conf := test.conf(n); conf != "" {
				n.conf("10-a.conflist", conf)
			}
			n.recordPod("c1")
			if test.installer {
				if err := n.dir().Installer("other").WriteRecord(runtimedir.Record{}); err != nil {
					t.Fatal(err)
				}
			}
			lock, err := n.dir().Installer(n.config.Name).Lock()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = lock.Close() }()
			if err := RemoveFiles(n.options.ConfDir, n.dir(), n.config.Name); err != nil {
				t.Error(err)
			}
			if _, err := n.dir().ReadState(); (err == nil) != test.stays {
				t.Errorf("the records: %v", err)
			}
			if _, err := os.Stat(filepath.Dir(n.recordPath(n.config.Name))); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the installer's directory: %v", err)
			}
		})
	}
}
