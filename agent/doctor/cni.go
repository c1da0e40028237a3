package doctor

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// cni looks at the network that the runtime loads, and at the binary.
func (e *examination) cni() {
	const check = "conflist"
	installed := e.installed()
	directory, err := conflist.Read(e.ConfDir, conflist.Options{Runtime: e.Runtime, BinDir: e.BinDir})
	var view conflist.View
	if err == nil {
		view = directory.View()
		switch none := view.Unknown == nil && len(view.Entries) == 0; {
		case none && !e.selecting():
			e.add(OK, check, "there is no entry, and no agent has a magic IP that needs one", "")
			return
		case none && !installed && !e.needsPlugin():
			e.add(OK, check, "no plugin is installed; pods are known by the API", "")
			return
		}
	}
	e.binary()
	if errors.Is(err, fs.ErrNotExist) {
		e.add(Hidden, check, e.ConfDir+" is not visible from here", "run this on the node, or in the installer's container; --cni-conf-dir names another directory")
		return
	}
	if err != nil {
		e.add(unreadable(err), check, err.Error(), "run this as root")
		return
	}
	if view.Unknown != nil {
		e.add(Fail, check, view.Unknown.Error(), "until then nobody can tell which pods are recorded")
		return
	}
	level := Warn
	if view.Blocked || view.Loads == "" {
		level = Fail
	}
	for _, note := range view.Notes {
		e.add(level, check, note, "")
	}
	if view.Loads == "" {
		e.add(Fail, check, "no CNI configuration that a runtime could use in "+e.ConfDir, "install a CNI plugin that gives pods their addresses, and then this one behind it")
		return
	}
	found := false
	for _, f := range view.Entries {
		path := filepath.Join(e.ConfDir, f.File)
		switch {
		case f.File != view.Expected:
			e.add(Warn, check, fmt.Sprintf("%s has an entry of type %s, but the runtime loads %s", path, entry.Type, view.Loads),
				fmt.Sprintf("move the entry to %s, or remove one of the two files", view.Expected))
		case f.First:
			e.add(Fail, check, path+": the entry of type "+entry.Type+" comes first", "move it behind the plugin that assigns addresses")
		default:
			e.entry(path, f)
		}
		found = found || f.File == view.Expected
	}
	if !found {
		e.add(Fail, check, fmt.Sprintf("%s, which the runtime loads, has no entry of type %s", filepath.Join(e.ConfDir, view.Loads), entry.Type),
			"install it: pods are only known by the API until then. Add the entry behind the plugin that assigns addresses, in "+view.Expected)
	}
}

// installed reports whether an installer has put anything on the node. Where no other directories of CNI are given, they are those
// that it has recorded, or the usual ones.
func (e *examination) installed() bool {
	dir := runtimedir.New(e.RuntimeDir)
	names, err := dir.Installers()
	var record runtimedir.Record
	if i := max(0, slices.Index(names, e.Name)); i < len(names) {
		if read, readErr := dir.Installer(names[i]).ReadRecord(); readErr == nil {
			record = *read
		}
	}
	if e.ConfDir == "" && record.Conflist != "" {
		e.ConfDir = conflist.DirOf(record.Conflist)
	}
	if e.BinDir == "" && record.Binary != "" {
		e.BinDir = filepath.Dir(record.Binary)
	}
	e.ConfDir, e.BinDir = cmp.Or(e.ConfDir, conflist.DefaultDir), cmp.Or(e.BinDir, conflist.DefaultBinDir)
	return len(names) > 0 || err != nil // what cannot be read may be there
}

// needsPlugin reports whether pods are not known by the API alone: an agent does without it, or the plugin has recorded some, as far
// as can be seen.
func (e *examination) needsPlugin() bool {
	return !e.stateRead || len(e.records) > 0 || slices.ContainsFunc(e.agents, func(a status.Agent) bool { return a.NoAPI })
}

