package runtimedir

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// The files of an agent, and their greatest sizes in bytes.
const (
	statusFile = "status.json"
	claimsFile = "claims.json"
	podsFile   = "pods.json"
	memoryFile = "memory.json"

	statusLimit = 16 << 20
	claimsLimit = 4 << 20
	memoryLimit = 16 << 20
)

// Agent is the directory of one agent, agents/<name>/. It writes there what others are to know of it.
type Agent struct{ writer }

// Agents lists the agents that have claims or a status, in order: while an agent starts there are claims without a status. With an error
// they are those that can be listed.
func (d Dir) Agents() ([]string, error) {
	return d.writers(agentsDir, d.agentWriter, claimsFile, statusFile)
}

func (d Dir) agentWriter(name string) writer { return d.Agent(name).writer }

// Lock makes this process the agent of this name until the lock is closed or the process ends; ErrLocked while
// another process is. It creates what is missing, and takes over what the version before has written.
func (a Agent) Lock() (*Lock, error) { return a.lock(a.takeOver) }

// Status is what an agent does, for people: status.json.
type Status struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// StartedAt is when this agent process began to serve (RFC 3339), LastSync when the kernel was
	// last changed.
	StartedAt   time.Time `json:"startedAt"`
	LastSync    time.Time `json:"lastSync,omitzero"`
	LastError   string    `json:"lastError,omitempty"`
	Backend     string    `json:"backend,omitempty"`
	BackendNote string    `json:"backendNote,omitempty"`
	DataPlane   DataPlane `json:"dataPlane,omitzero"`
	// PollInterval is a Go duration. The agent renews the file's modification time, its heartbeat, that often.
	PollInterval string `json:"pollInterval"`
	// NoAPI: the agent does without the Kubernetes API, so that the plugin's records are all that it knows.
	NoAPI    bool      `json:"noAPI,omitempty"`
	MagicIPs []MagicIP `json:"magicIPs"`
	// Links are the links of the node, those that are alike together.
	Links []Links `json:"links,omitempty"`
	// Notes are the conditions that an operator should know of, one sentence each.
	Notes []string `json:"notes,omitempty"`
	// Problems are the kinds of what LastError and Notes say and of the links, each once, in order; see ProblemKinds.
	Problems []string `json:"problems,omitempty"`
	// Targets are the pods of the node that a magic IP selects.
	Targets Targets `json:"targets,omitzero"`
}

// Targets are numbers of pods by their state.
type Targets struct {
	Ready       int `json:"ready"`
	NotReady    int `json:"notReady"`
	Terminating int `json:"terminating"`
}

// ProblemKinds are the kinds of problems, in order, and what each is.
func ProblemKinds() map[string]string {
	return map[string]string{
		"api":                 "the Kubernetes API does not answer, or refuses",
		"bypass":              "packets of pods may bypass the rules",
		"claims":              "the claims of another agent cannot be read",
		"configuration":       "the configuration cannot be used; the one before counts",
		"conntrack":           "stale connections cannot be deleted",
		"data_plane":          "the data plane is not as configured, or its settings cannot be read",
		"events_dropped":      "Events cannot be sent",
		"files":               "a file of the agent cannot be written",
		"foreign_rule":        "another program translates a magic IP",
		"hairpin":             "hairpin mode cannot be switched on",
		"local_route":         "a local route cannot be made",
		"metrics":             "metrics are not served",
		"network":             "the node's network cannot be read, or has a layout that clients are not served on",
		"record_lost":         "a record was lost with the state file",
		"rules":               "the rules cannot be brought into the kernel",
		"state_file":          "the plugin's state file cannot be read",
		"unfiltered_bridge":   "frames of a bridge do not pass netfilter",
		"unlabelled_pods":     "labels of recorded pods are not known",
		"unnamed_link":        "a link has a name that rules cannot have",
		"unrecorded_endpoint": "an endpoint's address is in no record",
		"unseen":              "it cannot be seen whether packets bypass the rules, or another program translates a magic IP",
		"unserved_link":       "a link is neither pods' nor an uplink",
		"verify":              "the kernel's rules cannot be read, or those of another program take the packets",
		"waiting":             "a source that decisions need has not been read since the start",
	}
}

