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
	var names string
	for _, file := range archive.Files {
		names += file.Name + "\n"
	}
	for _, word := range []string{
		"kind:", "k3s", "bridge plugin", "ptp plugin", "Calico", "AWS", "Azure CNI, transparent", "Azure CNI, bridge mode", "Cilium", "OVN-Kubernetes", "Antrea",
		"Kube-OVN", "macvlan", "ipvlan", "VPN", "WireGuard", "bonding", "VLAN", "DHCP renewal", "egress gateway", "several network interfaces", "VRF", "SR-IOV",
	} {
		if !strings.Contains(names, word) {
			t.Errorf("no layout of %s", word)
		}
	}
	for _, file := range archive.Files {
		t.Run(file.Name, func(t *testing.T) {
			snapshot, known, want := nodetest.Layout(t, string(file.Data))
			network := node.Classify(snapshot, known)
			got := shown(network)
			if len(network.Outward) > 0 {
				got += "\nout: " + strings.Join(network.Outward, " ")
			}
			if diff := cmp.Diff(strings.Join(want, "\n"), got); diff != "" {
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
			gateways := 0
			for _, link := range network.Links {
				pair := link.Kind == "veth" || link.Kind == "netkit"
				if unserved := slices.Contains(network.UnservedPairs, link.Name); unserved != (pair && link.Role != node.Served) {
					t.Errorf("%s: among the unserved pairs: %v", link.Name, unserved)
				}
				if strings.HasPrefix(link.Reason, "it is the node's way into") {
					gateways++
				}
				if served := slices.Contains(network.PodInterfaces, link.Name); served != (link.Role == node.Served && !link.Port) {
					t.Errorf("%s: among the pod interfaces: %v", link.Name, served)
				}
				if _, port := network.PodPorts[link.Index]; port && (!link.Port || link.Role != node.Served) {
					t.Errorf("%s: hairpin at what is no port of pods", link.Name)
				}
			}
			if len(network.Notes) != gateways { // the frames of all bridges here pass netfilter
				t.Errorf("notes %q with %d gateways", network.Notes, gateways)
			}
		})
	}
}

// TestKeep: an uplink stays one until it is gone only if it is certain. A bridge that looked like one before the first
// record of a pod behind it is none.
func TestKeep(t *testing.T) {
	const links = `
		link eth0 device 192.0.2.2/24
		link cni0 bridge 10.244.1.1/24
		link veth1 veth netns 0 master cni0
		route default eth0 cni0
		route 10.244.1.0/24 cni0
	`
	snapshot, known, _ := nodetest.Layout(t, links)
	network := node.Classify(snapshot, known)
	if diff := cmp.Diff([]string{"eth0", "cni0"}, network.Uplinks); diff != "" {
		t.Errorf("uplinks without a record (-want +got):\n%s", diff)
	}
	snapshot, known, _ = nodetest.Layout(t, links+"record veth1 10.244.1.5")
	known.Uplinks = network.Keep
	if diff := cmp.Diff([]string{"eth0"}, node.Classify(snapshot, known).Uplinks); diff != "" {
		t.Errorf("uplinks with a record (-want +got):\n%s", diff)
	}
}

// TestUnlisted: a dump that was interrupted lacks links that others name.
func TestUnlisted(t *testing.T) {
	network := node.Classify(node.Snapshot{
		Links: []node.LinkState{
			{Index: 5, Name: "port", Kind: "veth", Elsewhere: true, Master: 9},
			{Index: 6, Name: "end", Kind: "veth", Lower: 9},
			{Index: 7, Name: "vlan", Kind: "vlan", Lower: 9},
		},
		Addresses: []node.Address{{Link: 9, Prefix: netip.MustParsePrefix("10.244.1.1/24")}},
		Routes:    []node.Route{{Link: 9, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 254}, {Link: 7, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 7}},
	}, node.Known{})
	const want = `port: served: its other end is in another network namespace
end: other: both of its ends are on the node
vlan: uplink: a default route (table 7) goes by it`
	if diff := cmp.Diff(want, shown(network)); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
}

