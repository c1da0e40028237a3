package config

import (
	"fmt"
	"net/netip"
)

// reserved are addresses that clouds and cluster components use, with their use. A magic IP at one of them breaks
// the node, or sends requests for cloud credentials to the endpoint.
func reserved() map[netip.Addr]string {
	return map[netip.Addr]string{
		netip.MustParseAddr("169.254.169.254"): "the instance metadata service of most clouds",
		netip.MustParseAddr("169.254.169.252"): "the metadata server of GKE",
		netip.MustParseAddr("169.254.169.253"): "the DNS resolver of Amazon VPC",
		netip.MustParseAddr("169.254.170.2"):   "the task credentials of Amazon ECS",
		netip.MustParseAddr("169.254.170.23"):  "the pod identity agent of Amazon EKS",
		netip.MustParseAddr("169.254.20.10"):   "NodeLocal DNSCache",
		netip.MustParseAddr("169.254.25.10"):   "NodeLocal DNSCache as Kubespray sets it up",
		netip.MustParseAddr("169.254.1.1"):     "the pods' gateway of Calico and the Amazon VPC CNI",
		netip.MustParseAddr("169.254.7.127"):   "the pods' gateway of the Amazon VPC CNI",
		netip.MustParseAddr("fd00:ec2::254"):   "the instance metadata service of Amazon EC2",
	}
}

// unusable is the reason why an address cannot be a magic IP; empty where it can.
func unusable(address netip.Addr, allowReserved bool) string {
	switch owner, isReserved := reserved()[address]; {
	case isReserved && !allowReserved:
		return fmt.Sprintf("%s belongs to %s; set allowReserved: true to take it all the same", address, owner)
	case address.IsUnspecified(), address.IsLoopback(), address.IsMulticast(), address == netip.MustParseAddr("255.255.255.255"):
		return fmt.Sprintf("%s is an unspecified, loopback, multicast or broadcast address; allowed: a unicast address that the node does not own, such as 169.254.210.210", address)
	case address.Is6() && address.IsLinkLocalUnicast():
		return fmt.Sprintf("%s is an IPv6 link-local address, which is not routed; allowed: a unique local address such as fd00:a9fe:d2d2::1", address)
	}
	return ""
}
