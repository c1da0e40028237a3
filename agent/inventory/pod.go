// Package inventory is what is known of the node's pods.
//
// It is pure: no clock, no I/O, no logger.
package inventory

import (
	"net/netip"
	"slices"
	"time"
)

// Pod is what the Kubernetes API tells of a pod on this node.
type Pod struct {
	Namespace, Name, UID string
	// ConfigHash is the annotation kubernetes.io/config.hash: the UID by which CNI knows a static pod.
	ConfigHash string
	Labels     map[string]string
	// Owner is the controller as Kind/name, empty without one.
	Owner string
	// IPs are status.podIPs.
	IPs       []netip.Addr
	CreatedAt time.Time
	// Running, Ready (condition), Terminating (has a deletionTimestamp), Finished (Succeeded or Failed).
	Running, Ready, Terminating, Finished bool
	// Ports are the named container ports.
	Ports map[string]uint16
}

// Without says whether DEL has taken this address from the pod.
func (p Pod) Without(ip netip.Addr, withdrawn map[string][]netip.Addr) bool {
	return slices.Contains(withdrawn[p.UID], ip) || p.ConfigHash != "" && slices.Contains(withdrawn[p.ConfigHash], ip)
}

// View is what the Kubernetes API said last.
type View struct {
	Pods []Pod
	// Spoken: it has answered for every namespace. Reachable: it can be asked now for every one.
	Spoken, Reachable bool
	// Told are the namespaces that it has answered for, Current those of them that it can be asked for now.
	Told, Current []string
	// Problems are why it cannot, one sentence each.
	Problems []string
}

// AllNamespaces stands for every namespace.
const AllNamespaces = "*"

// Covers says whether a namespace is among these.
func Covers(namespaces []string, namespace string) bool {
	return slices.Contains(namespaces, namespace) || slices.Contains(namespaces, AllNamespaces)
}
