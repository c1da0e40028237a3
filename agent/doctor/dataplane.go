package doctor

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const dataPlaneCheck = "data plane"

// dataPlane reports whether packets of pods pass the rules, and what it costs where the agents bring them there.
func (e *examination) dataPlane() {
	const check = dataPlaneCheck
	var certain, possible []string
	unseen := errors.Join(e.unread, e.snapshot.Complete())
	if unseen == nil {
		certain, possible, unseen = e.network.Bypasses()
	}
	e.bypassed = len(certain) > 0
	hidden := node.ProgramsHidden()
	if unseen != nil {
		e.add(Hidden, check, "whether packets of pods bypass netfilter cannot be seen here: "+unseen.Error(), "run this as root in the network namespace of the node")
	}
	for _, text := range certain {
		e.add(Fail, check, text, "")
	}
	for _, text := range possible {
		e.add(Warn, check, text, "")
	}
	none := len(certain)+len(possible) == 0 && unseen == nil
	var known dataplane.Known
	if _, err := net.InterfaceByName(node.CiliumLink); err == nil {
		known.Link = true
	}
	settings, err := dataplane.Read(e.CiliumStateDir)
	if known.Unreadable = err; err == nil {
		known.Settings = &settings
	}
	agents := slices.DeleteFunc(slices.Clone(e.agents), func(a status.Agent) bool { return a.DataPlane.Name == "" })
	if len(agents) == 0 { // none runs, or they are of versions that know of none
		agents = []status.Agent{{Status: runtimedir.Status{DataPlane: runtimedir.DataPlane{Configured: string(dataplane.Auto)}}}}
	}
	for _, a := range agents {
		choice := dataplane.Choose(dataplane.Mode(a.DataPlane.Configured), known)
		who := ""
		if a.Name != "" {
			who = "agent " + a.Name + ": "
		}
		switch {
		case choice.Broken != "":
			e.add(Fail, check, who+choice.Reason+": "+choice.Broken, "set dataPlane to auto")
		case choice.Unknown != "":
			e.add(Hidden, check, who+choice.Reason+"; it is not known "+choice.Unknown, "run this as root on the node")
		case a.Name != "" && a.DataPlane.Name != string(choice.Plane):
			e.add(Fail, check, fmt.Sprintf("%sit is %s, and the agent takes it for %s (%s)", who, choice.Reason, a.DataPlane.Name, a.DataPlane.Reason),
				"see that the agent can read "+e.CiliumStateDir+" (the chart mounts it where the cluster has the API cilium.io/v2, or with config.dataPlane=cilium)")
		case choice.Price != "":
			e.add(Warn, check, who+choice.Reason+": "+choice.Means+". The price: "+choice.Price, "where that matters: "+choice.Instead)
		case known.Link:
			e.add(OK, check, who+choice.Reason+": "+choice.Means, "")
		case none && hidden != nil:
			e.add(Hidden, check, fmt.Sprintf("whether eBPF programs attached by tcx or netkit see the packets of pods before netfilter cannot be seen here: %v; none does by tc", hidden), "run this as root on the node")
		case none:
			e.add(OK, check, "no eBPF program sees the packets of pods before netfilter", "")
		}
		e.localRoutes(a, choice)
	}
}

// localRoutes compares the local routes in the kernel with those that an agent says it has made.
func (e *examination) localRoutes(a status.Agent, choice dataplane.Choice) {
	const check = "local routes"
	if len(a.DataPlane.LocalRoutes) == 0 {
		return
	}
	if e.unread != nil {
		e.add(Hidden, check, e.unread.Error(), "run this as root in the network namespace of the node")
		return
	}
	there := map[netip.Addr]bool{}
	for _, route := range e.snapshot.LocalRoutes {
		there[route.Address] = true
	}
	var missing []string
	for _, address := range a.DataPlane.LocalRoutes {
		if !there[address] {
			missing = append(missing, address.String())
		}
	}
	if len(missing) > 0 {
		next := "find out what removes them (ip monitor route); the agent restores them"
		if !a.Live {
			next = "start the agent: without it nothing restores them"
		}
		means := "packets of pods bypass the rules and leave the node"
		if !choice.LocalRoutes {
			means = "nothing but the rules keeps packets to it on the node"
		}
		e.add(Fail, check, fmt.Sprintf("agent %s has made one for %s, and it is gone: %s", a.Name, few(missing), means), next)
		return
	}
	e.add(OK, check, fmt.Sprintf("those of agent %s are in the kernel (%d)", a.Name, len(a.DataPlane.LocalRoutes)), "")
}
