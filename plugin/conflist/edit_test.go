package conflist

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tailscale/hujson"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

func keyOf(agent string) Key {
	return Key{Agent: agent, RuntimeDir: entry.DefaultRuntimeDir, Selectors: []entry.Selector{{Namespace: "default", Selector: "app=" + agent}}}
}

// cases are the configurations that the installer is tried on.
const cases = "../install/testdata"

// TestAgentsShareTheEntry: in whatever order agents come and go, each changes its own key, and the file is as before
// when the last one has gone.
func TestAgentsShareTheEntry(t *testing.T) {
	t.Parallel()
	agents := []string{"a", "b.c", "d"}
	orders := [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
	for _, path := range []string{"pretty/before/10-flannel.conflist", "compact/before/10-a.conflist", "one-line/before/10-a.conflist", "tabs/before/10-a.conflist"} {
		before, err := os.ReadFile(filepath.Join(cases, path))
		if err != nil {
			t.Fatal(err)
		}
		for _, come := range orders {
			for _, leave := range orders {
				data := before
				for _, i := range come {
					if data, err = with(data, keyOf(agents[i])); err != nil {
						t.Fatal(err)
					}
				}
				for n, i := range leave {
					left := 0
					if data, left, err = without(data, agents[i], entry.DefaultRuntimeDir); err != nil {
						t.Fatal(err)
					}
					if n == 2 {
						break
					}
					if left != 1 {
						t.Fatalf("%s: %d entries:\n%s", path, left, data)
					}
					for _, j := range leave[n+1:] {
						if !has(data, agents[j], entry.DefaultRuntimeDir) {
							t.Errorf("%s: %s is gone with %s:\n%s", path, agents[j], agents[i], data)
						}
					}
				}
				if diff := cmp.Diff(string(before), string(data)); diff != "" {
					t.Errorf("%s, %v and %v (-before +after):\n%s", path, come, leave, diff)
				}
			}
		}
	}
}

// TestAnotherRuntimeDir: an entry with another runtime directory is another installation's.
func TestAnotherRuntimeDir(t *testing.T) {
	t.Parallel()
	data, err := with([]byte(`{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`), keyOf("a"))
	if err != nil {
		t.Fatal(err)
	}
	if got, left, err := without(data, "a", "/run/elsewhere"); err != nil || left != 1 || !bytes.Equal(got, data) {
		t.Errorf("%d, %v:\n%s", left, err, got)
	}
	other := keyOf("b")
	other.RuntimeDir = "/run/elsewhere"
	if _, err := with(data, other); err == nil || !strings.Contains(err.Error(), "share one directory") {
		t.Errorf("%v", err)
	}
}

// TestEntryThatFailsPods: what the plugin would refuse at each ADD is corrected, and goes with the agent.
func TestEntryThatFailsPods(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"},{"type":"magic-ip-address","runtimeDir":DIR,"selectors":SELECTORS}]}`
	good := `{"a":[{"namespace":"default","selector":"app=a"}]}`
	for name, test := range map[string][2]string{
		"relative runtimeDir": {`"run"`, good}, "runtimeDir of another type": {"5", good}, "selectors of another type": {`"/run/magic-ip-address"`, `[]`},
		"another key of another type": {`"/run/magic-ip-address"`, `{"b":"x","a":[{"namespace":"default","selector":"app=a"}],"c":[{"selector":"x"}]}`},
		"runtimeDir in another case":  {`"/run/magic-ip-address","RuntimeDir":"run","RUNTIMEDIR":"run"`, good},
		"selectors in another case":   {`"/run/magic-ip-address","Selectors":{"a":5}`, good},
		"no namespace":                {`"/run/magic-ip-address"`, `{"a":[{"namespace":"","selector":"app=a"}]}`},
	} {
		data := []byte(strings.NewReplacer("DIR", test[0], "SELECTORS", test[1]).Replace(list))
		after, err := with(data, keyOf("a"))
		if err != nil {
			t.Fatal(err)
		}
		d, err := parse(after)
		if err != nil {
			t.Fatal(err)
		}
		r := raw(d.entries()[0])
		dir, errDir := r.Dir()
		all, errAll := r.ByAgent()
		if errDir != nil || errAll != nil || dir != entry.DefaultRuntimeDir || len(all) != 1 || len(all["a"]) != 1 {
			t.Errorf("%s: %v, %v: %s", name, errDir, errAll, after)
		}
		if cleaned, left, err := without(data, "a", entry.DefaultRuntimeDir); name != "selectors of another type" && !strings.HasPrefix(name, "another key") && (err != nil || left != 0) {
			t.Errorf("%s: %d left, %v: %s", name, left, err, cleaned)
		}
	}
}

// FuzzEdit: whatever a configuration looks like, with and without the key it means the same to a loader, and it comes back
// to the byte.
func FuzzEdit(f *testing.F) {
	files, err := filepath.Glob(cases + "/*/before/*")
	if err != nil || len(files) == 0 {
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
		name := "10-a.conf"
		if isList {
			name = "10-a.conflist"
		}
		d := &Directory{path: "/", folders: map[string][]file{}}
		d.insert(file{name: name, target: name, data: data})
		if d.files[0].unusable != nil || bytes.Contains(data, []byte(`magic`)) || bytes.Contains(data, []byte(`\u`)) {
			return // or perhaps with an entry already
		}
		with, err := d.Put(keyOf("a"), spoken)
		if err != nil {
			return // which may be because of keys that differ in case only, and loaders take for one another
		}
		if !with.d.Has(with.File, "a", entry.DefaultRuntimeDir) {
			t.Fatalf("no entry in\n%s", with.d.find(with.File).data)
		}
		if again, err := with.d.Put(keyOf("a"), spoken); err != nil || !again.Empty() {
			t.Errorf("again: %v, %v", err, again.Paths())
		}
		after, err := with.d.Take("a", entry.DefaultRuntimeDir, "")
		if diff := cmp.Diff(contents(d), contents(after.d)); err != nil || diff != "" {
			t.Errorf("%v (-before +after):\n%s", err, diff)
		}
	})
}

func contents(d *Directory) map[string]string {
	all := map[string]string{}
	for _, f := range d.files {
		all[f.name] = string(f.data)
	}
	return all
}

// TestFold: of members whose names differ in case only, that of the right name stays, or else the last, under the right name.
func TestFold(t *testing.T) {
	t.Parallel()
	for before, want := range map[string]string{
		`{"runtimeDir":"/a","type":"m"}`:                 `{"runtimeDir":"/a","type":"m"}`,
		`{"RuntimeDir":"/a","SELECTORS":{"a":[]}}`:       `{"runtimeDir":"/a","selectors":{"a":[]}}`,
		`{"runtimeDir":"/a","RuntimeDir":"/b"}`:          `{"runtimeDir":"/a"}`,
		`{"RuntimeDir":"/b","runtimeDir":"/a","type":1}`: `{"runtimeDir":"/a","type":1}`,
		`{"RUNTIMEDIR":"/a","RuntimeDir":"/b"}`:          `{"runtimeDir":"/b"}`,
	} {
		v, err := hujson.Parse([]byte(before))
		if err != nil {
			t.Fatal(err)
		}
		fold(&v, "runtimeDir", "selectors")
		if got := v.String(); got != want {
			t.Errorf("%s became %s, want %s", before, got, want)
		}
	}
}
