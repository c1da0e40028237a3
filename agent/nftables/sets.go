package nftables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// set is a map where value is set.
type set struct {
	name     string
	comment  string
	key      string
	value    string
	elements map[string]string // key to value, as nft lists them
	// until is when the kernel removes an element, in a set whose elements have timeouts; zero is never. Such elements are
	// never deleted: whether they are still there is a matter of time.
	until map[string]time.Time
	// counted: the kernel counts the packets that meet an element.
	counted bool
}

// The sets in which several rules may have the same element; see shared.
const (
	addressesSet     = "addresses"
	hostAddressesSet = "host-addresses"
	hostEndpointsSet = "host-endpoints"
	hairpinsSet      = "hairpins"
)

// actionsSuffix ends the names of the maps of actions.
const actionsSuffix = "actions"

// zoneType is the type of the zones, which nft names by an expression only.
const zoneType = "ct zone"

// concat joins the parts of a key or a value as nft writes them.
func concat(parts ...string) string { return strings.Join(parts, " . ") }

func concatPort(a netip.AddrPort) string {
	return concat(a.Addr().String(), strconv.Itoa(int(a.Port())))
}

// elementKey is the key of a frontend's elements.
func elementKey(f plan.Frontend) string {
	return concat(f.Address.String(), string(f.Protocol), strconv.Itoa(int(f.Port)))
}

// sets are the data of the plan. How many magic IPs there are does not matter to a packet to any other address: see TestLookupsOfOthers.
func sets(p *plan.Plan, family plan.Family) []set {
	address := "ipv4_addr"
	if family == plan.IPv6 {
		address = "ipv6_addr"
	}
	frontend := concat(address, "inet_proto", "inet_service")
	newSet := func(name, key, value, comment string) set {
		return set{name: name, key: key, value: value, comment: comment, elements: map[string]string{}}
	}
	addresses := newSet(addressesSet, address, "", "the magic IPs")
	hostAddresses := newSet(hostAddressesSet, address, "", "the magic IPs that processes of this node may use")
	interfaces := newSet("pod-interfaces", "ifname", "", "links of this node's pods")
	unserved := newSet("unserved-pairs", "ifname", "", "links that are not served whatever their kind")
	actions := newSet(actionsSuffix, frontend, "verdict", "actions for packets of pods")
	hostActions := newSet("host-"+actionsSuffix, frontend, "verdict", "actions for packets of processes of this node")
	destinations := newSet("destinations", frontend, concat(address, "inet_service"), "destinations of new flows")
	zones := newSet("zones", concat(address, "inet_service"), zoneType, "zones of UDP flows, by the endpoint")
	spreads := newSet("spreads", frontend, "verdict", "frontends with several endpoints")
	for _, s := range []*set{&actions, &hostActions, &destinations, &spreads} {
		s.counted = true
	}
	held := newSet("held", frontend, "", "frontends whose clients wait")
	held.until = map[string]time.Time{}
	excluded := newSet("excluded", concat(address, frontend), "", "sources that are exempt")
	passed := newSet("passed", frontend, "", "frontends whose packets may leave the node as they are")
	hostExcluded := newSet("host-excluded", frontend, "", "frontends that processes of this node do not use")
	hairpins := newSet(hairpinsSet, concat(address, address), "", "endpoints that connect to themselves")
	bridges := newSet("unfiltered-bridges", concat("ifname", "ifname"), "", "bridges whose frames do not pass netfilter")
	servers := newSet("servers", address, "", "addresses that translated flows lead to")
	hostEndpoints := newSet(hostEndpointsSet, concat(address, "inet_service"), "", "endpoints that are processes of this node")

	for _, rule := range p.Rules {
		if plan.FamilyOf(rule.Address) != family {
			continue
		}
		key := elementKey(rule.Frontend)
		if rule.Foreign() {
			actions.elements[key], hostActions.elements[key] = "accept", "accept"
			passed.elements[key] = ""
			continue
		}
		addresses.elements[rule.Address.String()] = ""
		actions.elements[key] = "goto " + clientChainName(rule.Action, rule.Clients)
		hostActions.elements[key] = "accept"
		switch rule.Action {
		case plan.Pass:
			passed.elements[key] = ""
		case plan.Hold:
			held.elements[key] = ""
			held.until[key] = rule.HoldUntil
			hostActions.elements[key] = "goto hold"
		case plan.Reject:
			hostActions.elements[key] = "goto " + rejectChain
		}
		if rule.Zone != 0 {
			zones.elements[concatPort(netip.AddrPortFrom(rule.Address, rule.Port))] = strconv.Itoa(int(rule.Zone))
		}
		if rule.HostClients {
			hostAddresses.elements[rule.Address.String()] = ""
		} else {
			hostActions.elements[key] = "accept"
			hostExcluded.elements[key] = ""
		}
		for _, source := range rule.Excluded {
			excluded.elements[concat(source.String(), key)] = ""
		}
		for _, endpoint := range rule.Endpoints {
			switch {
			case !slices.Contains(p.HostAddresses, endpoint.Addr()): // the node connects to itself without masquerade
				hairpins.elements[concat(endpoint.Addr().String(), endpoint.Addr().String())] = ""
			case rule.Protocol == plan.TCP:
				hostEndpoints.elements[concatPort(endpoint)] = ""
			}
		}
		switch len(rule.Endpoints) {
		case 0:
		case 1:
			destinations.elements[key] = concatPort(rule.Endpoints[0])
		default:
			spreads.elements[key] = "goto " + spreadName(rule.Frontend)
		}
	}
	for _, links := range []struct {
		set   set
		names []string
	}{{interfaces, p.PodInterfaces}, {unserved, p.UnservedPairs}} {
		for _, name := range links.names {
			links.set.elements[name] = ""
		}
	}
	for _, bridge := range p.Bridges {
		if bridge.Unfiltered(family) {
			bridges.elements[concat(bridge.Name, bridge.Name)] = ""
		}
	}
	for _, server := range p.Servers {
		if plan.FamilyOf(server) == family && !slices.Contains(p.HostAddresses, server) {
			servers.elements[server.String()] = ""
		}
	}
	// Frontends of other agents count only on addresses that are ours in this family.
	all := []set{
		addresses, hostAddresses, interfaces, unserved, actions, hostActions, destinations, spreads, held, excluded,
		hostExcluded, passed, hairpins, bridges, servers, hostEndpoints,
	}
	if p.Zones {
		all = append(all, zones)
	}
	return all
}
