package state

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy says that another process held the lock for as long as the caller wanted to wait.
var ErrBusy = errors.New("another process holds the lock")

// Update replaces the recorded attachments by what change makes of them, which may be the same slice
// edited in place; where that is no change, nothing is written. It waits for its turn for at most wait
// (then ErrBusy).
//
// It never creates dir, so that removing can use it as it is: fs.ErrNotExist where dir is missing. A
// newer file is left untouched: *NewerVersionError. A corrupt one is set aside, and the update begins
// from an empty list: that is the warning, which can come with and without an error.
func Update(dir string, wait time.Duration, change func([]Attachment) []Attachment) (warning, err error) {
	lock, err := acquire(filepath.Join(dir, lockName), wait)
	if err != nil {
		return nil, err
	}
	defer func() { _ = lock.Close() }() // lets the lock go

	attachments, err := Read(dir)
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		aside := filepath.Join(dir, corruptName)
		if err := os.Rename(corrupt.Path, aside); err != nil {
			return nil, err
		}
		warning = fmt.Errorf("%w; it is kept as %s, the records begin anew", err, aside)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	before, err := encode(attachments)
	if err != nil {
		return warning, err
	}
	after, err := encode(change(attachments))
	if err != nil || bytes.Equal(before, after) {
		return warning, err
	}
	return warning, replace(dir, after)
}

// acquire takes the lock on path, waiting for at most wait; it is held until the file returned is closed or the
// process ends.
func acquire(path string, wait time.Duration) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	acquired := make(chan error, 1)
	// A blocking flock, not a loop of attempts: the kernel serves its waiters in order, so that with many ADDs
	// at once nobody starves.
	go func() { acquired <- flock(file) }()
	timeout := time.NewTimer(wait)
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
	if err := os.Rename(temp, filepath.Join(dir, fileName)); err != nil {
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
