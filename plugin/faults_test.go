package plugin_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Whatever the state of the runtime directory, pods start and stop.
func TestFailsOpen(t *testing.T) {
	const newer = `{"version": 2, "pods": []}`
	for _, test := range []struct {
		name  string
		prior func(t *testing.T, dir string)
		log   string // "" is: the log cannot be written either
		after func(t *testing.T, dir string)
	}{
		{
			name: "a file in place of the directory",
			prior: func(t *testing.T, dir string) {
				if err := os.Remove(dir); err != nil {
					t.Fatal(err)
				}
				put(t, dir, "odd")
			},
			after: func(t *testing.T, dir string) {
				if got, err := os.ReadFile(dir); err != nil || string(got) != "odd" {
					t.Errorf("the file is %q (%v), want it untouched", got, err)
				}
			},
		},
		{
			name: "a directory in place of the file",
			prior: func(t *testing.T, dir string) {
				if err := os.MkdirAll(filepath.Join(dir, "plugin", "state.json"), 0o700); err != nil {
					t.Fatal(err)
				}
			},
			log: "state.json is a directory; allowed: a regular file",
		},
		{
			name: "the file cannot be written",
			prior: func(t *testing.T, dir string) {
				add(conf(dir, nil)).of("c0").ok(t)
				// The temporary file cannot be made. A disk that is full is tried in package runtimedir.
				put(t, filepath.Join(dir, "plugin", "state.json.tmp", "full"), "")
			},
			log:   "directory not empty",
			after: func(t *testing.T, dir string) { wantRecorded(t, dir, "c0 10.244.1.7") },
		},
		{
			name: "newer",
			prior: func(t *testing.T, dir string) {
				put(t, filepath.Join(dir, "plugin", "state.json"), newer)
			},
			log: "state.json has version 2",
			after: func(t *testing.T, dir string) {
				wantLog(t, dir, "command=DEL containerID=c1 pod=kube-system/apm-x")
				if got := files(t, dir)["plugin/state.json"]; got != newer {
					t.Errorf("the file is %q, want it untouched", got)
				}
			},
		},
		{
			name: "corrupt",
			prior: func(t *testing.T, dir string) {
				put(t, filepath.Join(dir, "plugin", "state.json"), "{")
			},
			log: "state.json is corrupt",
			after: func(t *testing.T, dir string) {
				wantRecorded(t, dir) // added and deleted
				if got := files(t, dir)["plugin/state.json.corrupt"]; got != "{" {
					t.Errorf("kept is %q", got)
				}
			},
		},
		{
			name: "corrupt file of an agent",
			prior: func(t *testing.T, dir string) {
				agent(t, dir, "kube-system.magic", true, runtimedir.Pods{})
				put(t, filepath.Join(dir, "agents", "kube-system.magic", "pods.json"), "{")
			},
			log:   "pods.json is corrupt",
			after: func(t *testing.T, dir string) { wantRecorded(t, dir) },
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "run")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			test.prior(t, dir)
			if diff := cmp.Diff(bridgeResult, add(conf(dir, nil)).ok(t)); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
			if test.log != "" {
				wantLog(t, dir, test.log, "command=ADD containerID=c1 pod=kube-system/apm-x")
			}
			del(conf(dir, nil)).ok(t)
			if test.after != nil {
				test.after(t, dir)
			}
		})
	}
}

// DEL sets a corrupt file aside as ADD does, so that it is said once.
func TestDelOfACorruptFile(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "plugin", "state.json"), "{")
	del(conf(dir, nil)).ok(t)
	wantLog(t, dir, "state.json is corrupt", "command=DEL")
	wantRecorded(t, dir)
}

// What cannot be logged to the file goes to standard error, which the runtime keeps.
func TestLogWithoutDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	put(t, dir, "odd")
	cmd := add(conf(dir, nil)).cmd(t)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if want := `level=ERROR msg="the pod is not recorded" command=ADD containerID=c1 pod=kube-system/apm-x`; !strings.Contains(stderr.String(), want) {
		t.Errorf("standard error is %q, want %q", stderr.String(), want)
	}
}

// A process that holds the lock and will not let go delays a pod, and no more.
func TestLockHeldForGood(t *testing.T) {
	dir := t.TempDir()
	c := conf(dir, values{"cniVersion": "1.1.0", "cni.dev/valid-attachments": []values{}})
	add(c).of("c0").ok(t)
	lock, err := os.OpenFile(filepath.Join(dir, "plugin", "state.lock"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	passed := lab.Stopwatch()
	add(c).ok(t)
	del(c).of("c0").ok(t)
	if _, err := (command{name: "GC", conf: c}).run(t); err == nil || err.Code != types.ErrTryAgainLater {
		t.Errorf("GC: %v, want code 11", err)
	}
	if waited := passed(); waited > 20*time.Second {
		t.Errorf("ADD, DEL and GC waited %s, want about 1s each", waited)
	}
	wantLog(t, dir, "command=ADD", "command=DEL", runtimedir.ErrBusy.Error())
	wantRecorded(t, dir, "c0 10.244.1.7")
}

func TestLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	c := conf(dir, values{"selectors": selectors("a in (")}) // logs one line
	const limit = 256 << 10
	put(t, filepath.Join(dir, "plugin", "plugin.log"), strings.Repeat("x", limit-1))
	put(t, filepath.Join(dir, "plugin", "plugin.log.1"), "old")

	add(c).ok(t)
	if got := files(t, dir); got["plugin/plugin.log.1"] != "old" || len(got["plugin/plugin.log"]) <= limit {
		t.Fatalf("rotated before it was full: %d bytes", len(got["plugin/plugin.log"]))
	}
	add(c).ok(t)
	got := files(t, dir)
	if len(got["plugin/plugin.log.1"]) <= limit {
		t.Errorf("plugin.log.1 has %d bytes, want the full log", len(got["plugin/plugin.log.1"]))
	}
	if strings.Count(got["plugin/plugin.log"], "\n") != 1 || !strings.Contains(got["plugin/plugin.log"], "level=WARN") {
		t.Errorf("plugin.log is %q, want one line", got["plugin/plugin.log"])
	}
}

// Processes at once, as a node with many starting pods has them.
func TestParallelAddAndDel(t *testing.T) {
	dir := t.TempDir()
	var commands []command
	var want []string
	for i := range 10 {
		old, added := fmt.Sprintf("old%d", i), fmt.Sprintf("new%d", i)
		add(conf(dir, nil)).of(old).ok(t)
		commands = append(commands, add(conf(dir, nil)).of(added), del(conf(dir, nil)).of(old))
		want = append(want, added+" 10.244.1.7")
	}
	var all sync.WaitGroup
	said := make([]string, len(commands))
	for i, command := range commands {
		cmd := command.cmd(t)
		all.Go(func() {
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s %s: %v: %s", command.name, command.containerID, err, out)
			}
			said[i] = string(out)
		})
	}
	all.Wait()
	// One that has had no time, or not the lock, gives up and says so.
	log, err := os.ReadFile(filepath.Join(dir, "plugin", "plugin.log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for i, command := range commands {
		if name := "containerID=" + command.containerID + " "; strings.Contains(said[i]+string(log), name) {
			t.Logf("%s %s again", command.name, command.containerID)
			command.ok(t)
		}
	}
	got := recorded(t, dir)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
