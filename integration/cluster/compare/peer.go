package main

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// peer is a way by which clients reach the target of their node.
type peer string

const (
	magicNFTables peer = "magic IP (nftables)"
	magicIPTables peer = "magic IP (iptables)"
	serviceLocal  peer = "Service (internalTrafficPolicy: Local)"
	serviceSame   peer = "Service (PreferSameNode)"
	hostPort      peer = "hostPort (portmap)"
	unixSocket    peer = "Unix socket (hostPath)"
	poller        peer = "5 s poller (imitation)"
	ciliumLRP     peer = "Cilium Local Redirect Policy"
	ciliumService peer = "Cilium Service (Local)"
)

// magic is that of the project's own.
func (p peer) magic() bool { return p == magicNFTables || p == magicIPTables }

// grpcStream is the kind of client that the program stream is.
const grpcStream lab.Kind = "grpc-stream"

func allKinds() []lab.Kind {
	return []lab.Kind{lab.NewConnection, lab.KeepAlive, grpcStream, lab.UDP, lab.SendTo}
}

// Addresses and ports. hostPort has the node's address, and ports of its own there.
const (
	port       = 8080
	control    = 8081
	streamPort = 8082
	ahead      = 10000 // of the ports of the pod are those of the node

	magicAddress    = "169.254.210.210"
	iptablesAddress = "169.254.210.211"
	pollerAddress   = "169.254.210.212"
	redirectAddress = "169.254.210.213"
	localAddress    = "10.96.0.80"
	sameNodeAddress = "10.96.0.81"

	socketDir = "/run/sockets"
)

// address is where clients of a node connect to; a path of a Unix socket.
func (p peer) address(n *whole.Node, kind lab.Kind) string {
	to := uint16(port)
	if kind == grpcStream {
		to = streamPort
	}
	if p == unixSocket {
		return fmt.Sprintf("%s/%d", socketDir, to)
	}
	ip := map[peer]string{
		magicNFTables: magicAddress, magicIPTables: iptablesAddress, poller: pollerAddress, ciliumLRP: redirectAddress,
		serviceLocal: localAddress, ciliumService: localAddress, serviceSame: sameNodeAddress,
	}[p]
	if p == hostPort {
		return netip.AddrPortFrom(n.Address, to+ahead).String()
	}
	return netip.AddrPortFrom(netip.MustParseAddr(ip), to).String()
}

// lacks is why a peer has no such clients, or cannot be updated so; empty where it has and can.
func (p peer) lacks(kind lab.Kind, surge bool) string {
	switch {
	case p == unixSocket && (kind == lab.UDP || kind == lab.SendTo):
		return "a stream socket takes no datagrams"
	case p == hostPort && surge:
		return "one pod a port: Kubernetes refuses maxSurge"
	}
	return ""
}

// kindsOf are those of these kinds of client that a peer has in an update.
func (p peer) kindsOf(kinds []lab.Kind, surge bool) []lab.Kind {
	return slices.DeleteFunc(slices.Clone(kinds), func(kind lab.Kind) bool { return p.lacks(kind, surge) != "" })
}
