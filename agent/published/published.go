// Package published is the file that an agent publishes about itself,
// <runtime dir>/agents/<name>.json, and the lock that says whether the agent lives.
//
// The agent of that name is its only writer. The CNI plugin reads it (labels of pods, records known
// to be dead), as do other agents (conflicts) and people. Standard library and x/sys only: the plugin
// must stay small.
package published

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// Version is the format that this build writes and the newest it reads.
const Version = 1

// Agent is the content of agents/<name>.json.
type Agent struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// StartedAt is when this agent process began to serve (RFC 3339), LastSync when the kernel was
	// last brought to another state. The file's modification time is the heartbeat:
	// the agent renews it every PollInterval.
	StartedAt    time.Time `json:"startedAt"`
	LastSync     time.Time `json:"lastSync,omitzero"`
	LastError    string    `json:"lastError,omitempty"`
	Backend      string    `json:"backend,omitempty"`
	BackendNote  string    `json:"backendNote,omitempty"`
	PollInterval string    `json:"pollInterval"` // a Go duration
	MagicIPs     []MagicIP `json:"magicIPs"`
	// Labels of the node's pods in the namespaces that the agent serves, by pod UID.
	Labels map[string]map[string]string `json:"labels,omitempty"`
	// Told is what else the API has told of pods with a record, by the UID in it.
	Told map[string]Pod `json:"told,omitempty"`
	// Dead are attachments whose pod and host interface are both gone: the plugin drops their records.
	Dead []Attachment `json:"dead,omitempty"`
	// Records are those of the endpoints, from the list of the state file that was begun at RecordsSince, and
	// Lost those from lists before that one which still count: what the agent goes on with after a restart.
	Records      []state.Attachment `json:"records,omitempty"`
	RecordsSince time.Time          `json:"recordsSince,omitzero"`
	Lost         []state.Attachment `json:"lost,omitempty"`
	// Withdrawn are the addresses that DEL has taken from a pod, by UID, and that the API may tell still.
	Withdrawn map[string][]netip.Addr `json:"withdrawn,omitempty"`
	// Notes are the conditions that an operator should know of, one sentence each.
	Notes []string `json:"notes,omitempty"`
}

// MagicIP is one claim of an agent (address, protocol, port) and what became of it.
type MagicIP struct {
	Address   netip.Addr `json:"ipAddress"`
	Port      uint16     `json:"port"`
	Protocol  string     `json:"protocol"`
	Namespace string     `json:"namespace"`
	Selector  string     `json:"selector"`
	// ClaimedAt decides between agents that claim the same address, protocol and port: the older stands.
	ClaimedAt time.Time `json:"claimedAt"`
	// Refused is the reason why this claim is not served; empty where it is.
	Refused string `json:"refused,omitempty"`
	// Action is what becomes of new packets: serve, reject, hold or pass; empty where the claim is refused.
	Action string `json:"action,omitempty"`
	// Endpoints is where traffic goes now.
	Endpoints []Endpoint `json:"endpoints"`
	// LostAt is when the last endpoint went.
	LostAt time.Time `json:"lostAt,omitzero"`
}

// Endpoint is a target that traffic goes to now.
type Endpoint struct {
	Address netip.AddrPort `json:"address"`
	Pod     string         `json:"pod,omitempty"` // namespace/name
	UID     string         `json:"uid,omitempty"`
	// Recorded: the CNI plugin has recorded the pod's sandbox.
	Recorded bool `json:"recorded,omitempty"`
}

// Pod is what the API has told of a pod, besides its labels.
type Pod struct {
	CreatedAt time.Time         `json:"createdAt"`
	Owner     string            `json:"owner,omitempty"` // Kind/name of the controller
	Ports     map[string]uint16 `json:"ports,omitempty"` // by name
	Finished  bool              `json:"finished,omitempty"`
}

// Attachment identifies a record of the state file.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// NewerVersionError says that a file was written by a newer build, which alone understands it.
type NewerVersionError struct {
	Path    string
	Version int
}

