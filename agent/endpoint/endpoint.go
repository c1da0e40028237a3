// Package endpoint joins what the CNI plugin recorded with what the Kubernetes API says of the node's
// pods, and chooses where the traffic of a magic IP goes.
//
// It is pure. Either source may be absent: without the API a record is all that is known of a pod.
package endpoint

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// Sources is all that is known of the node's pods at one moment.
type Sources struct {
	Records []state.Attachment
	// Pods is what the API said last.
	Pods []inventory.Pod
	// Told is what it said last of pods with a record, by the UID in it: it counts where Pods lists them no more.
	Told map[string]inventory.Pod
	// Current are the namespaces of which the API has told, and can be asked now: what it does not list there is
	// not there (as opposed to: not known).
	Current []string
	// Withdrawn are addresses that DEL has taken from a pod, by pod UID: its podIP counts no more
	// until the API reports another one.
	Withdrawn map[string][]netip.Addr
	// Interfaces are the names of the node's links; nil is not known. A sandbox whose host interface is
	// gone is gone, and a record whose pod the API does not know counts for as long as it stands.
	Interfaces map[string]bool
	Now        time.Time
}

// UnknownPodGrace is how long after its ADD a record counts whose pod the API does not know: the API
// learns of a pod's sandbox late.
const UnknownPodGrace = 60 * time.Second

// Target is a pod with an address on this node.
type Target struct {
	Namespace, Name, UID string
	// Labels are nil where nobody has told them yet.
	Labels map[string]string
	Owner  string
	IPs    []netip.Addr
	// CreatedAt is the pod's creationTimestamp, or else the time of its ADD, which is AddedAt.
	CreatedAt, AddedAt time.Time
	Running            bool
	Ready              bool
	Terminating        bool
	Finished           bool
	// Recorded: the CNI plugin has recorded its sandbox, which still stands.
	Recorded bool
	Ports    map[string]uint16
}

// Targets joins records and pods. Records and pods are joined by UID, for static pods by config hash.
// A record's addresses beat podIP, since a sandbox may be replaced under one UID, and a podIP that
// stands in another pod's record is stale. Of two records with one address the later ADD has it.
func Targets(s Sources) []Target {
	holder := map[netip.Addr]int{}
	records := Standing(s.Records, s.Interfaces)
	withdrawn := maps.Clone(s.Withdrawn)
	if withdrawn == nil {
		withdrawn = map[string][]netip.Addr{}
	}
	for _, record := range s.Records {
		if !stands(record, s.Interfaces) {
			withdrawn[record.UID] = append(slices.Clone(withdrawn[record.UID]), record.IPs...)
		}
	}
	slices.SortStableFunc(records, func(a, b state.Attachment) int { return a.AddedAt.Compare(b.AddedAt) })
	for i, record := range records {
		for _, ip := range record.IPs {
			holder[ip] = i
		}
	}
	pods := map[string]int{}
	for i, pod := range s.Pods {
		pods[pod.UID] = i
		if pod.ConfigHash != "" {
			pods[pod.ConfigHash] = i
		}
	}

	// A sandbox may be replaced under one UID before DEL has come for the first.
	type attached struct{ uid, ifName string }
	latest := map[attached]int{}
	for i, record := range records {
		latest[attached{record.UID, record.IfName}] = i
	}

	recorded := make([]bool, len(s.Pods))
	var targets []Target
	for i, record := range records {
		if record.UID != "" && latest[attached{record.UID, record.IfName}] != i {
			continue
		}
		target := Target{
			Namespace: record.Namespace, Name: record.Name, UID: record.UID, Labels: record.Labels,
			CreatedAt: record.AddedAt, AddedAt: record.AddedAt, Recorded: true,
		}
		for _, ip := range record.IPs {
			if holder[ip] == i {
				target.IPs = append(target.IPs, ip)
			}
		}
		if j, known := pods[record.UID]; known && record.UID != "" {
			recorded[j] = true
			target.tell(s.Pods[j])
		} else if inventory.Covers(s.Current, record.Namespace) && !s.counts(record) {
			continue
		} else if told, was := s.Told[record.UID]; was {
			target.remember(told)
		}
		targets = append(targets, target)
	}
	for i, pod := range s.Pods {
		if recorded[i] {
			continue
		}
		target := Target{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
		target.tell(pod)
		for _, ip := range pod.IPs {
			if _, taken := holder[ip]; !taken && !pod.Without(ip, withdrawn) {
				target.IPs = append(target.IPs, ip)
			}
		}
		targets = append(targets, target)
	}
	return targets
}

// Standing are the records whose sandbox can still be reached: whose host interface, where the record names
// one, is there. One that is gone although the record stays says that a DEL went unrecorded. interfaces
// are the node's links; nil is not known.
func Standing(records []state.Attachment, interfaces map[string]bool) []state.Attachment {
	return slices.DeleteFunc(slices.Clone(records), func(r state.Attachment) bool { return !stands(r, interfaces) })
}

func stands(record state.Attachment, interfaces map[string]bool) bool {
	return record.HostInterface == "" || interfaces == nil || interfaces[record.HostInterface]
}

// counts says whether a record counts whose pod the API does not know.
func (s Sources) counts(record state.Attachment) bool {
	return s.Now.Sub(record.AddedAt) < UnknownPodGrace || record.HostInterface != "" && s.Interfaces[record.HostInterface]
}

// tell adds what the API knows; labels may change on a running pod, so the API's are the truth.
func (t *Target) tell(pod inventory.Pod) {
	t.remember(pod)
	t.Running, t.Ready, t.Terminating = pod.Running, pod.Ready, pod.Terminating
}

// remember adds what the API knew of a pod that it has forgotten, such as one that was deleted by force: what it is, and
// not how it is.
func (t *Target) remember(pod inventory.Pod) {
	t.Labels, t.Owner, t.CreatedAt, t.Ports, t.Finished = pod.Labels, pod.Owner, pod.CreatedAt, pod.Ports, pod.Finished
	if t.Labels == nil {
		t.Labels = map[string]string{}
	}
}

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
	Owner     string // Kind/name; empty for any
	Readiness Readiness
	Spread    bool // all targets of the best rank instead of the newest
	IPv6      bool // the family of the magic IP
	// TargetPort is a number; TargetPortName, where set, is looked up in the pod's containers instead.
	TargetPort     uint16
	TargetPortName string
}

