package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The magic IPs of the scale are 198.18.0.0 and on (a network for benchmarks, RFC 2544), each with a selector
// that no other has, and one that all have.
const (
	firstOfMany = "198.18.0.1"
	allOfThem   = "all"
)

// What the number of magic IPs may cost: a setup 5 %, a change three times as much as with one.
const (
	scalePathLimit   = 1.05
	scaleChangeLimit = 3
)

// measureScale measures nodes with one magic IP and with thousands, side by side.
func measureScale(ctx context.Context, count rounds) (measured []table, err error) {
	for _, backend := range []struct {
		name    string
		sizes   []int
		targets bool
	}{
		{"nftables", []int{1, 100, 1000, 10000}, true},
		{"iptables", []int{1, 100, 1000}, false}, // more are for nftables
	} {
		tables, err := measureBackendScale(ctx, backend.name, backend.sizes, backend.targets, count)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", backend.name, err)
		}
		measured = append(measured, tables...)
	}
	return measured, nil
}

func measureBackendScale(ctx context.Context, backend string, sizes []int, targets bool, count rounds) (measured []table, err error) {
	var nodes []*scaleNode
	defer func() {
		for _, n := range nodes {
			err = errors.Join(err, n.node.Close())
		}
	}()
	changes := table{title: backend + ": one endpoint of many", unit: "ms", base: "one magic IP"}
	rest := table{title: backend + ": all of them", unit: "ms"}
	memory := table{title: backend + ": memory of the agent", unit: "MiB"}
	for _, size := range sizes {
		n, err := newScaleNode(ctx, backend, size)
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
		if err := n.measure(ctx, count.scale); err != nil {
			return nil, fmt.Errorf("%d magic IPs: %w\nthe agent's log:\n%.4000s", size, err, n.agent.Log())
		}
		what := magicIPs(size)
		row := row{what: what, values: n.took, ratios: sample{n.took.p99() / nodes[0].took.p99()}}
		if targets && size == sizes[len(sizes)-1] {
			row.target = target{ratioMedian, scaleChangeLimit}
		}
		changes.rows = append(changes.rows, row)
		rest.rows = append(rest.rows, n.rest...)
		memory.rows = append(memory.rows, n.memory...)
	}
	for i, size := range sizes {
		changes.rows = append(changes.rows, row2(magicIPs(size)+", until the agent is done", nodes[i].done))
	}
	changes.notes = []string{
		"Begins and ends as in the table above of the record and the rule; the ratio is of the p99 of all changes. " +
			"The agent is done when stale flows are deleted and the endpoint is published.",
	}
	if backend != "nftables" {
		changes.notes = []string{"Until the agent is done: iptables tells nobody when a rule is in place."}
	}
	paths, err := measureScalePath(ctx, backend, nodes, targets, count)
	if err != nil {
		return nil, err
	}
	return []table{paths, changes, rest, memory}, nil
}

func row2(what string, values sample) row { return row{what: what, values: values} }

func magicIPs(count int) string { return strconv.Itoa(count) + " magic IPs" }

// scaleNode is a node with so many magic IPs.
type scaleNode struct {
	size     int
	node     *lab.Node
	agent    *lab.Agent
	notified *notifications
	settled  *settled
	backend  string
	magicIP  netip.Addr // the last one
	pods     []runtimedir.Attachment
	own      netip.AddrPort

	took, done   sample
	rest, memory []row
}

func newScaleNode(ctx context.Context, backend string, size int) (n *scaleNode, err error) {
	n = &scaleNode{size: size, backend: backend}
	if n.node, err = newNode(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = n.node.Close()
		}
	}()
	if err := n.node.Sysctl(lab.Host, "bridge/bridge-nf-call-iptables", "1"); err != nil {
		return nil, fmt.Errorf("%w: load the kernel module br_netfilter", err)
	}
	if _, err := n.node.Add(ctx, "bridge", lab.Pod{Name: "client", Namespace: "other"}); err != nil {
		return nil, err
	}
	for i, name := range []string{"server", "other"} {
		attached, err := n.node.Add(ctx, "bridge", lab.Pod{Name: name, Namespace: "other"})
		if err != nil {
			return nil, err
		}
		link, err := hostInterface(attached)
		if err != nil {
			return nil, err
		}
		n.pods = append(n.pods, runtimedir.Attachment{
			ContainerID: attached.ContainerID, IfName: "eth0", Network: "bridge", Namespace: "default", Name: name, UID: uid(1000 + i),
			IPs: attached.IPs, HostInterface: link, Netns: "/run/netns/" + name, AddedAt: time.Now().UTC(),
		})
	}
	n.own = netip.AddrPortFrom(n.pods[0].IPs[0], serverPort)
	return n, errors.Join(
		n.node.Sysctl("client", "ipv4/ip_local_port_range", "1024 65535"),
		n.node.Sysctl(lab.Host, "netfilter/nf_conntrack_tcp_timeout_close", "1"),
	)
}

