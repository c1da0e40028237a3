package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

func frontendOf(m published.MagicIP) plan.Frontend {
	return plan.Frontend{Address: m.Address, Protocol: plan.Protocol(m.Protocol), Port: m.Port}
}

func splitPod(pod string) (namespace, name string) {
	namespace, name, _ = strings.Cut(pod, "/")
	return namespace, name
}

// publish writes what the agent does where it differs from what was written last. With heartbeat, the
// file's time stamp is renewed all the same.
func (a *Agent) publish(now time.Time, heartbeat bool) {
	view := &published.Agent{
		Version: published.Version, Name: a.config.Name, StartedAt: a.startedAt, LastSync: a.syncedAt, LastError: a.lastError(),
		Backend: a.Backend.Name(), BackendNote: a.BackendNote, PollInterval: a.config.PollInterval.String(), Notes: a.notes(), Labels: a.labels(), Told: a.toldPods(), Dead: a.dead(now),
		Records: a.endpointRecords(), RecordsSince: a.records.since, Lost: a.records.lost,
		Withdrawn: maps.Clone(a.pods.withdrawn),
	}
	for i, port := range a.config.Ports {
		m := published.MagicIP{
			Address: port.Address, Port: port.Port, Protocol: string(port.Protocol),
			Namespace: port.Namespace, Selector: port.SelectorText, Refused: port.Unserved, Endpoints: []published.Endpoint{},
		}
		if s := a.serving[i]; s != nil && port.Unserved == "" {
			m.ClaimedAt, m.LostAt, m.Refused = s.claimedAt, s.lostAt, s.refused
			if s.refused == "" {
				m.Action = string(a.action(port, s, now))
			}
			for _, c := range s.endpoints {
				m.Endpoints = append(m.Endpoints, published.Endpoint{Address: c.Address, Pod: podName(c), UID: c.UID, Recorded: c.Recorded})
			}
		}
		view.MagicIPs = append(view.MagicIPs, m)
	}
	if a.published != nil {
		if reflect.DeepEqual(view, a.published) {
			if heartbeat {
				a.note("published file", a.renew(now))
			}
			return
		}
	}
	before := a.published
	if before == nil {
		before = a.restored
	}
	for _, tell := range a.Published {
		tell(before, view)
	}
	err := published.Write(a.RuntimeDir, view)
	a.note("published file", err)
	if err == nil {
		a.published = view
	}
}

func (a *Agent) renew(now time.Time) error {
	if err := published.Renew(a.RuntimeDir, a.config.Name, now); err != nil {
		// Somebody has taken the file away: write it again.
		return published.Write(a.RuntimeDir, a.published)
	}
	return nil
}

// endpointRecords are the records of the endpoints that the state file has, and not lost ones.
func (a *Agent) endpointRecords() (list []state.Attachment) {
	endpoints := map[netip.Addr]bool{}
	for _, s := range a.services {
		for _, chosen := range s.endpoints {
			endpoints[chosen.Address.Addr()] = true
		}
	}
	for _, record := range a.records.list[len(a.records.lost):] {
		if slices.ContainsFunc(record.IPs, func(ip netip.Addr) bool { return endpoints[ip] }) {
			list = append(list, record)
		}
	}
	return list
}

// labels are those of the node's pods, by the UID that CNI knows them by: so that the plugin finds them at ADD.
func (a *Agent) labels() map[string]map[string]string {
	restored := a.restoredLabels()
	if len(restored)+len(a.pods.Pods)+len(a.pods.told) == 0 {
		return nil
	}
	labels := map[string]map[string]string{}
	maps.Copy(labels, restored)
	tell := func(uid string, pod inventory.Pod) {
		labels[uid] = pod.Labels
		if pod.Labels == nil {
			labels[uid] = map[string]string{}
		}
	}
	for uid, pod := range a.pods.told {
		tell(uid, pod)
	}
	for _, pod := range a.pods.Pods {
		tell(cmp.Or(pod.ConfigHash, pod.UID), pod)
	}
	return labels
}

// unknownLabels is how many recorded pods of the namespaces that are served nobody knows the labels of.
func (a *Agent) unknownLabels() (count int) {
	for _, record := range a.records.list {
		if record.Labels == nil && a.serves(record.Namespace) {
			count++
		}
	}
	return count
}

func (a *Agent) toldPods() map[string]published.Pod {
	if len(a.pods.told) == 0 {
		return nil
	}
	told := map[string]published.Pod{}
	for uid, pod := range a.pods.told {
		told[uid] = published.Pod{CreatedAt: pod.CreatedAt, Owner: pod.Owner, Ports: pod.Ports, Finished: pod.Finished}
	}
	return told
}

// notes are the conditions that an operator should know of.
func (a *Agent) notes() []string {
	var notes []string
	if a.applied == nil {
		return nil
	}
	for _, record := range a.records.lost {
		notes = append(notes, record.Namespace+"/"+record.Name+": its record was lost with the state file; it counts for as long as "+
			record.HostInterface+" is there")
	}
	for _, bridge := range a.applied.Bridges {
		var sysctls []string
		if bridge.Unfiltered4 {
			sysctls = append(sysctls, "net.bridge.bridge-nf-call-iptables")
		}
		if bridge.Unfiltered6 {
			sysctls = append(sysctls, "net.bridge.bridge-nf-call-ip6tables")
		}
		notes = append(notes, "bridge "+bridge.Name+": its frames do not pass netfilter ("+strings.Join(sysctls, ", ")+
			" is 0 or br_netfilter is not loaded), so that between its own pods the source address is masqueraded")
	}
	for _, rule := range a.foreign.rules {
		notes = append(notes, "somebody else translates a magic IP too; remove the rule: "+rule)
	}
	notes = append(notes, a.foreign.bypasses...)
	if unknown := a.unknownLabels(); a.API == nil && unknown > 0 {
		notes = append(notes, fmt.Sprintf("%d recorded pods have no labels that are known, so that no selector matches them: the container runtime passes none to "+
			"CNI plugins (containerd does not), and without the Kubernetes API nobody else tells", unknown))
	}
	for _, more := range a.Notes {
		notes = append(notes, more()...)
	}
	return notes
}
