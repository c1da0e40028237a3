package conflist

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// TestReplaceOnlyWhatWasRead: a primary CNI that writes its file between our reading and our writing keeps what it wrote.
func TestReplaceOnlyWhatWasRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "10-a.conflist")
	like := file{mode: 0o640, uid: os.Geteuid(), gid: os.Getegid()}
	if err := os.WriteFile(path, []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	want := func(content string) {
		t.Helper()
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("%v, %v", entries, err)
		}
		if data, err := os.ReadFile(path); err != nil || string(data) != content {
			t.Errorf("%q, %v, want %q", data, err, content)
		}
	}
	for what, err := range map[string]error{
		"replace": replace(path, []byte("old"), []byte("ours"), like), "remove": removeOnly(path, []byte("old")), "create": create(path, []byte("ours"), like),
	} {
		if !errors.Is(err, ErrChanged) {
			t.Errorf("%s: %v", what, err)
		}
	}
	want("new")
	if err := replace(filepath.Join(dir, "20-gone.conflist"), []byte("old"), []byte("ours"), like); err == nil {
		t.Error("a file that is gone is made anew")
	}
	want("new")
	if err := replace(path, []byte("new"), []byte("ours"), like); err != nil {
		t.Error(err)
	}
	want("ours")
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("mode %v: %v", info.Mode(), err)
	}
}

