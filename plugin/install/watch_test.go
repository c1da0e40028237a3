package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// watch runs an installer; stop is SIGTERM.
func (n *node) watch() (stop func()) {
	n.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	n.ended = ended
	go func() { ended <- Watch(ctx, n.options) }()
	stop = func() {
		n.Helper()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				n.Errorf("the installer ended with %v", err)
			}
			ended <- nil
		case <-lab.After(n, 20*time.Second):
			n.Fatal("the installer does not end")
		}
	}
	n.Cleanup(stop)
	return stop
}

// patience is less than the poll, which would find out as well.
const patience = poll - time.Second

// eventually waits until something is so.
func (n *node) eventually(what string, so func() bool) {
	n.Helper()
	for passed := lab.Stopwatch(); !so(); time.Sleep(2 * time.Millisecond) {
		if passed() > patience {
			n.Fatalf("%s: not within %s; there is %v", what, patience, n.confs())
		}
	}
}

// has reports whether 10-a.conflist has the key of an agent.
func (n *node) has(agent string) bool {
	d, err := conflist.Read(n.options.ConfDir, conflist.Options{})
	return err == nil && d.Has("10-a.conflist", agent, n.options.RuntimeDir)
}

// awaitKey waits for the key in 10-a.conflist.
func (n *node) awaitKey() {
	n.Helper()
	n.eventually("the key", func() bool { return n.has(n.config.Name) })
}

// rename writes 10-a.conflist as a careful primary CNI does.
func (n *node) rename(content string) {
	n.Helper()
	path := filepath.Join(n.options.ConfDir, "10-a.conflist")
	n.put(path+".new", content)
	if err := os.Rename(path+".new", path); err != nil {
		n.Fatal(err)
	}
}

func TestWatchWaitsForThePrimary(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	if err := os.Remove(n.options.ConfDir); err != nil {
		t.Fatal(err)
	}
	stop := n.watch()
	n.eventually("to say that it waits", func() bool {
		record, err := n.dir().Installer(n.config.Name).ReadRecord()
		return err == nil && strings.Contains(record.LastError, "waiting for the primary CNI")
	})
	if n.placed() == "" {
		t.Error("the plugin is not in place yet")
	}
	if err := os.Mkdir(n.options.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.rename(simple)
	n.awaitKey()
	n.eventually("to say that it waits no more", func() bool {
		record, err := n.dir().Installer(n.config.Name).ReadRecord()
		return err == nil && record.LastError == "" && filepath.Base(record.Conflist) == "10-a.conflist" && !record.InstalledAt.IsZero()
	})
	stop()
	n.awaitKey() // SIGTERM is not uninstall
	if _, err := n.dir().Installer(n.config.Name).ReadRecord(); err != nil {
		t.Error(err)
	}
}

// TestWatchPutsBack what others change: by rename and in place, the whole directory, the plugin, its mode.
func TestWatchPutsBack(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(n *node){
		"by rename": func(n *node) {
			n.rename(strings.Replace(simple, "bridge", "ptp", 1))
		},
		"in place": func(n *node) { n.put(filepath.Join(n.options.ConfDir, "10-a.conflist"), simple+"\n") },
		"removed and written": func(n *node) {
			if err := os.Remove(filepath.Join(n.options.ConfDir, "10-a.conflist")); err != nil {
				n.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
			n.put(filepath.Join(n.options.ConfDir, "10-a.conflist"), simple)
		},
		"directory replaced": func(n *node) {
			anew := n.options.ConfDir + ".new"
			if err := errors.Join(os.Mkdir(anew, 0o755), os.WriteFile(filepath.Join(anew, "10-a.conflist"), []byte(simple), 0o644),
				os.Rename(n.options.ConfDir, n.options.ConfDir+".old"), os.Rename(anew, n.options.ConfDir)); err != nil {
				n.Fatal(err)
			}
		},
		"plugin removed": func(n *node) {
			if err := os.Remove(filepath.Join(n.options.BinDir, entry.Type)); err != nil {
				n.Fatal(err)
			}
		},
		"plugin overwritten": func(n *node) { n.put(filepath.Join(n.options.BinDir, entry.Type), "odd") },
		"plugin's mode": func(n *node) {
			if err := os.Chmod(filepath.Join(n.options.BinDir, entry.Type), 0o644); err != nil {
				n.Fatal(err)
			}
		},
		"record removed": func(n *node) {
			if err := os.RemoveAll(n.recordPath(n.config.Name)); err != nil {
				n.Fatal(err)
			}
			n.put(filepath.Join(n.options.ConfDir, "unrelated"), "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.conf("10-a.conflist", simple)
			n.watch()
			n.awaitKey()
			time.Sleep(5 * settle) // until it has looked at what it has written itself
			damage(n)
			n.awaitKey()
			n.eventually("the plugin", func() bool {
				info, err := os.Stat(filepath.Join(n.options.BinDir, entry.Type))
				return err == nil && info.Mode() == 0o755 && n.placed() == fmt.Sprintf(plugin, "v1.0.0")
			})
			n.eventually("the record", func() bool {
				_, err := n.dir().Installer(n.config.Name).ReadRecord()
				return err == nil
			})
		})
	}
}

// TestWatchDoesNotFight with a writer that removes the entry as soon as it is there.
func TestWatchDoesNotFight(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	var removed atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
			if n.has(n.config.Name) {
				removed.Add(1)
				n.rename(simple)
			}
		}
	}()
	defer func() { cancel(); <-ended }()
	n.watch()
	n.eventually("to say that it is in a quarrel", func() bool {
		record, err := n.dir().Installer(n.config.Name).ReadRecord()
		return err == nil && len(record.Notes) == 1 && strings.Contains(record.Notes[0], "another program has removed the entry from") && strings.Contains(record.Notes[0], "cni.exclusive")
	})
	// Its pauses are 0, 0, 1, 2, 4 … seconds.
	time.Sleep(4 * time.Second)
	if times := removed.Load(); times < 3 || times > 6 {
		t.Errorf("the entry was put back %d times within about 4 seconds", times)
	}
	if !strings.Contains(n.log.String(), "removed by another program") {
		t.Error("nothing in the log")
	}
}

