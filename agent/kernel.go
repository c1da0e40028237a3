package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// kernel is what the agent has done to the kernel, and what it has still to do.
type kernel struct {
	agent *agent
	// applied is the plan in the kernel: nil before the first one, which came at syncedAt.
	applied  *plan.Plan
	syncedAt time.Time
	// restored are the frontends that the process before has served, until all sources are synced: the configuration may have changed since.
	restored []plan.Frontend
	// servers are those of the plan in the kernel; before the first one, of the process before.
	servers []netip.Addr
	// due is swept until that succeeds, whatever else changes. again is swept with the next poll: what can wait for it, and once more
	// what was swept, as a packet that was on its way through the rules of before while the table was dumped makes its entry after
	// the dump.
	due, again plan.Change
	// sweptAt is when the last sweep began.
	sweptAt time.Time
	// restoredAt is when externally modified rules were last restored.
	restoredAt time.Time
	// damaged: they have been, and the next sync restores them.
	damaged bool

	// hairpins are the ifindexes of the bridge ports where this agent has switched hairpin mode on.
	hairpins []int

	// counts is how often each frontend was asked for, as of the last poll; nil where that is not counted.
	counts map[plan.Frontend]plan.Count

	syncErr, verifyErr, sweepErr, countErr error
	hairpinErrs                            []problem
	routeErrs                              []error
}

// restorePause keeps the agent from fighting with another program that changes its rules again and again.
const restorePause = time.Second

// sweepPause is how long the connections of a sandbox that is gone may wait for those of another, so that a burst of changes costs few
// dumps: each walks the whole table of the kernel, however few connections are in it.
const sweepPause = 500 * time.Millisecond

// check reports whether our rules were externally modified, where they may have been. next is when to look again (0: never).
func (k *kernel) check(ctx context.Context, changed Source, now time.Time) (damaged bool, next time.Duration) {
	switch pause := k.restoredAt.Add(restorePause).Sub(now); {
	case changed&Poll != 0 || changed&Rules != 0 && pause <= 0:
		return k.verify(ctx, now), 0
	case changed&Rules != 0:
		k.agent.pending.Or(uint32(Rules))
		return false, pause
	}
	return false, 0
}

// apply brings the kernel to the plan, also where it is there but damaged. next is when to look again (0: never).
func (k *kernel) apply(ctx context.Context, p plan.Plan, changed Source, damaged bool, now time.Time) (next time.Duration) {
	p.Inherit(k.servers)
	if changed&Poll != 0 && !k.again.Empty() {
		if k.sweep(ctx, k.again); k.sweepErr != nil {
			k.due = k.due.Plus(k.again)
		}
		k.again = plan.Change{}
	}
	if k.applied == nil || damaged || k.syncErr != nil || !p.Equal(k.applied) {
		started := time.Now()
		k.syncErr = k.agent.Backend.Sync(ctx, &p)
		k.agent.Meter.Synced(time.Since(started), k.syncErr)
		if k.syncErr == nil || inPlace(k.syncErr) {
			k.agent.Log.Debug("rules in place", "backend", k.agent.Backend.Name(), "took", time.Since(started))
			change := p.Since(k.applied)
			if k.applied == nil || p.Synced {
				change = change.Plus(plan.Change{Removed: k.removed(&p)})
			}
			if p.Synced {
				k.restored = nil
			}
			if k.damaged { // new flows of any frontend may have gone anywhere
				all := p.Since(nil)
				change.Frontends, change.Untranslated = all.Frontends, all.Untranslated
			}
			k.again = k.again.Plus(plan.Change{Moved: change.Moved})
			change.Moved = nil
			k.due = k.due.Plus(change)
			k.applied, k.servers, k.syncedAt = &p, p.Servers, now
			if k.damaged {
				k.agent.Meter.Restored()
			}
			k.damaged = false
		}
	}
	next = k.sweepDue(ctx, now)
	if changed&Poll != 0 {
		k.counts, k.countErr = k.agent.Backend.Counts()
	}
	k.hairpin()
	k.routes()
	return next
}

// removed are the frontends that the process before has served and that the plan has no rule for.
func (k *kernel) removed(p *plan.Plan) (removed []plan.Frontend) {
	for _, f := range k.restored {
		if _, found := p.Find(f); !found {
			removed = append(removed, f)
		}
	}
	return removed
}

