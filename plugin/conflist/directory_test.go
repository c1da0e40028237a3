package conflist

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

// spoken are the versions of CNI that the plugin speaks.
var spoken = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// directory makes a directory of these files, as if they had been there for a while. A content "-> target" makes a link.
func directory(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "net.d")
	past := time.Now().Add(-time.Hour)
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			if err := os.Symlink(target, path); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := errors.Join(os.WriteFile(path, []byte(content), 0o644), os.Chtimes(path, past, past)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func read(t *testing.T, dir string) *Directory {
	t.Helper()
	d, err := Read(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestView: what is loaded, where the entry belongs, and where it is.
func TestView(t *testing.T) {
	t.Parallel()
	list := func(plugins string) string { return `{"cniVersion":"1.0.0","name":"a","plugins":[` + plugins + `]}` }
	const bridge, single, ours = `{"type":"bridge"}`, `{"cniVersion":"1.0.0","name":"a","type":"bridge"}`, `{"type":"magic-ip-address"}`
	for name, test := range map[string]struct {
		files                         map[string]string
		loads, expected, found, notes string
		blocked                       bool
		unknown                       string
	}{
		"nothing":            {files: map[string]string{"README": ""}},
		"a list":             {files: map[string]string{"10-a.conflist": list(bridge + "," + ours)}, loads: "10-a.conflist", expected: "10-a.conflist", found: "10-a.conflist"},
		"without entry":      {files: map[string]string{"10-a.conflist": list(bridge)}, loads: "10-a.conflist", expected: "10-a.conflist"},
		"entry first":        {files: map[string]string{"10-a.conflist": list(ours + "," + bridge)}, loads: "10-a.conflist", expected: "10-a.conflist", found: "10-a.conflist first"},
		"elsewhere":          {files: map[string]string{"05-b.conflist": list(bridge), "10-a.conflist": list(bridge + "," + ours)}, loads: "05-b.conflist", expected: "05-b.conflist", found: "10-a.conflist"},
		"single":             {files: map[string]string{"10-a.conf": single}, loads: "10-a.conf", expected: "10-a-conf.magic-ip-address.conflist"},
		"with our list":      {files: map[string]string{"10-a.conf": single, "10-a-conf.magic-ip-address.conflist": list(bridge + "," + ours)}, loads: "10-a-conf.magic-ip-address.conflist", expected: "10-a-conf.magic-ip-address.conflist", found: "10-a-conf.magic-ip-address.conflist"},
		"empty first":        {files: map[string]string{"00-a.conf": "", "10-a.conflist": list(bridge)}, loads: "10-a.conflist", expected: "10-a.conflist", notes: "00-a.conf is empty: CRI-O passes it over, containerd starts no pod until it is corrected or removed", blocked: true},
		"a dangling link":    {files: map[string]string{"00-a.conf": "-> nowhere", "10-a.conflist": list(bridge)}, loads: "10-a.conflist", expected: "10-a.conflist", notes: "no such file", blocked: true},
		"a loop":             {files: map[string]string{"00-a.conf": "-> 00-b.conf", "00-b.conf": "-> 00-a.conf", "10-a.conflist": list(bridge)}, unknown: "too many levels of symbolic links"},
		"a link out":         {files: map[string]string{"00-a.conf": "-> /etc/hostname", "10-a.conflist": list(bridge + "," + ours)}, unknown: "leads out of the directory", found: "10-a.conflist"},
		"a link to above":    {files: map[string]string{"00-a.conf": "-> .."}, unknown: "leads out of the directory"},
		"a link up and down": {files: map[string]string{"10-a.conflist": "-> ../net.d/sub/../real", "sub/x": "", "real": list(bridge)}, loads: "10-a.conflist", expected: "10-a.conflist"},
		"a link out behind our list": {files: map[string]string{"10-a.conf": "-> /etc/hostname", "10-a-conf.magic-ip-address.conflist": list(bridge + "," + ours)}, loads: "10-a-conf.magic-ip-address.conflist",
			found: "10-a-conf.magic-ip-address.conflist", unknown: "10-a.conf is a symbolic link that leads out of the directory"},
		"a folder that is none": {files: map[string]string{"10-a.conflist": list(bridge), "a": "text"}, notes: "net.d/a: not a directory"},
		"a link up":             {files: map[string]string{"00-a.conf": "-> ../other/a.conf"}, unknown: "leads out of the directory"},
		"a folder":              {files: map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/10-bridge.conf": bridge, "a/zz-magic-ip-address.conf": ours}, loads: "10-a.conflist", expected: "a/zz-magic-ip-address.conf", found: "a/zz-magic-ip-address.conf"},
		"a broken folder":       {files: map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/10-bridge.conf": "{", "20-b.conflist": strings.Replace(list(bridge), `"a"`, `"b"`, 1)}, loads: "20-b.conflist", expected: "20-b.conflist", notes: "a/10-bridge.conf", blocked: true},
		"a link of a folder":    {files: map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a": "-> b", "b/10-bridge.conf": bridge}, loads: "10-a.conflist", expected: "a/zz-magic-ip-address.conf"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := read(t, directory(t, test.files)).View()
			var found []string
			for _, f := range v.Entries {
				found = append(found, f.File)
				if f.First {
					found[len(found)-1] += " first"
				}
			}
			if diff := cmp.Diff([]any{test.loads, test.expected, test.found, test.blocked}, []any{v.Loads, v.Expected, strings.Join(found, ", "), v.Blocked}); diff != "" {
				t.Errorf("loaded, expected, found, blocked (-want +got):\n%s", diff)
			}
			if notes := strings.Join(v.Notes, "\n"); !strings.Contains(notes, test.notes) || test.notes == "" && notes != "" {
				t.Errorf("notes %q, want %q", notes, test.notes)
			}
			if got := fmt.Sprint(v.Unknown); !strings.Contains(got, test.unknown) || test.unknown == "" && v.Unknown != nil {
				t.Errorf("unknown: %v", v.Unknown)
			}
		})
	}
}

// TestHugeFile: a reader of others' files needs no more memory than a configuration is large.
func TestHugeFile(t *testing.T) {
	t.Parallel()
	dir := directory(t, map[string]string{"00-a.conf": "", "10-a.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`})
	if err := os.Truncate(filepath.Join(dir, "00-a.conf"), 1<<40); err != nil {
		t.Fatal(err)
	}
	if v := read(t, dir).View(); v.Loads != "10-a.conflist" || !strings.Contains(v.Notes[0], "1099511627776 bytes") {
		t.Errorf("%+v", v)
	}
}

// TestLimits: a configuration of the greatest size, and one behind as many links as the kernel follows, are still used; one byte or link
// more is too many.
func TestLimits(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
	for extra, used := range []bool{true, false} {
		dir := directory(t, map[string]string{"10-a.conflist": list + strings.Repeat(" ", maxSize-len(list)+extra)})
		if v := read(t, dir).View(); (v.Loads == "10-a.conflist") != used {
			t.Errorf("%d bytes too many: %+v", extra, v)
		}
		const mostLinks = 40 // MAXSYMLINKS, linux/namei.h
		links := map[string]string{"file": list, "10-a.conflist": fmt.Sprintf("-> link%d", mostLinks-1+extra), "link1": "-> file"}
		for i := range mostLinks - 2 + extra {
			links[fmt.Sprintf("link%d", i+2)] = fmt.Sprintf("-> link%d", i+1)
		}
		dir = directory(t, links)
		if _, err := os.ReadFile(filepath.Join(dir, "10-a.conflist")); (err == nil) != used {
			t.Errorf("%d links too many: the kernel says %v", extra, err)
		}
		if v := read(t, dir).View(); (v.Loads == "10-a.conflist") != used {
			t.Errorf("%d links too many: %+v", extra, v)
		}
	}
}

// TestWriteNoMoreThanIsRead: an entry that would make a configuration larger than one may be is an error, and the file is left alone.
// A file with the entry that cannot be read keeps the agent from saying that it is removed.
func TestWriteNoMoreThanIsRead(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
	key := keyOf("a")
	key.Selectors[0].Selector = strings.Repeat("x", maxSize-len(list))
	d := read(t, directory(t, map[string]string{"10-a.conflist": list}))
	if p, err := d.Put(key, []string{"1.0.0"}); err == nil || !strings.Contains(err.Error(), "no network configuration has more") || p.File != "" {
		t.Errorf("%q, %v", p.File, err)
	}
	data, err := with([]byte(list), key)
	if err != nil {
		t.Fatal(err)
	}
	d = read(t, directory(t, map[string]string{"10-a.conflist": string(data)}))
	if _, err := d.Take("a", entry.DefaultRuntimeDir, "10-a.conflist"); err == nil || !strings.Contains(err.Error(), "no network configuration has more") {
		t.Errorf("taken: %v", err)
	}
}

// TestRemove: what is left has no comma too many, also where nothing is left.
func TestRemove(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		text  string
		index int
		want  string
	}{
		{`[1]`, 0, `[]`}, {`[ 1, 2 ]`, 0, `[ 2 ]`}, {`[ 1, 2 ]`, 1, `[ 1 ]`}, {`[1, 2, 3]`, 1, `[1, 3]`},
		{`{"a": 1}`, 0, `{}`}, {`{ "a": 1, "b": 2 }`, 0, `{ "b": 2 }`}, {`{"a": 1, "b": 2}`, 1, `{"a": 1}`},
	} {
		value, err := parseJSON([]byte(test.text))
		if err != nil {
			t.Fatal(err)
		}
		if remove(&value, test.index); string(value.Pack()) != test.want {
			t.Errorf("%s without %d: %s, want %s", test.text, test.index, value.Pack(), test.want)
		}
	}
}

// TestNoJSON: an operator is told of an empty file that it is one.
func TestNoJSON(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"": "the file is empty", " \n": "the file is empty", "{": "not JSON", "{} // text": "not JSON"} {
		if _, err := parseJSON([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

// TestHarmless: a plan that a loader would notice beyond our entry is none.
func TestHarmless(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "bridge"}]}`
	const entryText = `{"type": "magic-ip-address"}`
	const with = `{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "bridge"}, ` + entryText + `]}`
	for _, change := range [][2]string{
		{`"a"`, `"b"`}, {"1.0.0", "1.1.0"}, {"bridge", "ptp"}, {`{"type": "bridge"}`, `{"type": "bridge", "mtu": 1}`}, {`"name"`, `"disableCheck": true, "name"`},
		{`"name"`, `"disableGC": true, "name"`}, {`"name"`, `"loadOnlyInlinedPlugins": true, "name"`}, {`{"type": "bridge"}, `, ""},
		{`{"type": "bridge"}`, `{"type": "bridge"}, {"type": "tuning"}`}, {"]", ""}, {", " + entryText, ""}, {entryText, entryText + ", " + entryText},
		{`{"type": "bridge"}, ` + entryText, entryText + `, {"type": "bridge"}`}, {"", ""},
	} {
		d := read(t, directory(t, map[string]string{"10-a.conflist": list}))
		p := Plan{d: d.clone(), File: "10-a.conflist"}
		p.write(*d.find("10-a.conflist"), []byte(strings.Replace(with, change[0], change[1], 1)))
		if err := p.validate(*d.find("10-a.conflist")); (err == nil) != (change[0] == "") {
			t.Errorf("%q to %q: %v", change[0], change[1], err)
		}
	}
}

// TestOwnListOfAnother: a list of our own is the original and our entry, or the plan is none.
func TestOwnListOfAnother(t *testing.T) {
	t.Parallel()
	const original = `{"cniVersion": "1.0.0", "name": "a", "type": "bridge", "mtu": 1400}`
	for list, harmless := range map[string]bool{
		`{"cniVersion": "1.0.0", "name": "a", "plugins": [` + original + `, {"type": "magic-ip-address"}]}`: true,
		`{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "ptp"}, {"type": "magic-ip-address"}]}`:  false,
		`{"cniVersion": "1.0.0", "name": "b", "plugins": [` + original + `, {"type": "magic-ip-address"}]}`: false,
		`{"cniVersion": "0.4.0", "name": "a", "plugins": [` + original + `, {"type": "magic-ip-address"}]}`: false,
		`{"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "magic-ip-address"}]}`:                   false,
	} {
		d := read(t, directory(t, map[string]string{"10-a.conf": original}))
		p := Plan{d: d.clone(), File: ownName("10-a.conf")}
		p.create(p.File, []byte(list), d.files[0])
		if err := p.validate(d.files[0]); (err == nil) != harmless {
			t.Errorf("%s: %v", list, err)
		}
	}
}

// TestThinMultus: where it takes a network over by a copy, the entry goes where the copy is from; where it does not, into its own list.
func TestThinMultus(t *testing.T) {
	t.Parallel()
	const multus, multusList, single = `{"cniVersion":"0.3.1","name":"multus","type":"multus","delegates":[{"name":"a"}]}`, "00-multus-conf.magic-ip-address.conflist", `{"cniVersion":"0.3.1","name":"a","type":"bridge"}`
	for name, test := range map[string]struct {
		files map[string]string
		want  string
	}{
		"a list":               {map[string]string{"00-multus.conf": multus, "10-a.conflist": `{"cniVersion":"0.3.1","name":"a","plugins":[{"type":"bridge"}]}`}, "10-a.conflist"},
		"a single plugin":      {map[string]string{"00-multus.conf": multus, "10-a.conf": single}, "10-a-conf.magic-ip-address.conflist"},
		"nothing beside it":    {map[string]string{"00-multus.conf": multus}, multusList},
		"another network":      {map[string]string{"00-multus.conf": multus, "10-b.conf": strings.Replace(single, `"a"`, `"b"`, 1)}, multusList},
		"one that is unusable": {map[string]string{"00-multus.conf": multus, "10-a.conf": "{"}, multusList},
		"no delegates":         {map[string]string{"00-multus.conf": strings.Replace(multus, `{"name":"a"}`, "", 1), "10-a.conf": single}, multusList},
		"the thick one":        {map[string]string{"00-multus.conf": strings.Replace(multus, `"type":"multus"`, `"type":"multus-shim"`, 1), "10-a.conf": single}, multusList},
		"another name":         {map[string]string{"01-meta.conf": multus, "10-a.conf": single}, "01-meta-conf.magic-ip-address.conflist"},
	} {
		dir := directory(t, test.files)
		p, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Put(keyOf("a"), spoken) })
		if err != nil || p.File != test.want || !read(t, dir).Has(test.want, "a", entry.DefaultRuntimeDir) {
			t.Errorf("%s: the entry is in %s, %v, want %s", name, p.File, err, test.want)
		}
	}
}

