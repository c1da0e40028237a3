package plugin

import (
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
)

func TestInterfaces(t *testing.T) {
	// The links that are on the node of the test; the kernel does not tell the driver of odd1.
	links := map[string]link{
		"cni0": {"bridge", 3}, "veth1": {"veth", 4}, "bwp1": {"ifb", 5}, "cali1": {"veth", 6}, "odd1": {"", 7}, "eth0": {"hv_netvsc", 2}, "eth1": {"mlx5e_rep", 8},
	}
	tests := []struct {
		name    string
		result  string
		addrs   string
		host    string
		ignored string
	}{
		{
			name: "bridge",
			result: `{"interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
				"ips": [{"interface": 2, "address": "10.244.1.7/24"}, {"interface": 2, "address": "fd00::7/64"}]}`,
			addrs: "10.244.1.7 fd00::7", host: "veth1",
		},
		{
			name: "bridge named after the veth",
			result: `{"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}, {"name": "cni0"}],
				"ips": [{"interface": 1, "address": "10.244.1.7/24"}]}`,
			addrs: "10.244.1.7", host: "veth1",
		},
		{
			name: "bridge and bandwidth",
			result: `{"interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}, {"name": "bwp1"}],
				"ips": [{"interface": 2, "address": "10.244.1.7/24"}]}`,
			addrs: "10.244.1.7", host: "veth1",
		},
		{
			name:   "a bridge alone leads to no sandbox in particular",
			result: `{"interfaces": [{"name": "cni0"}], "ips": [{"address": "10.244.1.7/24"}]}`,
			addrs:  "10.244.1.7",
		},
		{
			name:   "ptp, the link is not there",
			result: `{"interfaces": [{"name": "veth9"}, {"name": "eth0", "sandbox": "/ns"}], "ips": [{"interface": 1, "address": "10.244.1.7/32"}]}`,
			addrs:  "10.244.1.7",
		},
		{
			name:   "calico names the end of the node alone",
			result: `{"interfaces": [{"name": "cali1"}], "ips": [{"version": "4", "address": "10.244.1.7/32"}]}`,
			addrs:  "10.244.1.7", host: "cali1",
		},
		{
			name: "several interfaces in the sandbox",
			result: `{"interfaces": [{"name": "eth0", "sandbox": "/ns"}, {"name": "net1", "sandbox": "/ns"}],
				"ips": [{"interface": 1, "address": "192.168.1.7/24"}, {"interface": 0, "address": "10.244.1.7/24"}, {"address": "10.0.0.9/24"}]}`,
			addrs: "10.244.1.7 10.0.0.9",
		},
		{
			name:   "an address of the node's end",
			result: `{"interfaces": [{"name": "odd1"}, {"name": "eth0", "sandbox": "/ns"}], "ips": [{"interface": 0, "address": "10.244.1.1/24"}]}`,
			host:   "odd1",
		},
		{
			name:   "azure names the end of the pod without its sandbox",
			result: `{"interfaces": [{"name": "eth0"}], "ips": [{"address": "10.244.1.7/16"}]}`,
			addrs:  "10.244.1.7",
		},
		{
			name:   "a device of the node stays when the sandbox ends",
			result: `{"interfaces": [{"name": "eth1"}, {"name": "eth0", "sandbox": "/ns"}], "ips": [{"interface": 1, "address": "10.244.1.7/16"}]}`,
			addrs:  "10.244.1.7",
		},
		{
			name: "a link that never was",
			result: `{"interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}, {"name": "dummy1"}],
				"ips": [{"interface": 1, "address": "10.244.1.7/24"}]}`,
			addrs: "10.244.1.7", host: "veth1",
		},
		{
			name: "no such interface",
			result: `{"interfaces": [{"name": "eth0", "sandbox": "/ns"}],
				"ips": [{"interface": 1, "address": "10.0.0.1/24"}, {"interface": -1, "address": "10.0.0.2/24"}, {"interface": 0, "address": "10.244.1.7/24"}]}`,
			addrs: "10.244.1.7", ignored: "10.0.0.1/24: there is no interface 1\n10.0.0.2/24: there is no interface -1",
		},
		{
			name:   "no interfaces at all",
			result: `{"ips": [{"address": "10.244.1.7/24"}, {"interface": 0, "address": "10.0.0.1/24"}]}`,
			addrs:  "10.244.1.7", ignored: "10.0.0.1/24: there is no interface 0",
		},
		{
			name:   "an address that is none",
			result: `{"ips": [{"address": "10.244.1"}, {"address": "10.244.1.7/24"}]}`,
			addrs:  "10.244.1.7", ignored: `netip.ParsePrefix("10.244.1"): no '/'`,
		},
		{name: "IPv4 in IPv6", result: `{"ips": [{"address": "::ffff:10.244.1.7/120"}]}`, addrs: "10.244.1.7"},
		{name: "nothing", result: `{}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			interfaces, err := parseInterfaces([]byte(test.result))
			if err != nil {
				t.Fatal(err)
			}
			got, ignored := interfaces.addresses("eth0")
			var want []netip.Addr
			for addr := range strings.FieldsSeq(test.addrs) {
				want = append(want, netip.MustParseAddr(addr))
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
			message := ""
			if ignored != nil {
				message = ignored.Error()
			}
			if diff := cmp.Diff(test.ignored, message); diff != "" {
				t.Errorf("ignored (-want +got):\n%s", diff)
			}
			host, index := interfaces.host("eth0", func(name string) (link, bool) {
				l, exists := links[name]
				return l, exists
			})
			if host != test.host || index != links[test.host].index {
				t.Errorf("host interface is %q with index %d, want %q", host, index, test.host)
			}
		})
	}
}

// What the kernel says of real links, in a network namespace of the test's own.
func TestLookUp(t *testing.T) {
	const inside = "TEST_HAS_ITS_OWN_NETWORK"
	if os.Getenv(inside) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLookUp$", "-test.v")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		if os.Getuid() != 0 {
			cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	named := func(name string) netlink.LinkAttrs {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return attrs
	}
	for _, link := range []netlink.Link{
		&netlink.Bridge{LinkAttrs: named("cni0")},
		&netlink.Veth{LinkAttrs: named("veth1"), PeerName: "eth0"},
	} {
		if err := netlink.LinkAdd(link); err != nil {
			t.Fatalf("%s: %v", link.Attrs().Name, err)
		}
	}
	for name, want := range map[string]string{"cni0": "bridge", "veth1": "veth", "missing": "", "a-name-longer-than-15": ""} {
		index := 0
		if link, err := netlink.LinkByName(name); err == nil {
			index = link.Attrs().Index
		}
		if got, exists := lookUp(name); got.driver != want || got.index != index || exists != (want != "") {
			t.Errorf("%s is %+v, there %v, want driver %q and index %d", name, got, exists, want, index)
		}
	}
}
