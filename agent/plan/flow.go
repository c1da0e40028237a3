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
	// SynSent: TCP, and nothing has come back yet (TCP_CONNTRACK_SYN_SENT).
	SynSent bool
}

// Stale says whether a flow must be deleted so that its client reaches the present endpoint, or is
// refused, at once.
//
//   - A flow to a present endpoint stays.
//   - UDP and SCTP sockets know nothing of a vanished peer and would feed a dead flow for ever: they go.
//   - A half-open TCP flow would have its retransmitted SYN sent where the first one went: it goes.
//   - An established TCP flow stays for as long as the sandbox that serves it stands, so that a
//     terminating pod can finish its work; afterwards only a reset saves its client from a time-out.
//   - A reply that is on its way while its flow is deleted makes an entry of its own, with the frontend as its
//     source. The client's packets are replies to that one and would never be translated: it goes.
//   - Flows that are left alone on purpose stay, and what a removed frontend never translated.
//
// change names the frontends that p has no more; the flows of all others than these and p's are not ours.
func (p *Plan) Stale(f Flow, change Change) bool {
	frontend := Frontend{f.Destination.Addr(), f.Protocol, f.Destination.Port()}
	rule, ours := p.Find(frontend)
	if !ours && f.Server == f.Destination {
		if rule, ours = p.Find(Frontend{f.Source.Addr(), f.Protocol, f.Source.Port()}); ours {
			f.Source, f.Destination, f.Server = f.Destination, f.Source, f.Source
		}
	}
	if !ours && !slices.Contains(change.Removed, frontend) {
		return false
	}
	if rule.Action == Pass || slices.Contains(rule.Endpoints, f.Server) {
		return false
	}
	if f.Server == f.Destination { // not translated
		if !ours {
			return false
		}
		source := f.Source.Addr()
		if slices.Contains(rule.Excluded, source) || !rule.HostClients && contains(p.HostAddresses, source) {
			return false
		}
	}
	return f.Protocol != TCP || f.SynSent || p.Settled && !contains(p.Sandboxes, f.Server.Addr())
}

// Change is where the flows of a new plan may have become stale.
type Change struct {
	// Frontends are those whose endpoints or fate changed; Removed those that are there no more.
	Frontends, Removed []Frontend
	// Gone are addresses of sandboxes that stand no more.
	Gone []netip.Addr
}

// Empty says that no flow can have become stale.
func (c Change) Empty() bool { return len(c.Frontends)+len(c.Removed)+len(c.Gone) == 0 }

// Since compares p with the plan before it; nil is a plan of which nothing is known.
func (p *Plan) Since(before *Plan) Change {
	if before == nil || p.Settled && !before.Settled {
		before = &Plan{}
	}
	var change Change
	for _, rule := range p.Rules {
		old, found := before.Find(rule.Frontend)
		if !found || old.Action != rule.Action || old.HostClients != rule.HostClients ||
			!slices.Equal(old.Endpoints, rule.Endpoints) || !slices.Equal(old.Excluded, rule.Excluded) {
			change.Frontends = append(change.Frontends, rule.Frontend)
		}
	}
	for _, rule := range before.Rules {
		if _, found := p.Find(rule.Frontend); !found && !rule.Foreign() {
			change.Removed = append(change.Removed, rule.Frontend)
		}
	}
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
