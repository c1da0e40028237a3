package runtimedir

import (
	"errors"
	"io/fs"
	"time"
)

const (
	recordFile  = "record.json"
	recordLimit = 256 << 10
)

// Installer is the directory of the installer of one agent, install/<name>/.
type Installer struct{ writer }

// Installers lists the agents of which an installer has a record, in order. With an error they are those that can be listed.
func (d Dir) Installers() ([]string, error) {
	return d.writers(installDir, d.installerWriter, recordFile)
}

func (d Dir) installerWriter(name string) writer { return d.Installer(name).writer }

// Lock makes this process the installer of the agent until the lock is closed or the process ends; ErrLocked while another
// process is.
func (i Installer) Lock() (*Lock, error) { return i.lock(i.takeOver) }

// Record is what an installer has put on the node: record.json. It is there before the agent's key is in a conflist, and
// is removed after the key.
type Record struct {
	Version int `json:"version"`
	// Conflist is the file that has the key, by the path that the installer knows it by; empty while there is none.
	Conflist string `json:"conflist,omitempty"`
	// Binary is the path of the plugin; PluginVersion and PluginSHA256 are those that this installer brings.
	Binary        string `json:"binary"`
	PluginVersion string `json:"pluginVersion"`
	PluginSHA256  string `json:"pluginSHA256"`
	// Restored is how often the key has been put back since this installer started, after another program had removed it.
	Restored int `json:"restored,omitempty"`
	// InstalledAt is when the key was last put into a conflist (RFC 3339).
	InstalledAt time.Time `json:"installedAt,omitzero"`
	LastError   string    `json:"lastError,omitempty"`
	// Notes are the conditions that an operator should know of, one sentence each.
	Notes []string `json:"notes,omitempty"`
}

func (r *Record) version() *int { return &r.Version }

// ReadRecord returns what the installer has put on the node; fs.ErrNotExist where that is nothing.
func (i Installer) ReadRecord() (*Record, error) {
	if i.isOld() {
		return i.readOld()
	}
	record := &Record{}
	if err := i.read(recordFile, recordLimit, record); err != nil {
		return nil, err
	}
	return record, nil
}

// RemoveRecord removes the record: the key is in no network configuration any more.
func (i Installer) RemoveRecord() error {
	if err := i.removeOld(i.oldFile); err != nil {
		return err
	}
	f, err := i.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.close()
	return f.remove(recordFile)
}

// WriteRecord replaces the record. The caller holds the lock.
func (i Installer) WriteRecord(record Record) error {
	return i.write(recordFile, recordLimit, &record)
}
