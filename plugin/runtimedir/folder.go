package runtimedir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// folder is an open directory. A name in it is opened relative to it and without following a link, one name at a
// time: whatever the writer of the directory puts in place of a name, nothing outside is reached. (openat2 with
// RESOLVE_BENEATH does the same for a path of several names; a kernel or seccomp filter may lack it.)
type folder struct {
	fd   int
	path string // for messages
}

// errOwner is the cause where a directory is of another user.
var errOwner = errors.New("allowed: a directory of root")

const folderFlags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

func openFolder(path string) (*folder, error) { return folderAt(unix.AT_FDCWD, path, path) }

func folderAt(fd int, name, path string) (*folder, error) {
	f := &folder{fd: -1, path: path}
	err := restart(func() (err error) {
		f.fd, err = unix.Openat(fd, name, folderFlags, 0)
		return err
	})
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("%w; allowed: a directory of root, and no symbolic link to one", err)}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	stat, err := f.stat()
	if err == nil && !owned(stat.Uid) {
		err = fmt.Errorf("owned by user %d; %w", stat.Uid, errOwner)
	}
	if err != nil {
		f.close()
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return f, nil
}

// owned reports whether a user may own what is read here: root, or the user of this process in tests.
func owned(uid uint32) bool { return uid == 0 || int(uid) == os.Geteuid() }

func (f *folder) close() { _ = unix.Close(f.fd) }

// descend replaces f, which err came with, by the folder that step reaches through names.
func (f *folder) descend(err error, names []string, step func(*folder, string) (*folder, error)) (*folder, error) {
	for _, name := range names {
		if err != nil {
			return nil, err
		}
		parent := f
		f, err = step(parent, name)
		parent.close()
	}
	return f, err
}

func (f *folder) sub(name string) (*folder, error) {
	if err := f.check(name); err != nil {
		return nil, err
	}
	return folderAt(f.fd, name, f.join(name))
}

func (f *folder) makeSub(name string) (*folder, error) {
	if err := f.check(name); err != nil {
		return nil, err
	}
	if err := unix.Mkdirat(f.fd, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EROFS) {
		return nil, &fs.PathError{Op: "mkdir", Path: f.join(name), Err: err}
	}
	return f.sub(name)
}

// check refuses what is not a name but a path.
func (f *folder) check(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return &fs.PathError{Op: "open", Path: f.path, Err: fmt.Errorf("%q is no name of a file", name)}
	}
	return nil
}

func (f *folder) join(name string) string { return filepath.Join(f.path, name) }

func (f *folder) stat() (stat unix.Stat_t, err error) {
	if err = unix.Fstat(f.fd, &stat); err != nil {
		err = &fs.PathError{Op: "stat", Path: f.path, Err: err}
	}
	return stat, err
}

// lookup is stat for a name, without following it.
func (f *folder) lookup(name string) (stat unix.Stat_t, err error) {
	if err = f.check(name); err != nil {
		return stat, err
	}
	if err = unix.Fstatat(f.fd, name, &stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		err = &fs.PathError{Op: "stat", Path: f.join(name), Err: err}
	}
	return stat, err
}

// modified is when a name was last written to.
func (f *folder) modified(name string) (time.Time, error) {
	stat, err := f.lookup(name)
	return modTime(&stat), err
}

func modTime(stat *unix.Stat_t) time.Time { return time.Unix(stat.Mtim.Unix()) }

// open opens a regular file of at most limit bytes; *UnsafeError for anything else. O_NONBLOCK: a FIFO must not make
// its reader wait before it is recognised.
func (f *folder) open(name string, flags int, limit int64) (*os.File, int64, error) {
	return f.create(name, flags, 0, limit)
}

