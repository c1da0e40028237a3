package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol is the origin (rtm_protocol, linux/rtnetlink.h) that the local routes of all agents bear: by it they are known as
// theirs, whichever process has made them. Numbers below 5 are the kernel's and ip(8)'s, and no routing daemon is known to use this one.
const routeProtocol = 109

// LocalRoute makes an address one of the node's own, without being on any of its links.
type LocalRoute struct {
	Address netip.Addr
	// Source is what processes of the node connect from: without it the kernel takes the address itself.
	Source netip.Addr
}

// AddLocalRoute adds a local route, or gives that of an agent another source; there is never none in between. Where another program has
// made one for the address, that is an error.
func (Kernel) AddLocalRoute(r LocalRoute) error {
	err := netlink.RouteAdd(r.route())
	if errors.Is(err, unix.EEXIST) {
		const filter = netlink.RT_FILTER_TABLE | netlink.RT_FILTER_PROTOCOL | netlink.RT_FILTER_DST
		var ours []netlink.Route
		if ours, err = netlink.RouteListFiltered(netlink.FAMILY_ALL, r.route(), filter); err == nil {
			if len(ours) == 0 {
				return fmt.Errorf("local route for %s: another program has made one; remove it: ip route del local %[1]s", r.Address)
			}
			err = netlink.RouteReplace(r.route())
		}
	}
	if err != nil {
		return fmt.Errorf("local route for %s, source %s: %w", r.Address, r.Source, err)
	}
	return nil
}

// RemoveLocalRoute removes a local route of an agent's; one that is gone is not an error.
func (Kernel) RemoveLocalRoute(r LocalRoute) error {
	if err := netlink.RouteDel(r.route()); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("local route for %s: %w", r.Address, err)
	}
	return nil
}

// loopback is the ifindex of lo in every network namespace (LOOPBACK_IFINDEX, net/net_namespace.h).
const loopback = 1

func (r LocalRoute) route() *netlink.Route {
	route := &netlink.Route{
		LinkIndex: loopback, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: routeProtocol,
		Dst: &net.IPNet{IP: r.Address.AsSlice(), Mask: net.CIDRMask(r.Address.BitLen(), r.Address.BitLen())},
	}
	if r.Source.IsValid() {
		route.Src = r.Source.AsSlice()
	}
	return route
}
