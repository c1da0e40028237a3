package whole

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const (
	workPrefix = "magic-ip-cluster-"
	cgroupRoot = "/sys/fs/cgroup"
)

// workDir is the folder of a cluster, whose name its cgroups bear too. It is locked as long as the cluster's process
// lives: what is not locked is left over from one that was killed.
type workDir struct {
	path string
	lock *os.File
}

func newWorkDir() (*workDir, error) {
	if err := removeLeftovers(); err != nil {
		return nil, err
	}
	path, err := os.MkdirTemp("", workPrefix)
	if err != nil {
		return nil, err
	}
	lock, err := lockDir(path)
	if err != nil {
		return nil, err
	}
	return &workDir{path: path, lock: lock}, os.Chmod(path, 0o755)
}

func lockDir(path string) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = dir.Close()
		return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
	}
	return dir, nil
}

func removeLeftovers() error {
	left, err := filepath.Glob(filepath.Join(os.TempDir(), workPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		// Another one may be between MkdirTemp and its lock.
		if info, err := os.Stat(path); err != nil || time.Since(info.ModTime()) < 10*time.Second {
			continue
		}
		lock, err := lockDir(path)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := (&workDir{path: path, lock: lock}).remove(); err != nil {
			return fmt.Errorf("left over from a cluster that was killed: %w", err)
		}
	}
	return nil
}

// remove removes the folder and the cgroups. The processes have ended.
func (w *workDir) remove() error {
	hierarchies, err := findHierarchies()
	for _, h := range hierarchies {
		err = errors.Join(err, removeCgroup(filepath.Join(h.dir, filepath.Base(w.path))))
	}
	return errors.Join(err, os.RemoveAll(w.path), w.lock.Close())
}

// hierarchy is where cgroups of some controllers, or all, are made.
type hierarchy struct {
	dir     string
	fstype  string
	options string // to mount it
}

// findHierarchies lists the cgroup hierarchies that are mounted: version 1, 2, or both.
func findHierarchies() ([]hierarchy, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []hierarchy
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		// 36 35 98:0 /root /mount/point rw,noatime shared:1 - fstype source rw,options
		before, after, _ := strings.Cut(lines.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if len(left) < 5 || len(right) < 3 || !strings.HasPrefix(left[4], cgroupRoot) {
			continue
		}
		h := hierarchy{dir: left[4], fstype: right[0], options: "rw"}
		switch h.fstype {
		case "cgroup":
			h.options = controllers(right[2])
		case "cgroup2":
		default:
			continue
		}
		found = append(found, h)
	}
	if len(found) == 0 {
		return nil, errors.New("no cgroups are mounted below " + cgroupRoot)
	}
	return found, nil
}

// controllers are the options that a hierarchy of version 1 can be mounted again by.
func controllers(options string) string {
	names := slices.DeleteFunc(strings.Split(options, ","), func(option string) bool {
		key, _, _ := strings.Cut(option, "=")
		return slices.Contains([]string{"rw", "ro", "xattr", "noprefix", "clone_children", "release_agent"}, key)
	})
	if len(names) == 1 && strings.HasPrefix(names[0], "name=") {
		return "none," + names[0]
	}
	return strings.Join(names, ",")
}

// unified says that the machine has version 2 alone.
func unified(hierarchies []hierarchy) bool {
	return len(hierarchies) == 1 && hierarchies[0].fstype == "cgroup2"
}

// makeCgroup makes a cgroup in a hierarchy, which can have processes and children.
func makeCgroup(h hierarchy, name string) error {
	dir := h.dir
	for part := range strings.SplitSeq(name, "/") {
		if h.fstype == "cgroup2" {
			if err := delegate(dir); err != nil {
				return err
			}
		}
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		// A cpuset of version 1 takes no process before these are set.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(parent, file))
			if h.fstype != "cgroup" || errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, file), value, 0o644)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate gives all controllers of a cgroup of version 2 to its children.
func delegate(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(available)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0o644); err != nil {
			return fmt.Errorf("controller %s: %w", controller, err)
		}
	}
	return nil
}

// removeCgroup removes a cgroup with all below, once the kernel has let go of the processes that were in there.
func removeCgroup(dir string) error {
	ctx, cancel := lab.Patience(context.Background(), 10*time.Second)
	defer cancel()
	return lab.Eventually(ctx, func() error {
		var below []string
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				below = append(below, path)
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		slices.Reverse(below)
		for _, path := range below {
			if err := syscall.Rmdir(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return &fs.PathError{Op: "rmdir", Path: path, Err: err}
			}
		}
		return nil
	})
}
