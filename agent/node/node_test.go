package node_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// TestSnapshot reads a node that the kernel has made: eth0 and eth1 are uplinks, eth1 by a routing table of its own; cni0
// is a bridge of pods and gw0 the node's way into it; veth-pod is a routed pod; tap0 and tun0 belong to processes.
func TestSnapshot(t *testing.T) {
	nodetest.Namespace(t, fmt.Sprintf(`
		link add eth0 type veth peer name far0 netns %[1]s
		link add eth1 type veth peer name far1 netns %[1]s
		link add veth-pod type veth peer name eth0 netns %[2]s
		link add cni0 type bridge
		link add port type veth peer name eth0 netns %[3]s
		link set port master cni0
		link add gw0 type veth peer name gw1
		link set gw1 master cni0
		link add docker0 type bridge
		link add link eth1 name mac9 type macvlan
		link add vx0 type vxlan id 7 dstport 4789 dev eth0
		tuntap add tap0 mode tap
		tuntap add tun0 mode tun
		link set lo up
		link set eth0 up
		link set eth1 up
		link set tun0 up
		link set gw0 up
		link set veth-pod up
		addr add 192.0.2.2/24 dev eth0
		addr add 198.51.100.2/24 dev eth1
		addr add 10.244.1.1/24 dev gw0
		route add default via 192.0.2.1
		route add default via 198.51.100.1 table 7
		route add 0.0.0.0/1 dev tun0
		route add 10.244.2.5 dev veth-pod
	`, nodetest.Another(t), nodetest.Another(t), nodetest.Another(t)))
	readWithRecord := func() node.Network {
		t.Helper()
		snapshot, err := node.Kernel{}.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		return node.Classify(snapshot, node.Known{Attachments: []node.Attachment{{HostInterface: "veth-pod", Addresses: []netip.Addr{netip.MustParseAddr("10.244.2.5")}}}})
	}
	network := readWithRecord()
	if diff := cmp.Diff(strings.TrimSpace(`
eth0: uplink: a default route goes by it, and it carries 192.0.2.2
eth1: other: its other end is in the network namespace that the uplink eth0 leads to
veth-pod: served: the route to pod address 10.244.2.5 goes by it
cni0: served: all of its ports are pods'
port gw1: served: a port of cni0
gw0: served: it is the node's way into cni0, whose ports are all pods'
docker0: other: no pod is connected to it
mac9 vx0: other: no pods are behind links of this kind, and no default route goes by it
tap0: other: the process behind a tap is not known, and no recorded pod is behind it
tun0: uplink: a default route goes by it`), shown(network)); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
	if notes := strings.Join(network.Notes, "\n"); !strings.Contains(notes, "bridge cni0: its pods do not reach magic IPs") || !strings.Contains(notes, "by gw0") {
		t.Errorf("notes: %q", notes)
	}
	for name, want := range map[string]bool{"mac9": true, "nothing": false, "lo": true} {
		if _, found := network.IfIndex[name]; found != want {
			t.Errorf("IfIndex has %s: %v, want %v", name, found, want)
		}
	}
	if diff := cmp.Diff(map[int]bool{network.IfIndex["port"]: false}, network.PodPorts); diff != "" {
		t.Errorf("ports of pods (-want +got):\n%s", diff)
	}
	if !slices.Contains(network.Addresses, netip.MustParseAddr("198.51.100.2")) {
		t.Errorf("addresses: %v", network.Addresses)
	}
	if network.IPv6 {
		t.Error("IPv6 although every IPv6 route is link-local")
	}
	nodetest.IP(t, `-6 addr add fd00:1::1/64 dev gw0 nodad`)
	if !readWithRecord().IPv6 {
		t.Error("no IPv6 although a prefix is routed")
	}
}

// TestNames: names are bytes.
func TestNames(t *testing.T) {
	names := []string{`a"b`, "cali+", "\xff\x01x", "$(id)", "-n", "é"}
	nodetest.Namespace(t, "")
	for _, name := range names {
		nodetest.Run(t, "ip", "link", "add", "name", name, "type", "ifb")
	}
	network := read(t)
	for _, name := range names {
		if !slices.ContainsFunc(network.Links, func(l node.Link) bool { return l.Name == name }) {
			t.Errorf("no link %q among %+v", name, network.Links)
		}
	}
}

