package doctor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent"
)

// plugin is the type of our entry in a conflist, and the name of its binary.
const plugin = "magic-ip-address"

// conflist is what we read of a CNI configuration: a list of plugins, or a single one.
type conflist struct {
	entry
	Plugins []entry `json:"plugins"`
}

type entry struct {
	Type       string `json:"type"`
	RuntimeDir string `json:"runtimeDir"`
	Selectors  map[string][]struct {
		Namespace string `json:"namespace"`
		Selector  string `json:"selector"`
	} `json:"selectors"`
}

// cni looks at the conflist that the runtime loads, and at the binary.
func (e *examination) cni() {
	e.binary()
	const check = "conflist"
	files, err := os.ReadDir(e.ConfDir)
	if errors.Is(err, fs.ErrNotExist) {
		e.add(Hidden, check, e.ConfDir+" is not visible from here", "on the node, or with --cni-conf-dir")
		return
	}
	if err != nil {
		e.add(Fail, check, err.Error(), "run this as root")
		return
	}
	var names []string
	for _, file := range files { // in order; the runtime takes the first
		if slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(file.Name())) {
			names = append(names, file.Name())
		}
	}
	if len(names) == 0 {
		e.add(Fail, check, "no CNI configuration in "+e.ConfDir, "install a CNI plugin that gives pods their addresses, and then this one behind it")
		return
	}
	for i, name := range names {
		path := filepath.Join(e.ConfDir, name)
		conf, err := readConflist(path)
		if err != nil && i == 0 {
			e.add(Fail, check, err.Error(), "mend it, or have its owner write it anew")
		}
		at := slices.IndexFunc(conf.Plugins, func(p entry) bool { return p.Type == plugin })
		switch {
		case i == 0 && at < 0 && err == nil:
			e.add(Fail, check, path+", which the runtime loads, has no entry of type "+plugin, "install it: pods are only known by the API until then. Add the entry behind the plugin that assigns addresses")
		case i > 0 && at >= 0:
			e.add(Warn, check, path+" has an entry of type "+plugin+", but the runtime loads "+names[0], "take the entry to "+names[0]+", or remove one of the two files")
		case i == 0 && at == 0:
			e.add(Fail, check, path+": the entry of type "+plugin+" comes first", "move it behind the plugin that assigns addresses")
		case i == 0 && at > 0:
			e.entry(path, conf.Plugins[at])
		}
	}
}

func readConflist(path string) (conflist, error) {
	var conf conflist
	data, err := os.ReadFile(path)
	if err != nil {
		return conf, err
	}
	if len(data) == 0 {
		return conf, fmt.Errorf("%s is empty", path)
	}
	if err := json.Unmarshal(data, &conf); err != nil {
		return conf, fmt.Errorf("%s: %w", path, err)
	}
	return conf, nil
}

// entry looks at our entry: each agent needs its key in it, with the selectors of its configuration.
func (e *examination) entry(path string, ours entry) {
	const check = "conflist"
	dir := ours.RuntimeDir
	if dir == "" {
		dir = "/run/magic-ip-address"
	}
	if filepath.Clean(dir) != filepath.Clean(e.RuntimeDir) {
		e.add(Fail, check, fmt.Sprintf("%s: runtimeDir is %s, and here it is %s", path, dir, e.RuntimeDir), "plugin and agent must share one: change runtimeDir or --runtime-dir")
		return
	}
	for _, a := range e.agents {
		have := map[string]bool{}
		for _, s := range ours.Selectors[a.Name] {
			have[s.Namespace+" "+s.Selector] = true
		}
		var missing []string
		for _, m := range a.MagicIPs {
			if want := m.Namespace + " " + m.Selector; !have[want] && !slices.Contains(missing, want) {
				missing = append(missing, want)
			}
		}
		switch {
		case ours.Selectors[a.Name] == nil:
			e.add(Fail, check, fmt.Sprintf("%s: selectors has no key %q: the plugin records no pod for this agent", path, a.Name), "add "+selectorsOf(a))
		case len(missing) > 0:
			e.add(Fail, check, fmt.Sprintf("%s: selectors of %q lack %s", path, a.Name, strings.Join(missing, "; ")), "it should be "+selectorsOf(a))
		default:
			e.add(OK, check, fmt.Sprintf("%s has the selectors of agent %s", path, a.Name), "")
		}
	}
}

// selectorsOf is the key that an agent needs.
func selectorsOf(a agent.NodeAgent) string {
	type selector struct {
		Namespace string `json:"namespace"`
		Selector  string `json:"selector"`
	}
	var list []selector
	for _, m := range a.MagicIPs {
		if s := (selector{m.Namespace, m.Selector}); !slices.Contains(list, s) {
			list = append(list, s)
		}
	}
	data, err := json.Marshal(map[string][]selector{a.Name: list})
	if err != nil {
		return ""
	}
	return string(data)
}

func (e *examination) binary() {
	const check = "plugin binary"
	path := filepath.Join(e.BinDir, plugin)
	if _, err := os.Stat(e.BinDir); errors.Is(err, fs.ErrNotExist) {
		e.add(Hidden, check, e.BinDir+" is not visible from here", "on the node, or with --cni-bin-dir")
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
