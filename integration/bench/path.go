package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// plainDNAT is an address with the least that any translation needs, to tell its price from that of our rules.
const plainDNAT = "169.254.210.211"

// plainLimit is of the ratio of the magic IP to the plain rule.
const plainLimit = 1.01

// traffic is one kind of traffic between a client and a server.
type traffic struct {
	what string
	// block does a number of exchanges with the server at this address and notes how long each took.
	block func(server netip.AddrPort, exchanges int, took *sample) error
	size  int     // exchanges of a block
	limit float64 // of the ratio of the magic IP to the own address
}

func trafficKinds() []traffic {
	return []traffic{
		{what: "connection setup", block: setupBlock, size: 20, limit: 1.06},
		{what: "TCP request and response", block: requestBlock, size: 100, limit: 1.03},
		{what: "UDP round trip", block: datagramBlock, size: 100, limit: 1.06},
	}
}

// lane is a way to the server.
type lane struct {
	what   string
	server netip.AddrPort
	took   sample // µs of an exchange
	blocks sample // µs of a block
}

// measurePath compares the way through the magic IP with the way to the pod's own address, between two pods
// on one bridge.
func measurePath(ctx context.Context, count rounds) (measured []table, err error) {
	kinds := trafficKinds()
	node, err := newNode(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	own, err := podsOnABridge(ctx, node)
	if err != nil {
		return nil, err
	}
	processors, err := allowedProcessors()
	if err != nil {
		return nil, err
	}
	client := processors[0]
	for i, server := range processors[:min(2, len(processors))] {
		t := table{title: []string{"pod to pod, one processor", "pod to pod, two processors"}[i], unit: "µs", base: "own address"}
		beside := table{title: t.title + ", beside a plain DNAT rule", unit: "µs", base: "plain DNAT"}
		if t.rows, beside.rows, err = measureFrom(ctx, node, own, client, server, kinds, count.path); err != nil {
			return nil, fmt.Errorf("%s: %w", t.title, err)
		}
		if client == server {
			for _, rows := range [][]row{t.rows, beside.rows} {
				for i := range rows {
					rows[i].target = target{}
				}
			}
		}
		measured = append(measured, t, beside)
	}
	measured[len(measured)-1].notes = []string{
		fmt.Sprintf("%d rounds of one block for each address, in a new random order; a block is %d connections, or %d exchanges on one socket; "+
			"a ratio is of the times of two blocks of a round.", count.path, kinds[0].size, kinds[1].size),
		"Blocking sockets, one thread each for client and server, one byte each way. On one processor there is nothing but the path and two " +
			"context switches: that is for the difference in µs. On two an interrupt wakes each side, as between pods that run side by side: " +
			"the targets are for that.",
		"Connection setup: connect(2) and the server's first byte. Connections end with a reset (SO_LINGER 0), so that no port is left in " +
			"TIME_WAIT; ports from 1024 up, and the node forgets closed flows after 1 s.",
		"plain DNAT: one rule of nft, `ip daddr " + plainDNAT + " dnat to` the server: what any translation costs.",
		"One bridge, bridge-nf-call-iptables=1 as Kubernetes asks for, so that frames to the own address pass netfilter and conntrack too.",
	}
	return measured, nil
}

// measureFrom measures with client and server on these processors.
func measureFrom(ctx context.Context, node *lab.Node, own netip.AddrPort, client, server int, kinds []traffic, rounds int) (rows, beside []row, err error) {
	servers, err := startServers(node, "server", server)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, servers.close()) }()
	err = node.In("client", func() error {
		return onProcessor(client, func() error {
			for _, kind := range kinds {
				measured, besidePlain, err := kind.measure(ctx, own, rounds)
				if err != nil {
					return fmt.Errorf("%s: %w", kind.what, err)
				}
				rows, beside = append(rows, measured...), append(beside, besidePlain)
			}
			return nil
		})
	})
	return rows, beside, err
}

