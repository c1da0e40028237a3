package plan

import (
	"net/netip"
	"slices"
)

// Detour is what brings the packets of pods past netfilter where the data plane of the node would forward them around it.
type Detour struct {
	// LocalRoutes: packets of pods come in only where they are for an address of the node.
	LocalRoutes bool
	// Masquerade4 and Masquerade6: replies come back only where they are for an address of the node.
	Masquerade4, Masquerade6 bool
}

// None says that packets pass netfilter both ways.
func (d Detour) None() bool { return d == Detour{} }

func (d Detour) plus(e Detour) Detour {
	return Detour{
		LocalRoutes: d.LocalRoutes || e.LocalRoutes,
		Masquerade4: d.Masquerade4 || e.Masquerade4, Masquerade6: d.Masquerade6 || e.Masquerade6,
	}
}

// Masquerade reports whether flows of pods of this family are masqueraded.
func (d Detour) Masquerade(family Family) bool {
	return family == IPv4 && d.Masquerade4 || family == IPv6 && d.Masquerade6
}

// LocalAddresses are the magic IPs that are to be addresses of the node, in order: those of which no frontend passes now. A packet
// that passes is one for somebody else.
func (p *Plan) LocalAddresses() (addresses []netip.Addr) {
	if !p.Detour.LocalRoutes {
		return nil
	}
	passes := map[netip.Addr]bool{}
	for _, rule := range p.Rules {
		if !rule.Foreign() {
			addresses = append(addresses, rule.Address)
			passes[rule.Address] = passes[rule.Address] || rule.Action == Pass
		}
	}
	return slices.DeleteFunc(slices.Compact(addresses), func(a netip.Addr) bool { return passes[a] })
}
