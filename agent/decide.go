package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// service is what the agent has decided of a frontend, and what it remembers of it.
type service struct {
	claimedAt time.Time
	// lostAt is when the last endpoint went; zero while there is one, and where there was none. lostUptime is the same
	// moment as the time since the node was started.
	lostAt     time.Time
	lostUptime time.Duration
	unserved   string // the reason; empty where it is served
	unservedBy runtimedir.UnservedBy
	endpoints  []endpoint.Chosen
	// changedAt is when the addresses of the endpoints last changed; zero while the frontend is unserved.
	changedAt time.Time
	why       []string // there is no endpoint; of the first maxExplained that have none
}

// maxExplained bounds for how many frontends a decision says why they have no endpoint: there may be thousands.
const maxExplained = 50

// services are those of the configuration. inOrder are those of config.Ports, in order: nil where another port before has the
// frontend, and none at all until decide has looked.
type services struct {
	byFrontend map[plan.Frontend]*service
	inOrder    []*service
	// sorted are the positions of those that are not nil, by Frontend: in this order are plans and claims.
	sorted []int
	// planned is the memory of the last plan's input, which none keeps.
	planned []plan.Service
	// targets are the pods that they select.
	targets runtimedir.Targets
}

// decide chooses the endpoints of every frontend, and which frontends this agent may serve at all. It
// returns when a decision changes by time alone (0: never).
func (a *agent) decide(now time.Time) (next time.Duration) {
	targets := endpoint.NewIndex(a.pods.Targets(now))
	claims := a.claimsOfOthers()
	if a.services.inOrder == nil {
		a.takeServices(claims, now)
	}
	next = a.pods.NextExpiry(now)
	var standing map[netip.Addr]bool
	explained := 0
	for i, s := range a.services.inOrder {
		if s == nil {
			continue // unserved since it was parsed
		}
		port := &a.config.Ports[i]
		before, unservedBefore := s.endpoints, s.unserved
		s.unservedBy, s.unserved = a.unserved(port, s.claimedAt, claims[port.Frontend])
		s.endpoints = nil
		if s.unserved == "" {
			s.endpoints = targets.Choose(&port.Selection)
		}
		if s.unserved == "" && len(s.endpoints) == 0 && len(before) > 0 && !(a.pods.Synced(port.Namespace) && a.pods.OwnerResolved(port.Namespace, port.Owner)) {
			// That there is no endpoint cannot be decided yet: those in the kernel stay, as long as nothing speaks against them.
			if standing == nil {
				standing = addressSet(a.pods.Sandboxes(now))
			}
			s.endpoints = slices.DeleteFunc(slices.Clone(before), func(c endpoint.Chosen) bool { return !standing[c.Address.Addr()] })
		}
		s.why = nil
		if s.unserved == "" && len(s.endpoints) == 0 && explained < maxExplained {
			explained++
			s.why = targets.Why(&port.Selection)
		}
		if len(s.endpoints) > 0 {
			s.lostAt = time.Time{}
		} else if len(before) > 0 {
			s.lostAt, s.lostUptime = now, a.Uptime()
		}
		if wait := s.lostAt.Add(port.HoldFor).Sub(now); port.NoEndpoint == plan.Hold && !s.lostAt.IsZero() && wait > 0 {
			next = soonest(next, wait)
		}
		same := sameAddresses(before, s.endpoints)
		switch {
		case s.unserved != "":
			s.changedAt = time.Time{}
		case !same || s.changedAt.IsZero():
			s.changedAt = now.UTC().Round(0)
		}
		if !same || s.unserved != unservedBefore {
			a.logDecision(port, s, before, unservedBefore)
		}
	}
	a.services.targets = targets.Selected()
	return next
}

func addressSet(addresses []netip.Addr) map[netip.Addr]bool {
	set := make(map[netip.Addr]bool, len(addresses))
	for _, address := range addresses {
		set[address] = true
	}
	return set
}

// takeServices makes the services of the configuration, with what is remembered of them, and forgets others. A new claim is
// younger than all that are there, whatever the clock has done since they were made.
func (a *agent) takeServices(claims map[plan.Frontend][]claim, now time.Time) {
	byFrontend := make(map[plan.Frontend]*service, len(a.config.Ports))
	a.services.inOrder, a.services.sorted = make([]*service, len(a.config.Ports)), nil
	for i := range a.config.Ports {
		port := &a.config.Ports[i]
		if _, twice := byFrontend[port.Frontend]; twice {
			continue
		}
		s := a.services.byFrontend[port.Frontend]
		if s == nil {
			s = &service{claimedAt: now.UTC().Round(0)}
			for _, c := range claims[port.Frontend] {
				if !c.ClaimedAt.Before(s.claimedAt) {
					s.claimedAt = c.ClaimedAt.Add(1)
				}
			}
		}
		byFrontend[port.Frontend], a.services.inOrder[i] = s, s
		a.services.sorted = append(a.services.sorted, i)
	}
	slices.SortFunc(a.services.sorted, func(i, j int) int { return a.config.Ports[i].Compare(a.config.Ports[j].Frontend) })
	a.services.byFrontend = byFrontend
}

