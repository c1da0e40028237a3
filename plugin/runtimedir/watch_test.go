package runtimedir_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestFolders are those of the agents that are there, beside the three that may be there later.
func TestFolders(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	always := []string{dir, filepath.Join(dir, "plugin"), filepath.Join(dir, "agents")}
	if diff := cmp.Diff(always, d.Folders()); diff != "" {
		t.Errorf("of nothing (-want +got):\n%s", diff)
	}
	for _, name := range []string{"b", "a"} {
		if err := d.Agent(name).WriteClaims(nil); err != nil {
			t.Fatal(err)
		}
	}
	put(t, filepath.Join(dir, "agents", "a.json"), "{}") // of the version before
	if diff := cmp.Diff(append(always, filepath.Join(dir, "agents", "a"), filepath.Join(dir, "agents", "b")), d.Folders()); diff != "" {
		t.Errorf("of two agents (-want +got):\n%s", diff)
	}
}

// TestEvents: which paths of events are news of what.
func TestEvents(t *testing.T) {
	d := runtimedir.New("/run/m")
	for path, want := range map[string]struct{ state, claims bool }{
		"/run/m/plugin/state.json":             {state: true},
		"/run/m/state.json":                    {state: true}, // of the version before
		"/run/m/plugin/state.json.tmp":         {},
		"/run/m/plugin/plugin.log":             {},
		"/run/m/agents/a":                      {claims: true},
		"/run/m/agents/a.json":                 {claims: true}, // of the version before
		"/run/m/agents/a.json.tmp":             {},
		"/run/m/agents/a/claims.json":          {claims: true},
		"/run/m/agents/a/claims.json.tmp":      {},
		"/run/m/agents/a/status.json":          {},
		"/run/m/agents":                        {},
		"/run/m/install/a/claims.json":         {},
		"/elsewhere/run/m/agents/a":            {},
		"/elsewhere/run/m/plugin/state.json":   {},
		"/run/magic/agents/a":                  {},
		"/run/m/agents-of-others/a":            {},
		"/run/m/agents/claims.json/state.json": {},
	} {
		if state, claims := d.IsState(path), d.IsClaims(path); state != want.state || claims != want.claims {
			t.Errorf("%s: state %t, claims %t, want %+v", path, state, claims, want)
		}
	}
}

// TestSetAside: the file that could not be used, for people.
func TestSetAside(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	if path, at, ok := d.SetAside(); ok || path != "" || !at.IsZero() {
		t.Errorf("without a directory: %s of %s, %t", path, at, ok)
	}
	state := filepath.Join(dir, "plugin", "state.json")
	put(t, state, "{")
	if _, _, ok := d.SetAside(); ok {
		t.Error("a file that nothing has been done with is set aside")
	}
	written := time.Unix(1_000_000, 0)
	if err := os.Chtimes(state, written, written); err != nil {
		t.Fatal(err)
	}
	if warning, err := d.Update(time.Minute, nil, attachment("c")); warning == nil || err != nil {
		t.Fatal(warning, err)
	}
	if path, at, ok := d.SetAside(); !ok || path != state+".corrupt" || !at.Equal(written) {
		t.Errorf("it is %s of %s, %t", path, at, ok)
	}
}

// TestRemoveRecord: the record of an installer goes, and nothing else of it; one that is not there is no error.
func TestRemoveRecord(t *testing.T) {
	dir := t.TempDir()
	installer := runtimedir.New(dir).Installer("a")
	if err := installer.RemoveRecord(); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	lock, err := installer.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := installer.RemoveRecord(); err != nil {
		t.Errorf("without a record: %v", err)
	}
	if err := installer.WriteRecord(runtimedir.Record{Binary: "/opt/cni/bin/magic-ip-address"}); err != nil {
		t.Fatal(err)
	}
	if record, err := installer.ReadRecord(); err != nil || record.Binary != "/opt/cni/bin/magic-ip-address" {
		t.Errorf("record %+v, %v", record, err)
	}
	if err := installer.RemoveRecord(); err != nil {
		t.Error(err)
	}
	if _, err := installer.ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the record is there: %v", err)
	}
	if !installer.Live() {
		t.Error("the installer has lost its lock")
	}
}

// TestRemoveRecordOfTheVersionBefore: a key that a version before has installed, and this one has removed, is recorded no more.
func TestRemoveRecordOfTheVersionBefore(t *testing.T) {
	_, d := before(t)
	installer := d.Installer(name)
	if _, err := installer.ReadRecord(); err != nil {
		t.Fatal(err)
	}
	if err := installer.RemoveRecord(); err != nil {
		t.Error(err)
	}
	if _, err := installer.ReadRecord(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the record is there: %v", err)
	}
}
