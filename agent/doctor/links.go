package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
)

// links says by which links pods are served, and why others are not.
func (e *examination) links() {
	const check = "links"
	network := e.network
	var served, others []string
	for _, link := range network.Links {
		switch {
		case link.Port:
		case link.Role == node.Served:
			served = append(served, link.Name)
		case link.Role == node.Other && slices.Contains([]string{"veth", "netkit", "bridge", "tap", "openvswitch"}, link.Kind):
			others = append(others, fmt.Sprintf("%s (%s)", link.Name, link.Reason))
		}
	}
	for _, route := range e.snapshot.Routes {
		i := slices.IndexFunc(network.Links, func(l node.Link) bool { return l.Index == route.Link })
		if route.Default() && route.Table == mainTable && i >= 0 && network.Links[i].Role == node.Served {
			e.add(Warn, check, fmt.Sprintf("the node's default route goes by %s, which its pods are behind: what the node sends elsewhere goes to a pod", network.Links[i].Name),
				"see what has made it (ip route show default), and remove it: a DHCP client on a link of pods, or an egress gateway that should have a table of its own")
			break
		}
	}
	e.configuredLinks(network)
	for _, record := range e.records {
		link, ok := e.linkOf(network, record.HostInterface)
		if !ok || link.Role == node.Served || !e.anyAuto() {
			continue
		}
		e.add(Fail, check, fmt.Sprintf("pod %s/%s is behind %s, which is not served with hostInterface auto: %s", record.Namespace, record.Name, link.Name, link.Reason),
			"correct that, or name the link: hostInterface: "+link.Name)
	}
	if e.failed(check) {
		return
	}
	text := "clients are served by " + few(served)
	if len(served) == 0 {
		text = "no link that pods are behind is there yet"
	}
	if len(others) > 0 {
		text += "; not by " + few(others)
	}
	e.add(OK, check, text, "")
}

// configuredLinks sees that the links that a configuration names are there.
func (e *examination) configuredLinks(network node.Network) {
	const check = "links"
	seen := map[string]bool{}
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			for _, pattern := range m.HostInterface {
				prefix, wild := strings.CutSuffix(pattern, "+")
				there := slices.ContainsFunc(network.Links, func(l node.Link) bool { return l.Name == pattern || wild && strings.HasPrefix(l.Name, prefix) })
				if !there && !seen[pattern] {
					e.add(Fail, check, fmt.Sprintf("hostInterface of %s is %s, and the node has no such link: no pod behind another one is served", m.Frontend, pattern), "set hostInterface to auto, or to the link that the node's pods are behind")
				}
				seen[pattern] = true
			}
		}
	}
}

// anyAuto reports whether links are found by their kind for any magic IP.
func (e *examination) anyAuto() bool {
	for _, a := range e.agents {
		if slices.ContainsFunc(a.MagicIPs, func(m magicIP) bool { return len(m.HostInterface) == 0 }) {
			return true
		}
	}
	return false
}

// mainTable is RT_TABLE_MAIN.
const mainTable = 254

// linkOf finds a link by its name.
func (e *examination) linkOf(network node.Network, name string) (node.Link, bool) {
	i := slices.IndexFunc(network.Links, func(l node.Link) bool { return l.Name == name })
	if i < 0 {
		return node.Link{}, false
	}
	return network.Links[i], true
}

// byIP is the link that IP packets come in by which came in by a link: its bridge where it is a port of one.
func byIP(name string) string {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return name
	}
	master, err := netlink.LinkByIndex(link.Attrs().MasterIndex)
	if err != nil || master.Type() != "bridge" {
		return name
	}
	return master.Attrs().Name
}

// unserved is why what comes in by a link is not served; empty where it is, or where the link is not known.
func (e *examination) unserved(name string) string {
	link, ok := e.linkOf(e.network, name)
	if !ok || link.Role == node.Served {
		return ""
	}
	return link.Reason
}

// known is what the records tell of links.
func (e *examination) known() (known node.Known) {
	for _, record := range e.records {
		known.Attachments = append(known.Attachments, node.Attachment{HostInterface: record.HostInterface, HostIfIndex: record.HostIfIndex, Addresses: record.IPs})
	}
	return known
}
