package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// PluginType is the plugin's name: of its binary, and of its entry in a conflist.
const PluginType = "magic-ip-address"

// defaultRuntimeDir is what an entry without a runtimeDir means.
const defaultRuntimeDir = "/run/magic-ip-address"

// AnyRuntimeDir is for taking keys out whatever runtime directory their entry names.
const AnyRuntimeDir = ""

// Selector is one element below the name of an agent: a namespace ("*" is every one) and a label selector.
type Selector struct {
	Namespace string `json:"namespace"`
	Selector  string `json:"selector"`
}

// Key is what one agent has in the entry that all agents of a node share.
type Key struct {
	Agent      string
	RuntimeDir string
	Selectors  []Selector
}

// File is a network configuration in the CNI directory, as it is or as it shall be.
type File struct {
	Name string
	Data []byte
	// KeptName and Kept are the single-plugin configuration that this list was made of, which comes back when our
	// entry goes; empty where the list was always one.
	KeptName string
	Kept     []byte
}

// With returns the file with this key in its entry, and with the entry where it has none: last, behind the plugin
// that assigns addresses. Nothing else is changed, not even white space. A single-plugin configuration
// becomes a list. versions are the versions of CNI that the plugin speaks.
func (f File) With(key Key, versions []string) (File, error) {
	if filepath.Ext(f.Name) != listExt {
		list, err := listOf(f.Data)
		if err != nil {
			return f, fmt.Errorf("%s: %w", f.Name, err)
		}
		f = File{Name: listName(f.Name), Data: list, KeptName: f.Name, Kept: f.Data}
	}
	data, err := with(f.Data, key, versions)
	if err != nil {
		return f, fmt.Errorf("%s: %w", f.Name, err)
	}
	f.Data = data
	return f, nil
}

// Without returns the file without the key of this agent, and without the entry where that was the last key. Where
// nothing else has changed since With, it is the file from before, to the byte.
func (f File) Without(agent, runtimeDir string) (File, error) {
	if filepath.Ext(f.Name) != listExt {
		return f, nil
	}
	data, err := without(f.Data, agent, runtimeDir)
	if err != nil {
		return f, fmt.Errorf("%s: %w", f.Name, err)
	}
	f.Data = data
	if l, err := parseList(data); f.KeptName == "" || err != nil || len(l.ours) > 0 {
		return f, nil
	}
	// The last one out. A list that somebody has changed since stays a list.
	if list, err := listOf(f.Kept); err == nil && bytes.Equal(list, data) {
		return File{Name: f.KeptName, Data: f.Kept}, nil
	}
	f.KeptName, f.Kept = "", nil
	return f, nil
}

// list is a conflist that has plugins.
type list struct {
	data    []byte
	root    span
	plugins span
	ours    []int // positions of entries of our type among the plugins
}

func parseList(data []byte) (list, error) {
	root, err := scan(data)
	if err != nil {
		return list{}, err
	}
	l := list{data: data, root: root}
	var found bool
	if l.plugins, found = root.get("plugins"); !found || l.plugins.kind != '[' || len(l.plugins.items) == 0 {
		return list{}, errors.New("no plugins in the list")
	}
	for i, plugin := range l.plugins.items {
		if kind, _ := plugin.get("type"); kind.text == PluginType {
			l.ours = append(l.ours, i)
		}
	}
	return l, nil
}

func with(data []byte, key Key, versions []string) ([]byte, error) {
	l, err := parseList(data)
	if err != nil {
		return nil, err
	}
	if len(l.ours) == len(l.plugins.items) {
		return nil, errors.New("there is no plugin that assigns addresses")
	}
	if err := l.speaks(versions); err != nil {
		return nil, err
	}
	for _, i := range l.ours {
		if dir := l.runtimeDir(i); dir != filepath.Clean(key.RuntimeDir) {
			return nil, fmt.Errorf("it has an entry of %s whose runtimeDir is %s, and not %s: "+
				"agents of one node share one directory; uninstall the other agents or install with that one", PluginType, dir, filepath.Clean(key.RuntimeDir))
		}
	}
	if len(l.ours) == 0 {
		return l.plugins.append(data, key.entry), nil
	}
	if l, err = l.tidy(); err != nil {
		return nil, err
	}
	entry := l.plugins.items[l.ours[0]]
	selectors, found := entry.get("selectors")
	switch i := selectors.find(key.Agent); {
	case !found:
		return entry.append(l.data, key.selectors), nil
	case selectors.kind != '{':
		return splice(l.data, selectors.start, selectors.end, []byte("{"+key.member(styleOf(l.data, selectors))+"}")), nil
	case i < 0:
		return selectors.append(l.data, key.member), nil
	default:
		value := selectors.members[i].value
		var there []Selector
		if err := json.Unmarshal(l.data[value.start:value.end], &there); err == nil && slices.Equal(there, key.Selectors) {
			return l.data, nil
		}
		return splice(l.data, value.start, value.end, []byte(key.value(styleOf(l.data, selectors)))), nil
	}
}

// tidy makes one entry of several, and moves it behind another plugin where it comes first.
func (l list) tidy() (list, error) {
	var err error
	for len(l.ours) > 1 && err == nil {
		second := l.plugins.items[l.ours[1]]
		selectors, _ := second.get("selectors")
		before := l.data
		if l, err = parseList(l.plugins.cut(l.data, l.ours[1])); err != nil {
			break
		}
		for _, m := range selectors.members {
			entry := l.plugins.items[l.ours[0]]
			into, found := entry.get("selectors")
			if !found || into.kind != '{' || into.find(m.key) >= 0 {
				continue
			}
			moved := into.append(l.data, func(style) string { return string(before[m.start:m.value.end]) })
			if l, err = parseList(moved); err != nil {
				break
			}
		}
	}
	if err == nil && l.ours[0] == 0 {
		entry := l.plugins.items[0]
		text := string(l.data[entry.start:entry.end])
		if l, err = parseList(l.plugins.cut(l.data, 0)); err == nil {
			l, err = parseList(l.plugins.append(l.data, func(style) string { return text }))
		}
	}
	return l, err
}

