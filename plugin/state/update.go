package state

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy says that another process held the lock for as long as the caller wanted to wait.
var ErrBusy = errors.New("another process holds the lock")

// Recorded says whether an attachment is recorded in the runtime directory dir, without the cost of decoding
// any. The errors are those of ReadFile.
func Recorded(dir string, key Key) (bool, error) {
	path := Path(dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	if !intact(data) {
		file, err := parse(path, data)
		return slices.ContainsFunc(file.Attachments, func(a Attachment) bool { return a.Key() == key }), err
	}
	// Mostly not even the container is. Its ID is written as it is: CNI allows no character in it that JSON
	// would escape (SPEC.md, "Parameters").
	if !bytes.Contains(data, []byte(key.ContainerID)) {
		return false, nil
	}
	start, err := start(key)
	return bytes.Contains(data, append([]byte("\n"), start...)), err
}

// Update removes the records of gone and then appends those of add; where that is no change, nothing is
// written. It waits for its turn for at most wait (then ErrBusy).
//
// It never creates dir, so that removing can use it as it is: fs.ErrNotExist where dir is missing. A
// newer file is left untouched: *NewerVersionError. A corrupt one is set aside, and the update begins
// from an empty list, whose Since says so: that is the warning, which can come with and without an error.
func Update(dir string, wait time.Duration, gone []Key, add ...Attachment) (warning, err error) {
	lock, err := acquire(filepath.Join(dir, lockName), wait)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }() // lets the lock go

	before, list, err := load(dir)
	var corrupt *CorruptError
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case errors.As(err, &corrupt):
		aside := filepath.Join(dir, corruptName)
		if err := setAside(corrupt.Path, aside); err != nil {
			return nil, err
		}
		warning = fmt.Errorf("%w; it is kept as %s, the records begin anew", err, aside)
		list, err = encode(File{Since: time.Now().UTC()})
	case missing && len(add) == 0:
		return nil, nil
	case missing:
		list, err = encode(File{Since: time.Now().UTC()})
	}
	if err == nil {
		err = errors.Join(list.remove(gone), list.add(add))
	}
	if err != nil {
		return warning, err
	}
	after := list.join()
	if bytes.Equal(before, after) {
		return warning, nil
	}
	return warning, replace(dir, after)
}

// setAside gives the file a second name. It leaves it in its place, until the list that begins anew takes it:
// without a file in between, the next writer would not know that there ever was a list.
func setAside(path, aside string) error {
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Link(path, aside)
}

// Remove removes all that the plugin has written into the runtime directory dir: for the last agent that leaves the
// node. It waits for its turn for at most wait (then ErrBusy). A writer that waits meanwhile begins anew.
func Remove(dir string, wait time.Duration) error {
	lock, err := acquire(filepath.Join(dir, lockName), wait)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	for _, name := range []string{fileName, tempName, corruptName, LogName, LogName + OldLog, lockName} { // the lock last
		if removeErr := os.Remove(filepath.Join(dir, name)); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	return err
}

// acquire takes the lock on path, waiting for at most wait; it is held until the file returned is closed or the
// process ends.
func acquire(path string, wait time.Duration) (*os.File, error) {
	for deadline := time.Now().Add(wait); ; {
		file, err := acquireOnce(path, wait, time.Until(deadline))
		if err != nil || current(file, path) {
			return file, err
		}
		_ = file.Close() // Remove has taken it away while we waited
	}
}

// current says whether path still leads to this file.
func current(file *os.File, path string) bool {
	var held, there unix.Stat_t
	return unix.Fstat(int(file.Fd()), &held) == nil && unix.Stat(path, &there) == nil && held.Dev == there.Dev && held.Ino == there.Ino
}

func acquireOnce(path string, wait, left time.Duration) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	// Mostly nobody has it, and to wait costs a thread.
	if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return file, nil
	}
	acquired := make(chan error, 1)
	// A blocking flock, not a loop of attempts: the kernel serves its waiters in order, so that with many ADDs
	// at once nobody starves.
	go func() { acquired <- flock(file) }()
	timeout := time.NewTimer(left)
	defer timeout.Stop()
	select {
	case err := <-acquired:
		if err != nil {
			_ = file.Close()
			return nil, err
		}
		return file, nil
	case <-timeout.C:
		// The waiter cannot be called back. Should its turn come while this process still runs, it lets go at once.
		go func() { _ = errors.Join(<-acquired, file.Close()) }()
		return nil, fmt.Errorf("%s: %w for more than %s", path, ErrBusy, wait)
	}
}

func flock(file *os.File) error {
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) { // the runtime's own signals interrupt system calls that wait
			return &fs.PathError{Op: "flock", Path: file.Name(), Err: err}
		}
	}
}

// replace makes data the state file of dir. The caller holds the lock.
func replace(dir string, data []byte) error {
	durable, err := outlivesReboot(dir)
	if err != nil {
		return err
	}
	temp := filepath.Join(dir, tempName)
	if err := write(temp, data, durable); err != nil {
		_ = os.Remove(temp) // what is left of it would keep a full file system full
		return err
	}
	if err := os.Rename(temp, Path(dir)); err != nil {
		return err
	}
	if durable {
		return sync(dir)
	}
	return nil
}

func write(path string, data []byte, durable bool) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err == nil && durable {
		// Without it a power loss after the rename can leave an empty file.
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

func sync(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// outlivesReboot says whether dir is on a disk: syncing is for what a power loss leaves behind.
func outlivesReboot(dir string) (bool, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return stat.Type != unix.TMPFS_MAGIC && stat.Type != unix.RAMFS_MAGIC, nil
}
