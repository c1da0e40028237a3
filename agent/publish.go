package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// files are the agent's files in the runtime directory. Each has one reader, and is written only where it has changed.
type files struct {
	agent  *agent
	status file[*runtimedir.Status]
	// writer writes the status.
	writer *runtimedir.StatusWriter
	claims file[[]runtimedir.Claim]
	// spare is the memory for the next claims, of which there may be thousands.
	spare  []runtimedir.Claim
	pods   file[runtimedir.Pods]
	memory file[runtimedir.Memory]
	// observed is the status that observers have seen last; of the process before at first.
	observed *runtimedir.Status
}

// file is a file as it was written last.
type file[T any] struct {
	written *T // nil: nothing, or that has failed
	err     error
}

// put writes now unless it is equal to what is there.
func (f *file[T]) put(now T, equal func(a, b T) bool, write func(T) error) {
	if f.written != nil && equal(*f.written, now) {
		return
	}
	f.written = nil
	if f.err = write(now); f.err == nil {
		f.written = &now
	}
}

func deepEqual[T any](a, b T) bool { return reflect.DeepEqual(a, b) }

func (f *files) problems() []problem {
	return failed(
		problem{"files", "status file", f.status.err}, problem{"files", "claims file", f.claims.err},
		problem{"files", "pods file", f.pods.err}, problem{"files", "memory file", f.memory.err},
	)
}

// publish writes what the agent does. With heartbeat, the time stamp of the status file is renewed although nothing has changed, and
// all files are written again where one was removed.
// The status file is the last: an endpoint that it names survives a restart of the agent.
func (f *files) publish(now time.Time, heartbeat bool, waits []problem) {
	a := f.agent
	if heartbeat && !a.own.Complete() {
		f.claims.written, f.pods.written, f.memory.written, f.status.written = nil, nil, nil, nil
	}
	if len(waits) == 0 {
		f.publishClaims()
		f.pods.put(runtimedir.Pods{Labels: a.labels(), Dead: a.pods.Dead(now)}, deepEqual, func(pods runtimedir.Pods) error {
			dropped, err := a.own.WritePods(pods)
			if dropped > 0 {
				a.Log.Warn("pods have too many labels: the plugin records them whatever their labels are", "pods", dropped)
			}
			return err
		})
		f.memory.put(a.memory(a.query.LabelKeys), deepEqual, a.own.WriteMemory)
	}
	status := a.status(now)
	if len(waits) > 0 && f.observed != nil {
		status.MagicIPs = f.observed.MagicIPs // what the kernel has
	}
	if f.observed == nil || !f.observed.Equal(&status) {
		for _, observe := range a.Observers {
			observe(f.observed, &status)
		}
		f.observed, f.status.written = &status, nil
	}
	switch {
	case f.status.written == nil:
		f.status.put(&status, (*runtimedir.Status).Equal, func(status *runtimedir.Status) error { return f.writer.Write(*status) })
	case heartbeat:
		f.status.err = a.own.Renew(now)
	}
}

func (f *files) publishClaims() {
	a := f.agent
	claims := f.spare[:0]
	rules, local := a.wanted.Rules, a.localAddresses(&a.wanted) // in the same order as the services
	for _, i := range a.services.sorted {
		port, s := &a.config.Ports[i], a.services.inOrder[i]
		if port.Unserved != "" {
			continue
		}
		for len(rules) > 0 && rules[0].Frontend != port.Frontend && rules[0].Compare(port.Frontend) < 0 {
			rules = rules[1:]
		}
		for len(local) > 0 && local[0] != port.Address && local[0].Less(port.Address) {
			local = local[1:]
		}
		claims = append(claims, runtimedir.Claim{
			Frontend: port.Frontend, ClaimedAt: s.claimedAt, Served: s.unserved == "",
			LocalRoute: len(local) > 0 && local[0] == port.Address,
			Confined:   len(rules) > 0 && rules[0].Frontend == port.Frontend && rules[0].Confined(),
		})
	}
	f.spare = claims
	if f.claims.written == nil || !slices.Equal(*f.claims.written, claims) {
		f.claims.put(slices.Clone(claims), slices.Equal, a.own.WriteClaims)
	}
}