// TestDefaultRoutes: in every way that the kernel has of writing one.
func TestDefaultRoutes(t *testing.T) {
	for _, test := range []struct{ name, commands string }{
		{"gateway", "route add default via 192.0.2.1"},
		{"link", "route add default dev eth0"},
		{"onlink", "route add default via 203.0.113.1 dev eth0 onlink"},
		{"metric", "route add default via 192.0.2.1 metric 4000"},
		{"table", "route add default via 192.0.2.1 table 4711"},
		{"halves", "route add 128.0.0.0/1 via 192.0.2.1\nroute add 0.0.0.0/1 via 192.0.2.1"},
		{"multipath", "route add default nexthop via 192.0.2.1 nexthop via 192.0.2.9"},
		{"IPv6", "-6 route add default via fe80::1 dev eth0"},
		{"IPv6 multipath", "-6 route add default nexthop via fe80::1 dev eth0 nexthop via fe80::2 dev eth0"},
		{"IPv4 by an IPv6 gateway", "route add default via inet6 fe80::1 dev eth0"},
		{"global IPv6", "-6 route add 2000::/3 via fe80::1 dev eth0"},
		{"next hop object", "nexthop add id 5 via 192.0.2.1 dev eth0\nroute add default nhid 5"},
		{"group of next hop objects", "nexthop add id 5 via 192.0.2.1 dev eth0\nnexthop add id 6 group 5\nroute add default nhid 6"},
	} {
		for _, compat := range []string{"0", "1"} {
			t.Run(test.name+" "+compat, func(t *testing.T) {
				nodetest.Namespace(t, `
					link add eth0 type bridge
					link add port type ifb
					link set port master eth0
					link set port up
					link set eth0 up
					addr add 192.0.2.2/24 dev eth0
				`)
				sysctl(t, "net/ipv4/nexthop_compat_mode", compat)
				nodetest.IP(t, test.commands)
				snapshot, err := node.Kernel{}.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				if network := node.Classify(snapshot, node.Known{}); !slices.Contains(network.Uplinks, "eth0") {
					t.Errorf("routes %v: links %+v, want the uplink eth0", snapshot.Routes, network.Links)
				}
			})
		}
	}
	t.Run("no way out", func(t *testing.T) {
		nodetest.Namespace(t, `
			link add eth0 type veth peer name far0
			link set eth0 up
			addr add 192.0.2.2/24 dev eth0
			route add unreachable default
			-6 route add blackhole default
			route add 10.0.0.0/8 via 192.0.2.1
		`)
		snapshot, err := node.Kernel{}.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		if network := node.Classify(snapshot, node.Known{}); len(network.Uplinks) > 0 {
			t.Errorf("uplinks %v, want none", network.Uplinks)
		}
	})
}

// sysctl writes through a child process, which has the thread's network namespace.
func sysctl(t *testing.T, name, value string) {
	t.Helper()
	nodetest.Run(t, "sh", "-c", "echo "+value+" > /proc/sys/"+name)
}

func TestBridgeFilters(t *testing.T) {
	nodetest.Namespace(t, `
		link add plain type bridge
		link add own type bridge nf_call_iptables 1 nf_call_ip6tables 1
	`)
	unfiltered := func() map[string]bool {
		t.Helper()
		network := read(t)
		bridges := map[string]bool{}
		for _, b := range network.Bridges {
			if b.Unfiltered4 != b.Unfiltered6 {
				t.Errorf("families differ: %+v", b)
			}
			bridges[b.Name] = b.Unfiltered4
		}
		return bridges
	}
	filter := func(value string) {
		sysctl(t, "net/bridge/bridge-nf-call-iptables", value)
		sysctl(t, "net/bridge/bridge-nf-call-ip6tables", value)
	}
	filter("1")
	if diff := cmp.Diff(map[string]bool{"plain": false, "own": false}, unfiltered()); diff != "" {
		t.Errorf("sysctl on (-want +got):\n%s", diff)
	}
	filter("0")
	if diff := cmp.Diff(map[string]bool{"plain": true, "own": false}, unfiltered()); diff != "" {
		t.Errorf("sysctl off (-want +got):\n%s", diff)
	}
}

// read is the network of the test's namespace without any record.
func read(t *testing.T) node.Network {
	t.Helper()
	snapshot, err := node.Kernel{}.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return node.Classify(snapshot, node.Known{})
}

func TestHairpin(t *testing.T) {
	nodetest.Namespace(t, fmt.Sprintf(`
		link add cni0 type bridge
		link add port type veth peer name pod netns %[1]s
		link set port master cni0
		link add br1 type bridge
		link add nic type ifb
		link set nic master br1
		link add beside type veth peer name pod2 netns %[1]s
		link set beside master br1
		link add alone type veth peer name pod3 netns %[1]s
	`, nodetest.Another(t)))
	links := read(t).IfIndex
	port := links["port"]
	check := func(want map[int]bool) {
		t.Helper()
		if diff := cmp.Diff(want, read(t).PodPorts); diff != "" {
			t.Errorf("ports of pods (-want +got):\n%s", diff)
		}
	}
	check(map[int]bool{port: false})
	kernel := node.Kernel{}
	for range 2 {
		if err := kernel.SetHairpin(port, true); err != nil {
			t.Error(err)
		}
		check(map[int]bool{port: true})
	}
	nodetest.IP(t, "link set port name renamed")
	if err := kernel.SetHairpin(port, false); err != nil {
		t.Error(err)
	}
	check(map[int]bool{port: false})
	for name, index := range map[string]int{"a link that is gone": 4711, "a link that is no port": links["alone"]} {
		if err := kernel.SetHairpin(index, false); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
