package runtimedir

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// MakeState creates the directory of the plugin, where its log is too.
func (d Dir) MakeState() error {
	f, err := d.make(pluginDir)
	if err == nil {
		f.close()
	}
	return err
}

// Update removes the records of gone and then appends those of add; where that is no change, nothing is
// written. It waits for its turn for at most wait (then ErrBusy).
//
// Only what is added creates a directory: else fs.ErrNotExist where nothing was ever recorded. A
// newer file is left untouched: *NewerVersionError. A file that cannot be used is set aside, and the update begins
// from an empty list with a new Since: that is the warning, which can come with and without an error.
func (d Dir) Update(wait time.Duration, gone []Key, add ...Attachment) (warning, err error) {
	f, lock, err := d.lockState(wait, len(add) > 0)
	if err != nil {
		return nil, err
	}
	defer f.close()
	defer func() { _ = lock.Close() }() // releases it
	old, err := d.takeOldState()
	if err != nil {
		return nil, err
	}
	defer old.close()

	before, list, err := load(f)
	aside, warning := unusable(err), error(nil)
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case aside:
		warning = fmt.Errorf("%w; it is kept as %s, a new list begins", err, f.join(stateFile+corruptExt))
		list, err = encode(File{Since: time.Now().UTC()})
	case missing && old.err == nil:
		list, err = old.list, nil
	case missing && len(add) == 0 && errors.Is(old.err, fs.ErrNotExist):
		return nil, nil
	case missing:
		list, err = encode(File{Since: time.Now().UTC()})
	}
	switch {
	case err != nil || errors.Is(old.err, fs.ErrNotExist):
	case old.err == nil:
		err = list.merge(old.list)
	case unusable(old.err):
		warning = errors.Join(warning, fmt.Errorf("%w; its records are not taken over", old.err))
	default:
		err = old.err
	}
	if err == nil {
		err = errors.Join(list.remove(gone), list.add(add))
	}
	if err != nil {
		return warning, err
	}
	if after := list.join(); !bytes.Equal(before, after) {
		prepare := func() error { return nil }
		if aside {
			prepare = f.setAside
		}
		if err := f.replace(stateFile, after, stateLimit, prepare); err != nil {
			return warning, err
		}
	}
	return warning, old.clear(d, f)
}

// unusable reports whether an error means that a file has to be set aside.
func unusable(err error) bool {
	var corrupt *CorruptError
	var unsafe *UnsafeError
	return errors.As(err, &corrupt) || errors.As(err, &unsafe)
}

// setAside gives the state file a second name. It leaves it in its place, until the new list replaces it:
// without a file in between, the next writer would not know that there was a list.
func (f *folder) setAside() error {
	const aside = stateFile + corruptExt
	if err := f.remove(aside); err != nil {
		return err
	}
	if err := unix.Linkat(f.fd, stateFile, f.fd, aside, 0); err != nil {
		return &os.LinkError{Op: "link", Old: f.join(stateFile), New: f.join(aside), Err: err}
	}
	return nil
}

// RemoveState removes all that the plugin has written: for the installer that takes the last key out of the
// configuration of the node. It waits for its turn for at most wait (then ErrBusy). A writer that waits meanwhile begins a new list.
func (d Dir) RemoveState(wait time.Duration) error {
	f, lock, err := d.lockState(wait, false)
	if err == nil {
		defer f.close()
		defer func() { _ = lock.Close() }()
		entries, listErr := f.list()
		err = listErr
		for _, entry := range entries {
			if name := entry.Name(); name != stateLock {
				err = errors.Join(err, f.remove(name))
			}
		}
		err = errors.Join(err, f.remove(stateLock))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if top, openErr := d.open(); openErr == nil {
		err = errors.Join(err, top.removeOld(oldFiles...))
		top.close()
	}
	d.removeEmpty(pluginDir)
	return err
}

// lockState opens the directory of the plugin and takes its lock, which is held until the file is closed.
func (d Dir) lockState(limit time.Duration, create bool) (*folder, *os.File, error) {
	for deadline := time.Now().Add(limit); ; {
		f, err := d.openState(create)
		if err != nil {
			return nil, nil, err
		}
		file, _, err := f.create(stateLock, unix.O_WRONLY|unix.O_CREAT, lockMode, 0)
		if err == nil {
			err = wait(file, time.Until(deadline))
		}
		if err == nil && f.current(file, stateLock) {
			return f, file, nil
		}
		f.close()
		if err == nil {
			_ = file.Close() // RemoveState has taken it away while we waited
		} else if !create || !errors.Is(err, fs.ErrNotExist) { // or the directory with it
			return nil, nil, err
		}
	}
}

func (d Dir) openState(create bool) (*folder, error) {
	open := d.open
	if create || d.hasOldState() {
		open = d.make
	}
	f, err := open(pluginDir)
	if err != nil {
		return nil, err
	}
	if private, err := f.private(); err == nil && !private {
		_ = unix.Fchmod(f.fd, 0o700) // kubelet has made it
	}
	return f, nil
}

func (d Dir) hasOldState() bool {
	top, err := d.open()
	if err != nil {
		return false
	}
	defer top.close()
	_, err = top.lookup(stateFile)
	return err == nil
}
