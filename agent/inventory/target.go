package inventory

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Target is a pod with an address on this node.
type Target struct {
	PodID
	// Labels are nil where they are not known.
	Labels map[string]string
	// Owners are those of the configuration that are the pod's; for a Deployment, by its ReplicaSet.
	Owners         []string
	ServiceAccount string
	// IPs is at most one address of each family.
	IPs                                   []netip.Addr
	Running, Ready, Terminating, Finished bool
	Ports                                 []runtimedir.NamedPort

	// Unusable are addresses of the pod, as recorded or reported, that cannot be an endpoint. Unrecorded: its addresses are in no
	// record, although there are records.
	Unusable   []Unusable
	Unrecorded bool

	// Recorded: the CNI plugin has recorded its sandbox, which is live. HostInterface is the link of that, where it is known.
	Recorded      bool
	HostInterface string
	AddedAt       time.Time // of the record

	// order is the position of its record in the order of ADD. createdAt is the pod's creationTimestamp; added says that the
	// API has not reported the pod yet, so that it is newer than those that it has reported.
	order     int
	createdAt time.Time
	added     bool
}

// primaryInterface is the interface that container runtimes give a pod's address to, and so to podIPs; others are those of
// further networks.
const primaryInterface = "eth0"

// Newer compares the age of two targets: negative where a is the newer one. Pods that the API has reported are ordered by
// its clock, others by the order of their ADD. The clock of the node has no say.
func Newer(a, b *Target) int {
	if a.added != b.added {
		if a.added {
			return -1
		}
		return 1
	}
	return cmp.Or(b.createdAt.Compare(a.createdAt), cmp.Compare(b.order, a.order), strings.Compare(b.UID, a.UID))
}

// Targets joins records and pods.
//
// Of several sandboxes of one pod the one that was added last counts, since a sandbox may be replaced before the DEL of the
// first has come. A pod has one address of each family, that of its primary interface: the one whose address is in podIPs, or
// else eth0. A record's address beats podIP, which is of the sandbox before for a while after that was replaced; a podIP that
// is in another pod's record, or that DEL has taken, is stale. Of two records with one address the later ADD has it, also
// where its pod has a newer sandbox: the address was free when it was given.
func (i *Inventory) Targets(now time.Time) []Target {
	primaries := i.primaries(now)
	holder := i.holders(now)
	var targets []Target
	recorded := make([]bool, len(i.pods))
	for _, p := range primaries {
		r := &i.records[p.order]
		target := Target{
			PodID: r.pod(), Labels: r.Labels, Recorded: true, HostInterface: i.linkOf(r),
			AddedAt: r.AddedAt, order: p.order, added: true,
		}
		for _, ip := range p.ips {
			if n := holder[ip]; n != p.order {
				target.Unusable = append(target.Unusable, Unusable{ip, i.recordedFor(n, target.PodID)})
				continue
			}
			i.give(&target, ip, false)
		}
		n, here := i.byID[r.pod()]
		pod, reported := i.reported[r.pod()]
		inGrace := now.Sub(r.seenAt) < Grace
		switch {
		case here && r.UID != "":
			recorded[n] = true
			target.describe(&i.pods[n])
			target.observe(&i.pods[n])
		case i.missing(r) && !inGrace && (r.HostInterface == "" || i.links == nil):
			continue // nothing shows that its sandbox is live
		case reported:
			target.describe(&pod)
		default:
			target.added = inGrace || !i.missing(r)
			if target.Labels == nil && !Covers(i.view.Synced, r.Namespace) {
				target.Labels = i.labels[r.pod()]
			}
		}
		targets = append(targets, target)
	}
	withdrawn := i.withdrawnNow(now)
	for n := range i.pods {
		pod := &i.pods[n]
		if recorded[n] {
			continue
		}
		target := Target{PodID: pod.PodID, order: -1, Unrecorded: len(i.records) > 0 && !pod.HostNetwork}
		target.describe(pod)
		target.observe(pod)
		for _, ip := range pod.IPs {
			if n, taken := holder[ip]; taken {
				target.Unusable = append(target.Unusable, Unusable{ip, i.recordedFor(n, pod.PodID)})
			} else if reason := withdrawn(pod, ip); reason != "" {
				target.Unusable = append(target.Unusable, Unusable{ip, reason})
			} else if !target.has(ip.Is6()) {
				i.give(&target, ip, pod.HostNetwork)
			}
		}
		targets = append(targets, target)
	}
	return targets
}

// primary is the primary interface of a pod's present sandbox: the position of its record, and its first address of each family.
type primary struct {
	order int
	ips   []netip.Addr
}