// TestOriginalComesBack: a file of another user that was kept aside comes back as itself once no entry is needed, and goes where its owner has
// written another. That of a file which still has the entry stays.
func TestOriginalComesBack(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
	edited, err := with([]byte(list), keyOf("a"))
	if err != nil {
		t.Fatal(err)
	}
	const a, b = "10-a.conflist", "20-b.conflist"
	take := func(d *Directory) (Plan, error) { return d.Take("a", entry.DefaultRuntimeDir, "") }
	for name, test := range map[string]struct {
		inA, inB     string
		comesBack    bool
		left, change []string
		plan         func(*Directory) (Plan, error)
	}{
		"taken":                 {inA: string(edited), inB: list, comesBack: true, left: []string{a, b}, plan: take},
		"written anew":          {inA: list, inB: string(edited), left: []string{a, b}, plan: take},
		"put again":             {inA: string(edited), inB: list, left: []string{a, a + originalExt, b}, plan: func(d *Directory) (Plan, error) { return d.Put(keyOf("a"), spoken) }},
		"with another's change": {inA: strings.Replace(string(edited), "bridge", "ptp", 1), inB: list, left: []string{a, b}, plan: take},
	} {
		dir := directory(t, map[string]string{a: test.inA, a + originalExt: list, b: test.inB})
		original, err := os.Stat(filepath.Join(dir, a+originalExt))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Update(t.Context(), dir, Options{}, test.plan); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if now, err := os.Stat(filepath.Join(dir, a)); err != nil || os.SameFile(original, now) != test.comesBack {
			t.Errorf("%s: it is the file that was kept: %t, %v", name, !test.comesBack, err)
		}
		if diff := cmp.Diff(test.left, fileNames(t, dir)); diff != "" {
			t.Errorf("%s: files (-want +got):\n%s", name, diff)
		}
	}
}

