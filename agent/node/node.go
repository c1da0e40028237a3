// Package node knows the network of the node that the agent runs on: behind which interfaces its pods
// are, its own addresses, and what its bridges keep from netfilter.
package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Network is what the node's network looks like at one moment.
type Network struct {
	// PodInterfaces are the interfaces that pods can be behind: veth, bridge, netkit and tap links that
	// carry no default route in any table. A bridge stands for its ports: to IP, their packets come in by it.
	PodInterfaces []string
	// BridgePorts are the links that are ports of a bridge.
	BridgePorts map[string]bool
	// Interfaces are the names of all links.
	Interfaces map[string]bool
	// Addresses are the node's own.
	Addresses []netip.Addr
	// IPv6 says whether the node routes IPv6 at all: whether any route leads beyond a link.
	IPv6 bool
	// Bridges are the node's Linux bridges.
	Bridges []plan.Bridge
}

// podLinkTypes are link kinds (rtnetlink IFLA_INFO_KIND) that container runtimes put pods behind. A tap
// link is of kind tun; VM-based runtimes use it.
func podLinkType(kind string) bool {
	return slices.Contains([]string{"veth", "bridge", "netkit", "tun", "tuntap"}, kind)
}

// Kernel reads and changes the network of the calling process.
type Kernel struct{}

