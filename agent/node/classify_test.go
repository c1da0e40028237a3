package node_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

func TestLayouts(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/layouts.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range archive.Files {
		t.Run(file.Name, func(t *testing.T) {
			snapshot, known, want := nodetest.Layout(t, string(file.Data))
			network := node.Classify(snapshot, known)
			if diff := cmp.Diff(strings.Join(want, "\n"), shown(network)); diff != "" {
				t.Errorf("links (-want +got):\n%s", diff)
			}
			// A second look finds the same.
			known.Uplinks = network.Keep
			if diff := cmp.Diff(network.Links, node.Classify(snapshot, known).Links); diff != "" {
				t.Errorf("second look (-first +second):\n%s", diff)
			}
			slices.Reverse(snapshot.Links)
			slices.Reverse(snapshot.Routes)
			if diff := cmp.Diff(network.Links, node.Classify(snapshot, known).Links); diff != "" {
				t.Errorf("links and routes in reverse order (-first +second):\n%s", diff)
			}
			for _, link := range network.Links {
				if served := slices.Contains(network.PodInterfaces, link.Name); served != (link.Role == node.Served && !link.Port) {
					t.Errorf("%s: among the pod interfaces: %v", link.Name, served)
				}
				if _, port := network.PodPorts[link.Index]; port && (!link.Port || link.Role != node.Served) {
					t.Errorf("%s: hairpin at what is no port of pods", link.Name)
				}
			}
		})
	}
}

// shown are links with the same role and reason on one line.
func shown(network node.Network) string {
	var lines []string
	names := map[string][]string{}
	for _, link := range network.Links {
		line := fmt.Sprintf("%s: %s", link.Role, link.Reason)
		if names[line] == nil {
			lines = append(lines, line)
		}
		names[line] = append(names[line], link.Name)
	}
	for i, line := range lines {
		lines[i] = strings.Join(names[line], " ") + ": " + line
	}
	return strings.Join(lines, "\n")
}

// BenchmarkClassify: a node with 500 pods on routed veths, all of them recorded, and 5000 routes to others.
func BenchmarkClassify(b *testing.B) {
	s := node.Snapshot{Links: []node.LinkState{{Index: 2, Name: "eth0"}}}
	known := node.Known{}
	for i := range 500 {
		address := netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)})
		l := node.LinkState{Index: i + 3, Name: fmt.Sprint("cali", i), Kind: "veth", Elsewhere: true, NetNS: i}
		s.Links = append(s.Links, l)
		s.Routes = append(s.Routes, node.Route{Link: l.Index, Destination: netip.PrefixFrom(address, 32), Table: 254})
		known.Attachments = append(known.Attachments, node.Attachment{HostInterface: l.Name, HostIfIndex: l.Index, Addresses: []netip.Addr{address}})
	}
	for i := range 5000 {
		s.Routes = append(s.Routes, node.Route{Link: 2, Destination: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24), Table: 254})
	}
	for b.Loop() {
		if n := node.Classify(s, known); len(n.PodInterfaces) != 500 {
			b.Fatal(len(n.PodInterfaces))
		}
	}
}
