package conflist

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

const (
	// tempExt ends the names of files that are being written. No loader reads such a name.
	tempExt = keptExt + ".tmp"
	// originalExt is behind the name of a file of another user that has our entry now.
	originalExt = keptExt + ".original"
	// lockName is the file whose lock is held by those that change a directory, for as long as they change it.
	lockName = "." + entry.Type + ".lock"
	// lockTimeout is how long to wait for another installer that changes the same directory.
	lockTimeout = 10 * time.Second
)

// ErrChanged says that another program has changed a file since it was read.
var ErrChanged = errors.New("another program has changed it meanwhile")

// ErrHeld says that another installer has not given a directory's lock back.
var ErrHeld = errors.New("another installer has held its lock")

// IsOurs reports whether a file of a directory is a temporary one or a lock of an installer.
func IsOurs(name string) bool {
	return filepath.Base(name) == lockName || strings.HasSuffix(name, tempExt)
}

// Lock takes the lock of a directory. It is a file that only root can open, so that nobody else can hold it, and
// that is there for as long as the lock is held.
func Lock(ctx context.Context, dir string) (unlock func(), err error) {
	path := filepath.Join(dir, lockName)
	deadline := time.Now().Add(lockTimeout)
	for {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, err
		}
		if err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil && isFile(file, path) {
			return func() {
				_ = os.Remove(path) // while it is held: who waits for it looks for its name then
				_ = file.Close()
			}, nil
		}
		_ = file.Close()
		switch {
		case err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
		case time.Now().After(deadline):
			return nil, fmt.Errorf("%s: %w for %s", dir, ErrHeld, lockTimeout)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// lock takes the lock of a directory. By force it goes on without one that is not given back, and takes its file away: a change is made only
// where the file is as it was read, whoever has the lock.
func (o Options) lock(ctx context.Context, dir string) (unlock func(), err error) {
	unlock, err = Lock(ctx, dir)
	if o.Force != nil && errors.Is(err, ErrHeld) {
		o.Force(err)
		return func() { _ = os.Remove(filepath.Join(dir, lockName)) }, nil
	}
	return unlock, err
}

// isFile reports whether a path leads to an open file.
func isFile(file *os.File, path string) bool {
	opened, err := file.Stat()
	there, errThere := os.Lstat(path)
	return err == nil && errThere == nil && os.SameFile(opened, there)
}

// Update makes the changes that plan asks for, and asks again where another program has written meanwhile. It holds the
// lock of the directory only where there is something to change. With an error, notes of the plan are returned as well.
func Update(ctx context.Context, path string, options Options, plan func(*Directory) (Plan, error)) (Plan, error) {
	d, err := Read(path, options)
	if err != nil {
		return Plan{}, err
	}
	p, planErr := plan(d)
	if p.Empty() {
		return p, planErr
	}
	unlock, err := options.lock(ctx, path)
	if err != nil {
		return Plan{Notes: p.Notes}, explain(err, path)
	}
	defer unlock()
	for range 5 {
		if d, err = Read(path, options); err != nil {
			return Plan{Notes: p.Notes}, err
		}
		if p, planErr = plan(d); p.Empty() {
			return p, planErr
		}
		if err = d.makeChanges(p); !errors.Is(err, ErrChanged) {
			break
		}
	}
	if err != nil {
		p.File = ""
	}
	return p, errors.Join(planErr, err)
}

func (d *Directory) makeChanges(p Plan) error {
	if err := d.removeTemps(); err != nil {
		return explain(err, d.path)
	}
	for _, c := range p.changes {
		if err := d.apply(c); err != nil {
			return explain(err, filepath.Join(d.path, c.path))
		}
	}
	return nil
}

func (d *Directory) apply(c change) error {
	path := filepath.Join(d.path, c.path)
	var err error
	switch {
	case c.from != "" && c.old != nil:
		err = swap(filepath.Join(d.path, c.from), path, c.old)
	case c.from != "":
		err = rename(filepath.Join(d.path, c.from), path, unix.RENAME_NOREPLACE)
	case c.data == nil:
		err = removeOnly(path, c.old)
	case c.old == nil:
		err = create(path, c.data, c.like)
	default:
		err = replace(path, c.old, c.data, c.like)
	}
	if err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// rename is renameat2(2), and rename(2) on a file system that cannot do what the flags ask for.
func rename(from, to string, flags uint) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Rename(from, to)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// create makes a file of this content, in one step. A new file also gets the security label that the directory gives.
func create(path string, data []byte, like file) error {
	temp, _, err := temporary(path, data, like)
	if err != nil {
		return err
	}
	err = rename(temp, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%s: %w", path, ErrChanged)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}

// replace makes the content of a file new, in one step, unless it is no longer what it was when it was read. A file of
// another user, which only CAP_CHOWN could make again, is kept aside, to come back when the entry goes.
func replace(path string, old, data []byte, like file) error {
	temp, owned, err := temporary(path, data, like)
	if err != nil {
		return err
	}
	if owned {
		return swap(temp, path, old)
	}
	if err := exchange(temp, path, old); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return rename(temp, path+originalExt, 0)
}

// swap puts a file in the place of another, which is removed.
func swap(from, path string, old []byte) error {
	if err := exchange(from, path, old); err != nil {
		if strings.HasSuffix(from, tempExt) {
			err = errors.Join(err, os.Remove(from))
		}
		return err
	}
	if err := os.Remove(from); !errors.Is(err, fs.ErrNotExist) { // the file system cannot exchange
		return err
	}
	return nil
}

// exchange has two files change places, unless the one at path is no longer what it was when it was read. Other writers hold
// no lock of ours, so what was there is looked at before it goes.
func exchange(from, path string, old []byte) error {
	if err := rename(from, path, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	there, err := os.ReadFile(from)
	if errors.Is(err, fs.ErrNotExist) || err == nil && bytes.Equal(there, old) {
		return nil
	}
	return errors.Join(err, rename(from, path, unix.RENAME_EXCHANGE), fmt.Errorf("%s: %w", path, ErrChanged))
}

// removeOnly removes a file unless it is no longer what it was when it was read.
func removeOnly(path string, old []byte) error {
	temp, _, err := temporary(path, nil, file{mode: 0o600, uid: os.Geteuid(), gid: os.Getegid()}) // a free name
	if err != nil {
		return err
	}
	if err := rename(path, temp, 0); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	if there, err := os.ReadFile(temp); err != nil || !bytes.Equal(there, old) {
		return errors.Join(err, rename(temp, path, unix.RENAME_NOREPLACE), fmt.Errorf("%s: %w", path, ErrChanged))
	}
	return os.Remove(temp)
}

// temporary writes a temporary file beside path that a power loss leaves whole once it has been renamed. owned: it belongs to
// the user that it should.
func temporary(path string, data []byte, like file) (temp string, owned bool, err error) {
	opened, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*"+tempExt)
	if err != nil {
		return "", false, fmt.Errorf("%s: %w", path, errors.Unwrap(err)) // a name that lasts
	}
	_, err = opened.Write(data)
	err = errors.Join(err, opened.Chmod(like.mode)) // before the owner changes
	owned = like.uid == os.Geteuid() && like.gid == os.Getegid()
	if !owned {
		errOwner := opened.Chown(like.uid, like.gid)
		if owned = errOwner == nil; !errors.Is(errOwner, unix.EPERM) {
			err = errors.Join(err, errOwner)
		}
	}
	err = errors.Join(err, opened.Sync(), opened.Close())
	if err != nil {
		_ = os.Remove(opened.Name()) // what is left of it would keep a full file system full
	}
	var named *fs.PathError
	if errors.As(err, &named) {
		named.Path = path // which is the same each time
	}
	return opened.Name(), owned, err
}

// removeTemps removes what installers that were killed have left behind.
func (d *Directory) removeTemps() error {
	dirs := map[string]bool{d.path: true}
	for folder := range d.folders {
		dirs[filepath.Join(d.path, folder)] = true
	}
	for _, f := range d.files {
		dirs[filepath.Join(d.path, filepath.Dir(f.target))] = true
	}
	var all error
	for dir := range dirs {
		all = errors.Join(all, removeTemps(dir))
	}
	return all
}

func removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempExt) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// RemoveTemps removes what installers have left behind in a directory that were killed while they wrote.
func RemoveTemps(ctx context.Context, dir string, options Options) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if IsOurs(e.Name()) {
			unlock, err := options.lock(ctx, dir)
			if err != nil {
				return err
			}
			defer unlock()
			return removeTemps(dir)
		}
	}
	return nil
}

// WriteProgram makes data an executable file, in one step, once check has found that it runs. A rename: the file that is
// replaced may be running (ETXTBSY). The caller holds the lock of its directory.
func WriteProgram(path string, data []byte, check func(path string) error) error {
	if err := removeTemps(filepath.Dir(path)); err != nil {
		return err
	}
	temp, _, err := temporary(path, data, file{mode: 0o755, uid: os.Geteuid(), gid: os.Getegid()})
	if err != nil {
		return err
	}
	if err = check(temp); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir brings the names in a directory to the disk.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// explain adds what to do about a file that cannot be changed. Names of temporary files are left out, so that the same
// error reads the same.
func explain(err error, path string) error {
	advice := ""
	switch {
	case errors.Is(err, ErrChanged):
		return err
	case errors.Is(err, unix.EROFS):
		advice = "the file system is mounted read-only: name the directory that the runtime uses with --cni-conf-dir (value cni.confDir of the chart), or mount it writable"
	case errors.Is(err, unix.EBUSY):
		advice = "the file is a mount point of its own, so that it cannot be replaced: mount its directory instead, or add the entry where the file comes from"
	case errors.Is(err, unix.EPERM):
		advice = "the file or its directory may be immutable (lsattr shows i; chattr -i), or belong to a user that this container may not act for"
	case errors.Is(err, unix.EACCES):
		advice = "run this as root; in a container, look at its security label: name the directory that the runtime uses with --cni-conf-dir (value cni.confDir of the chart)"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		advice = "the file system is full"
	default:
		return err
	}
	var errno unix.Errno
	_ = errors.As(err, &errno)
	return fmt.Errorf("%s cannot be written: %w: %s", path, errno, advice)
}