// DataPlane is how packets of pods are brought to the rules.
type DataPlane struct {
	Configured string `json:"configured"` // auto, netfilter or cilium
	Name       string `json:"name"`       // netfilter or cilium
	Reason     string `json:"reason"`
	// LocalRoutes are the magic IPs that are addresses of the node by a route, so that packets of pods come to the rules.
	LocalRoutes []netip.Addr `json:"localRoutes,omitempty"`
	// Masquerade are the families (ip, ip6) of which flows of pods are masqueraded, so that replies come to the rules.
	Masquerade []string `json:"masquerade,omitempty"`
}

// MagicIP is one frontend of an agent's configuration, and what becomes of packets to it.
type MagicIP struct {
	Frontend
	Namespace string `json:"namespace"`
	Selector  string `json:"selector"`
	// HostInterface are the links that clients are behind, as configured; empty is auto.
	HostInterface []string `json:"hostInterface,omitempty"`
	// HostClients: processes of the node are clients too, as configured.
	HostClients bool `json:"hostClients,omitempty"`
	// ExcludeTarget: packets of the endpoints themselves are exempt, as configured.
	ExcludeTarget bool `json:"excludeTarget,omitempty"`
	// Reason is why the frontend is unserved, and UnservedBy what keeps it so; empty where it is served.
	Reason     string     `json:"reason,omitempty"`
	UnservedBy UnservedBy `json:"unservedBy,omitempty"`
	// Action is what becomes of new packets: serve, reject, hold or pass; empty where the frontend is unserved.
	Action string `json:"action,omitempty"`
	// Endpoints are where new flows go.
	Endpoints []Endpoint `json:"endpoints"`
	// Since is when the addresses of the endpoints last changed (RFC 3339); zero while the frontend is unserved.
	Since time.Time `json:"since,omitzero"`
	// Count is how often the frontend was asked for since the agent started; nil where that is not counted.
	Count *Count `json:"count,omitempty"`
	// Why says why there is none, one sentence each; empty where there is one, and beyond the first fifty frontends without one.
	Why []string `json:"why,omitempty"`
}

// UnservedBy is what keeps a frontend from being served.
type UnservedBy string

// What may do so.
const (
	ByConfiguration UnservedBy = "configuration" // of its own agent, whose installer then asks for no record of its targets
	ByNode          UnservedBy = "node"          // the node's own network
	ByAgent         UnservedBy = "agent"         // the claim of another agent
)

// Count is how often a frontend was asked for.
type Count struct {
	// Opened are new connections, and new flows of UDP and SCTP, that led to an endpoint.
	Opened uint64 `json:"opened"`
	// Refused are packets that were rejected or held because there was no endpoint.
	Refused uint64 `json:"refused"`
}

// Links are links of the node of one kind and role.
type Links struct {
	Names []string `json:"names"`
	Kind  string   `json:"kind"` // as the kernel names it; tap; device for hardware
	Role  string   `json:"role"` // served, uplink or other
	// Reason is the evidence for the role, or what is missing.
	Reason string `json:"reason"`
}

// Endpoint is a pod's address that new flows go to.
type Endpoint struct {
	Address netip.AddrPort `json:"address"`
	Pod     string         `json:"pod,omitempty"` // namespace/name
	UID     string         `json:"uid,omitempty"`
	// Recorded: the CNI plugin has recorded the pod's sandbox, at AddedAt.
	Recorded bool      `json:"recorded,omitempty"`
	AddedAt  time.Time `json:"addedAt,omitzero"`
}

func (s *Status) version() *int { return &s.Version }

// ReadStatus returns the status of the agent; fs.ErrNotExist where it has none.
func (a Agent) ReadStatus() (*Status, error) {
	status := &Status{}
	if a.isOld() {
		old, err := a.readOld()
		if err != nil {
			return nil, err
		}
		status = old.status()
	} else if err := a.read(statusFile, statusLimit, status); err != nil {
		return nil, err
	}
	status.Name = a.name
	return status, nil
}

