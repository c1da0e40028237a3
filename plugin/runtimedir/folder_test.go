package runtimedir_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// readers are all that read a file which another process writes, with the file.
func readers(dir string) map[string]func() error {
	d := runtimedir.New(dir)
	agent, installer := d.Agent("a"), d.Installer("a")
	return map[string]func() error{
		"plugin/state.json":     func() error { _, err := d.ReadState(); return err },
		"plugin/plugin.log":     func() error { _, err := d.ReadLog(); return err },
		"agents/a/status.json":  func() error { _, err := agent.ReadStatus(); return err },
		"agents/a/claims.json":  func() error { _, err := agent.ReadClaims(); return err },
		"agents/a/pods.json":    func() error { _, err := agent.ReadPods(); return err },
		"agents/a/memory.json":  func() error { _, err := agent.ReadMemory(); return err },
		"install/a/record.json": func() error { _, err := installer.ReadRecord(); return err },
		// Of the layout before.
		"state.json":       func() error { _, err := d.Recorded(runtimedir.Key{ContainerID: "c"}); return err },
		"plugin.log":       func() error { _, err := d.ReadLog(); return err },
		"agents/a.json":    func() error { _, err := agent.ReadPods(); return err },
		"agents/a.install": func() error { _, err := installer.ReadRecord(); return err },
	}
}

// obstacles are what a process that may write a directory can put in place of a file of it. bait is a file outside.
func obstacles(t *testing.T, bait string) map[string]func(path string) error {
	return map[string]func(path string) error{
		"a symbolic link":     func(path string) error { return os.Symlink(bait, path) },
		"2 links":             func(path string) error { return os.Link(bait, path) },
		"a FIFO":              func(path string) error { return unix.Mkfifo(path, 0o600) },
		"a directory":         func(path string) error { return os.MkdirAll(filepath.Join(path, "full"), 0o700) },
		"1099511627776 bytes": func(path string) error { put(t, path, ""); return os.Truncate(path, 1<<40) },
		"a socket": func(path string) error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			return unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		},
		"a device": func(path string) error {
			err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) // /dev/zero
			if errors.Is(err, unix.EPERM) {
				return os.Symlink("/dev/zero", path) // takes a capability
			}
			return err
		},
		"owned by user": func(path string) error { put(t, path, "{}"); return os.Chown(path, 4242, 4242) },
	}
}

// TestUnsafeFilesAreNotRead: what is in place of a file is named, and nothing outside is read or waited for.
func TestUnsafeFilesAreNotRead(t *testing.T) {
	outside := t.TempDir()
	bait := filepath.Join(outside, "bait")
	put(t, bait, `{"version": 1}`)
	for file := range readers("") {
		for found, obstruct := range obstacles(t, bait) {
			t.Run(file+" is "+found, func(t *testing.T) {
				dir := shortDir(t)
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := obstruct(path); errors.Is(err, unix.EPERM) && os.Getuid() != 0 {
					t.Skip(err)
				} else if err != nil {
					t.Fatal(err)
				}
				done := background(readers(dir)[file])
				var err error
				select {
				case err = <-done:
				case <-lab.After(t, time.Minute):
					t.Fatal("the reader hangs")
				}
				if strings.HasSuffix(file, "a.json") && found == "a directory" || strings.HasSuffix(file, ".install") && found == "a directory" {
					if !errors.Is(err, fs.ErrNotExist) { // it may be that of an agent whose name ends so
						t.Errorf("%v, want fs.ErrNotExist", err)
					}
					return
				}
				var unsafe *runtimedir.UnsafeError
				if !errors.As(err, &unsafe) || unsafe.Path != path || unsafe.Limit == 0 {
					t.Fatalf("%v, want an UnsafeError of %s", err, path)
				}
				if what, _ := os.Readlink(path); what == "/dev/zero" {
					found = "a symbolic link"
				} else if found == "a socket" {
					found = "a FIFO, a socket or a device"
				}
				if !strings.Contains(err.Error(), found) || !strings.Contains(err.Error(), "allowed: a regular file of root with one link") {
					t.Errorf("%q does not say %q, and what is allowed", err, found)
				}
			})
		}
	}
}

