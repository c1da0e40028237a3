package inventory

import (
	"net/netip"
	"slices"
)

// SetOwnAddresses takes in the addresses of the node: a podIP that is one of them would lead to a service of the node.
func (i *Inventory) SetOwnAddresses(addresses []netip.Addr) { i.own = addresses }

// SetMagicIPs takes in the magic IPs, of which there may be thousands: a podIP that is one of them would lead to itself.
func (i *Inventory) SetMagicIPs(addresses []netip.Addr) {
	i.magicIPs = make(map[netip.Addr]bool, len(addresses))
	for _, ip := range addresses {
		i.magicIPs[ip] = true
	}
}

// special says what an address is that no pod has; empty where a pod may have it. Those are the addresses that the API server does not
// accept in Endpoints and EndpointSlices (ValidateEndpointIP and ValidateNonSpecialIP in pkg/apis/core/validation), and forms that
// its parser does not accept. Everybody who may write pods/status can write any address into podIPs.
func special(ip netip.Addr) string {
	switch {
	case !ip.IsValid():
		return "no address"
	case ip.Zone() != "":
		return "an address of one link"
	case ip.Is4In6():
		return "an IPv4 address written as IPv6"
	case ip.IsUnspecified(), ip.Is4() && ip.As4()[0] == 0:
		return "unspecified"
	case ip.IsLoopback():
		return "loopback"
	case ip.IsLinkLocalUnicast():
		return "link-local"
	case ip.IsMulticast():
		return "multicast"
	case ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "broadcast"
	}
	return ""
}

// unusable says why an address of a pod or record cannot be an endpoint; empty where it can. A hostNetwork pod has the node's.
func (i *Inventory) unusable(ip netip.Addr, hostNetwork bool) string {
	if reason := special(ip); reason != "" {
		return reason
	}
	switch {
	case i.magicIPs[ip]:
		return "a magic IP"
	case !hostNetwork && slices.Contains(i.own, ip):
		return "an address of this node"
	}
	return ""
}

// Unusable is an address of a target that cannot be an endpoint.
type Unusable struct {
	IP     netip.Addr
	Reason string // as in "10.0.0.1 is loopback", "… is of a sandbox that was deleted"
}
