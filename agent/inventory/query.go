package inventory

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Query is what the configuration needs of the Kubernetes API. What it does not name is not kept of a pod, whose author may make
// labels and ports of a megabyte.
type Query struct {
	Namespaces []string // AllNamespaces for every one
	LabelKeys  map[string]bool
	PortNames  map[string]bool
	Owners     []OwnerQuery
}

// OwnerQuery is an owner that pods of a namespace must have.
type OwnerQuery struct {
	Namespace string // AllNamespaces: the owner is in the pod's namespace
	Owner
}

// Owner is a controller of pods.
type Owner struct{ Group, Version, Kind, Name string }

// ownerKinds are the kinds of Kubernetes that control pods, as group and version; of a Deployment, its ReplicaSets do.
var ownerKinds = map[string][2]string{ //nolint:gochecknoglobals // a constant
	"DaemonSet": {"apps", "v1"}, "Deployment": {"apps", "v1"}, "ReplicaSet": {"apps", "v1"}, "StatefulSet": {"apps", "v1"},
	"Job": {"batch", "v1"}, "ReplicationController": {"", "v1"},
}

var ownerFormat = regexp.MustCompile(`^(?:([a-z0-9][-.a-z0-9]*\.[-.a-z0-9]*[a-z0-9])/(v[a-z0-9]+)/)?([A-Z][A-Za-z0-9]*)/([a-z0-9][-.a-z0-9]*)$`)

// ParseOwner parses "Kind/name" of a kind of Kubernetes, and "group/version/Kind/name" of any other.
func ParseOwner(text string) (Owner, error) {
	const allowed = "allowed: Kind/name such as DaemonSet/apm-server; of other than %s: group/version/Kind/name"
	var kinds []string
	for kind := range ownerKinds {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	match := ownerFormat.FindStringSubmatch(text)
	if match == nil {
		return Owner{}, fmt.Errorf("%q is not allowed; "+allowed, text, strings.Join(kinds, ", "))
	}
	owner := Owner{Group: match[1], Version: match[2], Kind: match[3], Name: match[4]}
	if owner.Version == "" {
		known, ok := ownerKinds[owner.Kind]
		if !ok {
			return Owner{}, fmt.Errorf("%q is not allowed; "+allowed, text, strings.Join(kinds, ", "))
		}
		owner.Group, owner.Version = known[0], known[1]
	}
	return owner, nil
}

// String is what ParseOwner parses.
func (o Owner) String() string {
	if ownerKinds[o.Kind] == [2]string{o.Group, o.Version} {
		return o.Kind + "/" + o.Name
	}
	return o.Group + "/" + o.Version + "/" + o.Kind + "/" + o.Name
}