// status is what the agent does, for people.
func (a *agent) status(now time.Time) runtimedir.Status {
	notes := a.notes()
	status := runtimedir.Status{
		Targets: a.services.targets, Problems: a.kindsOf(notes), Notes: texts(notes),
		Name: a.config.Name, StartedAt: a.startedAt, LastSync: a.kernel.syncedAt, LastError: a.lastError(),
		Backend: a.Backend.Name(), BackendNote: a.BackendNote, DataPlane: a.dataPlane(), PollInterval: a.config.PollInterval.String(), NoAPI: a.API == nil,
		MagicIPs: make([]runtimedir.MagicIP, 0, len(a.config.Ports)), Links: links(a.sources.network.Links),
	}
	for i := range a.config.Ports {
		port := &a.config.Ports[i]
		m := runtimedir.MagicIP{
			Frontend: port.Frontend, Namespace: port.Namespace, Selector: port.SelectorText, HostInterface: port.HostInterface, HostClients: port.HostClients, ExcludeTarget: port.ExcludeTarget,
			Reason: port.Unserved, Endpoints: []runtimedir.Endpoint{},
		}
		if port.Unserved != "" {
			m.UnservedBy = runtimedir.ByConfiguration
		}
		if i < len(a.services.inOrder) && a.services.inOrder[i] != nil && port.Unserved == "" {
			s := a.services.inOrder[i]
			if m.Reason, m.UnservedBy = s.unserved, s.unservedBy; m.Reason == "" {
				m.Action, m.Why = string(a.action(port, s, now)), s.why
			}
			m.Since = s.changedAt
			if count, counted := a.kernel.counts[port.Frontend]; counted {
				m.Count = &count
			}
			m.Endpoints = append(m.Endpoints, chosenEndpoints(s.endpoints)...)
		}
		status.MagicIPs = append(status.MagicIPs, m)
	}
	return status
}

// dataPlane is how packets of pods are brought to the rules.
func (a *agent) dataPlane() runtimedir.DataPlane {
	status := runtimedir.DataPlane{Configured: string(a.config.DataPlane), Name: string(a.plane.Plane), Reason: a.plane.Reason}
	if p := a.kernel.applied; p != nil {
		status.LocalRoutes = a.localAddresses(p)
		for _, family := range plan.Families() {
			if p.Detour.Masquerade(family) && p.Has(family) {
				status.Masquerade = append(status.Masquerade, string(family))
			}
		}
	}
	return status
}

// links are the links of the node, those that are alike together. The ports of a bridge that is served are left out: they
// are as many as there are pods.
func links(all []node.Link) (groups []runtimedir.Links) {
	type likeness struct{ kind, role, reason string }
	at := map[likeness]int{}
	for _, l := range all {
		if l.Port && l.Role == node.Served {
			continue
		}
		alike := likeness{l.Kind, string(l.Role), l.Reason}
		n, there := at[alike]
		if !there {
			n = len(groups)
			at[alike] = n
			groups = append(groups, runtimedir.Links{Kind: l.Kind, Role: string(l.Role), Reason: l.Reason})
		}
		groups[n].Names = append(groups[n].Names, l.Name)
	}
	return groups
}

func chosenEndpoints(chosen []endpoint.Chosen) (endpoints []runtimedir.Endpoint) {
	for _, c := range chosen {
		endpoints = append(endpoints, runtimedir.Endpoint{Address: c.Address, Pod: podName(c), UID: c.UID, Recorded: c.Recorded, AddedAt: c.AddedAt})
	}
	return endpoints
}