// withoutChown runs f without the right to give files to others, as in a container without CAP_CHOWN.
func withoutChown(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		header, sets := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		err := unix.Capget(&header, &sets[0])
		if err == nil {
			sets[0].Effective &^= 1 << unix.CAP_CHOWN
			err = unix.Capset(&header, &sets[0])
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestFileOfAnotherUser: where a file cannot be given to its owner, the one that was there is kept aside; where it can, it is not.
func TestFileOfAnotherUser(t *testing.T) {
	t.Parallel()
	const path = "10-a.conflist"
	for _, test := range []struct {
		name     string
		uid, gid int
		old      string
		want     map[string]string
	}{
		{"its own", os.Geteuid(), os.Getegid(), "old", map[string]string{path: "new"}},
		{"another user's", 4242, os.Getegid(), "old", map[string]string{path: "new", path + originalExt: "old"}},
		{"another group's", os.Geteuid(), 4242, "old", map[string]string{path: "new", path + originalExt: "old"}},
		{"another user's that has been changed", 4242, os.Getegid(), "older", map[string]string{path: "old"}},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, path), []byte("old"), 0o644); err != nil {
			t.Fatal(err)
		}
		withoutChown(t, func() error {
			err := replace(filepath.Join(dir, path), []byte(test.old), []byte("new"), file{mode: 0o644, uid: test.uid, gid: test.gid})
			if changed := test.old != "old"; errors.Is(err, ErrChanged) == changed {
				return nil
			}
			return fmt.Errorf("%s: %w", test.name, err)
		})
		got := map[string]string{}
		for _, name := range fileNames(t, dir) {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			got[name] = string(data)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: files (-want +got):\n%s", test.name, diff)
		}
	}
	if os.Geteuid() != 0 {
		return // who is not root cannot give files away
	}
	name := filepath.Join(t.TempDir(), path)
	if err := errors.Join(os.WriteFile(name, []byte("old"), 0o644), replace(name, []byte("old"), []byte("new"), file{mode: 0o640, uid: 4242, gid: 4343})); err != nil {
		t.Fatal(err)
	}
	var stat unix.Stat_t
	if err := unix.Stat(name, &stat); err != nil || stat.Uid != 4242 || stat.Gid != 4343 {
		t.Errorf("owned by %d and %d, %v", stat.Uid, stat.Gid, err)
	}
	if diff := cmp.Diff([]string{path}, fileNames(t, filepath.Dir(name))); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// TestRemoveTemps removes what is an installer's own, and nothing else, and leaves no lock.
func TestRemoveTemps(t *testing.T) {
	t.Parallel()
	for name, ours := range map[string]bool{
		".magic-ip-address.lock": true, "10-a.conflist.123.magic-ip-address.tmp": true, "10-a.conflist": false, "10-a.conflist.tmp": false, "magic-ip-address.lock": false, "10-a.conf.magic-ip-address": false,
	} {
		dir := directory(t, map[string]string{name: "", "other": ""})
		if err := RemoveTemps(t.Context(), dir, Options{}); err != nil {
			t.Error(err)
		}
		left := []string{name, "other"}
		if ours {
			left = left[1:]
		}
		if diff := cmp.Diff(left, fileNames(t, dir)); diff != "" || IsOurs(name) != ours || IsOurs(filepath.Join(dir, name)) != ours {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if err := RemoveTemps(t.Context(), filepath.Join(t.TempDir(), "missing"), Options{}); err != nil {
		t.Errorf("a directory that is missing: %v", err)
	}
	if err := RemoveTemps(t.Context(), filepath.Join(directory(t, map[string]string{"file": ""}), "file"), Options{}); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("no directory: %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	dir := directory(t, map[string]string{"a" + tempExt: ""})
	unlock, err := Lock(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := RemoveTemps(canceled, dir, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("while another installer has the lock: %v", err)
	}
	unlock()
	if diff := cmp.Diff([]string{"a" + tempExt}, fileNames(t, dir)); diff != "" {
		t.Errorf("what another installer writes (-want +got):\n%s", diff)
	}
}

// TestWriteProgram: a program is replaced once it has been found to run, and else left as it was.
func TestWriteProgram(t *testing.T) {
	t.Parallel()
	dir := directory(t, map[string]string{"program": "old", "program.1" + tempExt: "half"})
	path := filepath.Join(dir, "program")
	want := func(content string, mode os.FileMode) {
		t.Helper()
		data, err := os.ReadFile(path)
		info, errStat := os.Stat(path)
		if err := errors.Join(err, errStat); err != nil || string(data) != content || info.Mode() != mode {
			t.Errorf("%q, %v, %v, want %q", data, info, err, content)
		}
		if diff := cmp.Diff([]string{"program"}, fileNames(t, dir)); diff != "" {
			t.Errorf("files (-want +got):\n%s", diff)
		}
	}
	bad := errors.New("it does not run")
	if err := WriteProgram(path, []byte("new"), func(string) error { return bad }); !errors.Is(err, bad) {
		t.Errorf("%v, want %v", err, bad)
	}
	want("old", 0o644)
	if err := WriteProgram(path, []byte("new"), func(path string) error {
		data, err := os.ReadFile(path)
		if err == nil && string(data) != "new" {
			err = fmt.Errorf("it is %q", data)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	want("new", 0o755)
	for _, missing := range []string{filepath.Join(dir, "missing", "program"), filepath.Join(path, "program")} {
		if err := WriteProgram(missing, nil, func(string) error { return nil }); err == nil {
			t.Errorf("%s is written", missing)
		}
	}
	if err := SyncDir(filepath.Join(dir, "missing")); err == nil {
		t.Error("a directory that is missing is brought to the disk")
	}
	if err := SyncDir("/proc"); !errors.Is(err, unix.EINVAL) { // which has no disk
		t.Errorf("a directory that cannot be brought to the disk: %v", err)
	}
}

// TestEntry is that of the file which has it, once the changes are made.
func TestEntry(t *testing.T) {
	t.Parallel()
	d := read(t, directory(t, map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`}))
	p, err := d.Put(keyOf("a"), spoken)
	if err != nil {
		t.Fatal(err)
	}
	if text := string(p.Entry()); !strings.HasPrefix(text, `{"type":"magic-ip-address"`) || !strings.Contains(text, "app=a") {
		t.Errorf("%s", text)
	}
	for name, plan := range map[string]Plan{"no file": {d: d}, "no entry": {d: d, File: "10-a.conflist"}} {
		if text := plan.Entry(); text != nil {
			t.Errorf("%s: %s", name, text)
		}
	}
}

// TestForce: an installer that hangs has the lock; who uninstalls by force goes on without it.
func TestForce(t *testing.T) {
	t.Parallel()
	const list, temp = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`, "10-a.conflist.1" + tempExt
	synctest.Test(t, func(t *testing.T) {
		dir := directory(t, map[string]string{"10-a.conflist": list})
		if _, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Put(keyOf("a"), spoken) }); err != nil {
			t.Fatal(err)
		}
		unlock, err := Lock(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		defer unlock()
		noted, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) {
			p, err := d.Put(keyOf("b"), spoken)
			p.Notes = append(p.Notes, "noted")
			return p, err
		})
		if !errors.Is(err, ErrHeld) || !slices.Equal(noted.Notes, []string{"noted"}) {
			t.Errorf("what was noted before the lock was waited for: %q, %v", noted.Notes, err)
		}
		uninstall := func(options Options) error {
			_, err := Update(t.Context(), dir, options, func(d *Directory) (Plan, error) { return d.Take("a", entry.DefaultRuntimeDir, "") })
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, temp), nil, 0o600)
			}
			return errors.Join(err, RemoveTemps(t.Context(), dir, options))
		}
		if err := uninstall(Options{}); !errors.Is(err, ErrHeld) {
			t.Errorf("without force: %v", err)
		}
		var told []error
		if err := uninstall(Options{Force: func(held error) { told = append(told, held) }}); err != nil || len(told) != 1 || !errors.Is(told[0], ErrHeld) {
			t.Errorf("by force: %v, told %v", err, told)
		}
		if diff := cmp.Diff([]string{"10-a.conflist"}, fileNames(t, dir)); diff != "" {
			t.Errorf("files (-want +got):\n%s", diff)
		}
		if data, err := os.ReadFile(filepath.Join(dir, "10-a.conflist")); err != nil || string(data) != list {
			t.Errorf("left: %s, %v", data, err)
		}
	})
}