func fileNames(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestCopiesThatNoLoaderReads lose the key with the last of it: whoever puts one back would have pods start with an entry whose agent is gone.
func TestCopiesThatNoLoaderReads(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
	edited, err := with([]byte(list), keyOf("a"))
	if err != nil {
		t.Fatal(err)
	}
	dir := directory(t, map[string]string{"10-a.conflist": "-> real", "real": string(edited), "20-b.conflist": list, "10-a.conflist.bak": string(edited), "README": "magic-ip-address"})
	want := func(when, content string) {
		t.Helper()
		for _, name := range []string{"10-a.conflist", "10-a.conflist.bak"} {
			if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != content {
				t.Errorf("%s: %s is %v:\n%s", when, name, err, data)
			}
		}
		if diff := cmp.Diff([]string{"10-a.conflist", "10-a.conflist.bak", "20-b.conflist", "README", "real"}, fileNames(t, dir)); diff != "" {
			t.Errorf("%s: files (-want +got):\n%s", when, diff)
		}
	}
	if _, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Put(keyOf("a"), spoken) }); err != nil {
		t.Error(err)
	}
	want("put", string(edited))
	if _, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Take("a", entry.DefaultRuntimeDir, "") }); err != nil {
		t.Error(err)
	}
	want("taken", list)
}

