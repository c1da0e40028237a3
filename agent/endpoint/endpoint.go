// Package endpoint chooses where the traffic of a magic IP goes among the targets of an inventory. It is pure.
package endpoint

import (
	"net/netip"
	"slices"
	"unique"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Readiness says how a pod's Ready condition counts.
type Readiness string

// The readiness modes.
const (
	// Prefer: ready pods first, others where there is none.
	Prefer Readiness = "prefer"
	// Require: only ready pods.
	Require Readiness = "require"
	// Ignore: a pod that is not terminating counts as ready.
	Ignore Readiness = "ignore"
)

// Selection is which targets a magic IP is for, and how the endpoint is chosen among them.
type Selection struct {
	Namespace string // inventory.AllNamespaces for every one
	Selector  Selector
	// Owner is an inventory.Owner; ServiceAccount is the name of the pod's. Empty for any.
	Owner, ServiceAccount string
	Readiness             Readiness
	Spread                bool // all targets of the best rank instead of the newest
	IPv6                  bool // the family of the magic IP
	// TargetPort is a number. PortName, where set, is looked up in the pod's containers instead, for PortProtocol.
	TargetPort   uint16
	PortName     string
	PortProtocol runtimedir.Protocol
}

// Selector is a Kubernetes label selector.
type Selector struct {
	labels.Selector
	// anyOf are labels of which a pod that is selected has one; empty where the selector requires none.
	anyOf []unique.Handle[label]
}

type label struct{ key, value string }

// labelOf is a label as it is looked up: the handle is compared, not its text.
func labelOf(key, value string) unique.Handle[label] { return unique.Make(label{key, value}) }

// ParseSelector parses the whole grammar of Kubernetes label selectors.
func ParseSelector(text string) (Selector, error) {
	selector, err := labels.Parse(text)
	if err != nil {
		return Selector{}, err
	}
	s := Selector{Selector: selector}
	requirements, _ := selector.Requirements()
	for _, r := range requirements {
		switch r.Operator() {
		case "=", "==", "in":
			for value := range r.Values() {
				s.anyOf = append(s.anyOf, labelOf(r.Key(), value))
			}
			return s, nil
		}
	}
	return s, nil
}

// Keys are the label keys that the selector looks at.
func (s Selector) Keys() (keys []string) {
	requirements, _ := s.Requirements()
	for _, r := range requirements {
		keys = append(keys, r.Key())
	}
	return keys
}

// Chosen is an endpoint: a target and its address and port.
type Chosen struct {
	*inventory.Target
	Address netip.AddrPort
}

// Index finds the targets of a selection without a look at all of them: there may be thousands of selections.
type Index struct {
	targets []*inventory.Target
	// selected are those that a selection has asked for, whatever their rank.
	selected map[*inventory.Target]bool
	byLabel  map[unique.Handle[label]][]*inventory.Target
}

// NewIndex makes an index of targets.
func NewIndex(targets []inventory.Target) *Index {
	index := &Index{selected: map[*inventory.Target]bool{}, byLabel: map[unique.Handle[label]][]*inventory.Target{}}
	for i := range targets {
		target := &targets[i]
		index.targets = append(index.targets, target)
		for key, value := range target.Labels {
			l := labelOf(key, value)
			index.byLabel[l] = append(index.byLabel[l], target)
		}
	}
	return index
}

// Choose returns the endpoints: the newest target of the best rank, or with Spread all of that rank.
func (i *Index) Choose(s *Selection) []Chosen {
	best := never
	var chosen []Chosen
	consider := func(targets []*inventory.Target) {
		for _, target := range targets {
			rank := s.rank(target)
			if rank != never || !target.Finished && s.matches(target) {
				i.selected[target] = true
			}
			address, ok := s.address(target)
			if rank > best || rank == never || !ok {
				continue
			}
			if rank < best {
				best, chosen = rank, nil
			}
			chosen = append(chosen, Chosen{Target: target, Address: address})
		}
	}
	if len(s.Selector.anyOf) == 0 {
		consider(i.targets)
	}
	for _, l := range s.Selector.anyOf { // a target has one value of a label, so none is found twice
		consider(i.byLabel[l])
	}
	slices.SortStableFunc(chosen, func(a, b Chosen) int { return inventory.Newer(a.Target, b.Target) })
	if !s.Spread {
		chosen = chosen[:min(1, len(chosen))]
	}
	return chosen
}

// Selected counts the targets that have been considered for a selection, by their state.
func (i *Index) Selected() (count runtimedir.Targets) {
	for target := range i.selected {
		switch {
		case target.Terminating:
			count.Terminating++
		case target.Ready:
			count.Ready++
		default:
			count.NotReady++
		}
	}
	return count
}

func (s *Selection) address(t *inventory.Target) (netip.AddrPort, bool) {
	port := s.TargetPort
	if s.PortName != "" {
		port = 0
		if i := slices.IndexFunc(t.Ports, s.named); i >= 0 {
			port = t.Ports[i].Port
		}
	}
	if port == 0 {
		return netip.AddrPort{}, false
	}
	for _, ip := range t.IPs {
		if ip.Is6() == s.IPv6 {
			return netip.AddrPortFrom(ip, port), true
		}
	}
	return netip.AddrPort{}, false
}

// named reports whether a container port is the one that is asked for by its name.
func (s *Selection) named(p runtimedir.NamedPort) bool {
	return p.Name == s.PortName && p.Protocol == s.PortProtocol
}

// matches reports whether the target is one of this selection. Labels that are not known match only a selector that requires none.
func (s *Selection) matches(t *inventory.Target) bool {
	if !s.inNamespace(t) {
		return false
	}
	if s.Owner != "" && !slices.Contains(t.Owners, s.Owner) || s.ServiceAccount != "" && s.ServiceAccount != t.ServiceAccount {
		return false
	}
	return s.Selector.Empty() || t.Labels != nil && s.Selector.Matches(labels.Set(t.Labels))
}

const never = 5

// rank is the row of the table in docs/concepts.md, "Which pod is the endpoint", from 1; never where it is none.
func (s *Selection) rank(t *inventory.Target) int {
	rank := never
	switch {
	case !s.matches(t) || t.Finished:
	case t.Ready && !t.Terminating:
		rank = 1
	case t.Ready:
		rank = 2
	case t.Terminating:
		rank = 4
	case t.Recorded || t.Running:
		rank = 3
	}
	switch {
	case s.Readiness == Require && rank > 2:
		rank = never
	case s.Readiness == Ignore && rank == 3:
		rank = 1
	}
	return rank
}
