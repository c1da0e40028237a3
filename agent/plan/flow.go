package plan

import (
	"net/netip"
	"slices"
)

// Flow is a conntrack entry as far as its fate depends on it.
type Flow struct {
	Protocol Protocol
	// Source and Destination are of the original direction, as the client sent it.
	Source, Destination netip.AddrPort
	// Server is the source of the reply direction: the endpoint, or Destination itself where nothing
	// translated the flow.
	Server netip.AddrPort
	// ReplyTo is the destination of the reply direction: the client, or the node where the flow is masqueraded.
	ReplyTo netip.Addr
	// HalfOpen: there is no connection. TCP, and nothing has come back yet (TCP_CONNTRACK_SYN_SENT); or SCTP, and no association has been made
	// or it is over (SCTP_CONNTRACK_COOKIE_WAIT, HEARTBEAT_SENT, CLOSED): what the client sends to begin one goes where the flow leads.
	HalfOpen bool
	// Closed: TCP, and both ends are through with it (TCP_CONNTRACK_TIME_WAIT).
	Closed bool
	// Zone is that of the original direction alone, 0 for none.
	Zone uint16
	// OtherZone: both directions are in a zone that others have made. Rules set none for its packets.
	OtherZone bool
}

// Stale reports whether a flow must be deleted so that its client reaches the present endpoint, or is
// rejected, at once.
//
//   - A flow to a present endpoint stays.
//   - UDP sockets know nothing of a vanished peer and would feed a dead flow for ever: they go.
//   - A flow in another zone than its frontend's gets nothing from its client any more: what the client sends makes a flow in the
//     zone of the present endpoint. It stays, so that the answers that its server still owes are translated back, for as long as
//     the sandbox of the server is live.
//   - A half-open TCP flow would have its retransmitted SYN sent where the first one went: it goes. So does one of SCTP with its INIT.
//   - An established TCP flow stays for as long as the sandbox that serves it is live, so that a
//     terminating pod can finish its work; afterwards only a reset saves its client from a time-out. An association of SCTP stays too:
//     the present endpoint does not know it, and conntrack calls its DATA invalid once the flow is deleted (sctp_new).
//   - A closed TCP flow stays: nobody waits for it, a SYN that uses its ports again begins it anew (nf_conntrack_tcp_packet),
//     and of clients with a connection for each request there are more of them than of all others.
//   - Flows that are exempt on purpose stay, also where another tool has translated them, and what a removed frontend never translated.
//   - A flow between two pods of a bridge whose frames have ceased to pass netfilter goes: its replies are no longer translated
//     back. The next one is masqueraded. The same holds for all flows of pods where the data plane has become one whose replies bypass
//     netfilter.
//   - A flow from a frontend is one the wrong way round: an answer that was on its way when the flow was deleted
//     that it belonged to. All that its client sends is taken for replies and never translated: it goes.
//
// change names the frontends that p has no more; the flows of all others than these and p's are not ours.
func (p *Plan) Stale(f Flow, change Change) bool {
	if f.Closed {
		return false
	}
	if reversed := (Frontend{Address: f.Source.Addr(), Protocol: f.Protocol, Port: f.Source.Port()}); f.Server == f.Destination {
		if rule, ours := p.Find(reversed); ours {
			return !p.exempt(rule, f.Destination.Addr())
		}
	}
	frontend := Frontend{Address: f.Destination.Addr(), Protocol: f.Protocol, Port: f.Destination.Port()}
	rule, ours := p.Find(frontend)
	if !ours && !slices.Contains(change.Removed, frontend) {
		return false
	}
	switch {
	case rule.Action == Pass:
		return false
	case f.Server == f.Destination: // not translated
		if !ours || p.exempt(rule, f.Source.Addr()) {
			return false
		}
	case p.bypassed(f, change):
		return true
	case slices.Contains(rule.Endpoints, f.Server):
		return false
	case ours && p.exempt(rule, f.Source.Addr()) && !contains(p.Servers, f.Server.Addr()) && !slices.Contains(change.Gone, f.Server.Addr()):
		return false // another tool has translated it
	}
	left := p.Zones && ours && f.Server != f.Destination && f.Zone != rule.Zone && !f.OtherZone
	if f.Protocol == UDP && !left || f.HalfOpen {
		return true
	}
	server := f.Server.Addr()
	return !contains(p.Sandboxes, server) && (p.Synced || slices.Contains(change.Gone, server))
}

// bypassed reports whether the replies of a translated flow no longer pass netfilter.
func (p *Plan) bypassed(f Flow, change Change) bool {
	client, server := f.Source.Addr(), f.Server.Addr()
	if f.ReplyTo != client || contains(p.HostAddresses, client) {
		return false
	}
	return change.Bypassed.Masquerade(FamilyOf(client)) || slices.ContainsFunc(change.Bridges, func(b Bridge) bool {
		return b.Unfiltered(FamilyOf(client)) && b.has(client) && b.has(server)
	})
}

