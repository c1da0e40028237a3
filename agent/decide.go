package agent

import (
	"net/netip"
	"slices"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

// decide chooses the endpoints of every frontend, and which frontends this agent may serve at all. It
// returns when a decision changes by time alone (0: never).
func (a *Agent) decide(now time.Time) (next time.Duration) {
	targets := endpoint.NewIndex(endpoint.Targets(endpoint.Sources{
		Records: a.labelled(), Interfaces: a.network.Interfaces, Now: now,
		Pods: a.pods.Pods, Told: a.pods.told, Current: a.pods.Current, Withdrawn: a.pods.withdrawn,
	}))
	if a.serving == nil {
		a.take(now)
	}
	for i, port := range a.config.Ports {
		s := a.serving[i]
		if s == nil {
			continue // refused when it was parsed
		}
		before, refusedBefore := s.endpoints, s.refused
		s.refused = a.refusal(port, s.claimedAt)
		s.endpoints = nil
		if s.refused == "" {
			s.endpoints = targets.Choose(port.Selection)
			a.keepRestored(port, s)
		}
		if len(s.endpoints) > 0 {
			s.lostAt = time.Time{}
		} else if len(before) > 0 || s.lostAt.IsZero() && a.hadEndpoint(port) {
			s.lostAt = now
		}
		if wait := s.lostAt.Add(port.HoldFor).Sub(now); port.NoEndpoint == plan.Hold && !s.lostAt.IsZero() && wait > 0 && (next == 0 || wait < next) {
			next = wait
		}
		a.report(port, s, before, refusedBefore)
	}
	return next
}

// take makes the services of the configuration, with what is remembered of them, and forgets others.
func (a *Agent) take(now time.Time) {
	services := make(map[plan.Frontend]*service, len(a.config.Ports))
	a.serving = make([]*service, len(a.config.Ports))
	for i, port := range a.config.Ports {
		if _, twice := services[port.Frontend]; twice {
			continue
		}
		s := a.services[port.Frontend]
		if s == nil {
			s = &service{claimedAt: now}
		}
		services[port.Frontend], a.serving[i] = s, s
	}
	a.services = services
}

// keepRestored prefers the endpoints from before a restart for as long as not every source has spoken.
func (a *Agent) keepRestored(port config.Port, s *service) {
	kept := a.restoredEndpoints(port)
	if len(kept) == 0 {
		return
	}
	if !port.Spread {
		s.endpoints = nil
	}
	for _, e := range kept {
		if slices.ContainsFunc(s.endpoints, func(c endpoint.Chosen) bool { return c.Address == e.Address }) {
			continue
		}
		namespace, name := splitPod(e.Pod)
		s.endpoints = append(s.endpoints, endpoint.Chosen{
			Target:  &endpoint.Target{Namespace: namespace, Name: name, UID: e.UID, Recorded: e.Recorded},
			Address: e.Address,
		})
	}
}

// hadEndpoint says whether the frontend had an endpoint when this agent was restarted.
func (a *Agent) hadEndpoint(port config.Port) bool {
	return slices.ContainsFunc(a.restoredOf[port.Frontend], func(m published.MagicIP) bool { return len(m.Endpoints) > 0 })
}

// refusal says why this agent may not serve a frontend; empty where it may.
func (a *Agent) refusal(port config.Port, claimedAt time.Time) string {
	if port.Unserved != "" {
		return port.Unserved
	}
	if slices.Contains(a.network.Addresses, port.Address) {
		return port.Address.String() + " is an address of this node; allowed: a unicast address that the node does not own"
	}
	if port.Address.Is6() && !a.network.IPv6 {
		return "this node has no IPv6: no route of it leads anywhere"
	}
	for _, other := range a.others {
		for _, m := range other.MagicIPs {
			older := m.ClaimedAt.Before(claimedAt) || m.ClaimedAt.Equal(claimedAt) && other.Name < a.config.Name
			if frontendOf(m) == port.Frontend && m.Refused == "" && older {
				reason := port.String() + " is claimed by agent " + other.Name + " since " + m.ClaimedAt.Format(time.RFC3339)
				if !published.Live(a.RuntimeDir, other.Name) {
					reason += ", which does not run but whose rules may be there; where it is gone for good, take them out and remove " +
						published.Path(a.RuntimeDir, other.Name)
				}
				return reason
			}
		}
	}
	return ""
}

// action is what becomes of new packets to a frontend that this agent may serve.
func (a *Agent) action(port config.Port, s *service, now time.Time) plan.Action {
	switch {
	case len(s.endpoints) > 0:
		return plan.Serve
	case port.NoEndpoint == plan.Hold && (s.lostAt.IsZero() || !now.Before(s.lostAt.Add(port.HoldFor))):
		return plan.Reject
	}
	return port.NoEndpoint
}

// plan is what follows from the decisions.
func (a *Agent) plan(now time.Time) plan.Plan {
	in := plan.Input{
		PodInterfaces: slices.Clone(a.network.PodInterfaces),
		Bridges:       a.network.Bridges,
		HostAddresses: a.network.Addresses,
		Settled:       a.settled(),
		Services:      make([]plan.Service, 0, len(a.config.Ports)),
	}
	for i, port := range a.config.Ports {
		s := a.serving[i]
		if s == nil || s.refused != "" {
			continue
		}
		service := plan.Service{
			Frontend: port.Frontend, HostInterface: port.HostInterface, HostClients: port.HostClients,
			ExcludeTarget: port.ExcludeTarget, WithoutEndpoint: a.action(port, s, now),
		}
		for _, chosen := range s.endpoints {
			service.Endpoints = append(service.Endpoints, chosen.Address)
			in.Sandboxes = append(in.Sandboxes, chosen.Address.Addr())
		}
		in.Services = append(in.Services, service)
	}
	for _, record := range endpoint.Standing(a.records.list, a.network.Interfaces) {
		in.Sandboxes = append(in.Sandboxes, record.IPs...)
		// The interfaces in the records are served whatever they are, if they are there.
		if a.network.Interfaces[record.HostInterface] && !a.network.BridgePorts[record.HostInterface] {
			in.PodInterfaces = append(in.PodInterfaces, record.HostInterface)
		}
	}
	for _, pod := range a.pods.Pods {
		for _, ip := range pod.IPs {
			if !pod.Finished && !pod.Without(ip, a.pods.withdrawn) {
				in.Sandboxes = append(in.Sandboxes, ip)
			}
		}
	}
	for _, other := range a.others {
		for _, m := range other.MagicIPs {
			if m.Refused == "" {
				in.Foreign = append(in.Foreign, frontendOf(m))
			}
		}
	}
	return plan.Build(in)
}

// report logs what a decision has changed.
func (a *Agent) report(port config.Port, s *service, before []endpoint.Chosen, refusedBefore string) {
	same := func(a, b endpoint.Chosen) bool { return a.Address == b.Address }
	if s.refused == refusedBefore && slices.EqualFunc(before, s.endpoints, same) {
		return // before anything is made of it: there may be thousands
	}
	log := a.Log.With("magicIP", port.String())
	if s.refused != refusedBefore && s.refused != "" {
		log.Error("not served: " + s.refused)
	}
	addresses := func(chosen []endpoint.Chosen) (all []netip.AddrPort, pods []string) {
		for _, c := range chosen {
			all, pods = append(all, c.Address), append(pods, podName(c))
		}
		return all, pods
	}
	had, _ := addresses(before)
	has, pods := addresses(s.endpoints)
	switch {
	case slices.Equal(had, has):
	case len(has) == 0:
		log.Info("no endpoint", "noEndpoint", port.NoEndpoint, "was", had)
	default:
		log.Info("endpoint", "addr", has, "pod", pods, "was", had)
	}
}