func (e *NewerVersionError) Error() string {
	return fmt.Sprintf("%s has version %d, this build reads up to %d: upgrade it", e.Path, e.Version, Version)
}

// Dir is the folder of the agents' files.
func Dir(runtimeDir string) string { return filepath.Join(runtimeDir, "agents") }

// Path is the file of the agent called name.
func Path(runtimeDir, name string) string { return filepath.Join(Dir(runtimeDir), name+".json") }

func lockPath(runtimeDir, name string) string { return filepath.Join(Dir(runtimeDir), name+".lock") }

// Read returns what the agent called name has published; fs.ErrNotExist where it has not.
func Read(runtimeDir, name string) (*Agent, error) {
	path := Path(runtimeDir, name)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var agent Agent
	err = json.Unmarshal(data, &agent)
	if err != nil {
		// A newer file need not have the shape that this build knows: its version is read alone.
		var head struct{ Version int }
		if json.Unmarshal(data, &head) == nil {
			agent.Version = head.Version
		}
	}
	switch {
	case agent.Version > Version:
		return nil, &NewerVersionError{Path: path, Version: agent.Version}
	case err != nil:
		return nil, fmt.Errorf("%s is corrupt: %w", path, err)
	}
	if agent.Version < 1 || agent.Name != name {
		return nil, fmt.Errorf("%s is corrupt: version %d of agent %q", path, agent.Version, agent.Name)
	}
	return &agent, nil
}

// Names lists the agents that have published a file, in order; none where there is no folder.
func Names(runtimeDir string) ([]string, error) {
	entries, err := os.ReadDir(Dir(runtimeDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		if name, ok := strings.CutSuffix(entry.Name(), ".json"); ok {
			names = append(names, name)
		}
	}
	return names, nil
}

// Write publishes agent: a temporary file and a rename, so that a reader sees the old or the new.
// The caller holds the agent's lock and so is the only writer.
func Write(runtimeDir string, agent *Agent) error {
	agent.Version = Version
	data, err := json.MarshalIndent(agent, "", "  ")
	if err != nil {
		return err
	}
	path := Path(runtimeDir, agent.Name)
	temp := path + ".tmp"
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// Renew moves the heartbeat of the agent called name to now.
func Renew(runtimeDir, name string, now time.Time) error {
	return os.Chtimes(Path(runtimeDir, name), now, now)
}

// ErrLocked says that another process is the live agent of this name.
var ErrLocked = errors.New("another process with this agent name is running")

// Lock makes this process the live agent called name until the file returned is closed or the process
// ends, in whatever way; ErrLocked while another is. It creates the runtime dir where it is missing.
func Lock(runtimeDir, name string) (*os.File, error) {
	return LockFile(lockPath(runtimeDir, name))
}

// Live says whether the agent called name runs: whether its lock is held. It takes no lock itself.
func Live(runtimeDir, name string) bool { return Held(lockPath(runtimeDir, name)) }

// LockFile takes the lock on a file in the folder of the agents' files, as Lock does.
//
// An open file description lock (fcntl(2)): it can be tested without being taken, so that readers
// never get in the way of an agent that starts.
func LockFile(path string) (locked *os.File, err error) {
	err = hold(filepath.Dir(filepath.Dir(path)), func() error {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		err = unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if err == nil {
			locked = file
			return nil
		}
		_ = file.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return ErrLocked
		}
		return &fs.PathError{Op: "lock", Path: path, Err: err}
	})
	return locked, err
}

// Unlock lets go of a lock and closes its file. To close it alone leaves the lock to a child that is just being forked,
// until that has executed its program.
func Unlock(locked *os.File) error {
	err := unix.FcntlFlock(locked.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK})
	return errors.Join(err, locked.Close())
}

// Held says whether somebody holds the lock on a file. It takes no lock itself.
func Held(path string) bool {
	file, err := os.Open(path)
	if err != nil {
		return false
	}
	defer func() { _ = file.Close() }()
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	return unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &lock) == nil && lock.Type != unix.F_UNLCK
}
