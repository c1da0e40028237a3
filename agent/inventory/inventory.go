// Package inventory is what is known of the node's pods: it joins the records of the CNI plugin, the pods of the Kubernetes
// API, the node's links, and what the agent remembered over a restart.
//
// A source that is silent changes nothing: what it reported last counts until it reports something else. Identity is the
// sandbox (container ID and interface), the pod (namespace, name and UID together) and the link (ifindex), never an address
// or a link's name.
//
// The package is pure: no clock, no I/O, no logger. Times come in as values; differences are taken between times of this
// process only, so that a step of the wall clock changes nothing.
package inventory

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Grace is how long a record counts whose pod is not in the API, from when it was first seen: the API may report a pod after
// its ADD. It is also how long a pod has been gone from the API before its record may be dead.
const Grace = 60 * time.Second

// Inventory is what is known of the pods of one node. It is not safe for concurrent use.
type Inventory struct {
	api        bool
	namespaces []string // that pods are selected in

	records       []record // in the order of ADD, the lost ones first
	since         time.Time
	recordsSynced bool

	own      []netip.Addr // addresses of the node
	magicIPs map[netip.Addr]bool
	links    map[string]int // by name, the index; nil before the first report
	linkName map[int]string

	view View
	// pods are those of the view, and of namespaces that it has not listed yet those of before.
	pods []Pod
	// left are pods of namespaces that are no longer of interest, with those of their addresses that no record and no other pod has had
	// since: nothing says that their sandboxes are gone.
	left []Pod
	// byID finds pods by ID, and mirror pods also by the ID that CNI has of the static pod.
	byID map[PodID]int
	// reported is what the API reported last of pods with a record, which it may have forgotten since.
	reported  map[PodID]Pod
	withdrawn map[PodID][]netip.Addr
	labels    map[PodID]map[string]string // of before the restart
}

// record is a record of the state file and what this process has seen of it.
type record struct {
	runtimedir.Attachment
	// lost: it was in a file that was lost. The list that began anew does not report its DEL; its link does.
	lost bool
	// link is the index of the host interface, from the record or as it was first seen; 0 before. It counts by itself once
	// seen under the recorded name: when the node starts, indexes begin anew, and those in an old file are of other links.
	link int
	seen bool
	// sought: the links have been read since the record came, or came with another link.
	sought bool
	// seenAt is when the record was first seen, missingSince since when its pod has not been in the API (zero: it is).
	seenAt, missingSince time.Time
}

func (r *record) pod() PodID { return PodID{Namespace: r.Namespace, Name: r.Name, UID: r.UID} }

// New makes an inventory that goes on with what Remember has written, and with the labels that Labels has returned. Without
// api, no pods of the API are expected.
func New(api bool, memory runtimedir.Memory, labels []runtimedir.PodLabels, now time.Time) *Inventory {
	i := &Inventory{
		api: api, since: memory.RecordsSince, labels: map[PodID]map[string]string{}, withdrawn: map[PodID][]netip.Addr{}, reported: map[PodID]Pod{}, byID: map[PodID]int{},
	}
	for _, a := range memory.Lost {
		i.records = append(i.records, record{Attachment: a, lost: true, link: a.HostIfIndex, seenAt: now})
	}
	for _, a := range memory.Records {
		i.records = append(i.records, record{Attachment: a, link: a.HostIfIndex, seenAt: now})
	}
	if api {
		for _, w := range memory.Withdrawn {
			i.withdrawn[w.PodID] = w.Addresses
		}
		for _, l := range labels {
			i.labels[l.PodID] = l.Labels
		}
		i.pods = slices.Clone(memory.Pods)
		i.indexPods()
		for id, n := range i.byID {
			i.reported[id] = i.pods[n]
		}
	}
	return i
}

// SetNamespaces makes these the namespaces whose pods are of interest; AllNamespaces for every one.
func (i *Inventory) SetNamespaces(namespaces []string) { i.namespaces = namespaces }

