// Package state is the file in which the plugin records the attachments of pods,
// <runtime dir>/state.json: which sandbox has which addresses.
//
// The plugin is its only writer; agents and people read it. Writers take turns by a lock on state.lock,
// which goes with the last agent of the node, and not before. Every change is a temporary file and a rename, so that a reader, who takes no
// lock, sees the old list or the new one, and so does everybody after a writer was killed.
//
// Limits: the list is read and written whole; it is meant for the pods of one node. A writer keeps the
// fields of a record that it does not know, as long as nobody has edited the file by hand. Standard
// library and x/sys only: the plugin must stay small.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

// Version is the format that this build writes and the newest it reads.
const Version = 1

const (
	fileName = "state.json"
	// Only the holder of the lock writes, so one name is enough, and what a killed writer leaves behind
	// is overwritten by the next.
	tempName = fileName + ".tmp"
	// A corrupt file is kept under this name; the next one replaces it.
	corruptName = fileName + ".corrupt"
	lockName    = "state.lock"
)

// LogName is the plugin's log in a runtime dir; with OldLog behind it, the one before.
const (
	LogName = "plugin.log"
	OldLog  = ".1"
)

// Attachment is one record: the interface of one pod's sandbox and its addresses.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	Network     string `json:"network"` // the name of the CNI network
	Namespace   string `json:"namespace,omitempty"`
	Name        string `json:"name,omitempty"`
	UID         string `json:"uid,omitempty"` // K8S_POD_UID; a static pod's differs from its UID in the API
	// Labels of the pod when it was added. Nil (absent in the file) is: not known; a pod known to have no
	// labels has an empty map.
	Labels map[string]string `json:"labels,omitzero"`
	IPs    []netip.Addr      `json:"ips"`
	// HostInterface is the link on the node that leads to the sandbox, where the CNI result names it.
	HostInterface string    `json:"hostInterface,omitempty"`
	Netns         string    `json:"netns,omitempty"` // a path
	AddedAt       time.Time `json:"addedAt"`
}

// Key identifies an attachment. Never the address: addresses are reused while the DEL of their former
// owner is still to come.
type Key struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// Key returns what identifies a.
func (a Attachment) Key() Key { return Key{ContainerID: a.ContainerID, IfName: a.IfName} }

// NewerVersionError says that the file was written by a newer build, which alone understands it.
type NewerVersionError struct {
	Path    string
	Version int
}

func (e *NewerVersionError) Error() string {
	return fmt.Sprintf("%s has version %d, this build reads up to %d: upgrade it", e.Path, e.Version, Version)
}

// CorruptError says that the file is not what a writer of this format leaves.
type CorruptError struct {
	Path string
	Err  error
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s is corrupt: %v", e.Path, e.Err) }

func (e *CorruptError) Unwrap() error { return e.Err }

// File is the content of state.json.
type File struct {
	Version int `json:"version"`
	// Since is when this list was begun: with the first record, or with the first update that found a
	// corrupt file. Where it differs from what it was, the list that was before is lost, and what is not in
	// this one may still be attached. Zero in files of builds that did not tell.
	Since time.Time `json:"since,omitzero"`
	// Attachments are in the order of their ADD.
	Attachments []Attachment `json:"attachments"`
}

// Read returns the attachments recorded in the runtime directory dir. The errors are those of ReadFile.
func Read(dir string) ([]Attachment, error) {
	file, err := ReadFile(dir)
	return file.Attachments, err
}

// ReadFile returns all that is recorded in the runtime directory dir. Errors are fs.ErrNotExist where
// nothing was ever recorded, *NewerVersionError, *CorruptError, or the operating system's. It changes
// nothing.
func ReadFile(dir string) (File, error) {
	path := Path(dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return File{}, err
	}
	return parse(path, data)
}

func parse(path string, data []byte) (File, error) {
	var file File
	err := json.Unmarshal(data, &file)
	if err != nil {
		// A newer file need not have the shape that this build knows: its version is read alone.
		var head struct{ Version int }
		if json.Unmarshal(data, &head) == nil {
			file.Version = head.Version
		}
	}
	switch {
	case file.Version > Version:
		return File{}, &NewerVersionError{Path: path, Version: file.Version}
	case err != nil:
		return File{}, &CorruptError{Path: path, Err: err}
	case file.Version < 1:
		return File{}, &CorruptError{Path: path, Err: fmt.Errorf("version %d", file.Version)}
	}
	for i, attachment := range file.Attachments {
		if err := attachment.validate(); err != nil {
			return File{}, &CorruptError{Path: path, Err: fmt.Errorf("attachment %d: %w", i, err)}
		}
	}
	return file, nil
}

func (a Attachment) validate() error {
	if a.ContainerID == "" || a.IfName == "" {
		return errors.New("no containerID or no ifName")
	}
	for _, addr := range a.IPs {
		if !addr.IsValid() {
			return errors.New("an empty address") // which netip.Addr accepts as JSON
		}
	}
	return nil
}
