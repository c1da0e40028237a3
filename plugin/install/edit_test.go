package install

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var allVersions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

func keyOf(agent string) Key {
	return Key{Agent: agent, RuntimeDir: defaultRuntimeDir, Selectors: []Selector{{Namespace: "default", Selector: "app=" + agent}}}
}

// TestAgentsShareTheEntry: in whatever order agents come and go, each changes its own key, and the file is as before
// when the last one has gone.
func TestAgentsShareTheEntry(t *testing.T) {
	t.Parallel()
	agents := []string{"a", "b.c", "d"}
	orders := [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	for _, path := range []string{"pretty/before/10-flannel.conflist", "compact/before/10-a.conflist", "one-line/before/10-a.conflist", "tabs/before/10-a.conflist", "lone-conf/before/10-a.conf"} {
		data, err := os.ReadFile(filepath.Join("testdata", path))
		if err != nil {
			t.Fatal(err)
		}
		before := File{Name: filepath.Base(path), Data: data}
		for _, come := range orders {
			for _, leave := range orders {
				f := before
				for _, i := range come {
					if f, err = f.With(keyOf(agents[i]), allVersions); err != nil {
						t.Fatal(err)
					}
				}
				for n, i := range leave {
					if f, err = f.Without(agents[i], defaultRuntimeDir); err != nil {
						t.Fatal(err)
					}
					if n == 2 {
						break
					}
					l, err := parseList(f.Data)
					if err != nil || len(l.ours) != 1 {
						t.Fatalf("%s: %v, %d entries:\n%s", path, err, len(l.ours), f.Data)
					}
					for _, j := range leave[n+1:] {
						if !l.has(agents[j], defaultRuntimeDir) {
							t.Errorf("%s: %s is gone with %s:\n%s", path, agents[j], agents[i], f.Data)
						}
					}
				}
				if diff := cmp.Diff(before, f); diff != "" {
					t.Errorf("%s, %v and %v (-before +after):\n%s", path, come, leave, diff)
				}
			}
		}
	}
}

// TestChangedInBetween: of a file that somebody has changed since, our entry goes and nothing else.
func TestChangedInBetween(t *testing.T) {
	t.Parallel()
	before := File{Name: "10-a.conf", Data: []byte(`{"cniVersion":"1.0.0","name":"a","type":"bridge"}`)}
	f, err := before.With(keyOf("a"), allVersions)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(f.Data, []byte(`"type": "bridge"`), []byte(`"type": "bridge", "mtu": 1400`), 1)
	f.Data = changed
	if f, err = f.Without("a", defaultRuntimeDir); err != nil {
		t.Fatal(err)
	}
	if f.Name != "10-a.conflist" || f.KeptName != "" || !bytes.Contains(f.Data, []byte("1400")) || bytes.Contains(f.Data, []byte(PluginType)) {
		t.Errorf("%s, kept %q:\n%s", f.Name, f.KeptName, f.Data)
	}
	// An entry with another runtime dir is another installation's.
	theirs := File{Name: "10-a.conflist", Data: changed}
	if got, err := theirs.Without("a", "/run/elsewhere"); err != nil || !bytes.Equal(got.Data, changed) {
		t.Errorf("%v:\n%s", err, got.Data)
	}
}

// FuzzEdit: whatever a configuration looks like, with and without the key it means the same to a loader, and it comes back
// to the byte.
func FuzzEdit(f *testing.F) {
	files, err := filepath.Glob("testdata/*/before/*")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, filepath.Ext(file) == listExt)
	}
	f.Fuzz(func(t *testing.T, data []byte, isList bool) {
		before := File{Name: "10-a.conf", Data: data}
		if isList {
			before.Name = "10-a.conflist"
		}
		if _, err := load(before.Name, data); err != nil || bytes.Contains(data, []byte(`magic`)) || bytes.Contains(data, []byte(`\u`)) {
			return // not usable, or perhaps with an entry already
		}
		with, err := before.With(keyOf("a"), allVersions)
		if err != nil {
			return // refused
		}
		if err := harmless(before, with); err != nil {
			// Keys that differ in case only, which loaders may take for one another: the installer refuses these too.
			if !json.Valid(with.Data) {
				t.Fatalf("%v:\n%s", err, with.Data)
			}
			return
		}
		if l, err := parseList(with.Data); err != nil || !l.has("a", defaultRuntimeDir) {
			t.Fatalf("%v: no entry in\n%s", err, with.Data)
		}
		if again, err := with.With(keyOf("a"), allVersions); err != nil || !bytes.Equal(again.Data, with.Data) {
			t.Errorf("again: %v\n%s\nthen\n%s", err, with.Data, again.Data)
		}
		after, err := with.Without("a", defaultRuntimeDir)
		if diff := cmp.Diff(before, after); err != nil || diff != "" {
			t.Errorf("%v (-before +after):\n%s", err, diff)
		}
	})
}