// Selector is a Kubernetes label selector.
type Selector struct {
	labels.Selector
	// anyOf are labels of which a pod that is selected has one; empty where the selector asks for none.
	anyOf []label
}

type label struct{ key, value string }

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
				s.anyOf = append(s.anyOf, label{r.Key(), value})
			}
			return s, nil
		}
	}
	return s, nil
}

// Chosen is an endpoint: a target and the address of the family and the port that were asked for.
type Chosen struct {
	*Target
	Address netip.AddrPort
}

// Index finds the targets of a selection without a look at all of them, for there may be thousands of selections.
type Index struct {
	targets []*Target
	byLabel map[label][]*Target
}

// NewIndex makes an index of targets.
func NewIndex(targets []Target) *Index {
	index := &Index{byLabel: map[label][]*Target{}}
	for i := range targets {
		target := &targets[i]
		index.targets = append(index.targets, target)
		for key, value := range target.Labels {
			index.byLabel[label{key, value}] = append(index.byLabel[label{key, value}], target)
		}
	}
	return index
}

// Choose returns the endpoints: the newest target of the best rank, or with Spread all of that rank.
func (i *Index) Choose(s Selection) []Chosen {
	best := never
	var chosen []Chosen
	consider := func(targets []*Target) {
		for _, target := range targets {
			rank := s.rank(target)
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
	slices.SortStableFunc(chosen, func(a, b Chosen) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), b.AddedAt.Compare(a.AddedAt), strings.Compare(b.UID, a.UID))
	})
	if !s.Spread && len(chosen) > 1 {
		chosen = chosen[:1]
	}
	return chosen
}

func (s *Selection) address(t *Target) (netip.AddrPort, bool) {
	port := s.TargetPort
	if s.TargetPortName != "" {
		port = t.Ports[s.TargetPortName]
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

// matches says whether the target is one of this selection. Labels that nobody has told yet match only
// a selector that asks for none.
func (s *Selection) matches(t *Target) bool {
	if s.Namespace != inventory.AllNamespaces && s.Namespace != t.Namespace {
		return false
	}
	if s.Owner != "" && s.Owner != t.Owner {
		return false
	}
	return s.Selector.Empty() || t.Labels != nil && s.Selector.Matches(labels.Set(t.Labels))
}

const never = 5

// rank is the row of the table in README, "Which pod is the endpoint", from 1; never where it is none.
func (s *Selection) rank(t *Target) int {
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