// SetRecords takes in the state file. What it lacks was taken by DEL, unless it is a new list: then records of before
// count for as long as their link is there. Those without a link do not, and their addresses do where the API reports them.
func (i *Inventory) SetRecords(file runtimedir.File, now time.Time) {
	newList := !file.Since.Equal(i.since)
	before := map[runtimedir.Key]*record{}
	for n := range i.records {
		before[i.records[n].Key()] = &i.records[n]
	}
	inFile, linksInFile := map[runtimedir.Key]bool{}, map[string]bool{}
	for _, a := range file.Attachments {
		inFile[a.Key()], linksInFile[a.HostInterface] = true, true
	}
	var records []record
	for _, r := range i.records {
		switch {
		case inFile[r.Key()]:
		case (r.lost || newList) && r.HostInterface != "" && !linksInFile[r.HostInterface]:
			r.lost = true
			records = append(records, r)
		case newList && r.HostInterface == "": // nothing says that it was deleted
		default:
			i.withdraw(&r)
		}
	}
	for _, a := range file.Attachments {
		r := record{seenAt: now}
		if known := before[a.Key()]; known != nil && known.HostInterface == a.HostInterface {
			r = *known
		} else if !i.recordsSynced {
			// The record may be older than this process. The wall clock of its ADD is the only witness of that.
			r.seenAt = now.Add(-min(max(0, now.Sub(a.AddedAt)), Grace))
		}
		r.Attachment, r.lost = a, false
		if a.HostIfIndex != 0 && a.HostIfIndex != r.link {
			r.link, r.sought = a.HostIfIndex, false
		}
		records = append(records, r)
	}
	i.records, i.since, i.recordsSynced = records, file.Since, true
	i.update(now)
}

// SetNoRecords takes in that there is no state file. That is news only where there has been none: false says that records
// are known, so that the file was lost.
func (i *Inventory) SetNoRecords() bool {
	i.recordsSynced = i.recordsSynced || len(i.records) == 0
	return len(i.records) == 0
}

// SetLinks takes in the links of the node: indexes by name. They must have been read after the records that were set last,
// because a link is recognised from then on by its index: a link that is removed may leave its name to another.
func (i *Inventory) SetLinks(links map[string]int) {
	i.links, i.linkName = links, make(map[int]string, len(links))
	for name, index := range links {
		i.linkName[index] = name
	}
	i.records = slices.DeleteFunc(i.records, func(r record) bool {
		gone := r.lost && !i.linked(&r)
		if gone {
			i.withdraw(&r)
		}
		return gone
	})
	for n := range i.records {
		r := &i.records[n]
		if r.link == 0 {
			r.link = links[r.HostInterface]
		}
		r.seen, r.sought = r.seen || r.link != 0 && links[r.HostInterface] == r.link, true
	}
}

// SetPods takes in what the Kubernetes API reports.
func (i *Inventory) SetPods(view View, now time.Time) {
	before := i.pods
	i.view, i.pods = view, nil
	i.left = slices.DeleteFunc(i.left, func(pod Pod) bool { return Covers(view.Synced, pod.Namespace) })
	for _, pod := range view.Pods {
		if Covers(view.Synced, pod.Namespace) {
			i.pods = append(i.pods, pod)
		}
	}
	for _, pod := range before {
		switch {
		case Covers(view.Synced, pod.Namespace):
		case Covers(i.namespaces, pod.Namespace):
			i.pods = append(i.pods, pod)
		default:
			pod.IPs = i.standing(&pod)
			i.left = append(i.left, pod)
		}
	}
	i.indexPods()
	for id, taken := range i.withdrawn {
		if id.Namespace == "" { // written by the version before
			delete(i.withdrawn, id)
			n := slices.IndexFunc(i.pods, func(p Pod) bool { return p.UID == id.UID || p.StaticUID == id.UID })
			if n < 0 {
				continue
			}
			id = i.pods[n].PodID
			i.withdrawn[id] = taken
		}
		n, here := i.byID[id]
		another := here && slices.ContainsFunc(i.pods[n].IPs, func(ip netip.Addr) bool { return !slices.Contains(taken, ip) })
		if another || !here && (Covers(view.Current, id.Namespace) || !Covers(i.namespaces, id.Namespace)) {
			delete(i.withdrawn, id)
		}
	}
	i.update(now)
}

