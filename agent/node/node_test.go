package node_test

import (
	"net/netip"
	"os/exec"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// inNamespace puts the test, and the commands it runs, into a network namespace of its own. The thread
// is never unlocked, so it ends with the test, and the namespace with it.
// The node: eth0 and eth1 are uplinks, one of them by a routing table of its own; cni0 is a bridge with a
// port; veth-pod is a routed pod; tap0 belongs to a VM; mac9 is what pods are never behind.
const links = `
	link add eth0 type veth peer name far0
	link add eth1 type veth peer name far1
	link add veth-pod type veth peer name pod
	link add cni0 type bridge
	link add port type veth peer name pod2
	link set port master cni0
	link add docker0 type bridge
	link add link eth1 name mac9 type macvlan
	tuntap add tap0 mode tap
	link set lo up
	link set eth0 up
	link set far0 up
	link set eth1 up
	link set far1 up
	link set docker0 up
`

func TestRead(t *testing.T) {
	nodetest.Namespace(t, links+`
		addr add 192.0.2.2/24 dev eth0
		addr add 198.51.100.2/24 dev eth1
		addr add 203.0.113.2/24 dev docker0
		route add default via 192.0.2.1
		route add default via 198.51.100.1 table 7
	`)
	read := func() node.Network {
		t.Helper()
		network, err := node.Kernel{}.Read()
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(network.PodInterfaces)
		return network
	}
	network := read()
	want := []string{"cni0", "docker0", "far0", "far1", "pod", "pod2", "tap0", "veth-pod"}
	if diff := cmp.Diff(want, network.PodInterfaces); diff != "" {
		t.Errorf("pod interfaces (-want +got):\n%s", diff)
	}
	if !network.Interfaces["mac9"] || network.Interfaces["nothing"] {
		t.Errorf("interfaces: %v", network.Interfaces)
	}
	if !network.BridgePorts["port"] || len(network.BridgePorts) != 1 {
		t.Errorf("bridge ports: %v", network.BridgePorts)
	}
	if !slices.Contains(network.Addresses, netip.MustParseAddr("198.51.100.2")) {
		t.Errorf("addresses: %v", network.Addresses)
	}
	if network.IPv6 {
		t.Error("IPv6 although every IPv6 route is link-local")
	}

	nodetest.IP(t, `
		route add default dev docker0 metric 5
		-6 addr add fd00:1::1/64 dev cni0 nodad
		link set cni0 up
	`)
	network = read()
	if slices.Contains(network.PodInterfaces, "docker0") {
		t.Error("docker0 carries a default route and counts as a pod interface")
	}
	if !network.IPv6 {
		t.Error("no IPv6 although a prefix is routed")
	}
}

func TestBridgeFilters(t *testing.T) {
	nodetest.Namespace(t, `
		link add plain type bridge
		link add own type bridge nf_call_iptables 1 nf_call_ip6tables 1
	`)
	unfiltered := func() map[string]bool {
		t.Helper()
		network, err := node.Kernel{}.Read()
		if err != nil {
			t.Fatal(err)
		}
		bridges := map[string]bool{}
		for _, b := range network.Bridges {
			if b.Unfiltered4 != b.Unfiltered6 {
				t.Errorf("families differ: %+v", b)
			}
			bridges[b.Name] = b.Unfiltered4
		}
		return bridges
	}
	sysctl := func(value string) {
		t.Helper()
		for _, tables := range []string{"iptables", "ip6tables"} {
			// Through the thread's own /proc entry: a child process has the thread's network namespace.
			command := "echo " + value + " > /proc/sys/net/bridge/bridge-nf-call-" + tables
			if out, err := exec.CommandContext(t.Context(), "sh", "-c", command).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", command, err, out)
			}
		}
	}
	sysctl("1")
	if diff := cmp.Diff(map[string]bool{"plain": false, "own": false}, unfiltered()); diff != "" {
		t.Errorf("sysctl on (-want +got):\n%s", diff)
	}
	sysctl("0")
	if diff := cmp.Diff(map[string]bool{"plain": true, "own": false}, unfiltered()); diff != "" {
		t.Errorf("sysctl off (-want +got):\n%s", diff)
	}
}

func TestEnableHairpin(t *testing.T) {
	nodetest.Namespace(t, `
		link add cni0 type bridge
		link add port type veth peer name pod
		link set port master cni0
		link add alone type veth peer name pod2
	`)
	for _, tt := range []struct {
		name string
		want bool
	}{{"port", true}, {"port", false}, {"alone", false}, {"nothing", false}} {
		switched, err := node.Kernel{}.EnableHairpin(tt.name)
		if err != nil || switched != tt.want {
			t.Errorf("EnableHairpin(%s) = %v, %v, want %v", tt.name, switched, err, tt.want)
		}
	}
}