// lastError is what is wrong now, in one line; empty where nothing is.
func (a *agent) lastError() string {
	var all []string
	for about, err := range a.logged {
		all = append(all, about+": "+err)
	}
	slices.Sort(all)
	return strings.ReplaceAll(strings.Join(all, "; "), "\n", "; ")
}

// labels are what the plugin may learn of pods, where the API reports any.
func (a *agent) labels() []runtimedir.PodLabels {
	if a.API == nil {
		return nil
	}
	return a.pods.Labels(a.query.LabelKeys)
}

// memory is what the agent goes on with after a restart, beside its status and claims.
func (a *agent) memory(keys map[string]bool) runtimedir.Memory {
	m := runtimedir.Memory{
		Uplinks: a.sources.uplinks, Hairpins: slices.Clone(a.kernel.hairpins), Namespace: a.sources.namespace, Cilium: a.sources.cilium,
		Servers: a.kernel.servers,
	}
	endpoints := addressSet(a.kernel.servers) // and former ones
	for i, s := range a.services.inOrder {
		if s == nil {
			continue
		}
		for _, c := range s.endpoints {
			endpoints[c.Address.Addr()] = true
		}
		if !s.lostAt.IsZero() {
			m.Holds = append(m.Holds, runtimedir.Hold{Frontend: a.config.Ports[i].Frontend, LostAt: s.lostUptime})
		}
	}
	a.pods.Remember(&m, func(ip netip.Addr) bool { return endpoints[ip] }, keys)
	return m
}

// restore begins with what the process before has written.
func (a *agent) restore(ctx context.Context) {
	now := time.Now()
	a.startedAt = now
	memory, err := a.own.ReadMemory()
	if err != nil {
		if memory = (&runtimedir.Memory{}); !errors.Is(err, fs.ErrNotExist) {
			a.Log.Warn("what this agent remembered cannot be used; starting without it", "error", err)
		}
		there, err := a.Backend.Exists(ctx)
		a.keep = there || err != nil
	}
	var labels []runtimedir.PodLabels
	if pods, err := a.own.ReadPods(); err == nil {
		labels = pods.Labels
	}
	a.sources.uplinks, a.kernel.hairpins, a.sources.namespace, a.sources.cilium = memory.Uplinks, memory.Hairpins, memory.Namespace, memory.Cilium
	a.kernel.servers = memory.Servers
	a.pods = inventory.New(a.API != nil, *memory, labels, now)
	a.services.byFrontend = map[plan.Frontend]*service{}
	if claims, err := a.own.ReadClaims(); err == nil {
		for _, c := range claims {
			a.services.byFrontend[c.Frontend] = &service{claimedAt: c.ClaimedAt}
			if c.Served {
				a.kernel.restored = append(a.kernel.restored, c.Frontend)
			}
		}
	}
	for _, h := range memory.Holds {
		if s := a.services.byFrontend[h.Frontend]; s != nil {
			elapsed := a.Uptime() - h.LostAt
			if elapsed < 0 { // the node was restarted
				elapsed = time.Hour
			}
			s.lostUptime, s.lostAt = h.LostAt, now.Add(-elapsed)
		}
	}
	if status, err := a.own.ReadStatus(); err == nil {
		a.files.observed = status
		for _, m := range status.MagicIPs {
			if s := a.services.byFrontend[m.Frontend]; s != nil {
				s.endpoints, s.changedAt = restored(m.Endpoints), m.Since
			}
		}
	}
	a.configure(a.config)
}

func restored(endpoints []runtimedir.Endpoint) (chosen []endpoint.Chosen) {
	for _, e := range endpoints {
		namespace, name, _ := strings.Cut(e.Pod, "/")
		chosen = append(chosen, endpoint.Chosen{
			Target: &inventory.Target{
				PodID: inventory.PodID{Namespace: namespace, Name: name, UID: e.UID}, Recorded: e.Recorded, AddedAt: e.AddedAt,
			},
			Address: e.Address,
		})
	}
	return chosen
}