func (i *Inventory) indexPods() {
	i.byID = make(map[PodID]int, len(i.pods))
	uids := make(map[string]bool, len(i.pods))
	for n := range i.pods {
		i.byID[i.pods[n].PodID], uids[i.pods[n].UID] = n, true
	}
	for n := range i.pods {
		// A static pod's UID is a hash, and everybody can write one into an annotation: it never stands for a pod of the API.
		if pod := &i.pods[n]; pod.StaticUID != "" && !uids[pod.StaticUID] {
			i.byID[staticID(pod)] = n
		}
	}
}

// update brings what is kept of records and pods in step with both.
func (i *Inventory) update(now time.Time) {
	reported := map[PodID]Pod{}
	if !i.recordsSynced {
		maps.Copy(reported, i.reported) // their records may be in the file
	}
	for n := range i.records {
		r := &i.records[n]
		pod, here := i.find(r)
		known, was := i.reported[r.pod()]
		if !was {
			known, was = i.reported[PodID{UID: r.UID}] // written by the version before
		}
		switch {
		case here:
			reported[r.pod()], r.missingSince = pod, time.Time{}
		case was:
			reported[r.pod()] = known
		}
		if !here && r.missingSince.IsZero() && i.missing(r) {
			r.missingSince = now
		}
	}
	i.reported = reported
	i.updateLeft()
}

// updateLeft takes those addresses from the pods of former namespaces that a record or another pod has.
func (i *Inventory) updateLeft() {
	if len(i.left) == 0 {
		return
	}
	held := map[netip.Addr]bool{}
	for n := range i.records {
		for _, ip := range i.records[n].IPs {
			held[ip] = true
		}
	}
	for n := range i.pods {
		for _, ip := range i.standing(&i.pods[n]) {
			held[ip] = held[ip] || !i.pods[n].HostNetwork // hostNetwork pods share theirs
		}
	}
	for n := range i.left {
		i.left[n].IPs = slices.DeleteFunc(slices.Clone(i.left[n].IPs), func(ip netip.Addr) bool { return held[ip] })
	}
	i.left = slices.DeleteFunc(i.left, func(pod Pod) bool { return len(pod.IPs) == 0 })
}

// staticID is the ID that CNI has of the static pod of a mirror pod.
func staticID(pod *Pod) PodID {
	return PodID{Namespace: pod.Namespace, Name: pod.Name, UID: pod.StaticUID}
}

// find returns the pod of a record, if it is in the API.
func (i *Inventory) find(r *record) (Pod, bool) {
	n, here := i.byID[r.pod()]
	if !here || r.UID == "" {
		return Pod{}, false
	}
	return i.pods[n], true
}

// missing reports whether the API would report the pod of a record if it were there.
func (i *Inventory) missing(r *record) bool {
	return r.UID != "" && Covers(i.namespaces, r.Namespace) && Covers(i.view.Current, r.Namespace)
}

// withdraw notes that a record counts no more: nor does its address where the API still reports it.
func (i *Inventory) withdraw(r *record) {
	if i.api && r.UID != "" {
		i.withdrawn[r.pod()] = append(i.withdrawn[r.pod()], r.IPs...)
	}
}

// live reports whether the sandbox of a record can still be reached. A link that is gone although the record stays says that
// a DEL went unrecorded. So does, where there is no link, that the pod has been gone from the API for Grace.
func (i *Inventory) live(r *record, now time.Time) bool {
	if r.HostInterface == "" {
		return !i.missing(r) || r.missingSince.IsZero() || now.Sub(r.missingSince) < Grace
	}
	return i.linked(r)
}

// linked reports whether the link of a record is there, as far as that is known.
func (i *Inventory) linked(r *record) bool { return i.links == nil || i.linkOf(r) != "" }

