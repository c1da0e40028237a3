package inventory

import (
	"slices"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Pod is a pod of this node as the Kubernetes API reports it.
type Pod = runtimedir.Pod

// PodID is what identifies it.
type PodID = runtimedir.PodID

// View is what the Kubernetes API reported last.
type View struct {
	// Pods are those of the synced namespaces.
	Pods []Pod
	// Synced are the namespaces that have been listed. Current are those of them that the API can be asked for now: a pod
	// that is not in Pods is not in the API.
	Synced, Current []string
	// Unresolved are the owners of which it is not known whether they are a pod's.
	Unresolved []OwnerQuery
	// Problems are why a namespace is not current, one sentence each.
	Problems []string
}

// AllNamespaces stands for every namespace.
const AllNamespaces = "*"

// Covers reports whether a namespace is among namespaces.
func Covers(namespaces []string, namespace string) bool {
	return slices.Contains(namespaces, namespace) || slices.Contains(namespaces, AllNamespaces)
}
