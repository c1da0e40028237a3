package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tailscale/hujson"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
)

var errAlone = errors.New("there is no plugin that assigns addresses, behind which the entry could be: have its owner write the file again")

// AnyRuntimeDir is for removing keys whatever runtime directory their entry names.
const AnyRuntimeDir = ""

// Key is what one agent has in the entry, which all agents of a node share.
type Key struct {
	Agent      string
	RuntimeDir string
	Selectors  []entry.Selector
}

// document is a file of a network configuration, as a tree that keeps each byte: a list of plugins, or one plugin.
type document struct{ hujson.Value }

func parse(data []byte) (*document, error) {
	root, err := parseJSON(data)
	if err == nil && root.Value.Kind() != '{' {
		err = errors.New("not a JSON object")
	}
	return &document{root}, err
}

// plugins are those that a list has inline; nil where it has none.
func (d *document) plugins() *hujson.Array {
	if v := get(&d.Value, "plugins"); v != nil {
		if array, ok := v.Value.(*hujson.Array); ok {
			return array
		}
	}
	return nil
}

// ours are the positions of the plugin's entries among the plugins of a list.
func (d *document) ours() (ours []int) {
	if plugins := d.plugins(); plugins != nil {
		for i := range plugins.Elements {
			if isEntry(&plugins.Elements[i]) {
				ours = append(ours, i)
			}
		}
	}
	return ours
}

// entries are the plugin's entries: those of a list, or the file itself where it is in the folder of a network.
func (d *document) entries() (entries []*hujson.Value) {
	if isEntry(&d.Value) {
		return []*hujson.Value{&d.Value}
	}
	for _, i := range d.ours() {
		entries = append(entries, &d.plugins().Elements[i])
	}
	return entries
}

func isEntry(v *hujson.Value) bool { return text(get(v, "type")) == entry.Type }

// raw is an entry for its parser.
func raw(v *hujson.Value) (r entry.Raw) {
	_ = json.Unmarshal(v.Pack(), &r) // it is an object
	return r
}

// shares reports whether an entry is of the agents with this runtime directory. One that the plugin would refuse is anybody's.
func shares(v *hujson.Value, runtimeDir string) bool {
	dir, err := raw(v).Dir()
	return err != nil || runtimeDir == AnyRuntimeDir || dir == filepath.Clean(runtimeDir)
}

// has reports whether the key of an agent is in a file.
func has(data []byte, agent, runtimeDir string) bool {
	d, err := parse(data)
	return err == nil && slices.ContainsFunc(d.entries(), func(v *hujson.Value) bool {
		selectors := get(v, "selectors")
		return selectors != nil && find(selectors, agent) >= 0 && shares(v, runtimeDir)
	})
}

// with returns a file with this key in its entry, and with the entry where it has none: last, behind the plugin that
// assigns addresses. Nothing else is changed, not even white space.
func with(data []byte, key Key) ([]byte, error) {
	d, err := parse(data)
	if err != nil {
		return nil, err
	}
	plugins := d.plugins()
	for _, v := range d.entries() {
		if !shares(v, key.RuntimeDir) {
			dir, _ := raw(v).Dir()
			return nil, fmt.Errorf("it has an entry of %s whose runtimeDir is %s, and not %s: "+
				"agents of one node share one directory; uninstall the other agents or install with that one", entry.Type, dir, filepath.Clean(key.RuntimeDir))
		}
	}
	switch ours := d.ours(); {
	case isEntry(&d.Value): // a file in the folder of a network
		key.put(&d.Value, &d.Value)
	case plugins == nil || len(plugins.Elements) == 0:
		return nil, errors.New("no plugins in the list")
	case len(ours) == len(plugins.Elements):
		return nil, errAlone
	case len(ours) == 0:
		list := get(&d.Value, "plugins")
		st := styleOf(&d.Value, list)
		add(list, st, key.entry(st))
	default:
		d.normalize()
		key.put(&d.Value, &plugins.Elements[d.ours()[0]])
	}
	return d.Pack(), nil
}

// normalize makes one entry of several, and moves it behind another plugin where it comes first.
func (d *document) normalize() {
	list := get(&d.Value, "plugins")
	for ours := d.ours(); len(ours) > 1; ours = d.ours() {
		into := get(&d.plugins().Elements[ours[0]], "selectors")
		if from := get(&d.plugins().Elements[ours[1]], "selectors"); from != nil && into != nil && into.Value.Kind() == '{' && from.Value.Kind() == '{' {
			for _, m := range from.Value.(*hujson.Object).Members {
				if find(into, m.Name.Value.(hujson.Literal).String()) < 0 {
					m.Name.BeforeExtra, m.Value.AfterExtra = nil, nil
					add(into, styleOf(&d.Value, into), m.Name.String()+":"+m.Value.String())
				}
			}
		}
		remove(list, ours[1])
	}
	if d.ours()[0] == 0 {
		first := d.plugins().Elements[0]
		remove(list, 0)
		add(list, styleOf(&d.Value, list), hujson.Value{Value: first.Value}.String())
	}
}

// fold gives members whose name differs from one of the keys in case only that name, and removes those that the key has already.
// The plugin decodes them as if they had it.
func fold(v *hujson.Value, keys ...string) {
	for _, key := range keys {
		for i, m := range slices.Backward(v.Value.(*hujson.Object).Members) {
			name := text(&m.Name)
			switch {
			case name == key || !strings.EqualFold(name, key):
			case get(v, key) == nil:
				v.Value.(*hujson.Object).Members[i].Name.Value = hujson.String(key)
			default:
				remove(v, i)
			}
		}
	}
}

