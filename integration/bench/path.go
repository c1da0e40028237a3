package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// traffic is one kind of traffic between a client and a server.
type traffic struct {
	what string
	// block does a number of exchanges with the server at this address and notes how long each took.
	block func(server netip.AddrPort, exchanges int, took *sample) error
	size  int // exchanges of a block
	limit float64

	own, magic sample // µs of an exchange, by the address that the client used
	ratios     sample // of the times of a block to the magic IP and one to the own address beside it
}

// measurePath compares the way through the magic IP with the way to the pod's own address, between two pods
// on one bridge.
func measurePath(ctx context.Context, count rounds) (measured table, err error) {
	node, err := newNode(ctx)
	if err != nil {
		return table{}, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	own, err := podsOnABridge(ctx, node)
	if err != nil {
		return table{}, err
	}
	servers, err := startServers(node, "server")
	if err != nil {
		return table{}, err
	}
	defer func() { err = errors.Join(err, servers.close()) }()

	kinds := []*traffic{
		{what: "TCP connection setup", block: setupBlock, size: 20, limit: 1.06},
		{what: "TCP request and response", block: requestBlock, size: 200, limit: 1.03},
		{what: "UDP round trip", block: datagramBlock, size: 200, limit: 1.06},
	}
	err = node.In("client", func() error {
		for _, kind := range kinds {
			if err := kind.takeTurns(ctx, own, count.path); err != nil {
				return fmt.Errorf("%s: %w", kind.what, err)
			}
		}
		return nil
	})
	if err != nil {
		return table{}, err
	}

	measured = table{title: "pod to pod on one bridge", unit: "µs", base: "own address", notes: []string{
		fmt.Sprintf("%d pairs of blocks (%d connections, or %d exchanges on one socket) to the one address and the other, in changing order; "+
			"a ratio is of the times of two blocks of a pair. Blocking sockets, one client thread and one server thread, one byte each way.",
			count.path, kinds[0].size, kinds[1].size),
		"Connection setup is connect(2) and the server's first byte. Connections end with a reset (SO_LINGER 0), so that no port is left in " +
			"TIME_WAIT; the node forgets closed flows after 1 s.",
		"bridge-nf-call-iptables=1 as Kubernetes asks for, so that frames to the own address pass netfilter and conntrack too; no other rules.",
	}}
	for _, kind := range kinds {
		measured.rows = append(measured.rows,
			row{what: kind.what + ", own address", values: kind.own},
			row{what: kind.what + ", magic IP", values: kind.magic, ratios: kind.ratios, target: target{ratioMedian, kind.limit}})
	}
	return measured, nil
}

// podsOnABridge attaches server and client, and waits until the magic IP leads to the server, whose own
// address it returns.
func podsOnABridge(ctx context.Context, node *lab.Node) (netip.AddrPort, error) {
	if err := node.Sysctl(lab.Host, "bridge/bridge-nf-call-iptables", "1"); err != nil {
		return netip.AddrPort{}, fmt.Errorf("%w: load the kernel module br_netfilter", err)
	}
	_, notifications, err := startAgent(ctx, node)
	if err != nil {
		return netip.AddrPort{}, err
	}
	notifications.close()
	settled, err := watchPublished(node)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer func() { _ = settled.watcher.Close() }()
	if _, err := node.Add(ctx, "bridge", lab.Pod{Name: "client"}); err != nil {
		return netip.AddrPort{}, err
	}
	// Some ten thousand connections a second are to find a free port, and conntrack a free entry.
	err = errors.Join(
		node.Sysctl("client", "ipv4/ip_local_port_range", "1024 65535"),
		node.Sysctl(lab.Host, "netfilter/nf_conntrack_tcp_timeout_close", "1"))
	if err != nil {
		return netip.AddrPort{}, err
	}
	server, err := node.Add(ctx, "bridge", lab.Pod{Name: "server", Labels: map[string]string{"app": "echo"}})
	if err != nil {
		return netip.AddrPort{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return netip.AddrPortFrom(server.IPs[0], serverPort), settled.await(ctx, server.IPs[0])
}

// takeTurns runs pairs of blocks. The first pair is not counted: neighbours and caches are cold.
func (t *traffic) takeTurns(ctx context.Context, own netip.AddrPort, pairs int) error {
	magic := netip.AddrPortFrom(netip.MustParseAddr(magicIP), serverPort)
	for pair := range pairs + 1 {
		if pair == 1 {
			t.own, t.magic, t.ratios = nil, nil, nil
		}
		var ownTime, magicTime float64
		for turn := range 2 {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			var err error
			if (pair+turn)%2 == 0 {
				ownTime, err = t.turn(own, &t.own)
			} else {
				magicTime, err = t.turn(magic, &t.magic)
			}
			if err != nil {
				return err
			}
		}
		t.ratios = append(t.ratios, magicTime/ownTime)
	}
	return nil
}

// turn returns the time of a block: the sum of its exchanges.
func (t *traffic) turn(server netip.AddrPort, took *sample) (sum float64, err error) {
	before := len(*took)
	if err := t.block(server, t.size, took); err != nil {
		return 0, fmt.Errorf("%s: %w", server, err)
	}
	for _, exchange := range (*took)[before:] {
		sum += exchange
	}
	return sum, nil
}