// notes are the conditions that an operator should know of.
func (a *agent) notes() (notes []Note) {
	add := func(kind string, texts ...string) {
		for _, text := range texts {
			notes = append(notes, Note{kind, text})
		}
	}
	if a.kernel.applied == nil {
		return nil
	}
	for _, record := range a.pods.Lost() {
		add("record_lost", record.Namespace+"/"+record.Name+": its record was lost with the state file; it counts for as long as "+
			record.HostInterface+" is there")
	}
	if unnamed := a.kernel.applied.Unnamed; len(unnamed) > 0 {
		add("unnamed_link", fmt.Sprintf("rules do not name the links %q, because their names could mean something else there: with iptables their pods are not served; rename them", unnamed))
	}
	for _, bridge := range a.kernel.applied.Bridges {
		var sysctls []string
		if bridge.Unfiltered4 {
			sysctls = append(sysctls, "net.bridge.bridge-nf-call-iptables")
		}
		if bridge.Unfiltered6 {
			sysctls = append(sysctls, "net.bridge.bridge-nf-call-ip6tables")
		}
		add("unfiltered_bridge", "bridge "+bridge.Name+": its frames do not pass netfilter ("+strings.Join(sysctls, ", ")+
			" is 0 or br_netfilter is not loaded), so that between its own pods the source address is masqueraded")
	}
	add("network", a.sources.network.Notes...)
	add("data_plane", a.planeNotes()...)
	if unlabelled := a.pods.Unlabelled(); a.API == nil && unlabelled > 0 {
		add("unlabelled_pods", fmt.Sprintf("%d recorded pods have no labels that are known, so that no selector matches them: the container runtime passes none to "+
			"CNI plugins (containerd does not), and without the Kubernetes API nothing else reports them", unlabelled))
	}
	add("unrecorded_endpoint", a.unrecordedEndpoints()...)
	for _, more := range a.Notes {
		notes = append(notes, more()...)
	}
	return notes
}

// texts are what the notes say.
func texts(notes []Note) (all []string) {
	for _, n := range notes {
		all = append(all, n.Text)
	}
	return all
}

// kindsOf are the kinds of the problems and notes that are there now, and of links that are not served.
func (a *agent) kindsOf(notes []Note) []string {
	kinds := slices.Clone(a.kinds)
	for _, n := range notes {
		kinds = append(kinds, n.Kind)
	}
	if slices.ContainsFunc(a.sources.network.Links, func(l node.Link) bool { return l.Role == node.Other }) {
		kinds = append(kinds, "unserved_link")
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// planeNotes are notes about a data plane by which magic IPs do not work, or may not.
func (a *agent) planeNotes() (notes []string) {
	if a.plane.Broken != "" {
		notes = append(notes, a.plane.Reason+": "+a.plane.Broken+"; set dataPlane to auto")
	}
	if a.plane.Unknown != "" {
		notes = append(notes, a.plane.Reason+"; it is not known "+a.plane.Unknown+". Mount that directory, or set dataPlane to cilium")
	}
	return notes
}

// unrecordedEndpoints are notes about endpoints whose address is in no record although the plugin records pods.
func (a *agent) unrecordedEndpoints() []string {
	const most = 3
	var pods []string
	for _, s := range a.services.inOrder {
		if s == nil {
			continue
		}
		for _, chosen := range s.endpoints {
			if !chosen.Unrecorded {
				continue
			}
			if name := podName(chosen) + " (" + chosen.Address.Addr().String() + ")"; !slices.Contains(pods, name) {
				pods = append(pods, name)
			}
		}
	}
	slices.Sort(pods)
	if more := len(pods) - most; more > 0 {
		pods = append(pods[:most], fmt.Sprintf("%d more", more))
	}
	if len(pods) == 0 {
		return nil
	}
	return []string{"endpoints with an address that is in no record of the CNI plugin: " + strings.Join(pods, ", ") +
		"; a pod was added before the plugin's entry in the conflist, or podIPs in its status are not true"}
}
