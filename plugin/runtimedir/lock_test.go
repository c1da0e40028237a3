package runtimedir_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func TestLock(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	d := runtimedir.New(dir)
	for name, w := range map[string]struct {
		lock func() (*runtimedir.Lock, error)
		live func() bool
	}{
		"agents/a":  {d.Agent("a").Lock, d.Agent("a").Live},
		"install/a": {d.Installer("a").Lock, d.Installer("a").Live},
	} {
		if w.live() {
			t.Errorf("%s: a writer that never ran is live", name)
		}
		lock, err := w.lock()
		if err != nil {
			t.Fatal(err)
		}
		if !w.live() || d.Agent("b").Live() || d.Installer("b").Live() {
			t.Errorf("%s: Live is wrong", name)
		}
		if _, err := w.lock(); !errors.Is(err, runtimedir.ErrLocked) {
			t.Errorf("%s: second Lock: %v", name, err)
		}
		for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, name): 0o700, filepath.Join(dir, name, "lock"): 0o200, filepath.Join(dir, name, "live"): 0o600} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
				t.Errorf("%s is %v, %v, want %v", path, info.Mode(), err, want)
			}
		}
		if err := lock.Close(); err != nil {
			t.Fatal(err)
		}
		if w.live() {
			t.Errorf("%s: live after its end", name)
		}

		// Another process that may read the directory can lock what it can open.
		live, err := os.Open(filepath.Join(dir, name, "live"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.FcntlFlock(live.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}); err != nil {
			t.Fatal(err)
		}
		if w.live() {
			t.Errorf("%s: live by a read lock", name)
		}
		lock, err = w.lock()
		if err != nil {
			t.Fatalf("%s: a read lock is in the way: %v", name, err)
		}
		if !w.live() {
			t.Errorf("%s: not live beside a read lock on the file before", name)
		}
		if err := errors.Join(lock.Close(), live.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWritersMakeTheirDirectoryPrivate: kubelet makes the directories of mounts 0755.
func TestWritersMakeTheirDirectoryPrivate(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	for name, write := range map[string]func() error{
		"agents/a":  func() error { lock, err := d.Agent("a").Lock(); return errors.Join(err, lock.Close()) },
		"install/a": func() error { lock, err := d.Installer("a").Lock(); return errors.Join(err, lock.Close()) },
		"plugin":    func() error { _, err := d.Update(generous, nil, attachment("c1")); return err },
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o755); err != nil { // the umask
			t.Fatal(err)
		}
		if err := write(); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
}

// TestComeAndGo: agents and installers that come and go at once never take from one another what they rely on: each that has
// its lock and has written something finds its files, its lock and the records where they were.
func TestComeAndGo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			name := fmt.Sprintf("agent-%d", i/2)
			for range 100 {
				err := comeAndGo(runtimedir.New(dir), name)
				if errors.Is(err, runtimedir.ErrLocked) {
					continue // its namesake is there
				}
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	group.Wait()
	if err := runtimedir.New(dir).RemoveState(generous); err != nil {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func comeAndGo(d runtimedir.Dir, name string) error {
	agent := d.Agent(name)
	lock, err := agent.Lock()
	if err != nil {
		return err
	}
	if err := agent.WriteStatus(runtimedir.Status{}); err != nil {
		return err
	}
	if _, err := d.Update(generous, []runtimedir.Key{attachment(name).Key()}, attachment(name)); err != nil {
		return err
	}
	recorded, err := d.Recorded(attachment(name).Key())
	_, readErr := agent.ReadStatus()
	if !recorded || !agent.Live() || err != nil || readErr != nil {
		return fmt.Errorf("recorded %t (%w), live %t, file %w", recorded, err, agent.Live(), readErr)
	}
	return errors.Join(agent.Leave(), lock.Close())
}

// TestLockThatWasRemoved: who opens the file of the lock just before its holder removes it does not take that file for the lock.
func TestLockThatWasRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	agent, path := runtimedir.New(dir).Agent("a"), filepath.Join(dir, "agents/a/lock")
	var holders atomic.Int32
	hold := func(f func()) {
		if n := holders.Add(1); n > 1 {
			t.Errorf("%d have the lock", n)
		}
		f()
		holders.Add(-1)
	}
	var done atomic.Bool
	var group sync.WaitGroup
	group.Go(func() { // writers that come and go, and do no more than that
		for !done.Load() {
			file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o200)
			if err != nil {
				continue // there is no directory yet
			}
			open, errOpen := file.Stat()
			if unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}) == nil {
				if there, err := os.Lstat(path); err == nil && errOpen == nil && os.SameFile(open, there) {
					hold(func() {})
					_ = os.Remove(path) // from here on another may have it
				}
			}
			_ = file.Close()
		}
	})
	for range 3000 {
		lock, err := agent.Lock()
		if errors.Is(err, runtimedir.ErrLocked) {
			continue
		}
		if err != nil {
			t.Error(err)
			break
		}
		hold(func() {
			if !agent.Live() {
				t.Error("the holder is not live")
			}
		})
		if err := lock.Close(); err != nil {
			t.Error(err)
		}
	}
	done.Store(true)
	group.Wait()
}

// TestOneHolder: of writers of one name that come and go, one at a time has the lock, whatever the one before has just removed.
func TestOneHolder(t *testing.T) {
	t.Parallel()
	agent := runtimedir.New(t.TempDir()).Agent("a")
	var holders, turns atomic.Int32
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for turns.Load() < 200 && !t.Failed() {
				lock, err := agent.Lock()
				if errors.Is(err, runtimedir.ErrLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				turns.Add(1)
				if n := holders.Add(1); n > 1 {
					t.Errorf("%d have the lock", n)
				}
				if !agent.Live() {
					t.Error("the holder is not live")
				}
				holders.Add(-1)
				if err := errors.Join(agent.Leave(), lock.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
}

// TestLeaveOfTheLast leaves what is not of this project, and what another writer has.
func TestLeaveOfTheLast(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	d := runtimedir.New(dir)
	lock, err := d.Installer("a").Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	put(t, filepath.Join(dir, "install/a/record.json.tmp"), "{") // it was killed
	put(t, filepath.Join(dir, "not-ours"), "")
	put(t, filepath.Join(dir, "install/b/record.json"), "{}")
	if err := d.Installer("a").Leave(); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) != 2 || got[0] != "install/b/record.json" || got[1] != "not-ours" {
		t.Errorf("left: %v", got)
	}
}