// put makes the key a member of an entry's selectors, where it is not so already. What the plugin would refuse, and fail each ADD
// for, is corrected or removed.
func (k Key) put(root, v *hujson.Value) {
	fold(v, "runtimeDir", "selectors")
	if _, err := raw(v).Dir(); err != nil {
		get(v, "runtimeDir").Value = hujson.String(filepath.Clean(k.RuntimeDir))
	}
	if all := get(v, "selectors"); all != nil && all.Value.Kind() == '{' {
		for i, m := range slices.Backward(all.Value.(*hujson.Object).Members) {
			var selectors []entry.Selector
			if json.Unmarshal(m.Value.Pack(), &selectors) != nil || slices.ContainsFunc(selectors, func(s entry.Selector) bool { return s.Namespace == "" }) {
				remove(all, i)
			}
		}
	}
	selectors := get(v, "selectors")
	if selectors == nil {
		st := styleOf(root, v)
		add(v, st, k.nested(st, 0))
		return
	}
	st := styleOf(root, selectors)
	replace := func(v *hujson.Value, text string) {
		value, _ := hujson.Parse([]byte(text)) // which we have written
		v.Value = value.Value
	}
	switch i := find(selectors, k.Agent); {
	case selectors.Value.Kind() != '{':
		replace(selectors, "{"+k.member(st)+"}")
	case i < 0:
		add(selectors, st, k.member(st))
	default:
		value := &selectors.Value.(*hujson.Object).Members[i].Value
		var there []entry.Selector
		if err := json.Unmarshal(value.Pack(), &there); err != nil || !slices.Equal(there, k.Selectors) {
			replace(value, k.value(st))
		}
	}
}

// without returns a list without the key of this agent, and without the entry where that was the last key; left is how
// many entries remain. Nil for a file of a folder that is to go as a whole.
func without(data []byte, agent, runtimeDir string) (after []byte, left int, err error) {
	d, err := parse(data)
	if err != nil {
		return nil, 0, err
	}
	if isEntry(&d.Value) {
		if shares(&d.Value, runtimeDir) && drop(&d.Value, agent) {
			return nil, 0, nil
		}
		return d.Pack(), 1, nil
	}
	for _, i := range slices.Backward(d.ours()) {
		v := &d.plugins().Elements[i]
		if !shares(v, runtimeDir) || !drop(v, agent) {
			continue
		}
		if len(d.plugins().Elements) == 1 {
			return nil, 1, errors.New("its only plugin is ours: nothing would be left; write the file anew")
		}
		remove(get(&d.Value, "plugins"), i)
	}
	return d.Pack(), len(d.ours()), nil
}

// drop removes the key of an agent from an entry, and reports whether that was its last one.
func drop(v *hujson.Value, agent string) (last bool) {
	selectors := get(v, "selectors")
	if selectors == nil {
		return false
	}
	for i := find(selectors, agent); i >= 0; i = find(selectors, agent) {
		if len(leads(selectors)) == 1 {
			return true
		}
		remove(selectors, i)
	}
	return false
}

// withoutEntries returns a list without any entry of the plugin.
func withoutEntries(data []byte) ([]byte, error) {
	d, err := parse(data)
	if err != nil {
		return nil, err
	}
	for _, i := range slices.Backward(d.ours()) {
		if len(d.plugins().Elements) == 1 {
			return nil, errors.New("its only plugin is ours: nothing would be left; write the file anew")
		}
		remove(get(&d.Value, "plugins"), i)
	}
	return d.Pack(), nil
}

// hasEntries reports whether a list has an entry of the plugin.
func hasEntries(data []byte) bool {
	d, err := parse(data)
	return err == nil && len(d.ours()) > 0
}

// listOf makes the list that a loader makes of a single-plugin configuration (libcni.ConfListFromConf), with the entries of
// another list, if that has any.
func listOf(single, other []byte) ([]byte, error) {
	d, err := parse(single)
	if err != nil {
		return nil, err
	}
	literal := func(key string) string {
		if v := get(&d.Value, key); v != nil {
			return hujson.Value{Value: v.Value}.String()
		}
		return `""`
	}
	var plugin, indented bytes.Buffer
	if err := json.Compact(&plugin, single); err != nil {
		return nil, err
	}
	if err := json.Indent(&indented, plugin.Bytes(), "    ", "  "); err != nil {
		return nil, err
	}
	data := fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"plugins\": [\n    %s\n  ]\n}\n", literal("cniVersion"), literal("name"), &indented)
	if d, err = parse(data); err != nil {
		return nil, err
	}
	if from, err := parse(other); err == nil {
		for _, v := range from.entries() {
			list := get(&d.Value, "plugins")
			add(list, styleOf(&d.Value, list), hujson.Value{Value: v.Value}.String())
		}
	}
	return d.Pack(), nil
}

// entry is the whole entry with this key alone.
func (k Key) entry(st style) string {
	text := "{" + st.newline(1)
	for _, line := range []string{
		`"type"` + st.colon + quote(entry.Type),
		`"runtimeDir"` + st.colon + quote(filepath.Clean(k.RuntimeDir)),
		`"capabilities"` + st.colon + `{"labels"` + st.colon + `true}`,
	} {
		text += line + st.next(1)
	}
	return text + k.nested(st, 1) + st.newline(0) + "}"
}

// nested is the member "selectors" of an entry, so many levels deeper than the elements that st is of.
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