// claim is a claim of another agent.
type claim struct {
	agent string
	runtimedir.Claim
}

// claimsOfOthers are those that are served.
func (a *agent) claimsOfOthers() map[plan.Frontend][]claim {
	claims := map[plan.Frontend][]claim{}
	for _, other := range a.sources.others {
		for _, c := range other.claims {
			if c.Served {
				claims[c.Frontend] = append(claims[c.Frontend], claim{other.name, c})
			}
		}
	}
	return claims
}

// unserved says why this agent may not serve a frontend; empty where it may.
func (a *agent) unserved(port *config.Port, claimedAt time.Time, others []claim) (by runtimedir.UnservedBy, reason string) {
	if port.Unserved != "" {
		return runtimedir.ByConfiguration, port.Unserved
	}
	if slices.Contains(a.sources.network.Addresses, port.Address) {
		return runtimedir.ByNode, port.Address.String() + " is an address of this node; allowed: a unicast address that the node does not own"
	}
	if port.Address.Is6() && !a.sources.network.IPv6 {
		return runtimedir.ByNode, "this node has no IPv6: no route of it leads anywhere"
	}
	for _, c := range others {
		if !c.ClaimedAt.Before(claimedAt) && !(c.ClaimedAt.Equal(claimedAt) && c.agent < a.config.Name) {
			continue
		}
		reason = port.String() + " is claimed by agent " + c.agent + " since " + c.ClaimedAt.Format(time.RFC3339)
		if other := a.dir.Agent(c.agent); !other.Live() {
			reason += ", which does not run but whose rules may be there; where it is gone for good: magic-ip-agent uninstall --name " + c.agent
		}
		return runtimedir.ByAgent, reason
	}
	return "", ""
}

// action is what becomes of new packets to a frontend that this agent may serve.
func (a *agent) action(port *config.Port, s *service, now time.Time) plan.Action {
	switch {
	case len(s.endpoints) > 0:
		return plan.Serve
	case port.NoEndpoint == plan.Hold && (s.lostAt.IsZero() || !now.Before(s.lostAt.Add(port.HoldFor))):
		return plan.Reject
	}
	return port.NoEndpoint
}

// plan is what follows from the decisions.
func (a *agent) plan(now time.Time) plan.Plan {
	network := &a.sources.network
	in := plan.Input{
		PodInterfaces: network.PodInterfaces,
		Uplinks:       network.Outward,
		UnservedPairs: network.UnservedPairs,
		Bridges:       network.Bridges,
		StrictTCP:     network.StrictTCP,
		HostAddresses: network.Addresses,
		Sandboxes:     a.pods.Sandboxes(now),
		Synced:        a.pods.AllSynced(),
		Detour:        a.plane.Detour,
		Zones:         a.Zones,
		Services:      a.services.planned[:0],
	}
	for _, i := range a.services.sorted {
		port, s := &a.config.Ports[i], a.services.inOrder[i]
		if s.unserved != "" {
			continue
		}
		in.Services = append(in.Services, plan.Service{
			Frontend: port.Frontend, HostInterface: port.HostInterface, HostClients: port.HostClients,
			ExcludeTarget: port.ExcludeTarget, WithoutEndpoint: a.action(port, s, now), HoldUntil: s.lostAt.Add(port.HoldFor),
			Spread: port.Spread, Endpoints: addresses(s.endpoints),
		})
	}
	a.services.planned = in.Services
	for _, other := range a.sources.others {
		for _, c := range other.claims {
			if c.Served {
				in.Foreign = append(in.Foreign, c.Frontend)
			}
		}
	}
	return plan.Build(in)
}

// sameAddresses reports whether traffic goes to the same endpoints. There may be thousands of frontends.
func sameAddresses(a, b []endpoint.Chosen) bool {
	return slices.EqualFunc(a, b, func(a, b endpoint.Chosen) bool { return a.Address == b.Address })
}

func addresses(chosen []endpoint.Chosen) (all []netip.AddrPort) {
	for _, c := range chosen {
		all = append(all, c.Address)
	}
	return all
}

// logDecision logs what a decision has changed.
func (a *agent) logDecision(port *config.Port, s *service, before []endpoint.Chosen, unservedBefore string) {
	log := a.Log.With("magicIP", port.String())
	if s.unserved != unservedBefore && s.unserved != "" {
		log.Error("not served", "reason", s.unserved)
	}
	had, has := addresses(before), addresses(s.endpoints)
	var pods []string
	for _, c := range s.endpoints {
		pods = append(pods, podName(c))
	}
	switch {
	case slices.Equal(had, has):
	case len(has) == 0:
		log.Info("no endpoint", "noEndpoint", port.NoEndpoint, "was", had)
	default:
		log.Info("endpoint", "addr", has, "pod", pods, "was", had)
	}
}

func podName(c endpoint.Chosen) string { return c.Namespace + "/" + c.Name }
