package runtimedir_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestRemoveBeforeAWaitingWriter: a writer that had waited for a lock that is gone takes the new one, so that the next does not
// write beside it.
func TestRemoveBeforeAWaitingWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	update(t, dir, nil, attachment("c1"))
	release := hold(t, dir)
	removed, written := make(chan error), make(chan error)
	go func() { removed <- runtimedir.New(dir).RemoveState(5 * time.Second) }()
	awaitWaiters(t, dir, 1) // the kernel serves them in order
	go func() {
		_, err := runtimedir.New(dir).Update(5*time.Second, nil, attachment("c2"))
		written <- err
	}()
	awaitWaiters(t, dir, 2)
	release()
	if err := errors.Join(<-removed, <-written); err != nil {
		t.Fatal(err)
	}
	if list := read(t, dir); len(list) != 1 || list[0].ContainerID != "c2" {
		t.Errorf("records %v", list)
	}
	if _, err := os.Stat(filepath.Join(dir, "plugin/state.lock")); err != nil {
		t.Errorf("the writer held the lock that was removed: %v", err)
	}
}

// awaitWaiters waits until so many wait for the lock of the state file.
func awaitWaiters(t *testing.T, dir string, want int) {
	t.Helper()
	info, err := os.Stat(filepath.Join(dir, "plugin/state.lock"))
	if err != nil {
		t.Fatal(err)
	}
	waits := regexp.MustCompile(fmt.Sprintf(`-> FLOCK .*:%d `, info.Sys().(*syscall.Stat_t).Ino))
	limit, cancel := lab.Patience(t.Context(), 10*time.Second)
	defer cancel()
	err = lab.Eventually(limit, func() error {
		locks, err := os.ReadFile("/proc/locks")
		if got := len(waits.FindAll(locks, -1)); err == nil && got != want {
			err = fmt.Errorf("%d wait for the lock, want %d", got, want)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	update(t, dir, nil, attachment("c1"))
	for _, name := range []string{"plugin/state.json.corrupt", "plugin/state.json.tmp", "plugin/plugin.log", "plugin/plugin.log.1"} {
		put(t, filepath.Join(dir, name), "")
	}
	for range 2 {
		if err := runtimedir.New(dir).RemoveState(time.Second); err != nil {
			t.Fatal(err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	}
	if err := runtimedir.New(filepath.Join(dir, "missing")).RemoveState(time.Second); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
}

// TestMakeState: where the directory cannot be made, that is an error.
func TestMakeState(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	put(t, file, "")
	if err := runtimedir.New(file).MakeState(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("%v, want an error of %s", err, file)
	}
}