// config is the agent's, and notes the last address.
func (n *scaleNode) config() []byte {
	var text strings.Builder
	fmt.Fprintf(&text, "name: %s\npollInterval: 1h\nmagicIPs:\n", agentName) // nothing but what is measured
	address := netip.MustParseAddr(firstOfMany)
	for i := range n.size {
		n.magicIP = address
		fmt.Fprintf(&text, "- {ipAddress: %s, namespace: default, selector: \"app in (%s, s%d)\", ports: [{port: %d}]}\n", address, allOfThem, i, serverPort)
		address = address.Next()
	}
	return []byte(text.String())
}

// measure measures all but the path, and leaves the last magic IP leading to the server.
func (n *scaleNode) measure(ctx context.Context, rounds int) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("it takes more than two minutes"))
	defer cancel()
	if err := setRecords(n.node.Path(lab.RuntimeDir), neighbours(otherRecords)); err != nil {
		return err
	}
	if n.notified, err = subscribe(n.node); err != nil {
		return err
	}
	defer n.notified.close()
	started := time.Now()
	if n.agent, err = n.node.StartAgent(n.config(), "--backend", n.backend, "--log-level", "warn"); err != nil {
		return err
	}
	rest := func(what string, values sample) { n.rest = append(n.rest, row2(magicIPs(n.size)+", "+what, values)) }
	err = lab.Eventually(ctx, func() error {
		if agent, err := runtimedir.New(n.node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus(); err != nil || agent.LastSync.IsZero() {
			return errors.Join(errors.New("the agent has not synced"), err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var took sample
	took.add(time.Since(started), time.Millisecond)
	rest("start of the agent until it is done", took)
	if n.settled, err = watchPublished(n.node); err != nil {
		return err
	}
	defer func() { _ = n.settled.watcher.Close() }()
	if err := n.resident(ctx, "after the start"); err != nil {
		return err
	}

	server, other := n.pods[0], n.pods[1]
	only := map[string]string{"app": fmt.Sprintf("s%d", n.size-1)}
	for i := range 2*rounds + 2 {
		if i == 2 { // the first ones are not counted
			n.took, n.done = nil, nil
		}
		pod := []runtimedir.Attachment{other, server}[i%2]
		if err := n.change(ctx, pod, only, &n.took, &n.done); err != nil {
			return err
		}
	}
	var all, allDone sample
	for i := range 4 {
		pod := []runtimedir.Attachment{other, server}[i%2]
		if err := n.change(ctx, pod, map[string]string{"app": allOfThem}, &all, &allDone); err != nil {
			return err
		}
	}
	if n.backend == "nftables" {
		rest("all endpoints at once", all)
	}
	rest("all endpoints at once, until the agent is done", allDone)
	for _, pod := range []runtimedir.Attachment{other, server} {
		if err := n.change(ctx, pod, only, &sample{}, &sample{}); err != nil {
			return err
		}
	}
	if n.backend == "nftables" {
		var flushed sample
		for range 3 {
			begun := time.Now()
			if _, err := n.node.Run(ctx, "nft", "flush", "ruleset"); err != nil {
				return err
			}
			at, err := n.notified.await(ctx, element{added: true, address: n.magicIP}, begun)
			if err != nil {
				return err
			}
			flushed.add(at.Sub(begun), time.Millisecond)
			n.notified.quiet(2 * time.Second) // the agent pauses between two mendings
		}
		rest("`nft flush ruleset` until the rules are back", flushed)
	}
	return n.resident(ctx, "after all of this")
}

// change makes pod the only target.
func (n *scaleNode) change(ctx context.Context, pod runtimedir.Attachment, labels map[string]string, took, done *sample) error {
	pod.Labels = labels
	begun := time.Now()
	if _, err := runtimedir.New(n.node.Path(lab.RuntimeDir)).Update(time.Second, []runtimedir.Key{n.pods[0].Key(), n.pods[1].Key()}, pod); err != nil {
		return err
	}
	if n.backend == "nftables" {
		arrived, err := n.notified.await(ctx, element{added: true, address: pod.IPs[0]}, begun)
		if err != nil {
			return err
		}
		took.add(arrived.Sub(begun), time.Millisecond)
	}
	if err := n.settled.awaitLast(ctx, pod.IPs[0]); err != nil {
		return err
	}
	done.add(time.Since(begun), time.Millisecond)
	if n.backend != "nftables" {
		*took = *done
	}
	return nil
}

// resident notes the agent's memory.
func (n *scaleNode) resident(ctx context.Context, when string) error {
	const command = `for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = magic-ip-agent ] && cat $p/status; done; true`
	status, err := n.node.Run(ctx, "sh", "-c", command)
	if err != nil {
		return err
	}
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		what := map[string]string{"VmHWM": "peak", "VmRSS": "resident"}[key]
		if what == "" {
			continue
		}
		kilobytes, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
		if err != nil {
			return err
		}
		n.memory = append(n.memory, row2(fmt.Sprintf("%s, %s %s", magicIPs(n.size), what, when), sample{kilobytes / 1024}))
	}
	return nil
}

// scaleLane is a way on one of the nodes.
type scaleLane struct {
	what         string
	node         *scaleNode
	server       netip.AddrPort
	base         int // index of the lane that the ratios are to
	took, blocks sample
}

// measureScalePath takes turns between the nodes: connection setup by the last magic IP, and by the server's own
// address, which has nothing to do with any of them.
func measureScalePath(ctx context.Context, backend string, nodes []*scaleNode, targets bool, count rounds) (t table, err error) {
	const size = 20
	processors, err := allowedProcessors()
	if err != nil {
		return t, err
	}
	for _, n := range nodes {
		servers, err := startServers(n.node, "server", processors[0])
		if err != nil {
			return t, err
		}
		defer func() { _ = servers.close() }()
	}
	var lanes []*scaleLane
	for kind, what := range []string{"an unrelated address", "the last magic IP"} {
		for _, n := range nodes {
			server := n.own
			if kind == 1 {
				server = netip.AddrPortFrom(n.magicIP, serverPort)
			}
			lanes = append(lanes, &scaleLane{what: what + ", " + magicIPs(n.size), node: n, server: server, base: kind * len(nodes)})
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range count.scalePath + 1 {
		for _, i := range random.Perm(len(lanes)) {
			if ctx.Err() != nil {
				return t, context.Cause(ctx)
			}
			l := lanes[i]
			if round == 1 {
				l.took, l.blocks = nil, nil
			}
			before := len(l.took)
			err := l.node.node.In("client", func() error {
				return onProcessor(processors[0], func() error { return setupBlock(l.server, size, &l.took) })
			})
			if err != nil {
				return t, fmt.Errorf("%s: %w", l.what, err)
			}
			var block float64
			for _, exchange := range l.took[before:] {
				block += exchange
			}
			l.blocks = append(l.blocks, block)
		}
	}
	t = table{title: backend + ": connection setup", unit: "µs", base: "one magic IP", notes: []string{
		fmt.Sprintf("%d rounds of one block of %d connections for each row, in a new random order; all nodes stand side by side; client and server "+
			"on one processor. A ratio is of two blocks of a round.", count.scalePath, size),
	}}
	for i, l := range lanes {
		r := row{what: l.what, values: l.took}
		if i != l.base {
			r.ratios = l.blocks.ratios(lanes[l.base].blocks)
			if targets {
				r.target = target{ratioMedian, scalePathLimit}
			}
		}
		t.rows = append(t.rows, r)
	}
	return t, nil
}
