package runtimedir_test

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestMain lets the test binary be the other processes of a node.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "as" {
		os.Exit(as(os.Args[2], os.Args[3]))
	}
	os.Exit(m.Run())
}

// as is a process that does what role says in the runtime directory dir.
func as(role, dir string) int {
	var err error
	switch role {
	case "writer": // adds 0, 1, 2, … and says so, until it is killed
		list, _ := readState(dir)
		for added := len(list); err == nil; added++ {
			_, err = runtimedir.New(dir).Update(generous, nil, attachment(strconv.Itoa(added)))
			fmt.Println(added)
		}
	default: // "+ID" or "-ID": one ADD or one DEL
		if id, add := strings.CutPrefix(role, "+"); add {
			_, err = runtimedir.New(dir).Update(generous, nil, attachment(id))
		} else {
			_, err = runtimedir.New(dir).Update(generous, []runtimedir.Key{{ContainerID: role[1:], IfName: "eth0"}})
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func process(t *testing.T, role, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "as", role, dir)
	cmd.Stderr = os.Stderr
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0") // by default, the race detector holds up each exit for a second
	return cmd
}

// hold takes the lock of dir, as a writer that does not get on does, until release.
func hold(t *testing.T, dir string) (release func()) {
	t.Helper()
	if err := runtimedir.New(dir).MakeState(); err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "plugin/state.lock"), os.O_WRONLY|os.O_CREATE, 0o200)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := lock.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestUpdateThatRemovesCreatesNoDirectory(t *testing.T) {
	empty := t.TempDir()
	for _, dir := range []string{empty, filepath.Join(empty, "missing")} {
		if _, err := runtimedir.New(dir).Update(generous, []runtimedir.Key{attachment("c1").Key()}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Update is %v, want fs.ErrNotExist", err)
		}
	}
	if entries, err := os.ReadDir(empty); err != nil || len(entries) > 0 {
		t.Errorf("made: %v, %v", entries, err)
	}
}

func TestUpdateWithoutChangeWritesNothing(t *testing.T) {
	unchanged := []runtimedir.Key{{ContainerID: "c2", IfName: "eth0"}}
	dir := t.TempDir()
	if err := runtimedir.New(dir).MakeState(); err != nil {
		t.Fatal(err)
	}
	update(t, dir, unchanged)
	if diff := cmp.Diff([]string{"plugin/state.lock"}, names(t, dir)); diff != "" {
		t.Errorf("files of an empty directory (-want +got):\n%s", diff)
	}

	update(t, dir, nil, attachment("c1"))
	path := filepath.Join(dir, "plugin/state.json")
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	update(t, dir, unchanged)
	after, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) {
		t.Error("the file was replaced by an equal one")
	}
}

func TestUpdateSetsACorruptFileAside(t *testing.T) {
	dir := t.TempDir()
	for _, corrupt := range []string{"first", "second"} {
		put(t, filepath.Join(dir, "plugin/state.json"), corrupt)
		warning, err := runtimedir.New(dir).Update(generous, nil, attachment(corrupt))
		if err != nil {
			t.Fatal(err)
		}
		var want *runtimedir.CorruptError
		if !errors.As(warning, &want) {
			t.Errorf("warning is %v, want a CorruptError", warning)
		}
		if diff := cmp.Diff([]runtimedir.Attachment{attachment(corrupt)}, read(t, dir), options()); diff != "" {
			t.Errorf("records after %q (-want +got):\n%s", corrupt, diff)
		}
		kept, err := os.ReadFile(filepath.Join(dir, "plugin/state.json.corrupt"))
		if err != nil || string(kept) != corrupt {
			t.Errorf("kept is %q (%v), want %q", kept, err, corrupt)
		}
	}
	if diff := cmp.Diff([]string{"plugin/state.json", "plugin/state.json.corrupt", "plugin/state.lock"}, names(t, dir)); diff != "" {
		t.Errorf("one corrupt file is kept, no more (-want +got):\n%s", diff)
	}
}

