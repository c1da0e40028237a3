package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// RecordVersion is the format of a Record that this build writes and the newest it reads.
const RecordVersion = 1

// Record is the content of agents/<name>.install: what the installer of that agent has put on the node. It is there
// before the agent's key is in a conflist, and goes after the key has gone.
type Record struct {
	Version int `json:"version"`
	// Conflist is the file that has the key, by the path that the installer knows it by; empty while there is none.
	Conflist string `json:"conflist,omitempty"`
	// Binary is the path of the plugin; PluginVersion and PluginSHA256 are those that this installer brings.
	Binary        string `json:"binary"`
	PluginVersion string `json:"pluginVersion"`
	PluginSHA256  string `json:"pluginSHA256"`
	// InstalledAt is when the key was last put into a conflist (RFC 3339).
	InstalledAt time.Time `json:"installedAt,omitzero"`
	LastError   string    `json:"lastError,omitempty"`
	// Notes are the conditions that an operator should know of, one sentence each.
	Notes []string `json:"notes,omitempty"`
}

const recordExt = ".install"

// RecordPath is the file of the installer of the agent called name.
func RecordPath(runtimeDir, name string) string {
	return filepath.Join(published.Dir(runtimeDir), name+recordExt)
}

// recordLock is held by the installer for as long as it lives.
func recordLock(runtimeDir, name string) string { return RecordPath(runtimeDir, name) + "-lock" }

// Lock makes this process the installer of the agent called name, as published.Lock does for the agent itself.
func Lock(runtimeDir, name string) (*os.File, error) {
	return published.LockFile(recordLock(runtimeDir, name))
}

// Live says whether an installer of the agent called name runs.
func Live(runtimeDir, name string) bool { return published.Held(recordLock(runtimeDir, name)) }

// ReadRecord returns what the installer of the agent called name has noted; fs.ErrNotExist where nothing of it
// is installed.
func ReadRecord(runtimeDir, name string) (*Record, error) {
	path := RecordPath(runtimeDir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var record Record
	if err := json.Unmarshal(data, &record); err != nil {
		return nil, fmt.Errorf("%s is corrupt: %w", path, err)
	}
	if record.Version > RecordVersion {
		return nil, fmt.Errorf("%s has version %d, this build reads up to %d: upgrade it", path, record.Version, RecordVersion)
	}
	return &record, nil
}

// writeRecord replaces the file as a whole. The caller holds the installer's lock and so is the only writer.
func writeRecord(runtimeDir, name string, record Record) error {
	record.Version = RecordVersion
	data, err := json.MarshalIndent(record, "", "  ")
	if err != nil {
		return err
	}
	path := RecordPath(runtimeDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { // somebody may have removed it
		return err
	}
	if err := os.WriteFile(path+".tmp", append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// otherInstallers are the installers of other agents that run on this node; an error where one is of a newer build.
func otherInstallers(runtimeDir, name string) (others []*Record, err error) {
	entries, err := os.ReadDir(published.Dir(runtimeDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, entry := range entries {
		other, ok := strings.CutSuffix(entry.Name(), recordExt)
		if !ok || other == name || !Live(runtimeDir, other) {
			continue
		}
		record, err := ReadRecord(runtimeDir, other)
		if err != nil {
			return nil, err
		}
		others = append(others, record)
	}
	return others, nil
}
