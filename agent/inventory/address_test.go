package inventory_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestUnusableAddresses: of a pod, of a hostNetwork pod and in a record. The node is 192.0.2.7 and 2001:db8::7, 198.51.100.1 a magic IP.
func TestUnusableAddresses(t *testing.T) {
	const usable, hostOnly = "", "an address of this node"
	for address, want := range map[string]string{
		"10.0.0.1": usable, "203.0.113.9": usable, "fd00::1": usable, "2001:db8::1": usable,
		"0.0.0.0": "unspecified", "0.1.2.3": "unspecified", "::": "unspecified", "127.0.0.1": "loopback", "127.9.9.9": "loopback", "::1": "loopback",
		"169.254.169.254": "link-local", "169.254.1.1": "link-local", "fe80::1": "link-local",
		"224.0.0.1": "multicast", "224.0.0.251": "multicast", "239.1.1.1": "multicast", "ff01::1": "multicast", "ff02::1": "multicast", "ff0e::1": "multicast",
		"255.255.255.255": "broadcast", "fe80::1%eth0": "an address of one link", "fd00::1%eth0": "an address of one link",
		"::ffff:127.0.0.1": "an IPv4 address written as IPv6", "::ffff:10.0.0.1": "an IPv4 address written as IPv6",
		"192.0.2.7": hostOnly, "2001:db8::7": hostOnly, "198.51.100.1": "a magic IP",
	} {
		ip := netip.MustParseAddr(address)
		pod := inventory.Pod{PodID: id("default", "pod", "p"), IPs: []netip.Addr{ip}, Ready: true}
		host := pod
		host.PodID, host.HostNetwork = id("default", "host", "h"), true
		record := runtimedir.Attachment{ContainerID: "c", IfName: "eth0", Namespace: "default", Name: "record", UID: "r", AddedAt: now, IPs: []netip.Addr{ip}}
		for _, test := range []struct {
			what string
			of   *inventory.Inventory
			want string
		}{
			{"pod", synced(nil, pod), want},
			{"hostNetwork pod", synced(nil, host), map[bool]string{true: usable, false: want}[want == hostOnly]},
			{"record", synced([]runtimedir.Attachment{record}), want},
		} {
			test.of.SetOwnAddresses([]netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")})
			test.of.SetMagicIPs([]netip.Addr{netip.MustParseAddr("198.51.100.1")})
			targets := test.of.Targets(now)
			if len(targets) != 1 {
				t.Fatalf("%s of a %s: targets %+v", address, test.what, targets)
			}
			got := ""
			for _, u := range targets[0].Unusable {
				got = u.Reason
			}
			if got != test.want || (len(targets[0].IPs) == 1) != (test.want == usable) {
				t.Errorf("%s of a %s: addresses %v, unusable %+v, want %q", address, test.what, targets[0].IPs, targets[0].Unusable, test.want)
			}
		}
	}
}

// TestUnusableBesideUsable: one address of a pod says nothing about the others.
func TestUnusableBesideUsable(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	i := synced(nil, inventory.Pod{PodID: id("default", "a", "a"), IPs: ips, Ready: true})
	if got := fmt.Sprint(i.Targets(now)[0].IPs); got != "[10.0.0.1 fd00::2]" {
		t.Errorf("addresses %s", got)
	}
}

// TestUnrecorded: where the CNI plugin records pods, an address that no record has is conspicuous.
func TestUnrecorded(t *testing.T) {
	pod := func(name string, n byte, host bool) inventory.Pod {
		return inventory.Pod{PodID: id("default", name, name), IPs: addr(n), Ready: true, HostNetwork: host}
	}
	pods := []inventory.Pod{pod("recorded", 1, false), pod("stranger", 2, false), pod("host", 3, true)}
	unrecorded := func(i *inventory.Inventory) (names []string) {
		for _, target := range i.Targets(now) {
			if target.Unrecorded {
				names = append(names, target.Name)
			}
		}
		return names
	}
	if diff := cmp.Diff([]string{"stranger"}, unrecorded(synced([]runtimedir.Attachment{record(id("default", "recorded", "recorded"), 1)}, pods...))); diff != "" {
		t.Errorf("with records (-want +got):\n%s", diff)
	}
	if got := unrecorded(synced(nil, pods...)); len(got) > 0 {
		t.Errorf("without records: %v", got)
	}
}
