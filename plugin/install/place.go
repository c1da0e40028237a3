package install

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
)

// tempExt is behind the names of files that are being written. No loader reads such a name. Only the holder of
// the directory's lock writes, so one name is enough.
const tempExt = keptExt + ".tmp"

// lockPatience is how long to wait for another installer that changes the same directory.
const lockPatience = 10 * time.Second

// errChanged says that somebody else has changed a file since it was read.
var errChanged = errors.New("somebody else has changed it meanwhile")

// lock takes the lock on a directory, which whoever changes it holds: flock on the directory itself, so that it
// protects the same thing whatever runtime directory an installer uses, and leaves no file behind.
func lock(ctx context.Context, dir string) (unlock func(), err error) {
	file, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(lockPatience)
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = file.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			_ = file.Close()
			return nil, &fs.PathError{Op: "flock", Path: dir, Err: err}
		case time.Now().After(deadline):
			_ = file.Close()
			return nil, fmt.Errorf("%s: another installer has held its lock for %s", dir, lockPatience)
		}
		select {
		case <-ctx.Done():
			_ = file.Close()
			return nil, context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// place makes the directory's file before into after. At every moment a loader finds one or the other; where both
// are there for an instant they mean the same network, and the one with the single plugin comes first. Whoever dies in
// between has the rest done by the next one.
func (d directory) place(before candidate, after File) error {
	if after.KeptName != "" && after.KeptName != before.KeptName {
		if err := d.write(after.KeptName+keptExt, after.Kept, before.mode); err != nil {
			return err
		}
	}
	target := after.Name
	if after.Name == before.Name {
		target = before.target
		if err := d.replace(target, before.Data, after.Data, before.mode); err != nil {
			return err
		}
	} else if err := d.write(target, after.Data, before.mode); err != nil {
		return err
	}
	if after.Name != before.Name {
		if data, err := os.ReadFile(filepath.Join(d.path, before.Name)); err == nil && !bytes.Equal(data, before.Data) {
			return fmt.Errorf("%s: %w", before.Name, errChanged)
		}
		if err := os.Remove(filepath.Join(d.path, before.Name)); err != nil {
			return err
		}
	}
	if before.KeptName != "" && after.KeptName == "" {
		if err := os.Remove(filepath.Join(d.path, before.KeptName+keptExt)); err != nil {
			return err
		}
	}
	return syncDir(d.path)
}

// write makes a file of this content, in one step.
func (d directory) write(name string, data []byte, mode fs.FileMode) error {
	temp, err := d.temp(name, data, mode)
	if err != nil {
		return err
	}
	// Within the directory: containerd reloads on the RENAME of the temporary name, and not on a CREATE alone. And a
	// new file has the security label that the directory gives, where a moved one would keep its old one.
	if err := os.Rename(temp, filepath.Join(d.path, name)); err != nil {
		return err
	}
	return syncDir(d.path)
}

// replace makes the content of a file new, in one step, unless it is no more what it was when it was read. The
// other writer holds no lock of ours, so the two files change places, and what was there is looked at before it goes.
func (d directory) replace(name string, old, data []byte, mode fs.FileMode) error {
	path := filepath.Join(d.path, name)
	temp, err := d.temp(name, data, mode)
	if err != nil {
		return err
	}
	copyOwner(temp, path)
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // a file system that cannot do that
		return errors.Join(os.Rename(temp, path), syncDir(d.path))
	}
	if err != nil {
		return errors.Join(&fs.PathError{Op: "exchange", Path: path, Err: err}, os.Remove(temp))
	}
	if there, err := os.ReadFile(temp); err != nil || !bytes.Equal(there, old) {
		back := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
		return errors.Join(err, back, os.Remove(temp), fmt.Errorf("%s: %w", name, errChanged))
	}
	return errors.Join(os.Remove(temp), syncDir(d.path))
}

// temp writes a temporary file that a power loss leaves whole once it has been renamed.
func (d directory) temp(name string, data []byte, mode fs.FileMode) (path string, err error) {
	path = filepath.Join(d.path, name+tempExt)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return "", err
	}
	_, err = file.Write(data)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close()) // chmod: the umask
	if err != nil {
		_ = os.Remove(path) // what is left of it would keep a full file system full
	}
	return path, err
}

// copyOwner gives a file the owner of another, where that is allowed: without CAP_CHOWN a file of somebody else's
// becomes ours, and stays readable.
func copyOwner(to, from string) {
	var stat unix.Stat_t
	if unix.Stat(from, &stat) == nil {
		_ = os.Chown(to, int(stat.Uid), int(stat.Gid))
	}
}

// removeTemps is RemoveTemps for the holder of the lock.
func (d directory) removeTemps() error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), tempExt) {
			err = errors.Join(err, os.Remove(filepath.Join(d.path, entry.Name())))
		}
	}
	return err
}

// RemoveTemps removes what installers have left behind in a directory that were killed while they wrote.
func RemoveTemps(ctx context.Context, dir string) error {
	unlock, err := lock(ctx, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	return directory{path: dir}.removeTemps()
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
