// Package runtimedir is every file under the runtime directory of a node: formats, locks, opening and replacing.
//
//	<dir>/                 holds directories only
//	  plugin/              written by the CNI plugin, as root of the node: state.json, its lock, plugin.log
//	  agents/<name>/       written by that agent: lock, live, status.json, claims.json, pods.json, memory.json
//	  install/<name>/      written by that installer: lock, live, record.json
//
// Each directory has one writer, is 0700, and is mounted read-only in the containers of all others. A reader
// treats it as hostile, since an agent runs in a container and a reader may be root of the node: no symbolic link
// is followed, and a file is read only if it is regular, owned by root, has one link and is within its size limit.
// Locks are files that other writers cannot open, see lock.go. A directory is never locked, because a process that can read
// a directory can lock it.
//
// The layout of the version before (state.json, agents/<name>.json, agents/<name>.install and their locks side by
// side) is read until its files are taken over, see old.go.
//
// Limits: standard library and x/sys only, because the plugin runs once for every pod.
package runtimedir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The directories of the writers.
const (
	pluginDir  = "plugin"
	agentsDir  = "agents"
	installDir = "install"
)

// Dir is a runtime directory. The path itself is trusted, except that it must not be a symbolic link.
type Dir struct{ path string }

// New returns the runtime directory at an absolute path. It touches nothing.
func New(path string) Dir { return Dir{path: path} }

// Path is where the directory is.
func (d Dir) Path() string { return d.path }

// Agent is the agent called name.
func (d Dir) Agent(name string) Agent {
	return Agent{writer{dir: d, group: agentsDir, name: name, oldFile: name + ".json", oldLock: name + ".lock"}}
}

// Installer is the installer of the agent called name.
func (d Dir) Installer(name string) Installer {
	return Installer{writer{dir: d, group: installDir, name: name, oldFile: name + ".install", oldLock: name + ".install-lock"}}
}

// open opens a directory below d, and d itself without names.
func (d Dir) open(names ...string) (*folder, error) {
	f, err := openFolder(d.path)
	return f.descend(err, names, (*folder).sub)
}

// make creates a directory below d where it is missing, and opens it.
func (d Dir) make(names ...string) (f *folder, err error) {
	for range 100 { // a writer that leaves removes directories that are empty
		if f, err = d.makeOnce(names); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return f, err
}

func (d Dir) makeOnce(names []string) (*folder, error) {
	f, err := openFolder(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(d.path), 0o755); err != nil {
			return nil, err
		}
		if err := os.Mkdir(d.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err = openFolder(d.path)
	}
	return f.descend(err, names, (*folder).makeSub)
}

// NewerVersionError means that a newer build has written a file in a format that this one does not know.
type NewerVersionError struct {
	Path    string
	Version int
}

func (e *NewerVersionError) Error() string {
	return fmt.Sprintf("%s has version %d, this build reads up to %d: upgrade it", e.Path, e.Version, Version)
}

// CorruptError means that a file is not what a writer of its format leaves.
type CorruptError struct {
	Path string
	Err  error
}

func (e *CorruptError) Error() string { return fmt.Sprintf("%s is corrupt: %v", e.Path, e.Err) }

func (e *CorruptError) Unwrap() error { return e.Err }

// UnsafeError means that a file is not read, although it is there: another process could have put it there to make its
// reader read something else, wait, or run out of memory.
type UnsafeError struct {
	Path string
	// Found is what is there, such as "a symbolic link". Limit is the size allowed, in bytes.
	Found string
	Limit int64
}

func (e *UnsafeError) Error() string {
	return fmt.Sprintf("%s is %s; allowed: a regular file of root with one link and at most %d bytes. remove it, its writer creates a new one", e.Path, e.Found, e.Limit)
}
