package runtimedir

import (
	"cmp"
	"fmt"
	"net/netip"
)

// Protocol is a transport protocol, written as nft and iptables write it.
type Protocol string

// The protocols that a magic IP can serve.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// Number is the protocol number of the IP header (IANA).
func (p Protocol) Number() uint8 {
	switch p {
	case UDP:
		return 17
	case SCTP:
		return 132
	default:
		return 6
	}
}

// Frontend is what clients connect to, and the key of everything.
type Frontend struct {
	Address  netip.Addr `json:"ipAddress"`
	Protocol Protocol   `json:"protocol"`
	Port     uint16     `json:"port"`
}

// AddrPort is the address and port of f.
func (f Frontend) AddrPort() netip.AddrPort { return netip.AddrPortFrom(f.Address, f.Port) }

func (f Frontend) String() string { return fmt.Sprintf("%s/%s", f.AddrPort(), f.Protocol) }

// Compare orders frontends by address, protocol and port.
func (f Frontend) Compare(g Frontend) int {
	if order := f.Address.Compare(g.Address); order != 0 {
		return order
	}
	return cmp.Or(cmp.Compare(f.Protocol, g.Protocol), cmp.Compare(f.Port, g.Port))
}