// create is open with O_CREAT among flags: a file that is missing gets the mode perm.
func (f *folder) create(name string, flags int, perm uint32, limit int64) (*os.File, int64, error) {
	if err := f.check(name); err != nil {
		return nil, 0, err
	}
	path, fd := f.join(name), -1
	err := restart(func() (err error) {
		fd, err = unix.Openat(f.fd, name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, perm)
		return err
	})
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, 0, &UnsafeError{Path: path, Found: "a symbolic link", Limit: limit}
	case errors.Is(err, unix.EISDIR):
		return nil, 0, &UnsafeError{Path: path, Found: "a directory", Limit: limit}
	case errors.Is(err, unix.ENXIO):
		return nil, 0, &UnsafeError{Path: path, Found: "a FIFO, a socket or a device", Limit: limit}
	case err != nil:
		return nil, 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	var stat unix.Stat_t
	err = unix.Fstat(fd, &stat)
	if err == nil {
		if found := unsafe(&stat, limit); found != "" {
			err = &UnsafeError{Path: path, Found: found, Limit: limit}
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, 0, err
	}
	return os.NewFile(uintptr(fd), path), stat.Size, nil
}

// unsafe is what is wrong with a file; empty where nothing is.
func unsafe(stat *unix.Stat_t, limit int64) string {
	switch kind := stat.Mode & unix.S_IFMT; {
	case kind == unix.S_IFDIR:
		return "a directory"
	case kind == unix.S_IFIFO:
		return "a FIFO"
	case kind == unix.S_IFCHR || kind == unix.S_IFBLK:
		return "a device"
	case kind != unix.S_IFREG:
		return "no regular file"
	case !owned(stat.Uid):
		return fmt.Sprintf("owned by user %d", stat.Uid)
	case stat.Nlink > 1:
		return fmt.Sprintf("a file with %d links", stat.Nlink)
	case stat.Size > limit:
		return fmt.Sprintf("a file of %d bytes", stat.Size)
	}
	return ""
}

// read returns the content of a file of at most limit bytes.
func (f *folder) read(name string, limit int64) ([]byte, error) {
	file, size, err := f.open(name, unix.O_RDONLY, limit)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data := make([]byte, size)
	n, err := io.ReadFull(file, data)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return data[:n], err
}

// tempExt is behind the name of a file that is being written. Only the holder of the directory's lock writes, so one
// name is enough.
const tempExt = ".tmp"

// replace makes data the content of a file: a reader finds the content before or this one, also after a power loss.
// The caller holds the lock of the directory. before, if any, is called when the new content is ready.
func (f *folder) replace(name string, data []byte, limit int64, before ...func() error) error {
	if err := f.check(name); err != nil {
		return err
	}
	if int64(len(data)) > limit {
		return fmt.Errorf("%s is not written: it would have %d bytes, allowed are %d", f.join(name), len(data), limit)
	}
	durable, err := f.outlivesReboot()
	if err != nil {
		return err
	}
	temp := name + tempExt
	if err := f.remove(temp); err != nil { // of a writer that was killed
		return err
	}
	err = f.write(temp, data, durable)
	for _, prepare := range before {
		if err == nil {
			err = prepare()
		}
	}
	if err == nil {
		if renameErr := unix.Renameat(f.fd, temp, f.fd, name); renameErr != nil {
			err = &os.LinkError{Op: "rename", Old: f.join(temp), New: f.join(name), Err: renameErr}
		}
	}
	if err != nil {
		_ = f.remove(temp) // what is left of it would keep a full file system full
		return err
	}
	if durable {
		return restart(func() error { return unix.Fsync(f.fd) })
	}
	return nil
}

func (f *folder) write(name string, data []byte, durable bool) error {
	fd := -1
	err := restart(func() (err error) {
		fd, err = unix.Openat(f.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
		return err
	})
	if err != nil {
		return &fs.PathError{Op: "create", Path: f.join(name), Err: err}
	}
	file := os.NewFile(uintptr(fd), f.join(name))
	_, err = file.Write(data)
	if err == nil && durable {
		// Without it a power loss after the rename can leave an empty file.
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

// outlivesReboot reports whether f is on a disk: syncing is for what a power loss leaves behind.
func (f *folder) outlivesReboot() (bool, error) {
	var stat unix.Statfs_t
	if err := restart(func() error { return unix.Fstatfs(f.fd, &stat) }); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: f.path, Err: err}
	}
	return stat.Type != unix.TMPFS_MAGIC && stat.Type != unix.RAMFS_MAGIC, nil
}

// remove removes names, whatever they are, except directories that are not empty. A name that is not there is no error.
func (f *folder) remove(names ...string) (all error) {
	for _, name := range names {
		err := unix.Unlinkat(f.fd, name, 0)
		if errors.Is(err, unix.EISDIR) {
			err = unix.Unlinkat(f.fd, name, unix.AT_REMOVEDIR)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, &fs.PathError{Op: "remove", Path: f.join(name), Err: err})
		}
	}
	return all
}

// maxEntries bounds what is read of a directory.
const maxEntries = 10_000

// list returns what is in f, in order.
func (f *folder) list() ([]fs.DirEntry, error) {
	fd, err := unix.Openat(f.fd, ".", folderFlags, 0) // with an offset of its own
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: f.path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), f.path)
	entries, err := dir.ReadDir(maxEntries)
	if errors.Is(err, io.EOF) { // it is empty
		err = nil
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, errors.Join(err, dir.Close())
}

// restart calls f again where a signal has interrupted it.
func restart(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