// primaries are those of all recorded pods, in the order of ADD.
func (i *Inventory) primaries(now time.Time) []primary {
	type owner struct {
		PodID
		container string // where the pod has no UID
	}
	ownerOf := func(r *record) owner {
		if r.UID == "" {
			return owner{container: r.ContainerID}
		}
		return owner{PodID: r.pod()}
	}
	sandbox := map[owner]string{} // the container that was added last
	for n := range i.records {
		if r := &i.records[n]; i.live(r, now) {
			sandbox[ownerOf(r)] = r.ContainerID
		}
	}
	best := map[owner]int{}
	for n := range i.records {
		r := &i.records[n]
		o := ownerOf(r)
		if !i.live(r, now) || sandbox[o] != r.ContainerID {
			continue
		}
		before, chosen := best[o]
		switch {
		case i.inPodIPs(r) && !(chosen && i.inPodIPs(&i.records[before])):
			best[o] = n
		case r.IfName == primaryInterface && !chosen:
			best[o] = n
		}
	}
	var primaries []primary
	for n := range i.records {
		r := &i.records[n]
		if chosen, ok := best[ownerOf(r)]; !ok || chosen != n {
			continue
		}
		p := primary{order: n}
		for _, ip := range r.IPs {
			if !slices.ContainsFunc(p.ips, func(q netip.Addr) bool { return q.Is6() == ip.Is6() }) {
				p.ips = append(p.ips, ip)
			}
		}
		primaries = append(primaries, p)
	}
	return primaries
}

// holders are the positions of the records that have an address of a primary interface.
func (i *Inventory) holders(now time.Time) map[netip.Addr]int {
	holders := map[netip.Addr]int{}
	for n := range i.records {
		if r := &i.records[n]; i.live(r, now) && (r.IfName == primaryInterface || i.inPodIPs(r)) {
			for _, ip := range r.IPs {
				if before, held := holders[ip]; !held || i.records[before].ContainerID != r.ContainerID {
					holders[ip] = n
				}
			}
		}
	}
	return holders
}

// inPodIPs reports whether the API reports an address of the record as the pod's.
func (i *Inventory) inPodIPs(r *record) bool {
	pod, here := i.find(r)
	return here && slices.ContainsFunc(r.IPs, func(ip netip.Addr) bool { return slices.Contains(pod.IPs, ip) })
}

// recordedFor is why an address in record n is none of a pod that has no part in it.
func (i *Inventory) recordedFor(n int, pod PodID) string {
	if other := i.records[n].pod(); other != pod {
		return fmt.Sprintf("recorded for pod %s/%s, which has it now", other.Namespace, other.Name)
	}
	return "of another interface or sandbox of the pod"
}

// withdrawnNow is why an address that the API reports of a pod is not its own any more: DEL has taken it, or would have, because the link
// of the sandbox is gone. Empty where it is.
func (i *Inventory) withdrawnNow(now time.Time) func(pod *Pod, ip netip.Addr) string {
	fallen := map[PodID][]netip.Addr{}
	for n := range i.records {
		if r := &i.records[n]; !i.live(r, now) && r.UID != "" {
			if pod, here := i.find(r); here {
				fallen[pod.PodID] = append(fallen[pod.PodID], r.IPs...)
			}
		}
	}
	return func(pod *Pod, ip netip.Addr) string {
		switch {
		case slices.Contains(fallen[pod.PodID], ip):
			return "of a sandbox whose link is gone"
		case slices.Contains(i.withdrawnFrom(pod), ip):
			return "of a sandbox that was deleted"
		}
		return ""
	}
}

// give adds an address to those of a target, or to those that cannot be an endpoint.
func (i *Inventory) give(t *Target, ip netip.Addr, hostNetwork bool) {
	if reason := i.unusable(ip, hostNetwork); reason != "" {
		t.Unusable = append(t.Unusable, Unusable{ip, reason})
		return
	}
	t.IPs = append(t.IPs, ip)
}

func (t *Target) has(ip6 bool) bool {
	return slices.ContainsFunc(t.IPs, func(ip netip.Addr) bool { return ip.Is6() == ip6 })
}

// describe adds what the API reports, or has reported, of what a pod is. Labels may change while a pod runs, so the API's are
// the truth.
func (t *Target) describe(pod *Pod) {
	t.Labels, t.Owners, t.ServiceAccount, t.Ports, t.Finished = pod.Labels, pod.Owners, pod.ServiceAccount, pod.Ports, pod.Finished
	t.createdAt, t.added = pod.CreatedAt, false
	if t.Labels == nil {
		t.Labels = map[string]string{}
	}
}

// observe adds how a pod is.
func (t *Target) observe(pod *Pod) {
	t.Running, t.Ready, t.Terminating = pod.Running, pod.Ready, pod.Terminating
}