// exempt reports whether the flows of a client to a frontend are exempt on purpose.
func (p *Plan) exempt(rule Rule, client netip.Addr) bool {
	return rule.Action == Pass || slices.Contains(rule.Excluded, client) || !rule.HostClients && contains(p.HostAddresses, client)
}

// Change is where the flows of a new plan may have become stale.
type Change struct {
	// Frontends are those whose endpoints or fate changed; Removed those that are there no more.
	Frontends, Removed []Frontend
	// Moved are those of which no client waits for a flow to be deleted: what comes next is led to the new endpoint by its zone, or is a
	// connection whose old endpoint is live and has not answered yet. They are looked through with the next poll.
	Moved []Frontend
	// Untranslated are those of Frontends that clients may have reached something else by.
	Untranslated []Frontend
	// Gone are addresses of sandboxes that stand no more.
	Gone []netip.Addr
	// Bridges are those whose frames of a family pass netfilter no more.
	Bridges []Bridge
	// Bypassed are the families of which the replies to pods pass netfilter no more.
	Bypassed Detour
}

// Empty says that no flow can have become stale.
func (c Change) Empty() bool {
	return len(c.Moved)+len(c.Frontends)+len(c.Removed)+len(c.Untranslated)+len(c.Gone)+len(c.Bridges) == 0 && c.Bypassed.None()
}

// OnlyGone says that flows can have become stale only by the end of sandboxes.
func (c Change) OnlyGone() bool {
	c.Gone = nil
	return c.Empty()
}

// Plus is where flows may have become stale by either change.
func (c Change) Plus(d Change) Change {
	return Change{
		Frontends:    union(c.Frontends, d.Frontends, Frontend.Compare),
		Removed:      union(c.Removed, d.Removed, Frontend.Compare),
		Moved:        union(c.Moved, d.Moved, Frontend.Compare),
		Untranslated: union(c.Untranslated, d.Untranslated, Frontend.Compare),
		Gone:         union(c.Gone, d.Gone, netip.Addr.Compare),
		Bridges:      slices.Concat(c.Bridges, d.Bridges),
		Bypassed:     c.Bypassed.plus(d.Bypassed),
	}
}

// union is what is in one of two sets. Mostly one of them is empty, and the other may be large.
func union[E any](a, b []E, compare func(E, E) int) []E {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	return sortedSet(slices.Concat(a, b), compare)
}

// Since compares p with the plan before it; nil is a plan of which nothing is known.
func (p *Plan) Since(before *Plan) Change {
	if before == nil || p.Synced && !before.Synced {
		before = &Plan{}
	}
	var change Change
	was, now := Diff(before, p)
	for i := range now {
		rule := &now[i]
		old, found := find(was, rule.Frontend)
		if !found || old.Action != rule.Action || old.HostClients != rule.HostClients ||
			old.Zone != rule.Zone || !slices.Equal(old.Endpoints, rule.Endpoints) || !slices.Equal(old.Excluded, rule.Excluded) {
			zoned := found && rule.Zoned && old.Zoned && old.Zone != rule.Zone
			untranslated := !found || old.Action == Pass || old.HostClients != rule.HostClients || !zoned && !slices.Equal(old.Excluded, rule.Excluded)
			switch {
			case untranslated:
				change.Frontends, change.Untranslated = append(change.Frontends, rule.Frontend), append(change.Untranslated, rule.Frontend)
			case zoned, rule.Protocol == TCP:
				change.Moved = append(change.Moved, rule.Frontend)
			default:
				change.Frontends = append(change.Frontends, rule.Frontend)
			}
		}
	}
	for _, rule := range was {
		if _, found := find(now, rule.Frontend); !found && !rule.Foreign() {
			change.Removed = append(change.Removed, rule.Frontend)
		}
	}
	for _, bridge := range p.Bridges {
		i := slices.IndexFunc(before.Bridges, func(b Bridge) bool { return b.Name == bridge.Name })
		if i < 0 || bridge.Unfiltered4 && !before.Bridges[i].Unfiltered4 || bridge.Unfiltered6 && !before.Bridges[i].Unfiltered6 {
			change.Bridges = append(change.Bridges, bridge)
		}
	}
	change.Bypassed.Masquerade4 = p.Detour.Masquerade4 && !before.Detour.Masquerade4
	change.Bypassed.Masquerade6 = p.Detour.Masquerade6 && !before.Detour.Masquerade6
	for _, address := range before.Sandboxes {
		if !contains(p.Sandboxes, address) {
			change.Gone = append(change.Gone, address)
		}
	}
	return change
}

func contains(sorted []netip.Addr, address netip.Addr) bool {
	_, found := slices.BinarySearchFunc(sorted, address, netip.Addr.Compare)
	return found
}