// TestRecordedTap: of a recorded link the index counts, where it is known.
func TestRecordedTap(t *testing.T) {
	snapshot, _, _ := nodetest.Layout(t, "link cni0 bridge\nlink tap1 tap master cni0")
	for _, test := range []struct {
		record node.Attachment
		served bool
	}{
		{node.Attachment{HostInterface: "tap1"}, true},
		{node.Attachment{HostInterface: "tap1", HostIfIndex: 3}, true},
		{node.Attachment{HostInterface: "before", HostIfIndex: 3}, true},
		{node.Attachment{HostInterface: "tap1", HostIfIndex: 4}, false},
	} {
		network := node.Classify(snapshot, node.Known{Attachments: []node.Attachment{test.record}})
		if served := len(network.PodInterfaces) > 0; served != test.served {
			t.Errorf("%+v: served %v, want %v", test.record, served, test.served)
		}
	}
}

// TestBridges: under which names the frames of bridges come in as packets, with the prefixes that are on link there.
func TestBridges(t *testing.T) {
	snapshot, known, _ := nodetest.Layout(t, `
		link cni0 bridge 10.244.1.1/24 10.244.9.1/32 169.254.1.1/16
		link cni0.7 vlan on cni0 10.244.2.1/24
		link way0 veth peer way1 10.244.3.1/24
		link way1 veth peer way0 master cni0
		link veth1 veth netns 0 master cni0
		link veth2 veth netns 1
		link eth0.7 vlan on eth0
		link eth0 device
		link mac0 macvlan on cni0
		link a veth peer b
		link b veth peer a
		link c veth peer d
		link d veth peer c master ovs
		link ovs openvswitch
	`)
	var got []string
	for _, bridge := range node.Classify(snapshot, known).Bridges {
		got = append(got, fmt.Sprint(bridge.Name, " ", bridge.Prefixes))
	}
	want := []string{"cni0 [10.244.1.0/24]", "cni0.7 [10.244.2.0/24]", "way0 [10.244.3.0/24]"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("bridges (-want +got):\n%s", diff)
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

// TestIsolatedPorts: those of a bridge that recorded pods are behind are noted, or of any while no pod is recorded; and only while frames
// pass netfilter.
func TestIsolatedPorts(t *testing.T) {
	const links = `
		link cni0 bridge 10.244.1.1/24
		link veth1 veth netns 0 master cni0
		link veth2 veth netns 1 master cni0
		link lxdbr0 bridge 10.9.0.1/24
		link veth3 veth netns 2 master lxdbr0
		route 10.244.1.0/24 cni0
		route 10.9.0.0/24 lxdbr0
	`
	for _, test := range []struct {
		name, record         string
		isolated             []string
		unfiltered4, filter6 bool
		want                 string // the bridges
	}{
		{"none is isolated", "record veth1 10.244.1.5", nil, false, false, ""},
		{"no record yet", "", []string{"veth2", "veth3"}, false, false, "cni0 lxdbr0"},
		{"of recorded pods", "record veth1 10.244.1.5", []string{"veth1", "veth2"}, false, false, "cni0"},
		{"of others", "record veth1 10.244.1.5", []string{"veth3"}, false, false, ""},
		{"frames of one family pass", "record veth1 10.244.1.5", []string{"veth1"}, true, true, "cni0"},
		{"no frames pass", "record veth1 10.244.1.5", []string{"veth1"}, true, false, ""},
	} {
		snapshot, known, _ := nodetest.Layout(t, links+test.record)
		for i := range snapshot.Links {
			l := &snapshot.Links[i]
			l.Isolated = slices.Contains(test.isolated, l.Name)
			l.Unfiltered4, l.Unfiltered6 = test.unfiltered4, test.unfiltered4 && !test.filter6
		}
		var got []string
		for _, note := range node.Classify(snapshot, known).Notes {
			if bridge, found := strings.CutPrefix(note, "bridge "); found && strings.Contains(note, ": pods behind isolated ports, such as ") {
				name, _, _ := strings.Cut(bridge, ":")
				got = append(got, name)
			}
		}
		if strings.Join(got, " ") != test.want {
			t.Errorf("%s: noted %q, want %q", test.name, got, test.want)
		}
	}
}