// TestWatchFollowsTheConfiguration as kubelet changes it: files behind a link that is replaced. A configuration that is not
// valid changes nothing but what the record says.
func TestWatchFollowsTheConfiguration(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	mount := filepath.Join(t.TempDir(), "config")
	version := 0
	change := func(content string) {
		t.Helper()
		version++
		data := fmt.Sprintf("..%d", version)
		if err := errors.Join(os.MkdirAll(filepath.Join(mount, data), 0o755), os.WriteFile(filepath.Join(mount, data, "config.yaml"), []byte(content), 0o644),
			os.Symlink(data, filepath.Join(mount, "..data_tmp")), os.Rename(filepath.Join(mount, "..data_tmp"), filepath.Join(mount, "..data"))); err != nil {
			t.Fatal(err)
		}
	}
	change("app=one")
	n.options.ConfigFile = filepath.Join(mount, "config.yaml")
	if err := os.Symlink("..data/config.yaml", n.options.ConfigFile); err != nil {
		t.Fatal(err)
	}
	n.options.Load = func() (Config, error) {
		data, err := os.ReadFile(n.options.ConfigFile)
		if err != nil || string(data) == "bad" {
			return Config{}, errors.New("bad configuration")
		}
		name, selector, renamed := strings.Cut(string(data), ":")
		if !renamed {
			name, selector = n.config.Name, string(data)
		}
		return Config{Name: name, Selectors: []entry.Selector{{Namespace: "default", Selector: selector}}}, nil
	}
	n.watch()
	selects := func(selector string) {
		t.Helper()
		n.eventually(selector, func() bool { return strings.Contains(n.confs()["10-a.conflist"], selector) })
	}
	says := func(want string) {
		t.Helper()
		n.eventually("to say "+want, func() bool {
			record, err := n.dir().Installer(n.config.Name).ReadRecord()
			return err == nil && (want == "" && record.LastError == "" || want != "" && strings.Contains(record.LastError, want))
		})
	}
	selects("app=one")
	time.Sleep(5 * settle) // until it has looked at what it has written itself
	change("app=two")
	selects("app=two")
	change("bad")
	says("bad configuration")
	n.rename(simple)
	selects("app=two")
	change("another-name:app=three")
	says("cannot change from default.magic-ip to another-name")
	selects("app=two")
	change("app=four")
	selects("app=four")
	says("")
}

// TestStandby: of two installers of one name the second waits, and takes over.
func TestStandby(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	stop := n.watch()
	n.awaitKey()
	if err := n.once(); err == nil || !strings.Contains(err.Error(), "another installer") {
		t.Errorf("install beside it: %v", err)
	}
	n.watch()
	n.eventually("to stand by", func() bool { return strings.Contains(n.log.String(), "standing by") })
	stop()
	n.eventually("to take over", func() bool { return n.dir().Installer(n.config.Name).Live() })
	n.rename(simple)
	n.awaitKey()
}

// undone is an installer whose DaemonSet can be deleted.
func (n *node) undone() (undo func()) {
	wanted := make(chan struct{})
	n.options.Removed = func(ctx context.Context) bool {
		select {
		case <-wanted:
			return true
		case <-ctx.Done():
		}
		select { // the last look
		case <-wanted:
			return true
		default:
			return false
		}
	}
	return func() { close(wanted) }
}