// TestNodeOfTheVersionBefore: its renamed configuration comes back, and each file is written once. A list of our own is made only where a key remains.
func TestNodeOfTheVersionBefore(t *testing.T) {
	t.Parallel()
	const single = `{"cniVersion":"1.0.0","name":"a","type":"bridge"}`
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[` + single + `,{"type":"magic-ip-address","selectors":{"a":[{"namespace":"default","selector":"app=old"}]}}]}`
	const own = "10-a-conf.magic-ip-address.conflist"
	for name, test := range map[string]struct {
		plan func(*Directory) (Plan, error)
		left []string
	}{
		"put":   {func(d *Directory) (Plan, error) { return d.Put(keyOf("a"), spoken) }, []string{own, "10-a.conf"}},
		"taken": {func(d *Directory) (Plan, error) { return d.Take("a", entry.DefaultRuntimeDir, "") }, []string{"10-a.conf"}},
	} {
		dir := directory(t, map[string]string{"10-a.conf.magic-ip-address": single, "10-a.conflist": list})
		p, err := Update(t.Context(), dir, Options{}, test.plan)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if paths := slices.Sorted(slices.Values(p.Paths())); len(slices.Compact(slices.Clone(paths))) != len(paths) {
			t.Errorf("%s: a file is written twice: %v", name, paths)
		}
		if diff := cmp.Diff(test.left, fileNames(t, dir)); diff != "" {
			t.Errorf("%s: files (-want +got):\n%s", name, diff)
		}
	}
}

// TestPluginsThatAreNotInstalled: those that are no files. Where a link leads on the node cannot be seen from a container.
func TestPluginsThatAreNotInstalled(t *testing.T) {
	t.Parallel()
	bin := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(bin, "bridge"), nil, 0o755), os.Symlink("/nowhere", filepath.Join(bin, "linked")), os.Mkdir(filepath.Join(bin, "folder"), 0o755)); err != nil {
		t.Fatal(err)
	}
	dir := directory(t, map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[
{"type":"bridge"},{"type":"linked"},{"type":"folder"},{"type":"gone"},{"type":"gone"},{"type":"magic-ip-address"}]}`})
	for where, want := range map[string][]string{bin: {"folder", "gone"}, "": nil} {
		d, err := Read(dir, Options{BinDir: where})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, d.notInstalled(d.files[0])); diff != "" {
			t.Errorf("in %q (-want +got):\n%s", where, diff)
		}
	}
}