// Read asks the kernel (rtnetlink). It reads the network namespace of the calling thread.
func (Kernel) Read() (Network, error) {
	network := Network{Interfaces: map[string]bool{}, BridgePorts: map[string]bool{}}
	uplinks, ipv6, err := readRoutes()
	if err != nil {
		return network, fmt.Errorf("routes of the node: %w", err)
	}
	network.IPv6 = ipv6
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	var messages [][]byte
	err = whole(func() (err error) {
		messages, err = request.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
	if err != nil {
		return network, fmt.Errorf("links of the node: %w", err)
	}
	filtered4, filtered6 := bridgeSysctl("iptables"), bridgeSysctl("ip6tables")
	var links []netlink.Link
	bridges := map[int]bool{}
	for _, message := range messages {
		link, err := netlink.LinkDeserialize(nil, message)
		if err != nil {
			return network, fmt.Errorf("links of the node: %w", err)
		}
		links = append(links, link)
		network.Interfaces[link.Attrs().Name] = true
		if link.Type() == "bridge" {
			bridges[link.Attrs().Index] = true
			own4, own6 := bridgeFilters(message)
			network.Bridges = append(network.Bridges, plan.Bridge{
				Name:        link.Attrs().Name,
				Unfiltered4: !filtered4.passes(own4),
				Unfiltered6: !filtered6.passes(own6),
			})
		}
	}
	for _, link := range links {
		switch attributes := link.Attrs(); {
		case bridges[attributes.MasterIndex]:
			network.BridgePorts[attributes.Name] = true
		case podLinkType(link.Type()) && !uplinks[attributes.Index]:
			network.PodInterfaces = append(network.PodInterfaces, attributes.Name)
		}
	}
	var addresses []netlink.Addr
	err = whole(func() (err error) {
		addresses, err = netlink.AddrList(nil, netlink.FAMILY_ALL)
		return err
	})
	if err != nil {
		return network, fmt.Errorf("addresses of the node: %w", err)
	}
	for _, address := range addresses {
		if ip, ok := netip.AddrFromSlice(address.IP); ok {
			network.Addresses = append(network.Addresses, ip.Unmap())
		}
	}
	return network, nil
}

// whole repeats a dump that the kernel says was torn by a change.
func whole(dump func() error) error {
	for range 5 {
		if err := dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return netlink.ErrDumpInterrupted
}

// readRoutes finds the indexes of links that a default route of any table leads to, and whether there is any
// IPv6 route but link-local, loopback and multicast ones.
func readRoutes() (uplinks map[int]bool, ipv6 bool, err error) {
	uplinks = map[int]bool{}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		// What a torn dump has told is true; the next one adds what it has left out.
		err := whole(func() error {
			return netlink.RouteListFilteredIter(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE,
				func(route netlink.Route) bool {
					links := defaultLinks(route)
					for _, index := range links {
						uplinks[index] = true
					}
					if family == netlink.FAMILY_V6 {
						ipv6 = ipv6 || len(links) > 0 || route.Dst != nil && route.Dst.IP.IsGlobalUnicast()
					}
					return true
				})
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, false, err
		}
	}
	return uplinks, ipv6, nil
}

// defaultLinks are the links of a default route; none where the route is another one.
func defaultLinks(route netlink.Route) []int {
	if route.Dst != nil {
		if ones, _ := route.Dst.Mask.Size(); ones > 0 || !route.Dst.IP.IsUnspecified() {
			return nil
		}
	}
	links := []int{}
	if route.LinkIndex > 0 {
		links = append(links, route.LinkIndex)
	}
	for _, hop := range route.MultiPath {
		links = append(links, hop.LinkIndex)
	}
	return links
}

type sysctl struct{ loaded, on bool }

// passes says whether the frames of a bridge with this flag of its own pass netfilter.
func (s sysctl) passes(own bool) bool { return s.on || s.loaded && own }

// bridgeSysctl reads net.bridge.bridge-nf-call-<tables>, which is per network namespace. It is missing
// where br_netfilter is not loaded: then no bridge's frames pass netfilter, whatever its own flag says.
func bridgeSysctl(tables string) sysctl {
	value, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-" + tables)
	return sysctl{loaded: err == nil, on: err == nil && strings.TrimSpace(string(value)) != "0"}
}

// Attributes of IFLA_INFO_DATA of a bridge (linux/if_link.h) that the netlink library does not name.
const (
	iflaBrNfCallIptables  = 36
	iflaBrNfCallIP6tables = 37
)

// bridgeFilters are the bridge's own flags nf_call_iptables and nf_call_ip6tables.
func bridgeFilters(message []byte) (ip, ip6 bool) {
	attribute := func(b []byte, kinds ...uint16) []byte {
		for _, kind := range kinds {
			attributes, err := nl.ParseRouteAttr(b)
			b = nil
			if err != nil {
				return nil
			}
			for _, a := range attributes {
				if a.Attr.Type&nl.NLA_TYPE_MASK == kind {
					b = a.Value
				}
			}
		}
		return b
	}
	if len(message) < unix.SizeofIfInfomsg {
		return false, false
	}
	data := attribute(message[unix.SizeofIfInfomsg:], unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA)
	on := func(b []byte) bool { return len(b) > 0 && b[0] != 0 }
	return on(attribute(data, iflaBrNfCallIptables)), on(attribute(data, iflaBrNfCallIP6tables))
}

// EnableHairpin lets the bridge port called name send a frame back where it came from, so that a pod
// reaches itself through a magic IP. It does nothing where name is no bridge port or hairpin is on.
func (Kernel) EnableHairpin(name string) (switched bool, err error) {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("link %s: %w", name, err)
	}
	if link.Attrs().MasterIndex == 0 {
		return false, nil
	}
	port, err := netlink.LinkGetProtinfo(link)
	if err != nil || port.Hairpin {
		return false, nil // not a port of a Linux bridge, or on already
	}
	if err := netlink.LinkSetHairpin(link, true); err != nil {
		return false, fmt.Errorf("link %s: hairpin: %w", name, err)
	}
	return true, nil
}

// Watch calls changed after each event that may change what Read returns, until ctx ends. It calls it
// once at the start, since what changed before the subscription would go unseen, and after a lost event.
func Watch(ctx context.Context, changed func()) error {
	for {
		err := watch(ctx, changed)
		if ctx.Err() != nil {
			return nil
		}
		// The kernel drops a subscriber that is too slow (ENOBUFS): subscribe and look again.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("rtnetlink subscription: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func watch(ctx context.Context, changed func()) error {
	done := make(chan struct{})
	defer close(done)
	failed := make(chan error, 3)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	links := make(chan netlink.LinkUpdate, 64)
	if err := netlink.LinkSubscribeWithOptions(links, done, netlink.LinkSubscribeOptions{ErrorCallback: fail}); err != nil {
		return err
	}
	routes := make(chan netlink.RouteUpdate, 64)
	if err := netlink.RouteSubscribeWithOptions(routes, done, netlink.RouteSubscribeOptions{ErrorCallback: fail}); err != nil {
		return err
	}
	addresses := make(chan netlink.AddrUpdate, 64)
	if err := netlink.AddrSubscribeWithOptions(addresses, done, netlink.AddrSubscribeOptions{ErrorCallback: fail}); err != nil {
		return err
	}
	changed()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case _, open := <-links:
			if !open {
				return unix.ENOBUFS
			}
			changed()
		case route, open := <-routes:
			if !open {
				return unix.ENOBUFS
			}
			// A node may learn routes by the thousand; only default ones tell an uplink.
			if len(defaultLinks(route.Route)) > 0 {
				changed()
			}
		case _, open := <-addresses:
			if !open {
				return unix.ENOBUFS
			}
			changed()
		}
	}
}
