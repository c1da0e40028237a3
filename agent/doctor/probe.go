package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/magic-ip-address/magic-ip-address/agent/doctor/probe"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	probeCheck = "probe"
	fromNode   = "a process of the node"
)

// rights is what a probe needs.
const rights = "run this as root on the node, or in a container with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW in the node's network and PID namespaces"

// probe sends packets to the magic IPs from where a pod is, and from the node itself, and says where they end.
func (e *examination) probe(ctx context.Context) {
	targets := e.targets()
	if len(targets) == 0 {
		e.add(Hidden, probeCheck, "no magic IP is served that packets could be sent to", "")
		return
	}
	e.probeFromPod(ctx, targets)
	e.probeFromNode(ctx, targets)
	e.settleFilters()
}

// settleFilters says of filters that could not be decided that they let the probe pass, where all of it came through.
func (e *examination) settleFilters() {
	for _, f := range e.found {
		if f.Check == probeCheck && f.Level != OK {
			return
		}
	}
	for i := range e.found {
		if f := &e.found[i]; f.Check == filtersCheck && f.Level == Warn {
			f.Level, f.Text, f.Next = OK, "the probe passed; "+f.Text, ""
		}
	}
}

func (e *examination) probeFromPod(ctx context.Context, targets []probe.Target) {
	if e.FromPod == "" && e.NetNS == "" {
		bridge, all := e.podBridge(), len(targets)
		if bridge == "" && e.bypassed {
			e.add(Hidden, probeCheck, "a veth of its own would be attached in another way than those of pods, whose packets bypass the rules", "use --from-pod or --netns")
			return
		}
		targets = slices.DeleteFunc(slices.Clone(targets), func(target probe.Target) bool {
			m, _ := e.served(target.Frontend)
			return len(m.HostInterface) > 0 && !plan.Names(m.HostInterface, bridge)
		})
		if elsewhere := all - len(targets); elsewhere > 0 {
			e.add(Hidden, probeCheck, fmt.Sprintf("%d are for clients behind links that hostInterface names, and a namespace made for the probe would be behind another", elsewhere), "use --from-pod or --netns")
		}
		if len(targets) == 0 {
			return
		}
	}
	client, name, done := e.client()
	if name == "" {
		return
	}
	defer done()
	e.probeFrom(ctx, client, name, targets)
}

// probeFromNode probes as processes of the node, and pods with hostNetwork, do. It needs no rights.
func (e *examination) probeFromNode(ctx context.Context, targets []probe.Target) {
	targets = slices.DeleteFunc(slices.Clone(targets), func(target probe.Target) bool {
		m, _ := e.served(target.Frontend)
		_, err := netlink.RouteGet(net.IP(target.Address.AsSlice()))
		return !m.HostClients || err != nil // the check of routes has said so
	})
	if len(targets) == 0 {
		return
	}
	here, err := netns.Get()
	if err != nil {
		e.add(Hidden, probeCheck, fmt.Sprintf("from %s: %v", fromNode, err), "")
		return
	}
	defer func() { _ = here.Close() }()
	e.probeFrom(ctx, here, fromNode, targets)
}

// probeFrom probes the targets from a network namespace, which has a name for people.
func (e *examination) probeFrom(ctx context.Context, client netns.NsHandle, name string, targets []probe.Target) {
	all := slices.DeleteFunc(slices.Clone(targets), func(target probe.Target) bool { return target.Protocol == plan.SCTP })
	all = all[:min(len(all), most)]
	traces, err := probe.Run(ctx, client, all, connectTimeout)
	if errors.Is(err, probe.ErrNotPermitted) {
		e.add(Hidden, probeCheck, err.Error(), rights)
		return
	}
	if err != nil {
		e.add(Hidden, probeCheck, fmt.Sprintf("from %s: %v", name, err), "")
		return
	}
	var ends []string // what became of those that did what they should, counted
	count := map[string]int{}
	for _, trace := range traces {
		level, text, next := e.judgeTrace(trace)
		if level != OK {
			e.add(level, probeCheck, fmt.Sprintf("from %s to %s: %s", name, trace.Frontend, text), next)
			continue
		}
		if count[text]++; count[text] == 1 {
			ends = append(ends, text)
		}
	}
	for i, end := range ends {
		ends[i] = fmt.Sprintf("%d %s", count[end], end)
	}
	if len(ends) > 0 {
		e.add(OK, probeCheck, fmt.Sprintf("from %s: %s", name, strings.Join(ends, ", ")), "")
	}
	if unprobed := len(targets) - len(all); unprobed > 0 {
		e.add(Hidden, probeCheck, fmt.Sprintf("from %s, %d more were not tried: SCTP, and more than %d", name, unprobed, most), "")
	}
}