// TestFolderEntry is the last of the plugins in a folder, and goes as a whole.
func TestFolderEntry(t *testing.T) {
	t.Parallel()
	files := map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/zz.conf": `{"type":"bridge"}`, "a/zzz.conf": `{"type":"tuning"}`}
	dir := directory(t, files)
	for _, agent := range []string{"a", "b"} {
		if _, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Put(keyOf(agent), spoken) }); err != nil {
			t.Fatal(err)
		}
	}
	list, err := read(t, dir).load(*read(t, dir).find("10-a.conflist"))
	if err != nil || len(list.Plugins) != 3 || list.Plugins[2].Network.Type != entry.Type || !strings.Contains(string(list.Plugins[2].Bytes), "app=b") {
		t.Errorf("%v, %v", list, err)
	}
	for _, agent := range []string{"a", "b"} {
		if _, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) { return d.Take(agent, entry.DefaultRuntimeDir, "") }); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(dir, "a"))
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
}

// TestEntriesOfAFolder: there is one entry, and it is not the first, whatever was there before.
func TestEntriesOfAFolder(t *testing.T) {
	t.Parallel()
	const bridge = `{"type":"bridge"}`
	ours := `{"type":"magic-ip-address","selectors":{"other":[{"namespace":"x","selector":"y"}]}}`
	for name, files := range map[string]map[string]string{
		"first":              {"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/00-ours.conf": ours, "a/10-bridge.conf": bridge},
		"two":                {"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/10-bridge.conf": bridge, "a/20-ours.conf": ours, "a/30-ours.conf": ours},
		"a file of our name": {"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/zz-magic-ip-address.conf": bridge},
		"inlined plugin":     {"10-a.conflist": `{"cniVersion":"1.1.0","name":"a","plugins":[` + bridge + `]}`, "a/20-ours.conf": ours},
	} {
		d := read(t, directory(t, files))
		p, err := d.Put(keyOf("a"), spoken)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		list, err := p.d.load(*p.d.find("10-a.conflist"))
		if err != nil || len(list.Plugins) != 2 || list.Plugins[1].Network.Type != entry.Type || !p.d.Has(p.File, "a", entry.DefaultRuntimeDir) {
			t.Errorf("%s: %v, %v", name, list, err)
		}
	}
	if _, err := read(t, directory(t, map[string]string{"10-a.conflist": `{"cniVersion":"1.1.0","name":"a"}`, "a/20-ours.conf": ours})).Put(keyOf("a"), spoken); !errors.Is(err, errAlone) {
		t.Errorf("nothing but the entry: %v", err)
	}
}

