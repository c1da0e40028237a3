package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/doctor/probe"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// targets are the ports that the agents serve, with their endpoints.
func (e *examination) targets() (targets []probe.Target) {
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			if m.Reason != "" {
				continue
			}
			target := probe.Target{Frontend: m.Frontend}
			for _, endpoint := range m.Endpoints {
				target.Endpoints = append(target.Endpoints, endpoint.Address)
			}
			targets = append(targets, target)
		}
	}
	return targets
}

// podOf is the pod that has an endpoint's address, as namespace/name.
func (e *examination) podOf(address netip.AddrPort) string {
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			for _, endpoint := range m.Endpoints {
				if endpoint.Address == address {
					return endpoint.Pod
				}
			}
		}
	}
	return "unknown"
}

// leaves is the link out of the node that the node's route to an address goes by; empty where it goes by another one.
func (e *examination) leaves(address netip.Addr) string {
	index, ok := routeTo(address)
	i := slices.IndexFunc(e.network.Links, func(l node.Link) bool { return l.Index == index && slices.Contains(e.network.Outward, l.Name) })
	if !ok || i < 0 {
		return ""
	}
	return e.network.Links[i].Name
}

// connectTimeout is how long an endpoint or a magic IP may take to answer: a SYN is sent three times by then.
const connectTimeout = 4 * time.Second

// endpoints connects to the endpoints' own addresses from the node, TCP only, and sends nothing.
func (e *examination) endpoints(ctx context.Context) {
	const check = "endpoints"
	var addresses []netip.AddrPort
	others := 0
	astray := map[netip.Addr]bool{}
	for _, target := range e.targets() {
		for _, endpoint := range target.Endpoints {
			if link := e.leaves(endpoint.Addr()); link != "" && !astray[endpoint.Addr()] {
				astray[endpoint.Addr()] = true
				e.add(Fail, check, fmt.Sprintf("the route to %s (pod %s) goes by %s, which leads out of the node: the pod's own route or link is gone", endpoint, e.podOf(endpoint), link),
					"see ip route get "+endpoint.Addr().String()+"; delete the pod, so that the CNI plugin creates them again")
			}
			switch {
			case astray[endpoint.Addr()]:
			case target.Protocol != plan.TCP:
				others++
			case !slices.Contains(addresses, endpoint):
				addresses = append(addresses, endpoint)
			}
		}
	}
	more := max(0, len(addresses)-most)
	addresses = addresses[:len(addresses)-more]
	results := make([]error, len(addresses))
	var group sync.WaitGroup
	for i, address := range addresses {
		group.Go(func() {
			dialer := net.Dialer{Timeout: connectTimeout}
			conn, err := dialer.DialContext(ctx, "tcp", address.String())
			if err == nil {
				err = conn.Close()
			}
			results[i] = err
		})
	}
	group.Wait()
	listening := 0
	for i, address := range addresses {
		name := fmt.Sprintf("%s (pod %s)", address, e.podOf(address))
		var timeout net.Error
		switch err := results[i]; {
		case err == nil:
			listening++
		case errors.Is(err, unix.ECONNREFUSED):
			e.add(Fail, check, name+" refuses connections: nothing listens on that port of the pod", "see that targetPort is the port that the pod's process listens on, on all of its addresses")
		case errors.As(err, &timeout) && timeout.Timeout():
			e.add(Warn, check, name+" does not answer this node: the pod hangs, or a policy drops what the node sends to it", "see what the probe says; kubectl get networkpolicy -A")
		default:
			e.add(Fail, check, fmt.Sprintf("%s cannot be reached from this node: %v", name, err), "see that the pod's link and the route to it are there: ip route get "+address.Addr().String())
		}
	}
	if listening > 0 {
		text := fmt.Sprintf("%d listen (TCP)", listening)
		if others > 0 {
			text += fmt.Sprintf("; %d of UDP or SCTP cannot be asked without sending data", others)
		}
		e.add(OK, check, text, "")
	}
	if more > 0 {
		e.add(Hidden, check, fmt.Sprintf("%d more were not tried", more), "")
	}
}
