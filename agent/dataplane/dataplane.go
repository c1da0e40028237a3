// Package dataplane knows whether packets of pods pass netfilter on their way through this node, and by what means magic IPs
// work where they do not.
//
// Cilium's settings are read from what its agent has written; nothing is concluded from the look of its links and programs, which
// are the same with all settings. The ways past netfilter, as measured with Cilium 1.20:
//
//   - BPF host routing redirects a pod's packet at its link, before the node's network stack. A packet to an address of the node
//     goes there all the same: a local route for the magic IP makes it one.
//   - A reply from pod to pod is redirected too, by BPF host routing, and with legacy host routing where the node has no route to
//     each pod by the pod's own link (endpoint routes) and Cilium does not masquerade by iptables. A reply to an address of the node
//     passes: the flow is masqueraded, which costs the client's address.
//
// Limits: other data planes are named by package node, and nothing is done about them.
package dataplane

import (
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Mode is the configuration's dataPlane.
type Mode string

// The modes.
const (
	// Auto: Cilium where it is on the node and its settings are known, else netfilter.
	Auto Mode = "auto"
	// Netfilter: packets of pods pass netfilter both ways.
	Netfilter Mode = "netfilter"
	// Cilium: Cilium carries the packets. While its settings cannot be read, they are taken for those that need most.
	Cilium Mode = "cilium"
)

// Known is what is known of the node.
type Known struct {
	// Link: Cilium's link is there.
	Link bool
	// Settings are Cilium's; nil where they cannot be read, and Unreadable is why.
	Settings   *Settings
	Unreadable error
}

// Choice is how the packets of pods are brought to the rules.
type Choice struct {
	// Plane is Netfilter or Cilium.
	Plane Mode
	plan.Detour
	// Reason is why, and Means what is done, for people.
	Reason, Means string
	// Price is what it costs, Instead the setting that avoids that, and Broken why magic IPs do not work; empty where there is none.
	Price, Instead, Broken string
	// Unknown says what would have to be known; empty where all is.
	Unknown string
}

// passes says that nothing is needed.
const passes = "packets of pods pass the rules both ways"

// instead is for those who need the client's address.
const instead = "Cilium's Helm values bpf.hostLegacyRouting=true with endpointRoutes.enabled=true"

// Choose decides for a mode.
func Choose(mode Mode, known Known) Choice {
	present := known.Link || mode == Cilium
	switch {
	case !present && mode == Netfilter:
		return Choice{Plane: Netfilter, Reason: "dataPlane is netfilter", Means: passes}
	case !present:
		return Choice{Plane: Netfilter, Reason: "Cilium is not on this node", Means: passes, Detour: plan.Detour{Backstop: true}}
	case known.Settings != nil:
		choice := ofCilium(*known.Settings)
		if mode != Netfilter {
			return choice
		}
		forbidden := Choice{Plane: Netfilter, Reason: "dataPlane is netfilter; " + choice.Reason}
		if choice.Detour.None() {
			forbidden.Price, forbidden.Instead, forbidden.Means = choice.Price, choice.Instead, choice.Means
			return forbidden
		}
		forbidden.Broken = "replies bypass the rules: clients time out"
		if choice.LocalRoutes {
			forbidden.Broken = "packets of pods to magic IPs bypass the rules and leave the node"
		}
		return forbidden
	case mode == Netfilter:
		return Choice{Plane: Netfilter, Reason: "dataPlane is netfilter"}
	case mode == Cilium:
		choice := ofCilium(Settings{IPv4: true, IPv6: true})
		choice.Reason = "dataPlane is cilium; its settings cannot be read and are taken for BPF host routing: " + known.Unreadable.Error()
		return choice
	}
	return Choice{
		Plane: Netfilter, Reason: "Cilium is on this node, and its settings cannot be read: " + known.Unreadable.Error(), Detour: plan.Detour{Backstop: true},
		Unknown: "whether replies to pods bypass the rules: with BPF host routing they do, and clients time out",
	}
}

// ofCilium is what these settings need.
func ofCilium(s Settings) Choice {
	const source = "servers see an address of the node instead of the client's"
	c := Choice{Plane: Cilium, Means: passes, Detour: plan.Detour{Backstop: true}}
	routes := ""
	if s.EndpointRoutes {
		routes = " and endpoint routes"
	}
	switch {
	case !s.LegacyHostRouting:
		c.Reason = "Cilium with BPF host routing" + routes
		c.LocalRoutes, c.Masquerade4, c.Masquerade6 = true, s.IPv4, s.IPv6
		c.Means = "local routes bring packets of pods to the rules, and masquerade their replies"
		c.Price, c.Instead = source, instead
	case s.EndpointRoutes:
		c.Reason = "Cilium with legacy host routing and endpoint routes"
	default:
		c.Masquerade4, c.Masquerade6 = s.IPv4 && (s.BPFMasquerade || !s.IPv4Masquerade), s.IPv6 && (s.BPFMasquerade || !s.IPv6Masquerade)
		c.Reason = "Cilium with legacy host routing, without endpoint routes"
		c.Price, c.Instead = source, "Cilium's Helm value endpointRoutes.enabled=true"
		if c.Masquerade4 || c.Masquerade6 {
			c.Means = "masquerade brings replies to pods back to the rules"
		}
		if c.Masquerade4 != s.IPv4 || c.Masquerade6 != s.IPv6 {
			c.Reason += ", with masquerade by iptables"
			c.Price += ": Cilium itself masquerades"
		}
	}
	c.Means += "; egress policies see the magic IP, so they have to allow it"
	return c
}
