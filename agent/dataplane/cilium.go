package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// StateDir is where Cilium's agent keeps its state, where it is not told otherwise.
const StateDir = "/run/cilium/state"

// File is the name of the file in the state directory that Cilium's agent writes at each start: its configuration as JSON, with
// the values that are in force rather than those that were asked for (github.com/cilium/cilium, pkg/option, StoreInFile).
const File = "agent-runtime-config.json"

// maxFile bounds what is read. Cilium 1.20 writes some 8 KiB.
const maxFile = 4 << 20

// Settings are those of Cilium that decide by which way packets of pods go.
type Settings = runtimedir.CiliumSettings

// Read reads what Cilium's agent has written into its state directory: fs.ErrNotExist where it has written nothing, or the
// directory is not there. It is written in place: an error may be gone a moment later.
func Read(stateDir string) (Settings, error) {
	// Without O_NONBLOCK a FIFO of that name would stop the reader.
	file, err := os.OpenFile(filepath.Join(stateDir, File), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Settings{}, err
	}
	defer func() { _ = file.Close() }()
	if info, err := file.Stat(); err != nil || !info.Mode().IsRegular() {
		return Settings{}, errors.Join(fmt.Errorf("%s is no regular file", file.Name()), err)
	}
	settings, err := parse(io.LimitReader(file, maxFile))
	if err != nil {
		return Settings{}, fmt.Errorf("%s: %w", file.Name(), err)
	}
	return settings, nil
}

// parse takes no value for granted: a version of Cilium that calls a setting otherwise is one of which nothing is known.
func parse(r io.Reader) (Settings, error) {
	type legacyRouting struct{ EnableHostLegacyRouting *bool }
	var file struct {
		legacyRouting                          // in Cilium 1.15
		UnsafeDaemonConfigOption legacyRouting // in 1.20
		EnableIPv4, EnableIPv6   *bool
		EnableEndpointRoutes     *bool
		EnableBPFMasquerade      *bool
		EnableIPv4Masquerade     *bool
		EnableIPv6Masquerade     *bool
	}
	if err := json.NewDecoder(r).Decode(&file); err != nil {
		return Settings{}, err
	}
	legacy := file.UnsafeDaemonConfigOption.EnableHostLegacyRouting
	if legacy == nil {
		legacy = file.EnableHostLegacyRouting
	}
	var settings Settings
	var missing []string
	for _, value := range []struct {
		name     string
		from, to *bool
	}{
		{"EnableHostLegacyRouting", legacy, &settings.LegacyHostRouting},
		{"EnableIPv4", file.EnableIPv4, &settings.IPv4},
		{"EnableIPv6", file.EnableIPv6, &settings.IPv6},
		{"EnableEndpointRoutes", file.EnableEndpointRoutes, &settings.EndpointRoutes},
		{"EnableBPFMasquerade", file.EnableBPFMasquerade, &settings.BPFMasquerade},
		{"EnableIPv4Masquerade", file.EnableIPv4Masquerade, &settings.IPv4Masquerade},
		{"EnableIPv6Masquerade", file.EnableIPv6Masquerade, &settings.IPv6Masquerade},
	} {
		if value.from == nil {
			missing = append(missing, value.name)
			continue
		}
		*value.to = *value.from
	}
	if len(missing) > 0 {
		return settings, fmt.Errorf("%s is missing: this version of Cilium is not known", strings.Join(missing, ", "))
	}
	return settings, nil
}