// client is the network namespace to probe from. Where there is none, it adds a finding and name is empty.
func (e *examination) client() (client netns.NsHandle, name string, done func()) {
	path := e.NetNS
	name = path
	if e.FromPod != "" {
		path, name = "", "pod "+e.FromPod
		for _, record := range e.records {
			if record.Namespace+"/"+record.Name == e.FromPod && (path == "" || record.IfName == "eth0") {
				path = record.Netns
			}
		}
		if path == "" { // the plugin records only pods that a selector may match
			path = netnsOf("/", e.FromPod)
		}
		if path == "" {
			e.add(Hidden, probeCheck, "pod "+e.FromPod+" has no record with a network namespace, and no process of it is found by the kubelet's /var/log/pods and by cgroups",
				"run this as root on the node of that pod, or give the path of its network namespace: --netns /proc/PID/ns/net, where PID is a process of the pod")
			return netns.None(), "", nil
		}
	}
	if path != "" {
		client, err := probe.Open(path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && e.FromPod != "":
			e.add(Fail, probeCheck, fmt.Sprintf("the network namespace of %s is gone, or not visible from here: %v", name, err), "run this on the node; if it is gone there, delete the pod")
		case err != nil:
			e.add(Fail, probeCheck, err.Error(), "")
		default:
			return client, name, func() { _ = client.Close() }
		}
		return netns.None(), "", nil
	}
	bridge := e.podBridge()
	var taken []netip.Addr
	for _, record := range e.records {
		taken = append(taken, record.IPs...)
	}
	for _, target := range e.targets() {
		for _, endpoint := range target.Endpoints {
			taken = append(taken, endpoint.Addr())
		}
	}
	site, err := probe.NewSite(bridge, taken)
	switch {
	case errors.Is(err, probe.ErrNotPermitted):
		e.add(Hidden, probeCheck, "packets cannot be sent from a pod's place: "+err.Error(), rights)
		return netns.None(), "", nil
	case err != nil:
		e.add(Hidden, probeCheck, fmt.Sprintf("a namespace to send packets from cannot be made: %v", err), "use --from-pod or --netns")
		return netns.None(), "", nil
	}
	name = "a namespace of its own on a veth"
	if bridge != "" {
		name = "a namespace of its own on bridge " + bridge
	}
	return site.Namespace, name, func() {
		if err := site.Close(); err != nil {
			e.add(Warn, probeCheck, fmt.Sprintf("link %s, which was made to send packets from, is left: %v", site.Link, err), "ip link delete "+site.Link)
		}
	}
}

// podBridge is the bridge that the node reaches most endpoints and recorded pods by; empty where pods are not on a bridge.
func (e *examination) podBridge() string {
	var addresses []netip.Addr
	for _, target := range e.targets() {
		for _, endpoint := range target.Endpoints {
			addresses = append(addresses, endpoint.Addr())
		}
	}
	for _, record := range e.records {
		addresses = append(addresses, record.IPs...)
	}
	count := map[string]int{}
	best := ""
	for _, address := range addresses {
		index, ok := routeTo(address)
		if !ok {
			continue
		}
		link, err := netlink.LinkByIndex(index)
		if err != nil || link.Attrs().Flags&net.FlagLoopback != 0 { // the endpoint is a process of the node
			continue
		}
		name := ""
		if link.Type() == "bridge" {
			name = link.Attrs().Name
		}
		if count[name]++; count[name] > count[best] {
			best = name
		}
	}
	return best
}

