package nodetest

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
)

// Layout reads a node's network from lines of these forms; links have the ifindexes 2, 3, … in their order.
//
//	link NAME KIND [master NAME] [on NAME | peer NAME | netns ID] [ADDRESS/BITS …]
//	route DESTINATION NAME… [table ID]
//	record HOST-INTERFACE ADDRESS…
//	before NAME…
//
// KIND is IFLA_INFO_KIND, or device for hardware, or tap. A link is on its parent; a veth has its peer on the node or in
// the network namespace with this ID. A route with several links has several next hops. Links named by before were
// uplinks. Other lines are returned as they are.
func Layout(t *testing.T, text string) (s node.Snapshot, known node.Known, rest []string) {
	t.Helper()
	lines := strings.Split(text, "\n")
	index := map[string]int{}
	for _, line := range lines {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "link" {
			index[fields[1]] = len(index) + 2
		}
	}
	of := func(name string) int {
		if index[name] == 0 {
			t.Fatalf("there is no link %s", name)
		}
		return index[name]
	}
	for _, line := range lines {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		switch fields[0] {
		case "link":
			link, addresses := layoutLink(t, fields[1:], of)
			s.Links, s.Addresses = append(s.Links, link), append(s.Addresses, addresses...)
		case "route":
			route := node.Route{Table: 254}
			if i := slices.Index(fields, "table"); i > 0 {
				table, err := strconv.Atoi(fields[i+1])
				if err != nil {
					t.Fatal(err)
				}
				route.Table, fields = table, fields[:i]
			}
			route.Destination = prefix(t, strings.Replace(fields[1], "default", "0.0.0.0/0", 1))
			for _, name := range fields[2:] {
				route.Link = of(name)
				s.Routes = append(s.Routes, route)
			}
		case "record":
			attachment := node.Attachment{HostInterface: fields[1]}
			for _, field := range fields[2:] {
				attachment.Addresses = append(attachment.Addresses, netip.MustParseAddr(field))
			}
			known.Attachments = append(known.Attachments, attachment)
		case "before":
			for _, name := range fields[1:] {
				known.Uplinks = append(known.Uplinks, of(name))
			}
		default:
			rest = append(rest, line)
		}
	}
	return s, known, rest
}

func layoutLink(t *testing.T, fields []string, of func(string) int) (l node.LinkState, addresses []node.Address) {
	t.Helper()
	l = node.LinkState{Index: of(fields[0]), Name: fields[0], Kind: fields[1]}
	switch l.Kind {
	case "device":
		l.Kind = ""
	case "tap":
		l.Kind, l.Tap = "tun", true
	}
	for fields = fields[2:]; len(fields) > 0; fields = fields[1:] {
		switch word := fields[0]; word {
		case "master", "on", "peer", "netns":
			fields = fields[1:]
			switch word {
			case "master":
				l.Master = of(fields[0])
			case "netns":
				id, err := strconv.Atoi(fields[0])
				if err != nil {
					t.Fatal(err)
				}
				// The ifindex belongs to the other namespace: it may be that of any link here.
				l.Lower, l.Elsewhere, l.NetNS = 2, true, id
			default:
				l.Lower = of(fields[0])
			}
		default:
			addresses = append(addresses, node.Address{Link: l.Index, Prefix: prefix(t, word)})
		}
	}
	return l, addresses
}

func prefix(t *testing.T, text string) netip.Prefix {
	t.Helper()
	p, err := netip.ParsePrefix(text)
	if err != nil {
		t.Fatal(fmt.Errorf("layout: %w", err))
	}
	return p
}