// WriteStatus replaces the status once. The caller holds the lock, as with everything that writes.
func (a Agent) WriteStatus(status Status) error { return a.StatusWriter().Write(status) }

// StatusPath is the status file, for messages.
func (a Agent) StatusPath() string {
	return a.dir.path + "/" + agentsDir + "/" + a.name + "/" + statusFile
}

// Renew moves the heartbeat to now; fs.ErrNotExist where there is no status.
func (a Agent) Renew(now time.Time) error {
	f, err := a.open()
	if err != nil {
		return err
	}
	defer f.close()
	stamp, err := unix.TimeToTimespec(now)
	if err == nil {
		err = unix.UtimesNanoAt(f.fd, statusFile, []unix.Timespec{stamp, stamp}, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return &fs.PathError{Op: "utimensat", Path: f.join(statusFile), Err: err}
	}
	return nil
}

// Complete reports whether the agent's files are there: those that it writes, whatever is in them.
func (a Agent) Complete() bool {
	f, err := a.open()
	if err == nil {
		defer f.close()
	}
	for _, name := range []string{statusFile, claimsFile, podsFile, memoryFile} {
		if err == nil {
			_, err = f.lookup(name)
		}
	}
	return !errors.Is(err, fs.ErrNotExist)
}

// Heartbeat is when the agent last polled its sources.
func (a Agent) Heartbeat() (time.Time, error) {
	if a.isOld() {
		return a.oldTime()
	}
	return a.time(statusFile)
}

// Claims are the frontends of an agent, for the other agents of the node: claims.json.
type Claims struct {
	Version int     `json:"version"`
	Claims  []Claim `json:"claims"`
}

// Claim is an agent's claim on a frontend. Of two the older one is served.
type Claim struct {
	Frontend
	ClaimedAt time.Time `json:"claimedAt,omitzero"`
	Served    bool      `json:"served"`
	// LocalRoute: the agent wants a local route for the address. An agent of a version without them does not.
	LocalRoute bool `json:"localRoute,omitempty"`
	// Confined: no packet to the frontend is for somebody beyond the node. Without it, no other agent keeps the address on the node.
	Confined bool `json:"confined,omitempty"`
}

func (c *Claims) version() *int { return &c.Version }

// ReadClaims returns the claims of the agent; fs.ErrNotExist where it has none.
func (a Agent) ReadClaims() ([]Claim, error) {
	if a.isOld() {
		old, err := a.readOld()
		if err != nil {
			return nil, err
		}
		return old.claims(), nil
	}
	var claims Claims
	err := a.read(claimsFile, claimsLimit, &claims)
	return claims.Claims, err
}

// WriteClaims replaces the claims.
func (a Agent) WriteClaims(claims []Claim) error {
	return a.write(claimsFile, claimsLimit, &Claims{Claims: claims})
}

// Memory is what an agent goes on with after a restart beside its status and claims, and no other process reads: memory.json.
type Memory struct {
	Version int `json:"version"`
	// Holds are the frontends that have no endpoint any more.
	Holds []Hold `json:"holds,omitempty"`
	// Uplinks are the ifindexes of the node's links that stay uplinks until they are gone, Hairpins those of the bridge
	// ports where this agent has switched hairpin mode on. They are of this network namespace.
	Uplinks   []int  `json:"uplinks,omitempty"`
	Hairpins  []int  `json:"hairpins,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	// Cilium are Cilium's settings as they were last read; nil where they were not.
	Cilium *CiliumSettings `json:"cilium,omitempty"`
	// Servers are the addresses of the endpoints and of those former ones that may have connections.
	Servers []netip.Addr `json:"servers,omitempty"`
	// Records are those of the Servers, from the list of the state file that was begun at RecordsSince, and
	// Lost those from lists before that one which still count.
	Records      []Attachment `json:"records,omitempty"`
	RecordsSince time.Time    `json:"recordsSince,omitzero"`
	Lost         []Attachment `json:"lost,omitempty"`
	// Pods are those with a record and those that are Servers, as the API reported them last.
	Pods []Pod `json:"pods,omitempty"`
	// Withdrawn are the addresses that DEL has taken from a pod, and that the API may still report.
	Withdrawn []Withdrawn `json:"withdrawn,omitempty"`
}

// CiliumSettings are those settings of Cilium that decide by which way packets of pods go.
type CiliumSettings struct {
	// IPv4 and IPv6 are the families of pods' addresses.
	IPv4 bool `json:"ipv4"`
	IPv6 bool `json:"ipv6"`
	// LegacyHostRouting: packets of pods pass the node's network stack, instead of being redirected past it by eBPF.
	LegacyHostRouting bool `json:"legacyHostRouting"`
	// EndpointRoutes: the node has a route to each pod by the pod's own link.
	EndpointRoutes bool `json:"endpointRoutes"`
	// BPFMasquerade: Cilium masquerades by eBPF, not by iptables.
	BPFMasquerade bool `json:"bpfMasquerade"`
	// IPv4Masquerade and IPv6Masquerade: packets of pods that leave the node are masqueraded.
	IPv4Masquerade bool `json:"ipv4Masquerade"`
	IPv6Masquerade bool `json:"ipv6Masquerade"`
}

// Hold is a frontend without an endpoint.
type Hold struct {
	Frontend
	// LostAt is when the last endpoint went: the time since the node was started (CLOCK_BOOTTIME), in nanoseconds.
	LostAt time.Duration `json:"lostAt"`
}

// PodID identifies a pod: all three parts do together. The version before wrote the UID alone.
type PodID struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Pod is a pod of this node as the Kubernetes API reports it.
type Pod struct {
	PodID
	// StaticUID is the UID that CNI has of the static pod which this mirror pod stands for (kubernetes.io/config.hash); empty
	// where the pod is no mirror pod (kubernetes.io/config.mirror).
	StaticUID string            `json:"staticUID,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	// Owners are those of the configuration that a live object is, which controls the pod; for a Deployment, by its ReplicaSet.
	Owners         []string     `json:"owners,omitempty"`
	ServiceAccount string       `json:"serviceAccount,omitempty"`
	HostNetwork    bool         `json:"hostNetwork,omitempty"`
	IPs            []netip.Addr `json:"podIPs,omitempty"` // status.podIPs
	CreatedAt      time.Time    `json:"createdAt,omitzero"`
	Running        bool         `json:"running,omitempty"`
	Ready          bool         `json:"ready,omitempty"`       // the condition
	Terminating    bool         `json:"terminating,omitempty"` // it has a deletionTimestamp
	Finished       bool         `json:"finished,omitempty"`    // Succeeded or Failed
	Ports          []NamedPort  `json:"ports,omitempty"`       // of containers
}

// NamedPort is a container port with a name. As in Services, name and protocol together find it.
type NamedPort struct {
	Name     string   `json:"name"`
	Protocol Protocol `json:"protocol"`
	Port     uint16   `json:"port"`
}

// Withdrawn are addresses that DEL has taken from a pod.
type Withdrawn struct {
	PodID
	Addresses []netip.Addr `json:"addresses"`
}

func (m *Memory) version() *int { return &m.Version }

// ReadMemory returns what the agent goes on with; fs.ErrNotExist where that is nothing. A file that cannot be used is
// kept as memory.json.corrupt, and the error reported once.
func (a Agent) ReadMemory() (*Memory, error) {
	memory := &Memory{}
	err := a.read(memoryFile, memoryLimit, memory)
	var corrupt *CorruptError
	if errors.As(err, &corrupt) {
		f, openErr := a.open()
		if openErr != nil {
			return nil, errors.Join(err, openErr)
		}
		defer f.close()
		if renameErr := unix.Renameat(f.fd, memoryFile, f.fd, memoryFile+corruptExt); renameErr != nil {
			return nil, errors.Join(err, renameErr)
		}
		return nil, fmt.Errorf("%w; it is kept as %s", err, f.join(memoryFile+corruptExt))
	}
	if err != nil {
		return nil, err
	}
	return memory, nil
}

// WriteMemory replaces what the agent goes on with.
func (a Agent) WriteMemory(memory Memory) error { return a.write(memoryFile, memoryLimit, &memory) }