// shortDir is a directory whose paths fit into the address of a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "rd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func background(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// TestDirectoriesAreNotFollowed: no directory is a symbolic link, and none is another user's.
func TestDirectoriesAreNotFollowed(t *testing.T) {
	for file := range readers("") {
		for name := filepath.Dir("x/" + file); name != "."; name = filepath.Dir(name) {
			name := strings.TrimPrefix(strings.TrimPrefix(name, "x"), "/")
			for what, replace := range map[string]func(path, outside string) error{
				"link": func(path, outside string) error { return os.Symlink(outside, path) },
				"FIFO": func(path, _ string) error { return unix.Mkfifo(path, 0o600) },
				"file": func(path, _ string) error { return os.WriteFile(path, nil, 0o600) },
				"another user's": func(path, _ string) error {
					return errors.Join(os.Mkdir(path, 0o700), os.Chown(path, 4242, 4242))
				},
			} {
				t.Run(file+", "+name+" is "+what, func(t *testing.T) {
					if what == "another user's" && os.Getuid() != 0 {
						t.Skip("takes root")
					}
					outside, dir := t.TempDir(), filepath.Join(t.TempDir(), "run")
					put(t, filepath.Join(outside, strings.TrimPrefix(strings.TrimPrefix(file, name), "/")), `{"version": 1}`)
					path := filepath.Join(dir, name)
					if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
						t.Fatal(err)
					}
					if err := replace(path, outside); err != nil {
						t.Fatal(err)
					}
					err := readers(dir)[file]()
					if file == "agents/a.install" && name == "agents" && errors.Is(err, fs.ErrNotExist) {
						return // the directory of the layout before is not there as such
					}
					if err == nil || errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "allowed: a directory of root") {
						t.Errorf("%v, want an error that says what is allowed", err)
					}
				})
			}
		}
	}
}

// TestWritersTouchNothingOutside: in place of a file, and of the temporary one before it, is a link to a file outside. A
// writer replaces the link.
func TestWritersTouchNothingOutside(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	agent, installer := d.Agent("a"), d.Installer("a")
	for file, write := range map[string]func() error{
		"plugin/state.json":     func() error { _, err := d.Update(generous, nil, attachment("c1")); return err },
		"agents/a/status.json":  func() error { return agent.WriteStatus(runtimedir.Status{}) },
		"agents/a/claims.json":  func() error { return agent.WriteClaims(nil) },
		"agents/a/pods.json":    func() error { _, err := agent.WritePods(runtimedir.Pods{}); return err },
		"agents/a/memory.json":  func() error { return agent.WriteMemory(runtimedir.Memory{}) },
		"install/a/record.json": func() error { return installer.WriteRecord(runtimedir.Record{}) },
	} {
		for _, link := range []func(target, name string) error{os.Symlink, os.Link} {
			bait := filepath.Join(t.TempDir(), "bait")
			put(t, bait, "bait")
			for _, ext := range []string{"", ".tmp"} {
				path := filepath.Join(dir, file+ext)
				_ = os.Remove(path)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := link(bait, path); err != nil {
					t.Fatal(err)
				}
			}
			if err := write(); err != nil {
				t.Errorf("%s: %v", file, err)
			}
			info, err := os.Lstat(filepath.Join(dir, file))
			if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o644 {
				t.Errorf("%s: %v, %v, want a new file", file, info, err)
			}
			if got, err := os.ReadFile(bait); err != nil || string(got) != "bait" {
				t.Errorf("%s: the file outside is %q, %v", file, got, err)
			}
		}
	}
}