// linkOf is the present name of a record's host interface; empty where that is gone or not known.
func (i *Inventory) linkOf(r *record) string {
	if r.seen {
		return i.linkName[r.link]
	}
	if index, there := i.links[r.HostInterface]; there && (r.link == 0 || r.link == index) {
		return r.HostInterface
	}
	return ""
}

// RecordsSynced reports whether the state file has been read since this process started.
func (i *Inventory) RecordsSynced() bool { return i.recordsSynced }

// Synced reports whether all that can report a pod of a namespace has done so since this process started.
func (i *Inventory) Synced(namespace string) bool {
	return i.recordsSynced && i.links != nil && (!i.api || Covers(i.view.Synced, namespace))
}

// OwnerResolved reports whether it is known of all pods of a namespace whether they have this owner; "" is known.
func (i *Inventory) OwnerResolved(namespace, owner string) bool {
	return owner == "" || !slices.ContainsFunc(i.view.Unresolved, func(q OwnerQuery) bool { return q.Namespace == namespace && q.String() == owner })
}

// AllSynced says the same of all namespaces.
func (i *Inventory) AllSynced() bool {
	return !slices.ContainsFunc(i.namespaces, func(n string) bool { return !i.Synced(n) })
}

// HasNewLink reports whether a record that has come since the links were read names a link that was not there: the record of a new pod
// may come before the event of its link.
func (i *Inventory) HasNewLink() bool {
	return slices.ContainsFunc(i.records, func(r record) bool {
		return r.HostInterface != "" && !r.sought && i.linkName[r.link] == ""
	})
}

// Sandboxes are the addresses of all sandboxes that stand.
func (i *Inventory) Sandboxes(now time.Time) (addresses []netip.Addr) {
	for n := range i.records {
		if r := &i.records[n]; i.live(r, now) {
			addresses = append(addresses, r.IPs...)
		}
	}
	for n := range i.pods {
		addresses = append(addresses, i.standing(&i.pods[n])...)
	}
	for n := range i.left {
		addresses = append(addresses, i.left[n].IPs...)
	}
	return addresses
}

// standing are the addresses of a pod of the API whose sandbox stands, as far as the API and DEL say.
func (i *Inventory) standing(pod *Pod) (addresses []netip.Addr) {
	for _, ip := range pod.IPs {
		if !pod.Finished && !slices.Contains(i.withdrawnFrom(pod), ip) {
			addresses = append(addresses, ip)
		}
	}
	return addresses
}

// withdrawnFrom are the addresses that DEL has taken from a pod.
func (i *Inventory) withdrawnFrom(pod *Pod) []netip.Addr {
	if len(i.withdrawn) == 0 {
		return nil
	}
	taken := i.withdrawn[pod.PodID]
	if pod.StaticUID != "" {
		taken = append(slices.Clone(taken), i.withdrawn[staticID(pod)]...)
	}
	return taken
}

// Live is a record whose sandbox is live: the present name and the index of its link (empty and 0 where they are not
// known), and its addresses.
type Live struct {
	HostInterface string
	Link          int
	IPs           []netip.Addr
}

// Live are all records whose sandbox is live.
func (i *Inventory) Live(now time.Time) (standing []Live) {
	for n := range i.records {
		if r := &i.records[n]; i.live(r, now) {
			standing = append(standing, Live{HostInterface: i.linkOf(r), Link: r.link, IPs: r.IPs})
		}
	}
	return standing
}

// Dead are the records that the plugin may drop: their pod has been gone from the API for Grace, and their host interface
// is gone from the node. Of those without one, the agent alone would say so, and the plugin takes no agent's word.
func (i *Inventory) Dead(now time.Time) (dead []runtimedir.Key) {
	for n := range i.records {
		r := &i.records[n]
		if r.HostInterface != "" && !r.missingSince.IsZero() && now.Sub(r.missingSince) >= Grace && !i.linked(r) {
			dead = append(dead, r.Key())
		}
	}
	return dead
}

