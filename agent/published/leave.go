package published

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// Leave removes what the agent called name has in the runtime dir; the caller holds its lock. The last one out,
// when no other agent and no installer is there, nor has left anything, also removes the records and logs of the plugin:
// the runtime dir is empty then.
func Leave(runtimeDir, name string) error {
	path := Path(runtimeDir, name)
	return LeaveFiles(runtimeDir, path, path+".tmp", path+".corrupt", lockPath(runtimeDir, name))
}

// LeaveFiles removes files of a leaving agent or installer, as Leave does.
func LeaveFiles(runtimeDir string, files ...string) error {
	return hold(runtimeDir, func() error {
		err := remove(files...)
		entries, readErr := os.ReadDir(Dir(runtimeDir))
		if readErr != nil && !errors.Is(readErr, fs.ErrNotExist) {
			return errors.Join(err, readErr)
		}
		var remains []string // of nobody: locks and temporary files of those who were killed
		for _, entry := range entries {
			path := filepath.Join(Dir(runtimeDir), entry.Name())
			switch ext := filepath.Ext(path); {
			case ext == ".json" || ext == ".install" || strings.Contains(ext, "lock") && Held(path):
				return err // somebody is still there
			default:
				remains = append(remains, path)
			}
		}
		err = errors.Join(err, remove(append(remains, Dir(runtimeDir))...))
		return errors.Join(err, state.Remove(runtimeDir, time.Second))
	})
}

func remove(files ...string) error {
	var all error
	for _, file := range files {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, err)
		}
	}
	return all
}

// holdPatience is far longer than anybody holds the runtime dir.
const holdPatience = 5 * time.Second

// hold runs f while nobody else comes or goes: agents and installers make and remove their lock files in here, so
// that the last one out does not take away what somebody who is just coming relies on. The lock is on the directory
// itself (flock(2)): it needs no file that would have to be removed.
func hold(runtimeDir string, f func() error) error {
	if err := os.MkdirAll(runtimeDir, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(runtimeDir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	for deadline := time.Now().Add(holdPatience); ; time.Sleep(time.Millisecond) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f()
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return &fs.PathError{Op: "flock", Path: runtimeDir, Err: err}
		case time.Now().After(deadline):
			return fmt.Errorf("%s: another process has held its lock for %s", runtimeDir, holdPatience)
		}
	}
}