// selecting reports whether an agent needs an entry, as far as can be seen.
func (e *examination) selecting() bool {
	return len(e.agents) == 0 || slices.ContainsFunc(e.agents, func(a status.Agent) bool { return a.Unreadable != "" || len(selectorsOf(a)) > 0 })
}

// entry looks at our entry: each agent needs its key in it, with the selectors of its configuration.
func (e *examination) entry(path string, ours conflist.Found) {
	const check = "conflist"
	dir, err := ours.Dir()
	if err != nil {
		e.add(Fail, check, fmt.Sprintf("%s: %v: no pod can be started with this entry", path, err), "correct it, or have it installed again")
		return
	}
	if dir != filepath.Clean(e.RuntimeDir) {
		e.add(Fail, check, fmt.Sprintf("%s: runtimeDir is %s, and here it is %s", path, dir, e.RuntimeDir), "plugin and agent must share one: change runtimeDir or --runtime-dir")
		return
	}
	all, err := ours.ByAgent()
	if err != nil {
		e.add(Fail, check, fmt.Sprintf("%s: %v: no pod can be started with this entry", path, err), "correct it, or have it installed again")
		return
	}
	for _, agent := range slices.Sorted(maps.Keys(all)) {
		for _, s := range all[agent] {
			if _, err := labels.Parse(s.Selector); err != nil {
				e.add(Fail, check, fmt.Sprintf("%s: the selector %q of agent %s is not valid, so that the plugin records no pod for it: %v", path, s.Selector, agent, err),
					"correct it, or have it installed again")
			}
		}
	}
	for _, a := range e.agents {
		wanted := selectorsOf(a)
		if len(wanted) == 0 {
			continue
		}
		var missing []string
		for _, s := range wanted {
			if !slices.Contains(all[a.Name], s) {
				missing = append(missing, s.Namespace+" "+s.Selector)
			}
		}
		switch {
		case all[a.Name] == nil:
			e.add(Fail, check, fmt.Sprintf("%s: selectors has no key %q: the plugin records no pod for this agent", path, a.Name), "add "+keyOf(a.Name, wanted))
		case len(missing) > 0:
			e.add(Fail, check, fmt.Sprintf("%s: selectors of %q lack %s", path, a.Name, strings.Join(missing, "; ")), "it should be "+keyOf(a.Name, wanted))
		default:
			e.add(OK, check, fmt.Sprintf("%s has the selectors of agent %s", path, a.Name), "")
		}
	}
}

// selectorsOf are the selectors that an agent needs in the entry. The installer leaves out those of magic IPs that the configuration
// itself keeps from being served.
func selectorsOf(a status.Agent) (wanted []entry.Selector) {
	for _, m := range a.MagicIPs {
		s := entry.Selector{Namespace: m.Namespace, Selector: m.Selector}
		if m.UnservedBy != runtimedir.ByConfiguration && !slices.Contains(wanted, s) {
			wanted = append(wanted, s)
		}
	}
	return wanted
}

// keyOf is the key of an agent in the entry.
func keyOf(name string, selectors []entry.Selector) string {
	data, err := json.Marshal(map[string][]entry.Selector{name: selectors})
	if err != nil {
		return ""
	}
	return string(data)
}

func (e *examination) binary() {
	const check = "plugin binary"
	path := filepath.Join(e.BinDir, entry.Type)
	if _, err := os.Stat(e.BinDir); errors.Is(err, fs.ErrNotExist) {
		e.add(Hidden, check, e.BinDir+" is not visible from here", "run this on the node, or in the installer's container; --cni-bin-dir names another directory")
		return
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		e.add(Fail, check, err.Error(), "install it: without it the runtime fails every pod whose conflist names it")
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || info.Size() == 0:
		e.add(Fail, check, fmt.Sprintf("%s cannot be executed: mode %s, %d bytes", path, info.Mode(), info.Size()), "install it again")
	default:
		e.add(OK, check, path, "")
	}
}
