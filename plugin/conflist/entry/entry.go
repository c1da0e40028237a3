// Package entry is the format of the plugin's entry in a conflist. It is apart from package conflist because the plugin
// parses an entry at each ADD, and must not pay for what edits files.
package entry

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
)

// Type is the "type" of an entry, and the name of the plugin's binary.
const Type = "magic-ip-address"

// DefaultRuntimeDir is what an entry without a runtimeDir means.
const DefaultRuntimeDir = "/run/magic-ip-address"

// EveryNamespace as the namespace of a selector.
const EveryNamespace = "*"

// Selector is one element below the name of an agent: a namespace and a label selector in the notation of kubectl.
type Selector struct {
	Namespace string `json:"namespace"`
	Selector  string `json:"selector"`
}

// Raw are the keys of an entry that are not CNI's. Each is decoded alone, so that an error can name it. Errors are
// *types.Error: code 6 for what has another type than it should, code 7 for a value that is not allowed.
type Raw struct {
	RuntimeDir json.RawMessage `json:"runtimeDir"`
	Selectors  json.RawMessage `json:"selectors"`
}

// Dir is the runtime directory. DefaultRuntimeDir also when there is an error.
func (r Raw) Dir() (string, error) {
	if Absent(r.RuntimeDir) {
		return DefaultRuntimeDir, nil
	}
	var dir string
	if err := json.Unmarshal(r.RuntimeDir, &dir); err != nil {
		return DefaultRuntimeDir, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("runtimeDir: must be a string: %v", err), "")
	}
	if !filepath.IsAbs(dir) {
		return DefaultRuntimeDir, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("runtimeDir: %q is not an absolute path", dir), "")
	}
	return filepath.Clean(dir), nil
}

// ByAgent are the selectors by the name of the agent. Label selectors are not parsed: one that is not valid is one
// agent's, and the pods are everybody's.
func (r Raw) ByAgent() (map[string][]Selector, error) {
	if Absent(r.Selectors) {
		return nil, nil
	}
	var selectors map[string][]Selector
	if err := json.Unmarshal(r.Selectors, &selectors); err != nil {
		return selectors, types.NewError(types.ErrDecodingFailure, fmt.Sprintf(
			`selectors: must be an object {"agent name": [{"namespace": "…", "selector": "…"}]}: %v`, err), "")
	}
	for _, agent := range slices.Sorted(maps.Keys(selectors)) {
		for i, selector := range selectors[agent] {
			if selector.Namespace == "" {
				return selectors, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(
					`selectors: %q[%d].namespace is empty: must be a namespace, or %q for every namespace`, agent, i, EveryNamespace), "")
			}
		}
	}
	return selectors, nil
}

// Absent says that a key is missing or null.
func Absent(value json.RawMessage) bool {
	return len(value) == 0 || bytes.Equal(value, []byte("null"))
}