// measure takes turns between the ways. besidePlain is the magic IP beside a plain DNAT rule.
func (t traffic) measure(ctx context.Context, own netip.AddrPort, rounds int) (rows []row, besidePlain row, err error) {
	lanes := []*lane{
		{what: "own address", server: own},
		{what: "plain DNAT", server: netip.AddrPortFrom(netip.MustParseAddr(plainDNAT), own.Port())},
		{what: "magic IP", server: netip.AddrPortFrom(netip.MustParseAddr(magicIP), own.Port())},
	}
	if err := t.takeTurns(ctx, rounds, lanes...); err != nil {
		return nil, row{}, err
	}
	for i, l := range lanes {
		r := row{what: t.what + ", " + l.what, values: l.took}
		if i > 0 {
			r.ratios = l.blocks.ratios(lanes[0].blocks)
		}
		if i == len(lanes)-1 {
			r.target = target{ratioMedian, t.limit}
		}
		rows = append(rows, r)
	}
	plain, ours := lanes[1], lanes[2]
	besidePlain = row{what: t.what + ", magic IP", values: ours.took, ratios: ours.blocks.ratios(plain.blocks), target: target{ratioMedian, plainLimit}}
	return rows, besidePlain, nil
}

// takeTurns does a block for each lane in each round. The first round is not counted: neighbours and caches are cold.
func (t traffic) takeTurns(ctx context.Context, rounds int, lanes ...*lane) error {
	random := rand.New(rand.NewPCG(1, 2))
	for round := range rounds + 1 {
		for _, i := range random.Perm(len(lanes)) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			l := lanes[i]
			if round == 1 {
				l.took, l.blocks = nil, nil
			}
			before := len(l.took)
			if err := t.block(l.server, t.size, &l.took); err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
			var block float64
			for _, exchange := range l.took[before:] {
				block += exchange
			}
			l.blocks = append(l.blocks, block)
		}
	}
	return nil
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
	if _, err := node.Add(ctx, "bridge", lab.Pod{Name: "client", Namespace: "other"}); err != nil {
		return netip.AddrPort{}, err
	}
	attached, err := node.Add(ctx, "bridge", lab.Pod{Name: "server", Labels: map[string]string{"app": "echo"}})
	if err != nil {
		return netip.AddrPort{}, err
	}
	server := attached.IPs[0]
	// Some ten thousand connections a second are to find a free port, and conntrack a free entry.
	if err := errors.Join(
		node.Sysctl("client", "ipv4/ip_local_port_range", "1024 65535"),
		node.Sysctl(lab.Host, "netfilter/nf_conntrack_tcp_timeout_close", "1"),
	); err != nil {
		return netip.AddrPort{}, err
	}
	nft := node.Command(ctx, "nft", "-f", "-")
	nft.Stdin = strings.NewReader(fmt.Sprintf(`table ip plain-dnat {
		chain prerouting {
			type nat hook prerouting priority dstnat
			ip daddr %s dnat to %s
		}
	}`, plainDNAT, server))
	if out, err := nft.CombinedOutput(); err != nil {
		return netip.AddrPort{}, fmt.Errorf("%s: %w: %s", nft, err, out)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the magic IP does not lead to the server"))
	defer cancel()
	return netip.AddrPortFrom(server, serverPort), settled.await(ctx, server)
}

// allowedProcessors are those that this process may use, at least one.
func allowedProcessors() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("sched_getaffinity: %w", err)
	}
	var processors []int
	for i := 0; len(processors) < set.Count(); i++ {
		if set.IsSet(i) {
			processors = append(processors, i)
		}
	}
	return processors, nil
}

// onProcessor runs f, which does not change its thread, on one processor.
func onProcessor(processor int, f func() error) (err error) {
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("sched_getaffinity: %w", err)
	}
	one.Set(processor)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("sched_setaffinity to processor %d: %w", processor, err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &before)) }()
	return f()
}