// sweepDue sweeps what is due, unless that can wait. next is when to look again (0: never).
func (k *kernel) sweepDue(ctx context.Context, now time.Time) (next time.Duration) {
	if k.applied == nil || k.due.Empty() {
		return 0
	}
	if pause := k.sweptAt.Add(sweepPause).Sub(now); pause > 0 && pause <= sweepPause && k.due.OnlyGone() {
		return pause
	}
	if k.sweep(ctx, k.due); k.sweepErr == nil {
		k.again, k.due, k.sweptAt = k.again.Plus(k.due), plan.Change{}, now
	}
	return 0
}

// localAddresses are the magic IPs that are to be addresses of the node by a plan. As a backstop, they are not those of which another
// agent lets packets pass, nor those of a family that the node has no way out for.
func (a *agent) localAddresses(p *plan.Plan) []netip.Addr {
	if a.plane.LocalRoutes {
		return p.LocalAddresses
	}
	passes := map[netip.Addr]bool{}
	for _, other := range a.sources.others {
		for _, c := range other.claims {
			passes[c.Address] = passes[c.Address] || c.Served && !c.Confined
		}
	}
	excluded := func(address netip.Addr) bool {
		return passes[address] || !a.sources.network.Sources[plan.FamilyOf(address)].IsValid()
	}
	if !slices.ContainsFunc(p.LocalAddresses, excluded) {
		return p.LocalAddresses
	}
	return slices.DeleteFunc(slices.Clone(p.LocalAddresses), excluded)
}

// routes makes magic IPs addresses of the node where the plan in the kernel wants that: after the rules, without which the node
// refuses what comes by them. Those of other agents stay, whether they run or not.
func (k *kernel) routes() {
	k.routeErrs = nil
	if k.applied == nil {
		return
	}
	network := &k.agent.sources.network
	addresses := k.agent.localAddresses(k.applied)
	inPlace := func(there node.LocalRoute, address netip.Addr) bool {
		return there.Address == address && there.Source == network.Sources[plan.FamilyOf(address)] && there.Source.IsValid()
	}
	if slices.EqualFunc(network.LocalRoutes, addresses, inPlace) { // there may be thousands
		return
	}
	there := map[netip.Addr]node.LocalRoute{}
	for _, route := range network.LocalRoutes {
		there[route.Address] = route
	}
	network.LocalRoutes = nil // as they are after this
	wanted := map[netip.Addr]bool{}
	var added []netip.Addr
	for _, address := range addresses {
		route := node.LocalRoute{Address: address, Source: network.Sources[plan.FamilyOf(address)]}
		wanted[address] = true
		if there[address] == route {
			network.LocalRoutes = append(network.LocalRoutes, route)
			continue
		}
		if !route.Source.IsValid() {
			k.routeErrs = append(k.routeErrs, fmt.Errorf("local route for %s: no uplink of the node has an address of its family that processes of the node could connect from", address))
			continue
		}
		if err := k.agent.Node.AddLocalRoute(route); err != nil {
			k.routeErrs = append(k.routeErrs, err)
			continue
		}
		network.LocalRoutes = append(network.LocalRoutes, route)
		added = append(added, address)
	}
	k.logRoutes("local routes added, so that packets to these magic IPs stay on the node", added)
	k.removeRoutes(slices.Collect(maps.Values(there)), wanted)
}

// removeRoutes removes local routes of agents that are not wanted, but for those that another agent wants.
func (k *kernel) removeRoutes(routes []node.LocalRoute, wanted map[netip.Addr]bool) {
	network := &k.agent.sources.network
	for _, other := range k.agent.sources.others {
		for _, c := range other.claims {
			wanted[c.Address] = wanted[c.Address] || c.LocalRoute
		}
	}
	unread := k.agent.sources.unread()
	var kept []node.LocalRoute
	var removed []netip.Addr
	for _, route := range routes {
		if wanted[route.Address] {
			continue
		}
		if len(unread) > 0 {
			kept = append(kept, route)
			continue
		}
		if err := k.agent.Node.RemoveLocalRoute(route); err != nil {
			k.routeErrs = append(k.routeErrs, err)
			network.LocalRoutes = append(network.LocalRoutes, route)
			continue
		}
		removed = append(removed, route.Address)
	}
	k.logRoutes("local routes removed", removed)
	if len(kept) > 0 {
		network.LocalRoutes = append(network.LocalRoutes, kept...)
		k.routeErrs = append(k.routeErrs, fmt.Errorf("local route for %s (%d in all) stays: it may be one of agent %s, whose claims cannot be read", kept[0].Address, len(kept), strings.Join(unread, ", ")))
	}
}