// NextExpiry is when the Grace of a record next ends, from now (0: never): then Targets, Sandboxes and Dead change by time alone.
func (i *Inventory) NextExpiry(now time.Time) (next time.Duration) {
	for n := range i.records {
		r := &i.records[n]
		if _, here := i.find(r); here || !i.missing(r) {
			continue
		}
		for _, since := range []time.Time{r.seenAt, r.missingSince} {
			if wait := since.Add(Grace).Sub(now); wait > 0 {
				next = min(cmp.Or(next, wait), wait)
			}
		}
	}
	return next
}

// Lost are the records that count although they were lost with the state file.
func (i *Inventory) Lost() (lost []runtimedir.Attachment) {
	for n := range i.records {
		if i.records[n].lost {
			lost = append(lost, i.records[n].Attachment)
		}
	}
	return lost
}

// Unlabelled is how many recorded pods of the namespaces of interest have no labels that are known.
func (i *Inventory) Unlabelled() (count int) {
	for n := range i.records {
		if r := &i.records[n]; r.Labels == nil && Covers(i.namespaces, r.Namespace) {
			count++
		}
	}
	return count
}

// Labels are those of the node's pods under the IDs that CNI has of them, in order of UID; only these keys.
func (i *Inventory) Labels(keys map[string]bool) []runtimedir.PodLabels {
	labels := map[PodID]map[string]string{}
	for id, known := range i.labels {
		if !Covers(i.view.Synced, id.Namespace) {
			labels[id] = known
		}
	}
	for id, pod := range i.reported {
		labels[id] = pod.Labels
	}
	for id, n := range i.byID {
		if pod := &i.pods[n]; pod.StaticUID == "" || id.UID == pod.StaticUID {
			labels[id] = pod.Labels
		}
	}
	list := make([]runtimedir.PodLabels, 0, len(labels))
	for id, all := range labels {
		list = append(list, runtimedir.PodLabels{PodID: id, Labels: only(all, keys)})
	}
	slices.SortFunc(list, func(a, b runtimedir.PodLabels) int { return compareIDs(a.PodID, b.PodID) })
	return list
}

// only are the labels with one of the keys, for a file: known, since a pod of the API has all it has, and nil where they exceed its bounds.
func only(labels map[string]string, keys map[string]bool) map[string]string {
	if labels == nil {
		labels = map[string]string{}
	}
	return runtimedir.KeepLabels(labels, keys)
}

func compareIDs(a, b PodID) int {
	return cmp.Or(strings.Compare(a.UID, b.UID), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}

// Remember writes what New goes on with after a restart. endpoints says which addresses are endpoints, or were and may have connections: a
// pod that has none and no record is reported again in time. Of labels only these keys are kept.
func (i *Inventory) Remember(m *runtimedir.Memory, endpoints func(netip.Addr) bool, keys map[string]bool) {
	m.RecordsSince, m.Lost = i.since, i.Lost()
	remembered := map[PodID]bool{}
	remember := func(pod Pod) {
		if !remembered[pod.PodID] {
			remembered[pod.PodID] = true
			if pod.Labels = only(pod.Labels, keys); pod.Labels != nil { // without them it would look like a pod that has none
				m.Pods = append(m.Pods, pod)
			}
		}
	}
	for n := range i.records {
		r := &i.records[n]
		if !r.lost && slices.ContainsFunc(r.IPs, endpoints) {
			m.Records = append(m.Records, r.Attachment)
		}
		if pod, known := i.reported[r.pod()]; known {
			remember(pod)
		}
	}
	for _, pod := range slices.Concat(i.pods, i.left) {
		if slices.ContainsFunc(pod.IPs, endpoints) {
			remember(pod)
		}
	}
	for id, addresses := range i.withdrawn {
		m.Withdrawn = append(m.Withdrawn, runtimedir.Withdrawn{PodID: id, Addresses: addresses})
	}
	slices.SortFunc(m.Withdrawn, func(a, b runtimedir.Withdrawn) int { return compareIDs(a.PodID, b.PodID) })
}
