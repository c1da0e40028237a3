package runtimedir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another process is the agent, or the installer, of this name.
var ErrLocked = errors.New("another process of this name is running")

// ErrBusy means that another process held the lock of the state file for as long as the caller wanted to wait.
var ErrBusy = errors.New("another process holds the lock")

// A process that may read a file may lock it: flock(2) takes any open file, and a read lock of fcntl(2) a file opened for
// reading. So a lock that is waited for, or tried for, is on a file that is not readable (lockMode): for a container of
// another writer, which is root without capabilities and sees it in a read-only mount, that is no open at all.
// Other processes test liveFile. It is readable, and only a write lock on it counts, which takes a file opened for writing.
const (
	lockFile = "lock"
	liveFile = "live"
	lockMode = 0o200
	liveMode = 0o600
)

// Lock is held until it is closed or its process ends, in whatever way.
type Lock struct {
	files []*os.File
	// Lost is why nothing could be taken over of what the version before has written; nil where it was, or is not there.
	Lost error
}

// Close releases the lock. Closing the files alone would leave it to a child that is just being forked, until that
// has executed its program.
func (l *Lock) Close() (err error) {
	for _, file := range l.files {
		err = errors.Join(err, unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK}), file.Close())
	}
	return err
}

// lock makes this process the writer of f: ErrLocked where another is. fs.ErrNotExist where f was removed meanwhile.
func (f *folder) lock() (*Lock, error) {
	for {
		file, _, err := f.create(lockFile, unix.O_WRONLY|unix.O_CREAT, lockMode, 0)
		if err != nil {
			return nil, err
		}
		err = writeLock(file)
		if err == nil && !f.current(file, lockFile) { // the last writer has left meanwhile, and taken it away
			_ = file.Close()
			continue
		}
		var live *os.File
		if err == nil {
			live, err = f.live()
		}
		if err != nil {
			_ = file.Close()
			return nil, err
		}
		return &Lock{files: []*os.File{live, file}}, nil
	}
}

// live creates the file whose lock shows that the writer of f runs. Each writer creates a new one: read locks on the one before
// have no effect.
func (f *folder) live() (*os.File, error) {
	if err := f.remove(liveFile); err != nil {
		return nil, err
	}
	file, _, err := f.create(liveFile, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, lockMode, 0)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(writeLock(file), file.Chmod(liveMode)); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// writeLock takes the open file description lock (fcntl(2)) on a file, which can be tested without being taken.
func writeLock(file *os.File) error {
	err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return ErrLocked
	case err != nil:
		return &fs.PathError{Op: "lock", Path: file.Name(), Err: err}
	}
	return nil
}

// held reports whether a process holds the write lock on a file of f. It takes no lock itself. A test for a read lock finds
// write locks only.
func (f *folder) held(name string) bool {
	file, _, err := f.open(name, unix.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	lock := unix.Flock_t{Type: unix.F_RDLCK}
	return unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}

// current reports whether name still leads to this file.
func (f *folder) current(file *os.File, name string) bool {
	var open unix.Stat_t
	there, err := f.lookup(name)
	return err == nil && unix.Fstat(int(file.Fd()), &open) == nil && open.Dev == there.Dev && open.Ino == there.Ino
}

// wait takes the lock on a file by flock(2), waiting for at most limit; it is held until the file is closed. On an error
// the file is closed.
func wait(file *os.File, limit time.Duration) error {
	fd := int(file.Fd())
	// Mostly no process has it, and to wait costs a thread.
	if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
		return nil
	}
	acquired := make(chan error, 1)
	// A blocking flock, not a loop of attempts: the kernel serves its waiters in order, so that with many ADDs
	// at once none starves.
	go func() { acquired <- restart(func() error { return unix.Flock(fd, unix.LOCK_EX) }) }()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case err := <-acquired:
		if err != nil {
			_ = file.Close()
			return &fs.PathError{Op: "flock", Path: file.Name(), Err: err}
		}
		return nil
	case <-timeout.C:
		// The system call cannot be cancelled. Should its turn come while this process still runs, the lock is released
		// at once.
		go func() { _ = errors.Join(<-acquired, file.Close()) }()
		return fmt.Errorf("%s: %w for more than %s", file.Name(), ErrBusy, limit)
	}
}
