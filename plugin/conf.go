package plugin

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// rawConf is the network configuration as it comes in. What belongs to one key is decoded alone, so that an
// error names the key, and keys of the runtime or of other plugins may have any format.
type rawConf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	entry.Raw
	RuntimeConfig    json.RawMessage `json:"runtimeConfig"`
	Args             json.RawMessage `json:"args"`
	PrevResult       json.RawMessage `json:"prevResult"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
}

// conf is a network configuration that can be used.
type conf struct {
	cniVersion string
	network    string
	dir        runtimedir.Dir
	selectors  map[string][]entry.Selector // by agent name

	// Undecoded: most pods do not need them.
	runtimeConfig json.RawMessage
	args          json.RawMessage
	prevResult    json.RawMessage
	valid         json.RawMessage
}

// parseConf returns *types.Error, code 6 for what has another type than it should and code 7 for a value that
// is not allowed. The conf has a runtimeDir also when there is an error.
//
// A selector that does not parse is no error: it belongs to one agent, and an error would fail the pods of all.
func parseConf(stdin []byte) (*conf, error) {
	c, raw, err := parseCommon(stdin)
	if err == nil {
		c.selectors, err = raw.ByAgent()
	}
	return c, err
}

// parseCommon parses what every command needs: all but the selectors.
func parseCommon(stdin []byte) (*conf, *rawConf, error) {
	var raw rawConf
	err := json.Unmarshal(stdin, &raw)
	c := &conf{
		cniVersion:    raw.CNIVersion,
		network:       raw.Name,
		dir:           runtimedir.New(entry.DefaultRuntimeDir),
		runtimeConfig: raw.RuntimeConfig,
		args:          raw.Args,
		prevResult:    raw.PrevResult,
		valid:         raw.ValidAttachments,
	}
	if err != nil {
		return c, &raw, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration: %v", err), "")
	}
	dir, err := raw.Dir()
	c.dir = runtimedir.New(dir)
	return c, &raw, err
}

// result is what ADD prints: prevResult. Its bytes are unchanged, so that unknown fields survive, unless
// it has to be converted to the version of the configuration.
func (c *conf) result() (json.RawMessage, error) {
	if entry.Absent(c.prevResult) {
		return nil, types.NewError(types.ErrInvalidNetworkConfig,
			"prevResult is missing: this plugin must be called behind another one that assigns addresses", "")
	}
	var head struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(c.prevResult, &head); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: must be a CNI result: %v", err), "")
	}
	// Results before 1.0.0 may leave their version out; it is the configuration's then, as in libcni.
	if head.CNIVersion == "" || head.CNIVersion == c.cniVersion {
		return c.prevResult, nil
	}
	converted, err := convert(head.CNIVersion, c.prevResult, c.cniVersion)
	if err != nil {
		return nil, types.NewError(types.ErrIncompatibleCNIVersion, fmt.Sprintf("prevResult: %v", err), "")
	}
	return converted, nil
}

func convert(from string, result json.RawMessage, to string) (converted json.RawMessage, err error) {
	// The library (1.3.1) panics on null among the interfaces, addresses and routes that it converts.
	defer func() {
		if recover() != nil {
			err = errors.New("cannot be converted: has it an entry that is null?")
		}
	}()
	old, err := version.NewResult(from, result)
	if err != nil {
		return nil, err
	}
	wanted, err := old.GetAsVersion(to)
	if err != nil {
		return nil, err
	}
	return json.Marshal(wanted)
}

// validAttachments are those that GC is to keep; nil where there is no list. An empty list
// removes everything. cnitool calls GC without a list, after libcni has sent a DEL for each attachment in its cache.
func (c *conf) validAttachments() (map[runtimedir.Key]bool, error) {
	const key = "cni.dev/valid-attachments"
	if len(c.valid) == 0 {
		return nil, nil
	}
	var list []types.GCAttachment
	if err := json.Unmarshal(c.valid, &list); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf(
			`%s: must be a list of {"containerID": "…", "ifname": "…"}: %v`, key, err), "")
	}
	valid := make(map[runtimedir.Key]bool, len(list))
	for i, attachment := range list {
		if attachment.ContainerID == "" || attachment.IfName == "" {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(
				"%s: entry %d: containerID and ifname must not be empty", key, i), "")
		}
		valid[runtimedir.Key(attachment)] = true
	}
	return valid, nil
}
