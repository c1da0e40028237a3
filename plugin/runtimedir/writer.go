package runtimedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the format of every file that this build writes, and the newest it reads.
const Version = 1

// writer is the directory of one agent or installer.
type writer struct {
	dir         Dir
	group, name string
	// Its files in the layout before.
	oldFile, oldLock string
}

// Name is the name of the agent.
func (w writer) Name() string { return w.name }

func (w writer) open() (*folder, error) { return w.dir.open(w.group, w.name) }

// lock makes this process the writer of the directory until the lock is closed; ErrLocked while another process is.
// It creates what is missing. takeOver is called where the layout before has something newer.
func (w writer) lock(takeOver func(*folder) error) (*Lock, error) {
	for {
		f, err := w.dir.make(w.group, w.name)
		if err != nil {
			return nil, err
		}
		lock, err := w.lockIn(f, takeOver)
		f.close()
		if !errors.Is(err, fs.ErrNotExist) { // it was removed by the writer that left
			return lock, err
		}
	}
}

func (w writer) lockIn(f *folder, takeOver func(*folder) error) (*Lock, error) {
	if w.oldLive() {
		return nil, ErrLocked
	}
	newer, err := w.oldIsNewer(f)
	if err != nil {
		return nil, err
	}
	lock, err := f.lock()
	if err != nil {
		return nil, err
	}
	if newer {
		lock.Lost = takeOver(f)
	}
	// Last: from here on the files in here count, and not those of the layout before.
	if err := unix.Fchmod(f.fd, 0o700); err != nil {
		return nil, errors.Join(&fs.PathError{Op: "chmod", Path: f.path, Err: err}, lock.Close())
	}
	return lock, nil
}

// Live reports whether the writer runs. It takes no lock.
func (w writer) Live() bool {
	f, err := w.open()
	if err == nil {
		defer f.close()
		if f.held(liveFile) {
			return true
		}
	}
	return w.oldLive()
}

// Leave removes all files of the writer, and the directories that are empty then, where they can be removed: in a
// container they are mounts. The caller holds the lock.
func (w writer) Leave() error {
	f, err := w.open()
	if errors.Is(err, fs.ErrNotExist) {
		return w.removeOld(w.oldFiles()...)
	}
	if err != nil {
		return err
	}
	defer f.close()
	entries, err := f.list()
	for _, entry := range entries {
		if name := entry.Name(); name != lockFile {
			err = errors.Join(err, f.remove(name))
		}
	}
	// Only then may another process become the writer.
	if err = errors.Join(err, w.removeOld(w.oldFiles()...), f.remove(lockFile)); err != nil {
		return err
	}
	w.dir.removeEmpty(w.group, w.name)
	return nil
}

// removeEmpty removes the directory group/name, and group, where they are empty and no mount.
func (d Dir) removeEmpty(group string, names ...string) {
	if f, err := d.open(group); err == nil {
		_ = f.remove(names...)
		f.close()
	}
	if f, err := d.open(); err == nil {
		_ = f.remove(group)
		f.close()
	}
}

// document is the content of a file, with its version.
type document interface{ version() *int }

// read reads a file of the directory into content; fs.ErrNotExist where there is none.
func (w writer) read(name string, limit int64, content document) error {
	f, err := w.open()
	if err != nil {
		return err
	}
	defer f.close()
	data, err := f.read(name, limit)
	if err != nil {
		return err
	}
	return decode(f.join(name), data, content)
}

func decode(path string, data []byte, content document) error {
	version := content.version()
	err := json.Unmarshal(data, content)
	if err != nil {
		// A newer file need not have the shape that this build knows: its version is read alone.
		var head struct{ Version int }
		if json.Unmarshal(data, &head) == nil {
			*version = head.Version
		}
	}
	switch {
	case *version > Version:
		return &NewerVersionError{Path: path, Version: *version}
	case err != nil:
		return &CorruptError{Path: path, Err: err}
	case *version < 1:
		return &CorruptError{Path: path, Err: fmt.Errorf("version %d", *version)}
	}
	return nil
}

// write replaces a file of the directory. The caller holds the lock.
func (w writer) write(name string, limit int64, content document) error {
	f, err := w.dir.make(w.group, w.name)
	if err != nil {
		return err
	}
	defer f.close()
	return f.put(name, limit, content)
}

func (f *folder) put(name string, limit int64, content document) error {
	*content.version() = Version
	data, err := json.MarshalIndent(content, "", " ")
	if err != nil {
		return err
	}
	return f.replace(name, append(data, '\n'), limit)
}

// time is when a file was last written or renewed.
func (w writer) time(name string) (time.Time, error) {
	f, err := w.open()
	if err != nil {
		return time.Time{}, err
	}
	defer f.close()
	return f.modified(name)
}

// writers are the names in a group, in order: of those that have one of the files in their directory, or of the layout before. With an
// error they are those that can be listed.
func (d Dir) writers(group string, of func(name string) writer, files ...string) ([]string, error) {
	names, err := d.oldWriters(of)
	if err != nil {
		return nil, err
	}
	f, err := d.open(group)
	if errors.Is(err, fs.ErrNotExist) {
		return names, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.close()
	entries, err := f.list()
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		has, hasErr := f.has(entry.Name(), files)
		err = errors.Join(err, hasErr)
		if has {
			names = append(names, entry.Name())
		}
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

// has reports whether a directory in f has one of the files. One that is gone or of another user has none.
func (f *folder) has(name string, files []string) (bool, error) {
	sub, err := f.sub(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, errOwner):
		return false, nil
	case err != nil:
		return false, err
	}
	defer sub.close()
	for _, file := range files {
		if _, err := sub.lookup(file); !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}
