package runtimedir

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"
)

// The files of the plugin, and their greatest sizes in bytes.
const (
	stateFile  = "state.json"
	stateLock  = "state.lock"
	corruptExt = ".corrupt" // behind the name of the last file that could not be used

	stateLimit = 16 << 20
)

// Attachment is one record: the interface of one pod's sandbox and its addresses.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	Network     string `json:"network"` // the name of the CNI network
	Namespace   string `json:"namespace,omitempty"`
	Name        string `json:"name,omitempty"`
	UID         string `json:"uid,omitempty"` // K8S_POD_UID; a static pod's differs from its UID in the API
	// Labels of the pod when it was added, only keys that selectors used then. Nil (absent in the file) is: not known; a
	// pod known to have none of them has an empty map.
	Labels map[string]string `json:"labels,omitzero"`
	IPs    []netip.Addr      `json:"ips"`
	// HostInterface is the link on the node that leads to the sandbox, where the CNI result names it.
	HostInterface string `json:"hostInterface,omitempty"`
	// HostIfIndex is the index of that link, which identifies it: a name passes to another link. 0 where not known.
	HostIfIndex int       `json:"hostIfIndex,omitempty"`
	Netns       string    `json:"netns,omitempty"` // a path
	AddedAt     time.Time `json:"addedAt"`
}

// Key identifies an attachment. Never the address: addresses are reused while the DEL of their former
// owner is still to come.
type Key struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// Key returns what identifies a.
func (a Attachment) Key() Key { return Key{ContainerID: a.ContainerID, IfName: a.IfName} }

// File is the content of state.json, the file in which the plugin records the attachments of pods. The plugin is its only
// writer. Writers take turns by the lock on state.lock. The list is read and written whole: it is meant for the pods of
// one node. A writer keeps the fields of a record that it does not know, as long as the file was not edited by hand.
type File struct {
	Version int `json:"version"`
	// Since is when this list was begun: with the first record, or with the first update that found a
	// corrupt file. Where it differs from what it was, the list before is lost, and what is not in
	// this one may still be attached. Zero in files of builds that did not write it.
	Since time.Time `json:"since,omitzero"`
	// Attachments are in the order of their ADD.
	Attachments []Attachment `json:"attachments"`
}

func (f *File) version() *int { return &f.Version }

// StatePath is the state file, for messages.
func (d Dir) StatePath() string { return d.path + "/" + pluginDir + "/" + stateFile }

// ReadState returns all that is recorded. Errors are fs.ErrNotExist where nothing was ever recorded,
// *NewerVersionError, *CorruptError, *UnsafeError, or the operating system's. It changes nothing and takes no lock.
func (d Dir) ReadState() (File, error) {
	old, oldErr := d.readOldState() // first: it may be moved in between
	file, err := d.readPluginState()
	switch {
	case errors.Is(oldErr, fs.ErrNotExist):
		return file, err
	case errors.Is(err, fs.ErrNotExist):
		return old, oldErr
	case err != nil || oldErr != nil:
		return file, err
	}
	return mergeFiles(file, old), nil
}

func (d Dir) readPluginState() (File, error) {
	f, err := d.open(pluginDir)
	if err != nil {
		return File{}, err
	}
	defer f.close()
	return readState(f)
}

func readState(f *folder) (File, error) {
	data, err := f.read(stateFile, stateLimit)
	if err != nil {
		return File{}, err
	}
	return parse(f.join(stateFile), data)
}

func parse(path string, data []byte) (File, error) {
	var file File
	if err := decode(path, data, &file); err != nil {
		return File{}, err
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

// Recorded reports whether an attachment is recorded, without the cost of decoding any. The errors are those of ReadState.
func (d Dir) Recorded(key Key) (bool, error) {
	old, oldErr := d.recorded(key) // first: it may be moved in between
	recorded, err := d.recorded(key, pluginDir)
	switch {
	case old:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, oldErr
	}
	return recorded, err
}

func (d Dir) recorded(key Key, names ...string) (bool, error) {
	f, err := d.open(names...)
	if err != nil {
		return false, err
	}
	defer f.close()
	data, err := f.read(stateFile, stateLimit)
	if err != nil {
		return false, err
	}
	if !intact(data) {
		file, err := parse(f.join(stateFile), data)
		return slices.ContainsFunc(file.Attachments, func(a Attachment) bool { return a.Key() == key }), err
	}
	return contains(data, key)
}

// SetAside is the corrupt state file that was kept last, and when it was written; false where there is none.
func (d Dir) SetAside() (path string, at time.Time, ok bool) {
	f, err := d.open(pluginDir)
	if err != nil {
		return "", time.Time{}, false
	}
	defer f.close()
	at, err = f.modified(stateFile + corruptExt)
	return f.join(stateFile + corruptExt), at, err == nil
}
