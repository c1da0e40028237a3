package event

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// word makes the Event of magic IPs that have fared alike.
func (r *Recorder) word(now time.Time, reason string, alike []*watched) Event {
	w := alike[0]
	e := Event{Reason: reason, Warning: reason != EndpointGained, First: w.first, Last: w.last}
	for _, other := range alike {
		e.Count = max(e.Count, other.changes)
		if other.first.Before(e.First) {
			e.First = other.first
		}
	}
	if e.Count == 0 { // nothing has changed, and that is what is told
		e.Count, e.First, e.Last = 1, now, now
	}
	names := namesOf(alike)
	switch reason {
	case ClaimRefused:
		e.Count, e.First, e.Last = 1, now, now
		e.Message = frontendOf(w.MagicIP).String() + " is not served: " + w.Refused
		if len(alike) > 1 {
			e.Message += fmt.Sprintf("; neither are %d others: `magic-ip-agent status` names them", len(alike)-1)
		}
	case EndpointLost:
		e.Message = fmt.Sprintf("%s: no endpoint for %s, the last was pod %s; %s. %s", names, since(w.noneFrom, now), w.lost, fate(w.MagicIP), r.look(w.MagicIP))
		if w.Action == string(plan.Pass) {
			e.Warning = false
		}
	case NoEndpoint:
		e.Message = fmt.Sprintf("%s: no endpoint for %s, and none since the agent knows of it; %s. %s", names, since(w.noneFrom, now), fate(w.MagicIP), r.look(w.MagicIP))
		if w.Action == string(plan.Pass) {
			e.Warning = false
		}
	case EndpointUnstable:
		at := "to no pod now"
		if w.has != "" {
			at = "to pod " + w.has + " now"
		}
		e.Message = fmt.Sprintf("%s: the endpoint has changed %d times in %s, of which this is the only word; traffic goes %s. Look at the restarts and the readiness probe of the pods: %s",
			names, e.Count, since(w.first, now), at, r.look(w.MagicIP))
	case EndpointGained:
		e.Message = fmt.Sprintf("%s: traffic goes to pod %s", names, w.has)
		if w.told != "" && w.told != w.has {
			e.Message += ", and no more to " + w.told
		}
		if w.without > 0 && w.lost != "" {
			e.Message += fmt.Sprintf(", after %s without an endpoint", w.without.Round(100*time.Millisecond))
		}
		if e.Count > 2 {
			e.Message += fmt.Sprintf(" (%d changes, of which this is the last)", e.Count)
		}
	}
	return e
}

func since(from, now time.Time) string { return now.Sub(from).Round(time.Second).String() }

// fate is what becomes of new connections.
func fate(m published.MagicIP) string {
	if m.Action == string(plan.Pass) {
		return "new connections go where they would go without a magic IP"
	}
	return "new connections are refused"
}

// look is the command that shows why there is no endpoint.
func (r *Recorder) look(m published.MagicIP) string {
	namespace := "-n " + m.Namespace
	if m.Namespace == "*" {
		namespace = "-A"
	}
	command := "kubectl get pods -o wide " + namespace
	if m.Selector != "" {
		command += " -l '" + m.Selector + "'"
	}
	if r.Node != "" {
		command += " --field-selector spec.nodeName=" + r.Node
	}
	return command
}

// most is how many of several are named.
const most = 3

// namesOf are the magic IPs, not all by name.
func namesOf(list []*watched) string {
	var names []string
	for _, w := range list {
		names = append(names, frontendOf(w.MagicIP).String())
	}
	return few(names)
}

func few(names []string) string {
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), more)
	}
	return strings.Join(names, ", ")
}

// podsOf are the endpoints of a magic IP in words; empty where it has none.
func podsOf(m published.MagicIP) string {
	var pods []string
	for _, e := range m.Endpoints {
		pods = append(pods, fmt.Sprintf("%s (%s)", e.Pod, e.Address.Addr()))
	}
	slices.Sort(pods)
	return few(slices.Compact(pods))
}