func TestUpdateLeavesANewerFileUntouched(t *testing.T) {
	dir := t.TempDir()
	const newer = `{"version": 2, "pods": []}`
	put(t, filepath.Join(dir, "plugin/state.json"), newer)
	_, err := runtimedir.New(dir).Update(generous, nil, attachment("c1"))
	var want *runtimedir.NewerVersionError
	if !errors.As(err, &want) {
		t.Errorf("Update is %v, want a NewerVersionError", err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "plugin/state.json")); err != nil || string(got) != newer {
		t.Errorf("the file is %q (%v), want it untouched", got, err)
	}
	if diff := cmp.Diff([]string{"plugin/state.json", "plugin/state.lock"}, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// A full disk: the temporary file cannot be written.
func TestUpdateThatCannotWriteKeepsTheOldFile(t *testing.T) {
	if !inMountNamespace(t) {
		return
	}
	dir := t.TempDir()
	if err := unix.Mount("full", dir, "tmpfs", 0, "size=16k,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	update(t, dir, nil, attachment("c1"))
	fill, err := os.Create(filepath.Join(dir, "fill"))
	for err == nil {
		_, err = fill.Write(make([]byte, 1024))
	}
	if _, err := runtimedir.New(dir).Update(generous, nil, attachment("c2")); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Update is %v, want ENOSPC", err)
	}
	if diff := cmp.Diff([]runtimedir.Attachment{attachment("c1")}, read(t, dir), options()); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"fill", "plugin/state.json", "plugin/state.lock"}, names(t, dir)); diff != "" {
		t.Errorf("nothing of the attempt is left (-want +got):\n%s", diff)
	}
}

// inMountNamespace runs the test again in a mount namespace of its own, and reports whether this is that run.
func inMountNamespace(t *testing.T) bool {
	t.Helper()
	const inside = "TEST_HAS_ITS_OWN_MOUNTS"
	if os.Getenv(inside) != "" {
		return true
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // private
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func TestUpdateWaitsForItsTurnOnlySoLong(t *testing.T) {
	dir := t.TempDir()
	release := hold(t, dir)
	begun, passed := time.Now(), lab.Stopwatch()
	if _, err := runtimedir.New(dir).Update(50*time.Millisecond, nil, attachment("c1")); !errors.Is(err, runtimedir.ErrBusy) {
		t.Errorf("Update is %v, want ErrBusy", err)
	}
	if waited := time.Since(begun); waited < 50*time.Millisecond || passed() > 10*time.Second {
		t.Errorf("waited %s, want about 50ms", waited)
	}

	release()
	// The waiter that was given up stands in the queue before this one; it must not keep the lock.
	update(t, dir, nil, attachment("c2"))
	if diff := cmp.Diff([]runtimedir.Attachment{attachment("c2")}, read(t, dir), options()); diff != "" {
		t.Errorf("what was given up is not done later (-want +got):\n%s", diff)
	}
}

// kill -9 at any time leaves the old file or the new one, and nothing that was acknowledged is lost.
func TestKilledWriter(t *testing.T) {
	dir := t.TempDir()
	wanted := 0 // this many were acknowledged
	for range 40 {
		cmd := process(t, "writer", dir)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(stdout)
		killed := false
		for lines.Scan() {
			added, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(err)
			}
			wanted = added + 1
			if !killed {
				killed = true
				time.AfterFunc(rand.N(8*time.Millisecond), func() { _ = cmd.Process.Kill() })
			}
		}
		_ = cmd.Wait() // it was killed

		attachments := read(t, dir)
		// One may have reached the file without its writer living to say so.
		if len(attachments) != wanted && len(attachments) != wanted+1 {
			t.Fatalf("%d records after %d were acknowledged", len(attachments), wanted)
		}
		for i, attachment := range attachments {
			if attachment.ContainerID != strconv.Itoa(i) {
				t.Fatalf("record %d is %q", i, attachment.ContainerID)
			}
		}
		for _, name := range names(t, dir) {
			if !slices.Contains([]string{"plugin/state.json", "plugin/state.json.tmp", "plugin/state.lock"}, name) {
				t.Fatalf("%s is left over", name)
			}
		}
	}
	t.Logf("%d records written", wanted)
}

// Two hundred processes at once lose nothing and invent nothing.
func TestParallelWriters(t *testing.T) {
	dir := t.TempDir()
	var before, wanted []string
	var roles []string
	for i := range 100 {
		old, added := fmt.Sprintf("old%03d", i), fmt.Sprintf("new%03d", i)
		before = append(before, old)
		wanted = append(wanted, added)
		roles = append(roles, "-"+old, "+"+added)
	}
	for _, id := range before {
		update(t, dir, nil, attachment(id))
	}

	// They queue up behind a holder, so that they really compete.
	release := hold(t, dir)
	var all sync.WaitGroup
	for _, role := range roles {
		cmd := process(t, role, dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			if err := cmd.Wait(); err != nil {
				t.Errorf("%s: %v", role, err)
			}
		})
	}
	release()
	all.Wait()

	var got []string
	for _, attachment := range read(t, dir) {
		got = append(got, attachment.ContainerID)
	}
	slices.Sort(got)
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