// judgeTrace says what a trace means, and which of the other findings is the cause.
func (e *examination) judgeTrace(trace probe.Trace) (level Level, text, next string) {
	m, found := e.served(trace.Frontend)
	link := byIP(trace.Link)
	if reason, next := e.unserved(m, link); reason != "" && !trace.Local && (trace.Hop == probe.Node || trace.Hop == probe.Rejected) {
		return Fail, fmt.Sprintf("%s; clients behind %s are not served: %s", trace.Text, link, reason), next
	}
	without := found && len(m.Endpoints) == 0
	text = trace.Text
	if exempt(m, trace.Source.Addr()) && slices.Contains([]probe.Hop{probe.Rejected, probe.Output, probe.Node, probe.Astray}, trace.Hop) {
		return OK, "exempt, as excludeTarget has it", ""
	}
	fail := func(text string, checks ...string) (Level, string, string) {
		text, next := e.because(text, checks...)
		return Fail, text, next
	}
	switch trace.Hop {
	case probe.Answered:
		return OK, "answered", ""
	case probe.Rejected:
		if without && m.Action == string(plan.Reject) {
			return OK, "rejected for want of an endpoint", ""
		}
		if without {
			return fail(text+", although it should "+m.Action, "rules", "agent")
		}
		return fail(text, "links", "endpoints", "rules", "rules of others", "filters", "agent")
	case probe.Output:
		if without && m.Action != string(plan.Pass) { // EPERM is what the kernel makes of a rejection too
			return OK, map[bool]string{true: "held", false: "rejected"}[m.Action == string(plan.Hold)] + " for want of an endpoint", ""
		}
		return fail(text, "endpoints", "rules", "rules of others", "filters", "agent")
	case probe.Node:
		if without && m.Action == string(plan.Hold) {
			return OK, "held for want of an endpoint", ""
		}
		if trace.Local {
			return fail(text, "conntrack", "endpoints", "rules", "rules of others", "filters", "agent")
		}
		return fail(text, "forwarding", "rp_filter", "conntrack", "links", "bridge ports", "endpoints", "rules", "rules of others", "filters", "agent")
	case probe.Client:
		if e.bypassed && trace.Result != probe.Failure { // the client has sent it
			return fail(text, dataPlaneCheck)
		}
		return Fail, text, "give the client a route to it: a default route is enough. In the client's namespace: ip route get " + trace.Address.String()
	case probe.Astray:
		if without && m.Action == string(plan.Pass) {
			return OK, "passed for want of an endpoint", ""
		}
		return fail(text, "rules of others", "rules", dataPlaneCheck, "agent")
	case probe.Refused:
		return fail(text, "endpoints")
	case probe.Silent:
		if trace.Protocol == plan.UDP {
			return OK, "delivered to the endpoint, which need not answer an empty datagram", ""
		}
		return fail(text, "endpoints", "filters", "rp_filter")
	case probe.Reply:
		return fail(text, "bridges", "forwarding", "rp_filter", dataPlaneCheck, "filters")
	}
	return Hidden, text, ""
}

// served finds what the agents say of a frontend.
func (e *examination) served(frontend plan.Frontend) (magicIP, bool) {
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			if m.Reason == "" && m.Frontend == frontend {
				return m, true
			}
		}
	}
	return magicIP{}, false
}

// exempt reports whether packets of a source are left alone: it is a target, and excluded.
func exempt(m magicIP, source netip.Addr) bool {
	return m.ExcludeTarget && slices.ContainsFunc(m.Endpoints, func(e runtimedir.Endpoint) bool { return e.Address.Addr() == source })
}

// because adds to the text what a check has found that explains where a probe ended: of these checks a failure first, then a
// warning. next is then what that check says.
func (e *examination) because(text string, checks ...string) (withCause, next string) {
	for _, level := range []Level{Fail, Warn} {
		for _, check := range checks {
			i := slices.IndexFunc(e.found, func(f Finding) bool {
				return f.Level == level && (f.Check == check || strings.HasPrefix(f.Check, check+" "))
			})
			if i >= 0 {
				return fmt.Sprintf("%s; probably because of %s: %s", text, e.found[i].Check, e.found[i].Text), e.found[i].Next
			}
		}
	}
	return text, "nothing else that was looked at explains it: look at the other rules of this node (nft list ruleset, iptables-save) and at NetworkPolicies"
}
