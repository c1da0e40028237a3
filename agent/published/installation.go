package published

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Installed is what we read of agents/<name>.install, which the installer of that name writes: it is there for as
// long as the agent's key may be in a conflist.
type Installed struct {
	Conflist    string    `json:"conflist"`
	Binary      string    `json:"binary"`
	InstalledAt time.Time `json:"installedAt"`
	LastError   string    `json:"lastError,omitempty"`
	Notes       []string  `json:"notes,omitempty"`
}

// Installation reads what the installer of the agent called name says; nil where there is none.
func Installation(runtimeDir, name string) (*Installed, error) {
	path := filepath.Join(Dir(runtimeDir), name+".install")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var installed Installed
	if err := json.Unmarshal(data, &installed); err != nil {
		return nil, fmt.Errorf("%s is corrupt: %w", path, err)
	}
	return &installed, nil
}