// newUndone is a node with such an installer, which has installed.
func newUndone(t *testing.T) (n *node, undo func()) {
	t.Helper()
	n = newNode(t)
	n.conf("10-a.conflist", simple)
	undo = n.undone()
	n.watch()
	n.awaitKey()
	return n, undo
}

func (n *node) awaitGone() {
	n.Helper()
	n.eventually("everything to be gone", func() bool {
		entries, err := os.ReadDir(n.options.RuntimeDir)
		return (err == nil && len(entries) == 0 || errors.Is(err, fs.ErrNotExist)) && n.confs()["10-a.conflist"] == simple
	})
	if n.placed() == "" {
		n.Error("the plugin is gone: runtimes may still call it")
	}
}

func TestUndone(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	undo := n.undone()
	stop := n.watch()
	n.awaitKey()
	n.recordPod("c1")
	undo()
	n.awaitGone()
	// It neither ends, to be started again, nor does it put anything back.
	n.rename(simple)
	time.Sleep(5 * settle)
	n.awaitGone()
	n.eventually("to wait", func() bool { return strings.Contains(n.log.String(), "waiting to be stopped") })
	time.Sleep(settle)
	if len(n.ended) > 0 {
		t.Error("it has ended")
	}
	n.recordPod("c2") // by an ADD that had begun with the entry
	stop()
	n.awaitGone()
}

// recordPod is what an ADD does in the runtime directory.
func (n *node) recordPod(id string) {
	n.Helper()
	if _, err := n.dir().Update(time.Minute, nil, runtimedir.Attachment{ContainerID: id, IfName: "eth0"}); err != nil {
		n.Fatal(err)
	}
}

// TestUndoneAfterSIGTERM: the news of what it was sent for come later.
func TestUndoneAfterSIGTERM(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	n.options.Removed = func(ctx context.Context) bool { <-ctx.Done(); return true }
	stop := n.watch()
	n.awaitKey()
	stop()
	n.awaitGone()
}

// TestUndoneWhileStandingBy: who was only waiting installs nothing after the first has gone.
func TestUndoneWhileStandingBy(t *testing.T) {
	t.Parallel()
	for range 10 { // of two things that may be done first
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		lock, err := n.dir().Installer(n.config.Name).Lock()
		if err != nil {
			t.Fatal(err)
		}
		n.undone()()
		n.watch()
		n.eventually("to stand by", func() bool { return strings.Contains(n.log.String(), "standing by") })
		if err := lock.Close(); err != nil {
			t.Fatal(err)
		}
		n.eventually("to wait", func() bool { return strings.Contains(n.log.String(), "waiting to be stopped") })
		if strings.Contains(n.log.String(), "put in place") {
			t.Error("it has installed first")
		}
		if rest := n.read(n.options.RuntimeDir); len(rest) > 0 {
			t.Errorf("left in the runtime dir: %v", rest)
		}
	}
}

// TestUndoneBesideOthers: the key of another agent, and the records that it needs, stay.
func TestUndoneBesideOthers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	other := n.options
	other.Load = func() (Config, error) { return Config{Name: "other", Selectors: n.config.Selectors}, nil }
	if err := Once(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	n.recordPod("c1")
	undo := n.undone()
	n.watch()
	n.awaitKey()
	undo()
	n.eventually("the key to go", func() bool { return !n.has(n.config.Name) })
	n.eventually("to wait", func() bool { return strings.Contains(n.log.String(), "waiting to be stopped") })
	if !n.has("other") {
		t.Error("the other's key is gone")
	}
	if _, err := os.Stat(n.dir().StatePath()); err != nil {
		t.Error(err)
	}
}

// TestUndoTriesAgain: what cannot be taken out is tried again, and the agent, which waits for the record, is not told otherwise.
func TestUndoTriesAgain(t *testing.T) {
	t.Parallel()
	n, undo := newUndone(t)
	unlock, err := conflist.Lock(t.Context(), n.options.ConfDir)
	if err != nil {
		t.Fatal(err)
	}
	undo()
	time.Sleep(time.Second)
	if _, err := n.dir().Installer(n.config.Name).ReadRecord(); err != nil {
		t.Errorf("the record is gone before the key: %v", err)
	}
	unlock()
	n.awaitGone()
}

// TestUndoTriesAgainWithTheState: a process that keeps the lock of the state file keeps nothing there for good.
func TestUndoTriesAgainWithTheState(t *testing.T) {
	t.Parallel()
	n, undo := newUndone(t)
	n.recordPod("c1")
	lock, err := os.OpenFile(filepath.Join(filepath.Dir(n.dir().StatePath()), "state.lock"), os.O_WRONLY, 0)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	undo()
	n.eventually("to be tried again", func() bool { return strings.Contains(n.log.String(), "tried again") })
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	n.awaitGone()
	if len(n.ended) > 0 {
		t.Error("it has ended, and would be started again")
	}
}