// TestNamesSortFirst: the list of our own before its original, and the entry behind all others of a folder.
func TestNamesSortFirst(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"10-a.conf", "10-a.json", ".conf", "a-conf.conf", "a-json.conf", "a.conf.conf", "ä.conf", "~.json", "-.conf"} {
		own := ownName(name)
		if original, ok := originalOf(own); own >= name || !ok || original != name || filepath.Ext(own) != listExt {
			t.Errorf("%s: %s, which is of %s", name, own, original)
		}
	}
	for _, name := range []string{"10-a.conflist", "magic-ip-address.conflist", ".magic-ip-address.conflist", "a.magic-ip-address.conflist"} {
		if original, ok := originalOf(name); ok {
			t.Errorf("%s is taken for a list of %s", name, original)
		}
	}
}

func TestDetect(t *testing.T) {
	t.Parallel()
	const containerd = "1 0 0:30 / / rw - overlay overlay rw,lowerdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/5/fs\n"
	const crio = "1 0 0:30 / / rw - overlay overlay rw,lowerdir=/var/lib/containers/storage/overlay/l/ABC\n"
	for name, test := range map[string]struct {
		files []string
		mount string
		want  Runtime
	}{
		"nothing":         {want: Auto},
		"containerd":      {files: []string{"run/containerd/containerd.sock"}, want: Containerd},
		"k3s":             {files: []string{"run/k3s/containerd/containerd.sock"}, want: Containerd},
		"CRI-O":           {files: []string{"run/crio/crio.sock"}, mount: containerd, want: CRIO},
		"both":            {files: []string{"run/crio/crio.sock", "run/containerd/containerd.sock"}, want: Auto},
		"in a container":  {mount: "7 1 0:2 / /proc rw - proc proc rw\n" + containerd, want: Containerd},
		"in one of CRI-O": {mount: crio, want: CRIO},
		"others' mounts":  {mount: "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n" + strings.Replace(crio, " / / ", " / /var/lib/x ", 1), want: Auto},
	} {
		root := t.TempDir()
		for _, file := range test.files {
			if err := errors.Join(os.MkdirAll(filepath.Join(root, filepath.Dir(file)), 0o755), os.WriteFile(filepath.Join(root, file), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "proc/self"), 0o755), os.WriteFile(filepath.Join(root, "proc/self/mountinfo"), []byte(test.mount), 0o600)); err != nil {
			t.Fatal(err)
		}
		if got := Detect(root); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
	for _, name := range []string{"containerd", "crio", "auto"} {
		if _, err := ParseRuntime(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := ParseRuntime("docker"); err == nil {
		t.Error("docker is taken")
	}
}

// TestLock: there is one holder, also where the file of the lock has been removed or replaced, and none of it stays.
func TestLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	held, done := make(chan bool, 1), make(chan error)
	const workers = 8
	for range workers {
		go func() {
			for range 20 {
				unlock, err := Lock(t.Context(), dir)
				if err != nil {
					done <- err
					return
				}
				select {
				case held <- true:
				default:
					done <- errors.New("two have the lock")
					return
				}
				if info, err := os.Stat(filepath.Join(dir, lockName)); err != nil || info.Mode() != 0o600 {
					done <- fmt.Errorf("%v, %w", info, err)
					return
				}
				<-held
				unlock()
			}
			done <- nil
		}()
	}
	for range workers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
}

// TestUpdateTriesAgain where another program writes meanwhile.
func TestUpdateTriesAgain(t *testing.T) {
	t.Parallel()
	const list = `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}`
	dir := directory(t, map[string]string{"10-a.conflist": list})
	looks := 0
	plan, err := Update(t.Context(), dir, Options{}, func(d *Directory) (Plan, error) {
		if looks++; looks == 2 { // after it has been read under the lock
			if err := os.WriteFile(filepath.Join(dir, "10-a.conflist"), []byte(strings.Replace(list, "bridge", "ptp", 1)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return d.Put(keyOf("a"), spoken)
	})
	if err != nil || plan.File != "10-a.conflist" {
		t.Fatal(plan.File, err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "10-a.conflist"))
	if err != nil || looks != 3 || !strings.Contains(string(data), "ptp") || !strings.Contains(string(data), entry.Type) {
		t.Errorf("%d looks, %v: %s", looks, err, data)
	}
	if entries, _ := os.ReadDir(dir); !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == "10-a.conflist" }) || len(entries) != 1 {
		t.Errorf("%v", entries)
	}
}

// TestOrphans: our list of an original that cannot be used goes when that has settled, also where it was written ahead of the clock.
func TestOrphans(t *testing.T) {
	t.Parallel()
	for age, want := range map[time.Duration]int{0: 0, time.Minute: 1, -time.Hour: 1} {
		d := &Directory{files: []file{{name: "10-a.conf", unusable: errEmpty, modified: time.Now().Add(-age)}, {name: ownName("10-a.conf")}}}
		p := &Plan{d: d}
		p.removeOrphans()
		if got := len(p.changes); got != want {
			t.Errorf("written %v ago: %d changes, want %d", age, got, want)
		}
	}
}

// TestSettle: a file that cannot be used is given time from when it was last written, by the clock of that moment: one from the future
// is not waited for. Of several the one that was written last counts.
func TestSettle(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for _, test := range []struct {
		ages []time.Duration
		want time.Duration
	}{
		{[]time.Duration{0}, settleTime}, {[]time.Duration{time.Second}, settleTime - time.Second}, {[]time.Duration{settleTime - 1}, 1},
		{[]time.Duration{settleTime}, 0}, {[]time.Duration{-1}, 0}, {[]time.Duration{settleTime - 1, 1, settleTime - 2}, settleTime - 1},
	} {
		d := &Directory{}
		for _, age := range test.ages {
			d.files = append(d.files, file{name: "10-a.conf", unusable: errEmpty, modified: now.Add(-age)})
		}
		if _, again, _, err := d.first(now, func(file) bool { return false }); err != nil || again != test.want {
			t.Errorf("written %v ago: waited for %v, %v, want %v", test.ages, again, err, test.want)
		}
	}
}

// TestDirOf: whether the entry is in a list or in the folder of a network.
func TestDirOf(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"/etc/cni/net.d/10-a.conflist", "/etc/cni/net.d/a/magic-ip-address.conf"} {
		if got := DirOf(file); got != "/etc/cni/net.d" {
			t.Errorf("the directory of %s is %s", file, got)
		}
	}
}
