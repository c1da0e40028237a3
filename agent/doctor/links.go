package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
)

// links says by which links clients are served, and why others are not.
func (e *examination) links() {
	const check = "links"
	e.defaultRoute()
	if named := e.namedLinks(); named && !e.anyAuto() {
		return
	}
	var served, others []string
	for _, link := range e.network.Links {
		switch {
		case link.Port:
		case link.Role == node.Served:
			served = append(served, link.Name)
		case link.Role == node.Other && slices.Contains([]string{"veth", "netkit", "bridge", "tap", "openvswitch"}, link.Kind):
			others = append(others, fmt.Sprintf("%s (%s)", link.Name, link.Reason))
		}
	}
	for _, record := range e.records {
		link, ok := e.linkOf(e.network, record.HostInterface)
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

// defaultRoute sees that the node's way out is none of the links that pods are behind.
func (e *examination) defaultRoute() {
	for _, route := range e.snapshot.Routes {
		i := slices.IndexFunc(e.network.Links, func(l node.Link) bool { return l.Index == route.Link })
		if route.Default() && route.Table == mainTable && i >= 0 && e.network.Links[i].Role == node.Served {
			e.add(Warn, "links", fmt.Sprintf("the node's default route goes by %s, which its pods are behind: what the node sends elsewhere goes to a pod", e.network.Links[i].Name),
				"see what has made it (ip route show default), and remove it: a DHCP client on a link of pods, or an egress gateway that should have a table of its own")
			break
		}
	}
}

// namedLinks says by which links clients are served where hostInterface names links, once for each such setting.
func (e *examination) namedLinks() (named bool) {
	const check = "links"
	seen := map[string]bool{}
	for _, a := range e.agents {
		for _, m := range a.MagicIPs {
			setting := strings.Join(m.HostInterface, ",")
			if setting == "" || seen[setting] {
				continue
			}
			seen[setting] = true
			var there []string
			port := ""
			for _, link := range e.network.Links {
				switch {
				case !plan.Names(m.HostInterface, link.Name):
				case link.Port:
					port = link.Name
				default:
					there = append(there, link.Name)
				}
			}
			why := "the node has no such link"
			if port != "" {
				why = port + " is a port, so that IP packets come in by what it is a port of"
			}
			pod, behind := e.behindAnother(m.HostInterface)
			if len(there) == 0 && port == "" && behind == "" && len(m.Endpoints) == 0 { // the first pod may bring it
				e.add(Hidden, check, fmt.Sprintf("hostInterface of %s is %s, and %s; nor is a pod known that is behind another one", m.Frontend, setting, why), "look again when there is a pod on the node")
				continue
			}
			if len(there) == 0 {
				e.add(Fail, check, fmt.Sprintf("hostInterface of %s is %s, and %s: no pod behind another one is served", m.Frontend, setting, why), "set hostInterface to auto, or to the link that the node's pods are behind")
				continue
			}
			if behind != "" {
				e.add(Warn, check, fmt.Sprintf("hostInterface of %s is %s: clients behind %s, such as pod %s, are not served", m.Frontend, setting, behind, pod), "if they should be: "+setAuto(behind))
				continue
			}
			e.add(OK, check, fmt.Sprintf("with hostInterface %s, clients are served by %s", setting, few(there)), "")
		}
	}
	return len(seen) > 0
}

// behindAnother is a recorded pod behind a link that hostInterface does not name, and the link; both are empty where there is none.
func (e *examination) behindAnother(hostInterface []string) (pod, link string) {
	for _, record := range e.records {
		for _, ip := range record.IPs {
			index, ok := routeTo(ip)
			i := slices.IndexFunc(e.network.Links, func(l node.Link) bool { return l.Index == index })
			if ok && i >= 0 && e.leaves(ip) == "" && !plan.Names(hostInterface, e.network.Links[i].Name) {
				return record.Namespace + "/" + record.Name, e.network.Links[i].Name
			}
		}
	}
	return "", ""
}

// clientLinks are the links that pods are behind, and those that a hostInterface names.
func (e *examination) clientLinks() []string {
	all := slices.Clone(e.network.PodInterfaces)
	for _, link := range e.network.Links {
		named := func(m magicIP) bool { return plan.Names(m.HostInterface, link.Name) }
		if !link.Port && !slices.Contains(all, link.Name) && slices.ContainsFunc(e.agents, func(a status.Agent) bool { return slices.ContainsFunc(a.MagicIPs, named) }) {
			all = append(all, link.Name)
		}
	}
	return all
}

// setAuto is what to do about a link that hostInterface does not name.
func setAuto(link string) string { return "hostInterface: auto, or name " + link + " there too" }

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

// unserved is why a magic IP does not serve what comes in by a link, and what to do about it; both are empty where it does, or where the
// link is not known.
func (e *examination) unserved(m magicIP, name string) (reason, next string) {
	if len(m.HostInterface) > 0 {
		if name == "" || plan.Names(m.HostInterface, name) {
			return "", ""
		}
		return "hostInterface is " + strings.Join(m.HostInterface, ","), setAuto(name)
	}
	link, ok := e.linkOf(e.network, name)
	if !ok || link.Role == node.Served {
		return "", ""
	}
	return link.Reason, "see that only pods are behind that link, or name it: hostInterface: " + name
}

// known is what the records tell of links.
func (e *examination) known() (known node.Known) {
	for _, record := range e.records {
		known.Attachments = append(known.Attachments, node.Attachment{HostInterface: record.HostInterface, HostIfIndex: record.HostIfIndex, Addresses: record.IPs})
	}
	return known
}
