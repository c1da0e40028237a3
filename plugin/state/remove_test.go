package state_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// TestRemoveBeforeAWaitingWriter: a writer that had waited for a lock that is gone takes the new one, so that the next does not
// write beside it.
func TestRemoveBeforeAWaitingWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	update(t, dir, nil, attachment("c1"))
	lock, err := os.Open(filepath.Join(dir, "state.lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	removed, written := make(chan error), make(chan error)
	go func() { removed <- state.Remove(dir, 5*time.Second) }()
	time.Sleep(100 * time.Millisecond) // the kernel serves waiters in order
	go func() {
		_, err := state.Update(dir, 5*time.Second, nil, attachment("c2"))
		written <- err
	}()
	time.Sleep(100 * time.Millisecond)
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(<-removed, <-written); err != nil {
		t.Fatal(err)
	}
	if list := read(t, dir); len(list) != 1 || list[0].ContainerID != "c2" {
		t.Errorf("records %v", list)
	}
	if _, err := os.Stat(filepath.Join(dir, "state.lock")); err != nil {
		t.Errorf("the writer held the lock that was removed: %v", err)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	update(t, dir, nil, attachment("c1"))
	for _, name := range []string{"state.json.corrupt", "state.json.tmp", "plugin.log", "plugin.log.1"} {
		put(t, filepath.Join(dir, name), "")
	}
	for range 2 {
		if err := state.Remove(dir, time.Second); err != nil {
			t.Fatal(err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	}
	if err := state.Remove(filepath.Join(dir, "missing"), time.Second); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
}
