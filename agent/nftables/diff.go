package nftables

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// diff is what leads from the table of one plan to that of another: elements, and the few chains that depend on the plan.
type diff struct {
	sets   []setChange
	chains []chain // new, or with other rules
	gone   []chain
}

// setChange is what has to be done to a set.
type setChange struct {
	old, wanted set
	gone, added []string // keys
}

func (d diff) empty() bool { return len(d.sets)+len(d.chains)+len(d.gone) == 0 }

// changes are those from one plan to another. What makes the same elements in both is left out: there may be thousands of
// rules, and one pod.
func changes(before, after *plan.Plan, family plan.Family) (d diff) {
	was, now := *before, *after
	if slices.Equal(before.HostAddresses, after.HostAddresses) { // they decide about hairpins
		was.Rules, now.Rules = plan.Diff(before, after)
	}
	old, wanted := sets(&was, family), sets(&now, family)
	for i, s := range wanted {
		change := setChange{old: old[i], wanted: s}
		if s.until == nil {
			change.gone = keysWithout(change.old, s, after)
		}
		change.added = keysWithout(s, change.old, before)
		if len(change.gone)+len(change.added) > 0 {
			d.sets = append(d.sets, change)
		}
	}
	oldChains := append(chains(before, family), spreadChains(was.Rules, family)...)
	newChains := append(chains(after, family), spreadChains(now.Rules, family)...)
	named := func(chains []chain, name string) int {
		return slices.IndexFunc(chains, func(c chain) bool { return c.name == name })
	}
	for _, c := range newChains {
		if i := named(oldChains, c.name); i < 0 || !c.equal(oldChains[i]) {
			d.chains = append(d.chains, c)
		}
	}
	for _, c := range oldChains {
		if named(newChains, c.name) < 0 {
			d.gone = append(d.gone, c)
		}
	}
	return d
}

// keysWithout are the keys of s that are not in other with the same value and timeout, nor needed by other rules of its plan.
func keysWithout(s, other set, of *plan.Plan) (keys []string) {
	for key, value := range s.elements {
		there, ok := other.elements[key]
		if (!ok || there != value || !s.until[key].Equal(other.until[key])) && !shared(of, s.name, key) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// shared reports whether a plan makes an element of one of the sets in which several rules may have the same.
func shared(p *plan.Plan, set, key string) bool {
	var needs func(*plan.Rule) bool
	text, _, _ := strings.Cut(key, " . ")
	address, err := netip.ParseAddr(text)
	if err != nil {
		return false // no address
	}
	isHost := slices.Contains(p.HostAddresses, address)
	switch set {
	case addressesSet:
		needs = func(r *plan.Rule) bool { return r.Address == address && !r.Foreign() }
	case hostAddressesSet:
		needs = func(r *plan.Rule) bool { return r.Address == address && !r.Foreign() && r.HostClients }
	case hairpinsSet:
		needs = func(r *plan.Rule) bool {
			return !isHost && slices.ContainsFunc(r.Endpoints, func(e netip.AddrPort) bool { return e.Addr() == address })
		}
	case hostEndpointsSet:
		needs = func(r *plan.Rule) bool {
			return isHost && r.Protocol == plan.TCP && slices.ContainsFunc(r.Endpoints, func(e netip.AddrPort) bool { return concatPort(e) == key })
		}
	default:
		return false
	}
	for i := range p.Rules {
		if needs(&p.Rules[i]) {
			return true
		}
	}
	return false
}
