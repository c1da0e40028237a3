package doctor

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/backend"
	"github.com/magic-ip-address/magic-ip-address/agent/foreign"
	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func (e *examination) versions(ctx context.Context) {
	var name unix.Utsname
	kernel := "unknown"
	if unix.Uname(&name) == nil {
		kernel = unix.ByteSliceToString(name.Release[:])
	}
	tools := "no nft and no iptables command here"
	if found := backend.Tools(ctx); len(found) > 0 {
		tools = strings.Join(found, ", ")
	}
	e.add(OK, "versions", fmt.Sprintf("magic-ip-agent %s, Linux %s, %s", e.Version, kernel, tools), "")
}

// NetAdmin reports whether this process has CAP_NET_ADMIN, which nft and iptables need to change rules, and to read them.
func NetAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err == nil && data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}

// backend says which backend each agent uses and why, and whether nftables could be used.
func (e *examination) backend(ctx context.Context) {
	const check = "backend"
	trial := backend.Trial(ctx)
	for _, a := range e.agents {
		text := fmt.Sprintf("agent %s uses %s", a.Name, a.Backend)
		if a.BackendNote != "" {
			text += ": " + a.BackendNote
		}
		switch {
		case a.Backend == backend.NFTables && trial != nil:
			e.add(Fail, check, fmt.Sprintf("agent %s uses nftables, which does not work from here: %v", a.Name, trial),
				"run this as root in the network namespace of the node; if that is so, see that the nft command and the kernel are there still")
		case a.Backend == backend.IPTables && trial == nil:
			e.add(OK, check, text+" (nftables could be used here)", "")
		default:
			e.add(OK, check, text, "")
		}
	}
}

// rules compares what is in the kernel with what the agents say they serve.
func (e *examination) rules(ctx context.Context) {
	const check = "rules"
	for _, a := range e.agents {
		if a.Unreadable != "" || a.LastSync.IsZero() {
			continue
		}
		differs, err := e.inspect(ctx, a)
		if len(differs) > 0 { // it may be changing right now
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			if read, readErr := status.Read(runtimedir.New(e.RuntimeDir), a.Name); readErr == nil {
				e.readNetwork()
				differs, err = e.inspect(ctx, read.Agents[0])
			}
		}
		switch {
		case err != nil:
			e.add(Hidden, check, fmt.Sprintf("those of agent %s cannot be read: %v", a.Name, err), "run this as root in the network namespace of the node")
		case len(differs) > 0:
			next := "find out what modifies them (nft monitor); the agent restores them"
			if !a.Live {
				next = "start the agent: without it nothing restores them"
			}
			e.add(Fail, check, fmt.Sprintf("those of agent %s are not as it says: %s", a.Name, strings.Join(differs, "; ")), next)
		default:
			e.add(OK, check, fmt.Sprintf("those of agent %s are in the kernel (%s)", a.Name, a.Backend), "")
		}
		left, unread, err := backend.Leftovers(ctx, a.Backend, a.Name)
		if err != nil {
			unread = err.Error()
		}
		if len(left) > 0 {
			e.add(Fail, check, fmt.Sprintf("agent %s uses %s, and its rules of backend %s are there too: they may lead to an endpoint of before", a.Name, a.Backend, strings.Join(left, ", ")),
				fmt.Sprintf("restart the agent: it removes them; those of iptables-legacy only with NET_RAW, so on the node: for i in iptables ip6tables; do $i-legacy-save | grep -v %s | $i-legacy-restore; done", iptables.Prefix(a.Name)))
		}
		if unread != "" {
			e.add(Hidden, check, fmt.Sprintf("whether agent %s has left rules of another backend: %s", a.Name, unread), "run this as root on the node")
		}
	}
}

func (e *examination) inspect(ctx context.Context, a status.Agent) ([]string, error) {
	// An endpoint at an address of the node has other rules than one of a pod.
	if err := errors.Join(e.unread, e.snapshot.Complete()); err != nil {
		return nil, err
	}
	in := plan.Input{HostAddresses: e.network.Addresses}
	for _, l := range a.Links {
		switch node.Role(l.Role) {
		case node.Served:
			in.PodInterfaces = append(in.PodInterfaces, l.Names...)
		case node.Uplink:
			in.Uplinks = append(in.Uplinks, l.Names...)
		}
	}
	for _, m := range a.MagicIPs {
		if m.Reason != "" {
			continue
		}
		service := plan.Service{Frontend: m.Frontend, HostInterface: m.HostInterface, HostClients: m.HostClients, WithoutEndpoint: plan.Action(m.Action)}
		for _, endpoint := range m.Endpoints {
			service.Endpoints = append(service.Endpoints, endpoint.Address)
		}
		in.Services = append(in.Services, service)
	}
	return backend.Inspect(ctx, a.Backend, a.Name, in)
}

func (e *examination) addresses() (all []netip.Addr) {
	seen := map[netip.Addr]bool{}
	for _, f := range e.frontends() {
		if !seen[f.Address] {
			seen[f.Address] = true
			all = append(all, f.Address)
		}
	}
	return all
}

// frontends are those that are served. Packets to another one go where the rules of others, and the node, send them.
func (e *examination) frontends() (all []plan.Frontend) {
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			if m.Reason == "" {
				all = append(all, m.Frontend)
			}
		}
	}
	return all
}

func (e *examination) foreignRules(ctx context.Context) {
	const check = "rules of others"
	frontends := e.frontends()
	if len(frontends) == 0 {
		return
	}
	found, hidden := foreign.Rules(ctx, frontends)
	for _, rule := range found {
		e.add(Warn, check, "another program translates a magic IP too: "+rule.Text, rule.Next)
	}
	for _, reason := range hidden {
		e.add(Hidden, check, reason, "run this as root on the node, with nft and the commands of iptables")
	}
	if len(found)+len(hidden) == 0 {
		e.add(OK, check, "none translates a magic IP; looked for: "+foreign.Kinds, "")
	}
}