// logRoutes logs what was done for these magic IPs, of which there may be thousands.
func (k *kernel) logRoutes(message string, addresses []netip.Addr) {
	const most = 5
	if len(addresses) > 0 {
		k.agent.Log.Info(message, "count", len(addresses), "first", addresses[:min(len(addresses), most)])
	}
}

// routeErr is the first error of local routes, and how many there are more; nil where there is none.
func (k *kernel) routeErr() error {
	switch more := len(k.routeErrs) - 1; {
	case more < 0:
		return nil
	case more > 0:
		return fmt.Errorf("%w (and %d more)", k.routeErrs[0], more)
	}
	return k.routeErrs[0]
}

// verify reports whether our rules were externally modified.
func (k *kernel) verify(ctx context.Context, now time.Time) (damaged bool) {
	differs, err := k.agent.Backend.Verify(ctx)
	if k.verifyErr = err; err != nil {
		k.agent.pending.Or(uint32(Rules)) // whether they were modified is still to be found out
	}
	if len(differs) > 0 {
		k.agent.Log.Warn("rules of this agent were externally modified; restoring them", "backend", k.agent.Backend.Name(), "differs", differs, "process", k.agent.Backend.ModifiedBy())
		k.restoredAt, k.damaged = now, true
	}
	return len(differs) > 0
}

// sweep deletes the flows that the plan in the kernel has made stale where change touches them.
func (k *kernel) sweep(ctx context.Context, change plan.Change) {
	deleted, err := k.agent.Flows.Sweep(ctx, k.applied, change)
	k.sweepErr = err
	k.agent.Meter.Swept(deleted)
	if deleted > 0 {
		k.agent.Log.Info("flows ended whose endpoint is gone", "flows", deleted)
	}
}

// hairpin lets endpoints behind a bridge port reach themselves through their magic IP.
func (k *kernel) hairpin() {
	k.hairpinErrs = nil
	network := &k.agent.sources.network
	done := map[netip.Addr]bool{} // many magic IPs may lead to one pod
	for i, s := range k.agent.services.inOrder {
		if s == nil || k.agent.config.Ports[i].ExcludeTarget {
			continue
		}
		for _, chosen := range s.endpoints {
			index := network.IfIndex[chosen.HostInterface]
			if on, port := network.PodPorts[index]; done[chosen.Address.Addr()] || on || !port {
				continue
			}
			done[chosen.Address.Addr()] = true
			if err := k.agent.Node.SetHairpin(index, true); err != nil {
				k.hairpinErrs = append(k.hairpinErrs, problem{"hairpin", "hairpin of " + chosen.HostInterface, err})
				continue
			}
			network.PodPorts[index] = true
			if !slices.Contains(k.hairpins, index) {
				k.hairpins = append(k.hairpins, index)
			}
			k.agent.Log.Info("hairpin mode switched on, so that the pod reaches itself", "interface", chosen.HostInterface, "pod", podName(chosen))
		}
	}
}

// synced reports whether nothing is left to be done.
func (k *kernel) synced() bool {
	return k.syncErr == nil && k.verifyErr == nil && k.sweepErr == nil && len(k.routeErrs) == 0 && len(k.hairpinErrs) == 0
}

func (k *kernel) problems() []problem {
	backend := k.agent.Backend.Name()
	return append(slices.Clone(k.hairpinErrs), failed(
		problem{"local_route", "local routes", k.routeErr()},
		problem{"rules", backend, k.syncErr}, problem{"verify", backend + " verify", k.verifyErr},
		problem{"verify", backend + " counters", k.countErr}, problem{"conntrack", "conntrack", k.sweepErr},
	)...)
}

func inPlace(err error) bool {
	var sync interface{ InPlace() bool }
	return errors.As(err, &sync) && sync.InPlace()
}