// TestLocksOpenNothingElse: lock files are opened as carefully as those that are read.
func TestLocksOpenNothingElse(t *testing.T) {
	for _, file := range []string{"agents/a/lock", "agents/a/live", "agents/a.lock", "install/a/lock", "install/a/live", "plugin/state.lock"} {
		bait := filepath.Join(t.TempDir(), "bait")
		put(t, bait, "")
		for found, obstruct := range obstacles(t, bait) {
			t.Run(file+" is "+found, func(t *testing.T) {
				dir := shortDir(t)
				d := runtimedir.New(dir)
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := obstruct(path); errors.Is(err, unix.EPERM) && os.Getuid() != 0 {
					t.Skip(err)
				} else if err != nil {
					t.Fatal(err)
				}
				does := func(what func() error) error {
					select {
					case err := <-background(what):
						return err
					case <-lab.After(t, time.Minute):
						t.Fatal("it hangs")
						return nil
					}
				}
				err := does(func() error {
					if d.Agent("a").Live() || d.Installer("a").Live() {
						return errors.New("it is live")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				err = does(func() error {
					_, err := d.Update(50*time.Millisecond, nil, attachment("c1"))
					if lock, lockErr := d.Agent("a").Lock(); lockErr == nil {
						_ = lock.Close()
					}
					if lock, lockErr := d.Installer("a").Lock(); lockErr == nil {
						_ = lock.Close()
					}
					return err
				})
				if wrong := strings.HasPrefix(file, "plugin/"); (err != nil) != wrong {
					t.Errorf("Update: %v", err)
				}
				if info, err := os.Stat(bait); err != nil || info.Size() != 0 {
					t.Errorf("the file outside: %v, %v", info, err)
				}
			})
		}
	}
}

func TestNamesAreNoPaths(t *testing.T) {
	d := runtimedir.New(t.TempDir())
	for _, name := range []string{"", ".", "..", "../plugin", "a/b", "/etc", "a\x00b"} {
		if _, err := d.Agent(name).Lock(); err == nil {
			t.Errorf("agent %q has a lock", name)
		}
		if err := d.Agent(name).WriteStatus(runtimedir.Status{}); err == nil {
			t.Errorf("agent %q has a status", name)
		}
		if _, err := d.Installer(name).ReadRecord(); err == nil {
			t.Errorf("installer %q has a record", name)
		}
	}
}

// TestSizesAreBounded: a writer never writes what its readers would not read.
func TestSizesAreBounded(t *testing.T) {
	dir := t.TempDir()
	agent := runtimedir.New(dir).Agent("a")
	if err := agent.WriteClaims([]runtimedir.Claim{{Served: true}}); err != nil {
		t.Fatal(err)
	}
	err := agent.WriteClaims(make([]runtimedir.Claim, 100_000))
	if err == nil || !strings.Contains(err.Error(), "claims.json is not written: it would have") || !strings.Contains(err.Error(), "allowed are 4194304") {
		t.Errorf("%v", err)
	}
	if claims, err := agent.ReadClaims(); err != nil || len(claims) != 1 {
		t.Errorf("claims %v, %v; want those before", claims, err)
	}
}

// TestLeasesAreNotWaitedFor: the owner of a file may take a lease on it (fcntl(2)), which makes who opens it wait for up to 45 s.
func TestLeasesAreNotWaitedFor(t *testing.T) {
	for file := range readers("") {
		dir := t.TempDir()
		path := filepath.Join(dir, file)
		put(t, path, `{"version": 1}`)
		lease, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(lease.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
			t.Fatal(err)
		}
		read := readers(dir)[file]
		select {
		case err := <-background(read):
			if !errors.Is(err, unix.EWOULDBLOCK) {
				t.Errorf("%s: %v, want EWOULDBLOCK", file, err)
			}
		case <-lab.After(t, 20*time.Second):
			t.Errorf("%s: the reader waits", file)
		}
		if err := lease.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
