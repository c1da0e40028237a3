package plan

import "net/netip"

// Detour is what brings the packets of pods past netfilter where the data plane of the node would forward them around it, and what keeps
// packets to magic IPs on the node where there are no rules.
type Detour struct {
	// LocalRoutes: packets of pods come in only where they are for an address of the node.
	LocalRoutes bool
	// Backstop: a magic IP is an address of the node where no packet to it is to leave the node. Rules that somebody flushes while no
	// agent runs leave the node refusing; routing comes after translation, so it does nothing while the rules are there.
	Backstop bool
	// Masquerade4 and Masquerade6: replies come back only where they are for an address of the node.
	Masquerade4, Masquerade6 bool
}

// None says that packets pass netfilter both ways.
func (d Detour) None() bool { return d == Detour{Backstop: d.Backstop} }

func (d Detour) plus(e Detour) Detour {
	return Detour{
		LocalRoutes: d.LocalRoutes || e.LocalRoutes, Backstop: d.Backstop || e.Backstop,
		Masquerade4: d.Masquerade4 || e.Masquerade4, Masquerade6: d.Masquerade6 || e.Masquerade6,
	}
}

// Masquerade reports whether flows of pods of this family are masqueraded.
func (d Detour) Masquerade(family Family) bool {
	return family == IPv4 && d.Masquerade4 || family == IPv6 && d.Masquerade6
}

// localAddresses are the magic IPs that are to be addresses of the node, in order: those of which no frontend passes now. A packet
// that passes is one for somebody else. As a backstop, they are not those either that processes of the node or targets are to reach
// elsewhere. There may be thousands.
func (p *Plan) localAddresses() (addresses []netip.Addr) {
	if !p.Detour.LocalRoutes && !p.Detour.Backstop {
		return nil
	}
	addresses = make([]netip.Addr, 0, len(p.Rules))
	for i := 0; i < len(p.Rules); { // in order of their addresses
		address, ours, passes := p.Rules[i].Address, false, false
		for ; i < len(p.Rules) && p.Rules[i].Address == address; i++ {
			if rule := &p.Rules[i]; !rule.Foreign() {
				ours = true
				passes = passes || rule.Action == Pass || !p.Detour.LocalRoutes && !rule.Confined()
			}
		}
		if ours && !passes {
			addresses = append(addresses, address)
		}
	}
	return addresses
}

// Confined reports whether no packet to the frontend is for somebody beyond the node.
func (r *Rule) Confined() bool { return r.Action != Pass && r.HostClients && !r.ExcludeTarget }
