package event

import (
	"fmt"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// describe makes the Event of frontends with one group key. Its message bears no time that differs from one occurrence
// to the next, so that the correlator counts occurrences instead of adding Events.
func (r *Reporter) describe(reason string, group []*frontend) *Event {
	f := group[0]
	e := &Event{Reason: reason, Warning: reason != EndpointGained}
	var names []string
	for _, other := range group {
		names = append(names, other.MagicIP.Frontend.String())
	}
	about := few(names) + ": "
	switch reason {
	case Unserved:
		e.Message = names[0] + " is not served: " + f.Reason
		if others := len(group) - 1; others > 0 {
			e.Message += fmt.Sprintf("; not served either: %d more, see `magic-ip-agent status`", others)
		}
	case EndpointLost:
		e.Message = about + "no endpoint for a minute, the last was pod " + f.last + "; " + fate(f.MagicIP) + ". " + r.command(f.MagicIP)
	case NoEndpoint:
		e.Message = about + "no endpoint for a minute, and none since the agent started; " + fate(f.MagicIP) + ". " + r.command(f.MagicIP)
	case EndpointUnstable:
		destination := "no pod"
		if f.pods != "" {
			destination = "pod " + f.pods
		}
		e.Message = fmt.Sprintf("%sthe endpoint has changed %d times and traffic goes to %s now. See the restarts and the readiness probe of the pods: %s",
			about, f.changes, destination, r.command(f.MagicIP))
	case EndpointGained:
		e.Message = about + "traffic goes to pod " + f.pods
		if f.reported != "" && f.reported != f.pods {
			e.Message += " instead of " + f.reported
		}
	}
	if f.Action == string(plan.Pass) && (reason == EndpointLost || reason == NoEndpoint) {
		e.Warning = false // nothing fails
	}
	return e
}

// fate is what happens to new connections without an endpoint.
func fate(m runtimedir.MagicIP) string {
	if m.Action == string(plan.Pass) {
		return "new connections go where they go without a magic IP"
	}
	return "new connections are rejected"
}

// command shows the candidates.
func (r *Reporter) command(m runtimedir.MagicIP) string {
	command := "kubectl get pods -o wide -n " + m.Namespace
	if m.Namespace == "*" {
		command = "kubectl get pods -o wide -A"
	}
	if m.Selector != "" {
		command += " -l '" + m.Selector + "'"
	}
	if r.Node != "" {
		command += " --field-selector spec.nodeName=" + r.Node
	}
	return command
}

// few names the first three.
func few(names []string) string {
	const most = 3
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}

// podsOf are the endpoints of a magic IP as text; empty without one.
func podsOf(m runtimedir.MagicIP) string {
	var pods []string
	for _, e := range m.Endpoints {
		pods = append(pods, fmt.Sprintf("%s (%s)", e.Pod, e.Address.Addr()))
	}
	slices.Sort(pods)
	return few(slices.Compact(pods))
}