// speaks checks that the plugin understands every version that a runtime may choose for this list: one it does not
// know would fail each ADD. The list's own version is never changed, because that is the runtime's business too.
func (l list) speaks(versions []string) error {
	version, _ := l.root.get("cniVersion")
	wanted := []string{version.text}
	if more, found := l.root.get("cniVersions"); found {
		for _, v := range more.items {
			wanted = append(wanted, v.text)
		}
	}
	for _, v := range wanted {
		if !slices.Contains(versions, v) {
			return fmt.Errorf("its cniVersion is %q, and the plugin speaks %s", v, strings.Join(versions, ", "))
		}
	}
	return nil
}

func (l list) runtimeDir(i int) string {
	dir, found := l.plugins.items[i].get("runtimeDir")
	if !found || !dir.isText {
		return defaultRuntimeDir
	}
	return filepath.Clean(dir.text)
}

// shares says whether an entry is of the agents with this runtime directory.
func (l list) shares(i int, runtimeDir string) bool {
	return runtimeDir == AnyRuntimeDir || l.runtimeDir(i) == filepath.Clean(runtimeDir)
}

// has says whether the key of an agent is in the list.
func (l list) has(agent, runtimeDir string) bool {
	return slices.ContainsFunc(l.ours, func(i int) bool {
		selectors, _ := l.plugins.items[i].get("selectors")
		return l.shares(i, runtimeDir) && selectors.find(agent) >= 0
	})
}

func without(data []byte, agent, runtimeDir string) ([]byte, error) {
	l, err := parseList(data)
	if err != nil {
		return nil, err
	}
	for n := len(l.ours) - 1; n >= 0; n-- { // from behind, so that positions stay
		if !l.shares(l.ours[n], runtimeDir) {
			continue
		}
		for {
			selectors, _ := l.plugins.items[l.ours[n]].get("selectors")
			i := selectors.find(agent)
			if i < 0 {
				break
			}
			if len(selectors.members) > 1 {
				if l, err = parseList(selectors.cut(l.data, i)); err != nil {
					return nil, err
				}
				continue
			}
			if len(l.plugins.items) == 1 {
				return nil, errors.New("its only plugin is ours: nothing would be left; write the file anew")
			}
			if l, err = parseList(l.plugins.cut(l.data, l.ours[n])); err != nil {
				return nil, err
			}
			break
		}
	}
	return l.data, nil
}

const (
	listExt = ".conflist"
	// keptExt is behind the name of a single-plugin configuration that became a list. No loader reads such a name.
	keptExt = "." + PluginType
)

// listName is the name of the list that a single-plugin configuration becomes.
func listName(name string) string { return strings.TrimSuffix(name, filepath.Ext(name)) + listExt }

// listOf makes the list that a loader makes of a single-plugin configuration (libcni.ConfListFromConf).
func listOf(single []byte) ([]byte, error) {
	root, err := scan(single)
	if err != nil {
		return nil, err
	}
	if root.kind != '{' {
		return nil, errors.New("not a JSON object")
	}
	raw := func(key string) string {
		value, found := root.get(key)
		if !found {
			return `""`
		}
		return string(single[value.start:value.end])
	}
	var plugin, indented bytes.Buffer
	if err := json.Compact(&plugin, single); err != nil {
		return nil, err
	}
	if err := json.Indent(&indented, plugin.Bytes(), "    ", "  "); err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"plugins\": [\n    %s\n  ]\n}\n", raw("cniVersion"), raw("name"), &indented), nil
}

// entry is the whole entry with this key alone.
func (k Key) entry(st style) string {
	text := "{" + st.newline(1)
	for _, line := range []string{
		`"type"` + st.colon + quote(PluginType),
		`"runtimeDir"` + st.colon + quote(filepath.Clean(k.RuntimeDir)),
		`"capabilities"` + st.colon + `{"labels"` + st.colon + `true}`,
	} {
		text += line + st.next(1)
	}
	return text + k.nested(st, 1) + st.newline(0) + "}"
}

// selectors is the member of an entry that has none.
func (k Key) selectors(st style) string { return k.nested(st, 0) }

func (k Key) nested(st style, level int) string {
	return `"selectors"` + st.colon + "{" + st.newline(level+1) + k.member(st) + st.newline(level) + "}"
}

// member is this key among the selectors.
func (k Key) member(st style) string { return quote(k.Agent) + st.colon + k.value(st) }

func (k Key) value(st style) string {
	var all []string
	for _, s := range k.Selectors {
		all = append(all, `{"namespace"`+st.colon+quote(s.Namespace)+st.comma+`"selector"`+st.colon+quote(s.Selector)+"}")
	}
	return "[" + strings.Join(all, st.comma) + "]"
}

// next separates two members that are so many levels deeper than the elements.
func (st style) next(levels int) string {
	if !st.lines() {
		return st.comma
	}
	return "," + st.newline(levels)
}

// quote writes a string as people do: json.Marshal would write \u003c for the < of a selector.
func quote(s string) string {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(s) // a string can be encoded
	return strings.TrimSuffix(text.String(), "\n")
}
