package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// arena is a world in which attackers send packets: two pods, one of them beside the client and the target on their bridge and one on a
// link of its own, and the host on the uplink. The node's reverse path filters, which drop some of it, are off.
type arena struct {
	*world
	six            bool
	client, target netip.Addr
	mate, routed   netip.Addr
	uplink, node   netip.Addr
	port           uint16 // of this attack alone
}

// The attackers, by the network namespaces that they are in.
const (
	mate   = "mate"
	routed = "routed"
	host   = lab.Uplink
)

// newArena returns a function that prepares the next attack.
func newArena(t *testing.T, backend string) func(six bool) *arena {
	w := newWorld(t, backend, "bridge")
	w.beyond(plain, excluding)
	client := w.addClient()
	beside := w.addPod("bridge", lab.Pod{Name: mate, Namespace: "elsewhere"})
	apart := w.addPod("ptp", lab.Pod{Name: routed, Namespace: "elsewhere"})
	w.run("ip link add vx0 type vxlan id 7 dstport 4789 local " + lab.NodeIPv4 + "; ip link set vx0 up; ip address add 10.99.0.1/24 dev vx0")
	for _, link := range []string{"all", "eth0", "vx0"} {
		if err := w.Sysctl(lab.Host, "ipv4/conf/"+link+"/rp_filter", "0"); err != nil {
			t.Fatal(err)
		}
	}
	w.start(configOf(agentName, entry(plain, ""), entry(excluding, "excludeTarget: true")))
	target := w.addTarget("echo")
	w.echo("echo")
	next := uint16(4000)
	return func(six bool) *arena {
		next++
		a := &arena{
			world: w, six: six, port: next, client: family(client.IPs, six), target: family(target.IPs, six), mate: family(beside.IPs, six), routed: family(apart.IPs, six),
			uplink: netip.MustParseAddr(lab.UplinkIPv4), node: netip.MustParseAddr(lab.NodeIPv4),
		}
		if six {
			a.uplink, a.node = netip.MustParseAddr(lab.UplinkIPv6), netip.MustParseAddr(lab.NodeIPv6)
		}
		return a
	}
}

// far is the host beyond the uplink.
func (a *arena) far() netip.Addr {
	if a.six {
		return netip.MustParseAddr("2001:db8:2::2")
	}
	return netip.MustParseAddr("198.51.100.2")
}

func (a *arena) magic() netip.AddrPort { return magic(a.six) }

// address is that of an attacker.
func (a *arena) address(who string) netip.Addr {
	return map[string]netip.Addr{mate: a.mate, routed: a.routed, host: a.uplink}[who]
}

func at(address netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(address, port) }

// datagram sends a UDP datagram with these addresses.
func (a *arena) datagram(who string, from, to netip.AddrPort, payload string) {
	a.t.Helper()
	a.inject(who, from.Addr(), to.Addr(), unix.IPPROTO_UDP, datagram(from, to, payload))
}

// neverArrives attacks, sends a marker, and wants that one alone to arrive in a namespace.
func (a *arena) neverArrives(namespace string, send, mark func()) error {
	arrived := a.sniff(namespace)
	send()
	return arrived.onlyMarker(a.t, mark)
}

// neverReachesTarget attacks, and wants nothing of it to arrive in the target.
func (a *arena) neverReachesTarget(send func()) error {
	return a.neverArrives("echo", send, func() { a.datagram("client", at(a.client, a.port), a.magic(), marker) })
}

// reachesTarget attacks, and wants it to arrive in the target.
func (a *arena) reachesTarget(send func()) error {
	arrived := a.sniff("echo")
	_, err := arrived.containing(a.t, send, attack)
	return err
}

// leaves attacks, and returns the first packet that arrives on the network with a magic IP as its destination, or as its source; nil where
// there is none.
func (a *arena) leaves(send func()) ([]byte, error) {
	arrived := a.sniff(host)
	send()
	mark := func() { a.datagram("client", at(a.client, a.port), at(a.far(), 9), marker) }
	found, err := arrived.until(a.t, mark, "a packet of ours", func(p []byte) bool {
		return a.onMagicIP(p) || strings.Contains(string(p), marker)
	})
	if err != nil || !a.onMagicIP(found) {
		return nil, err
	}
	return found, nil
}

// onMagicIP reports whether a packet's source or destination is a magic IP.
func (a *arena) onMagicIP(packet []byte) bool {
	start, length := 12, 4
	if packet[0]>>4 == 6 {
		start, length = 8, 16
	}
	for range 2 {
		if address, ok := netip.AddrFromSlice(packet[start : start+length]); ok && (address == a.magic().Addr() || address == magicAt(excluding, a.six).Addr()) {
			return true
		}
		start += length
	}
	return false
}

// neverLeaves attacks, and wants no packet from or to a magic IP to arrive on the network.
func (a *arena) neverLeaves(send func()) error {
	left, err := a.leaves(send)
	if left != nil {
		err = fmt.Errorf("a packet left: %x", left)
	}
	return err
}

// flow is a client's socket that has been answered by the target.
func (a *arena) flow(network string) (net.Conn, netip.AddrPort) {
	a.t.Helper()
	conn, err := a.Dial("client")(a.t.Context(), network, a.magic().String())
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = conn.Close() })
	if err := a.asks(conn); err != nil {
		a.t.Fatal(err)
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		a.t.Fatal(err)
	}
	return conn, local
}

// asks says what is wrong unless the target answers by the connection, and nobody before it.
func (a *arena) asks(conn net.Conn) error {
	tries, wait := 1, 10*time.Second
	if conn.LocalAddr().Network() == "udp" { // a datagram may be lost
		tries, wait = 10, time.Second
	}
	answer, n := make([]byte, 2000), 0
	var err error
	for range tries {
		if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: a\r\n\r\n")); err != nil {
			return err
		}
		if n, err = conn.Read(answer); !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	if err == nil && !strings.Contains(string(answer[:n]), "echo ") {
		err = fmt.Errorf("the client received %q", answer[:n])
	}
	return err
}

// icmpError is an ICMP error with a packet inside (RFC 792, RFC 4443); rest is what follows the checksum.
func icmpError(from, to netip.Addr, kind, code byte, rest uint32, inner []byte) (protocol byte, data []byte) {
	data = binary.BigEndian.AppendUint32([]byte{kind, code, 0, 0}, rest)
	data = append(data, inner...)
	if to.Is6() {
		binary.BigEndian.PutUint16(data[2:], checksum(from, to, unix.IPPROTO_ICMPV6, data))
		return unix.IPPROTO_ICMPV6, data
	}
	binary.BigEndian.PutUint16(data[2:], sum(data))
	return unix.IPPROTO_ICMP, data
}

// forge sends ICMP errors about a client's flow: that the port, and that the host is unreachable, that the packet was too big, that its
// time was exceeded, and that there is a better way.
func (a *arena) forge(who string, protocol byte, client netip.AddrPort) {
	a.t.Helper()
	kinds := []struct {
		kind, code byte
		rest       uint32
	}{{3, 3, 0}, {3, 1, 0}, {3, 2, 0}, {3, 4, 68}, {11, 0, 0}, {12, 0, 0}}
	if a.six {
		kinds = []struct {
			kind, code byte
			rest       uint32
		}{{1, 4, 0}, {1, 0, 0}, {2, 0, 1280}, {3, 0, 0}, {4, 1, 6}}
	}
	for _, server := range []netip.AddrPort{a.magic(), at(a.target, port)} {
		inner := segment(client, server, 1<<30, 1, tcpACK, "")
		if protocol == unix.IPPROTO_UDP {
			inner = datagram(client, server, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
		}
		for _, k := range kinds {
			icmp, data := icmpError(a.address(who), client.Addr(), k.kind, k.code, k.rest, packet(client.Addr(), server.Addr(), protocol, inner))
			a.inject(who, a.address(who), client.Addr(), icmp, data)
		}
	}
}

// attackRow is one row of the suite.
type attackRow struct {
	by   string // a row of SECURITY.md's table
	how  string
	must string // what must happen: "cannot: …" or "can: …"

	// One of these tries it: packets in the arena, sent by each of these attackers in both families; a row of the packet matrix, which
	// names it; or a test of its own.
	packets func(a *arena, who string) error
	from    []string
	row     string
	test    func(*testing.T)
}

var (
	everybody = []string{mate, routed, host}
	pods      = []string{mate, routed}
)

// attackRows is the suite. Those that need an API server are in integration/cluster/attack_test.go.
func attackRows() []attackRow {
	return []attackRow{
		{by: "Any pod", how: "ports that are not served", must: "cannot: be answered", row: podOtherPort},
		{by: "Any pod", how: "the rules stay, the agent is dead", must: "cannot: reach the address outside", row: agentDead},
		{by: "Any pod", how: "flow from before the agent", must: "cannot: go on to the address outside", row: beforeAgent},
		{by: "Any pod", how: "the rules are flushed, the agent is dead", must: "cannot: send out of the node", row: rulesFlushed},
		{by: "Any pod", how: "the endpoint's route is gone, the agent is dead", must: "cannot: send out of the node", row: goneRoute},
		{by: "Any pod", how: "answers to a client that is gone", must: "cannot: leave the node", row: lateReply},

		{by: "Pod with NET_RAW", how: "datagram with a magic IP as its source, to a client", must: "cannot: arrive", from: everybody, packets: (*arena).fromMagicIP},
		{by: "Pod with NET_RAW", how: "segments of no connection, from a magic IP", must: "cannot: arrive", from: everybody, packets: (*arena).segmentsFromMagicIP},
		{by: "Pod with NET_RAW", how: "magic IP as source and destination", must: "cannot: reach the target", from: everybody, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() { a.datagram(who, at(a.magic().Addr(), a.port), a.magic(), attack) })
		}},
		{by: "Pod with NET_RAW", how: "segments that no connection begins with, to a magic IP", must: "cannot: leave the node", from: pods, packets: (*arena).oddSegments},
		{by: "Pod with NET_RAW", how: "transports that are not served", must: "cannot: reach the target, leave the node", from: pods, packets: func(a *arena, who string) error {
			send := func() { a.transports(who) }
			return errors.Join(a.neverReachesTarget(send), a.neverLeaves(send))
		}},
		{by: "Pod with NET_RAW", how: "extension headers and IP options", must: "cannot: leave the node", from: pods, packets: func(a *arena, who string) error {
			return a.neverLeaves(func() {
				a.dressed(who, a.address(who), a.magic())
				a.dressed(who, a.address(who), at(a.magic().Addr(), port+1))
			})
		}},
		{by: "Pod with NET_RAW", how: "fragments: ports in the second, overlaps, parts missing", must: "cannot: leave the node", from: pods, packets: func(a *arena, who string) error {
			return a.neverLeaves(func() {
				a.fragments(who, a.address(who), a.magic())
				a.fragments(who, a.address(who), at(a.magic().Addr(), port+1))
			})
		}},
		{by: "Pod with NET_RAW", how: "source routing by way of the node", must: "cannot: reach the target, leave the node", from: everybody, packets: func(a *arena, who string) error {
			send := func() { a.sourceRouted(who) }
			if who == host { // what it gets back is its own packet, in an ICMP error
				return a.neverReachesTarget(send)
			}
			return errors.Join(a.neverReachesTarget(send), a.neverLeaves(send))
		}},
		{by: "Pod with NET_RAW", how: "source routing by way of a node that accepts it", must: "cannot: leave the node", from: pods, packets: (*arena).sourceRoutingAccepted},
		{by: "Pod with NET_RAW", how: "packet to a magic IP in one of a tunnel to the node", must: "cannot: reach the target, leave the node", from: everybody, packets: func(a *arena, who string) error {
			send := func() { a.tunnelled(who, a.magic(), attack) }
			mark := func() { a.tunnelled(who, at(a.target, 9), marker) }
			return errors.Join(a.neverArrives("echo", send, mark), a.neverLeaves(send))
		}},
		{by: "Pod with NET_RAW", how: "frames to everybody, with VLAN tags too", must: "cannot: leave the node", from: pods, packets: func(a *arena, who string) error {
			return a.neverLeaves(func() { a.frames(who, a.address(who)) })
		}},
		{by: "Pod with NET_RAW", how: "sources that no host has", must: "cannot: leave the node", from: pods, packets: func(a *arena, who string) error {
			return a.neverLeaves(func() { a.strangeSources(who) })
		}},
		{by: "Pod with NET_RAW", how: "source outside", must: "cannot: have an answer of a magic IP leave the node", from: pods, packets: (*arena).fromOutside},
		{by: "Pod with NET_RAW", how: "target's address, by another link, with excludeTarget", must: "cannot: leave the node", from: []string{routed}, packets: func(a *arena, who string) error {
			return a.neverLeaves(func() { a.datagram(who, at(a.target, a.port), magicAt(excluding, a.six), attack) })
		}},
		{by: "Pod with NET_RAW", how: "target's address, from its own bridge, with excludeTarget", must: "can: leave the node", from: []string{mate}, packets: func(a *arena, who string) error {
			left, err := a.leaves(func() { a.datagram(who, at(a.target, a.port), magicAt(excluding, a.six), attack) })
			if left == nil && err == nil {
				err = errors.New("it did not leave")
			}
			return err
		}},
		{by: "Pod with NET_RAW", how: "datagram of another pod's flow", must: "can: reach the target", from: pods, packets: func(a *arena, who string) error {
			return a.reachesTarget(func() { a.datagram(who, at(a.client, a.port), a.magic(), attack) })
		}},
		{by: "Pod with NET_RAW", how: "answer with the endpoint's address as its source", must: "can: arrive", from: pods, packets: func(a *arena, who string) error {
			conn, client := a.flow("udp")
			a.datagram(who, at(a.target, port), client, attack)
			if err := a.asks(conn); err == nil || !strings.Contains(err.Error(), attack) {
				return fmt.Errorf("it did not arrive: %w", err)
			}
			return nil
		}},
		{by: "Pod with NET_RAW", how: "ICMP errors about an established connection", must: "cannot: end it", from: everybody, packets: (*arena).icmpAboutTCP},
		{by: "Pod with NET_RAW", how: "ICMP errors about a UDP flow", must: "can: fail a request, cannot: end the flow", from: everybody, packets: (*arena).icmpAboutUDP},
		{by: "Pod with NET_RAW", how: "ICMP redirects that lead to it, to the node", must: "cannot: become the way to the target", from: pods, packets: (*arena).redirect},
		{by: "Pod with NET_RAW", how: "claims the target's address (ARP, neighbour discovery), on another link", must: "cannot: receive its packets", from: []string{routed}, packets: (*arena).claimTarget},
		{by: "Pod with NET_RAW", how: "claims the target's address (ARP, neighbour discovery), on its bridge", must: "can: receive its packets", from: []string{mate}, packets: (*arena).claimTarget},
		{by: "Pod with NET_RAW", how: "router advertisement, to a node that believes them", must: "cannot: have the uplink served, or pods not", from: pods, packets: (*arena).routerAdvertisement},
		{by: "Pod with NET_RAW", how: "server's segments out of the window", must: "cannot: end the connection", row: outOfWindow},

		{by: "Pod with NET_ADMIN", how: "takes a magic IP as its own address, and claims it", must: "cannot: receive its packets", from: pods, packets: (*arena).claimMagicIP},
		{by: "Pod with NET_ADMIN", how: "names of links that mean something in rules", must: "cannot: break them, open another link", row: oddNames},
		{by: "Pod with NET_ADMIN", how: "default route of the node by its link", must: "cannot: silence pods", row: strayDefault},
		{by: "Pod with NET_ADMIN", how: "link that comes while the agent is dead", must: "can: be served (iptables: cannot)", row: newVeth},

		{by: "Pod with NET_ADMIN", how: "its link goes down and up all the time", must: "cannot: keep the agent from its work", test: flappingLink},

		{by: "User of another namespace", how: "Service with the magic IP as its external IP (CVE-2020-8554), before the agent", must: "cannot: become the target", row: leftover},
		{by: "User of another namespace", how: "the same, while the agent runs", must: "cannot: become the target (iptables: for more than a moment)", from: []string{mate}, packets: (*arena).externalIP},

		{by: "Host on the uplink", how: "magic IP by way of the node", must: "cannot: be answered", row: uplinkDropped},
		{by: "Host on the uplink", how: "magic IP without an endpoint", must: "cannot: be answered", row: noneUplink},
		{by: "Host on the uplink", how: "the default route is away", must: "cannot: be answered", row: awayUplink},
		{by: "Host on the uplink", how: "interfaces named by the operator", must: "cannot: be answered", row: interfaceAny},
		{by: "Host on the uplink", how: "datagram of a pod's live flow", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			a.datagram("client", at(a.client, a.port), a.magic(), "before")
			return a.neverReachesTarget(func() { a.datagram(who, at(a.client, a.port), a.magic(), attack) })
		}},
		{by: "Host on the uplink", how: "new flow with a pod's address as its source", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() {
				a.datagram(who, at(a.client, a.port+1000), a.magic(), attack)
				a.inject(who, a.client, a.magic().Addr(), unix.IPPROTO_TCP, segment(at(a.client, a.port+1000), a.magic(), 1, 1, tcpSYN, attack))
			})
		}},
		{by: "Host on the uplink", how: "answer with the endpoint's address as its source", must: "cannot: arrive", from: []string{host}, packets: func(a *arena, who string) error {
			conn, client := a.flow("udp")
			a.datagram(who, at(a.target, port), client, attack)
			return a.asks(conn)
		}},
		{by: "Host on the uplink", how: "extension headers and IP options", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() { a.dressed(who, a.client, a.magic()); a.dressed(who, a.uplink, a.magic()) })
		}},
		{by: "Host on the uplink", how: "fragments", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() { a.fragments(who, a.client, a.magic()); a.fragments(who, a.uplink, a.magic()) })
		}},
		{by: "Host on the uplink", how: "frames to everybody, with VLAN tags too", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() { a.frames(who, a.uplink); a.frames(who, a.client) })
		}},
		{by: "Host on the uplink", how: "sources that no host has", must: "cannot: reach the target", from: []string{host}, packets: func(a *arena, who string) error {
			return a.neverReachesTarget(func() { a.strangeSources(who) })
		}},
		{by: "Host on the uplink", how: "router advertisement that the target is on its link, to a node that believes them", must: "cannot: get a packet of a client", from: []string{host}, packets: (*arena).prefixAdvertisement},
		{by: "Host on a second network, VPN peer, container on a bridge with such a port", how: "magic IP by way of the node", must: "cannot: be answered", row: linksOfOthers},
		{by: "Host on a second network, VPN peer, container on a bridge with such a port", how: "with any default route", must: "cannot: be answered", row: otherNetworks},
		{by: "Host on a second network, VPN peer, container on a bridge with such a port", how: "with no default route", must: "cannot: be answered", row: nicDropped},

		{by: "Unprivileged process of the host", how: "locks everything that it can open", must: "cannot: delay pods, agents, installers", test: unprivilegedLocks},
		{by: "Another release", how: "claims a port that is served", must: "cannot: have it", test: claimedPort},
		{by: "Another release", how: "comes, goes and restarts under load", must: "cannot: cost a request", row: twoAgents},

		{by: "Agent's container taken", how: "16 kinds of obstacles in place of its files: the plugin", must: "cannot: hinder a pod, reach a file", test: hostileAgent},
		{by: "Agent's container taken", how: "the same: other agents, status, doctor", must: "cannot: hinder them, reach a file", test: hostileNeighbour},
		{by: "Agent's container taken", how: "the same: the installer", must: "cannot: hinder it, reach a file", test: hostileFilesOfAnInstaller},
		{by: "Agent's container taken", how: "files that change while they are read", must: "cannot: hinder a pod, reach a file", test: swappedFiles},
		{by: "Agent's container taken", how: "reports pods that are alive as dead, and labels of others", must: "cannot: drop their records", test: hostileReports},
		{by: "Agent's container taken", how: "locks everything that it can open", must: "cannot: delay a pod", test: locksOfTheOtherAgent},
		{by: "Agent's container taken", how: "claims a port with an older date", must: "can: have it", test: olderClaim},
		{by: "Who reaches the metrics port", how: "connections that send nothing, a byte at a time, without end, and read nothing", must: "cannot: stop the agent, use up its files", test: metricsPort},
		{by: "Who writes pods' labels, names or rules' comments", how: "1,000 labels, of which none is asked for", must: "cannot: make the state file large", test: manyLabels},
		{by: "Who writes pods' labels, names or rules' comments", how: "control characters and commands in a rule's comment", must: "cannot: reach the terminal, or the shell, of an operator", test: hostileComment},
	}
}

func (a *arena) fromMagicIP(who string) error {
	return a.neverArrives("client",
		func() { a.datagram(who, a.magic(), at(a.client, a.port), attack) },
		func() { a.datagram(who, at(a.address(who), a.port), at(a.client, a.port), marker) })
}

func (a *arena) segmentsFromMagicIP(who string) error {
	return a.neverArrives("client", func() {
		for _, flags := range []byte{tcpSYN | tcpACK, tcpRST, tcpRST | tcpACK, 0, tcpSYN | tcpRST, tcpACK, 0xff} {
			a.inject(who, a.magic().Addr(), a.client, unix.IPPROTO_TCP, segment(a.magic(), at(a.client, a.port), 1, 1, flags, attack))
		}
	}, func() { a.datagram(who, at(a.address(who), a.port), at(a.client, a.port), marker) })
}

func (a *arena) oddSegments(who string) error {
	return a.neverLeaves(func() {
		for _, flags := range []byte{tcpSYN | tcpACK, tcpRST, tcpRST | tcpACK, 0, tcpSYN | tcpRST, tcpACK, tcpSYN | 1, 0x29, 0xff} {
			for _, to := range []netip.AddrPort{a.magic(), at(a.magic().Addr(), port+1)} {
				a.inject(who, a.address(who), to.Addr(), unix.IPPROTO_TCP, segment(at(a.address(who), a.port), to, 1, 1, flags, attack))
			}
		}
	})
}

func (a *arena) transports(who string) {
	inner := datagram(at(a.address(who), a.port), a.magic(), attack)
	for protocol := range 256 {
		if protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_UDP || a.six && protocol == unix.IPPROTO_ICMPV6 {
			continue
		}
		a.inject(who, a.address(who), a.magic().Addr(), byte(protocol), append(make([]byte, 16), inner...))
	}
}

func (a *arena) strangeSources(who string) {
	sources := []string{"0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", a.node.String(), "10.244.3.255", "10.244.3.1"}
	if a.six {
		sources = []string{"::", "::1", "fe80::1", "ff02::1", "::ffff:10.244.3.2", a.node.String(), "2002:7f00:1::", "fd00:10:244:3::1"}
	}
	for _, source := range sources {
		from := at(netip.MustParseAddr(source), a.port)
		for _, to := range []netip.AddrPort{a.magic(), at(a.magic().Addr(), port+1)} {
			a.datagram(who, from, to, attack)
			a.inject(who, from.Addr(), to.Addr(), unix.IPPROTO_TCP, segment(from, to, 1, 1, tcpSYN, attack))
		}
	}
}

// fromOutside asks in the name of a host outside, in every way that is answered.
func (a *arena) fromOutside(who string) error {
	return a.neverLeaves(func() {
		for _, to := range []netip.AddrPort{a.magic(), at(a.magic().Addr(), port+1)} {
			from := at(a.far(), a.port)
			a.datagram(who, from, to, attack)
			for _, flags := range []byte{tcpSYN, tcpACK} {
				a.inject(who, from.Addr(), to.Addr(), unix.IPPROTO_TCP, segment(from, to, 1, 1, flags, ""))
			}
			a.inject(who, from.Addr(), to.Addr(), 253, []byte(attack))
		}
	})
}

func (a *arena) icmpAboutTCP(who string) error {
	conn, client := a.flow("tcp")
	a.forge(who, unix.IPPROTO_TCP, client)
	return errors.Join(a.asks(conn), a.asks(conn))
}

func (a *arena) icmpAboutUDP(who string) error {
	conn, client := a.flow("udp")
	a.forge(who, unix.IPPROTO_UDP, client)
	err := lab.Eventually(patience(a.t), func() error {
		if errno := syscall.Errno(0); !errors.As(a.asks(conn), &errno) {
			return errors.New("the client has seen no error")
		}
		return nil
	})
	return errors.Join(err, lab.Eventually(patience(a.t), func() error { return a.asks(conn) }))
}

func (a *arena) redirect(who string) error {
	inner := packet(a.node, a.target, unix.IPPROTO_UDP, datagram(at(a.node, 1), at(a.target, 2), attack))
	if a.six {
		icmp, data := icmpError(a.target, a.node, 137, 0, 0, slices.Concat(a.address(who).AsSlice(), a.target.AsSlice()))
		a.inject(who, a.target, a.node, icmp, data)
	} else {
		icmp, data := icmpError(a.target, a.node, 5, 1, binary.BigEndian.Uint32(a.address(who).AsSlice()), inner)
		a.inject(who, a.target, a.node, icmp, data)
	}
	return errors.Join(a.want("client", a.magic(), "answered by echo"), a.want(lab.Host, a.magic(), "answered by echo"))
}

// impersonate gives an attacker an address and a server at it, until the test's attack is over.
func (a *arena) impersonate(who string, address netip.AddrPort) (end func()) {
	a.t.Helper()
	a.run(fmt.Sprintf("ip -n %s address add %s dev lo nodad", who, address.Addr()))
	impostor := a.echoAt(who, "impostor", address.String())
	return func() {
		a.t.Helper()
		_ = impostor.Close()
		a.run(fmt.Sprintf("ip -n %s address delete %s dev lo", who, address.Addr()))
	}
}

// claim tells all neighbours of an attacker that an address is at its link (RFC 826, RFC 4861).
func (a *arena) claim(who string, address netip.Addr) {
	a.t.Helper()
	mac, err := net.ParseMAC(strings.TrimSpace(a.run("ip netns exec " + who + " cat /sys/class/net/eth0/address")))
	if err != nil {
		a.t.Fatal(err)
	}
	if !a.six {
		for _, operation := range []byte{1, 2} {
			arp := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, operation}, mac, address.AsSlice(), make([]byte, 6), address.AsSlice())
			a.sendFrame(who, net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, unix.ETH_P_ARP, arp)
		}
		return
	}
	all := netip.MustParseAddr("ff02::1")
	protocol, data := icmpError(address, all, 136, 0, 0x20000000, slices.Concat(address.AsSlice(), []byte{2, 1}, mac))
	p := packet(address, all, protocol, data)
	p[7] = 255
	a.sendFrame(who, net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, unix.ETH_P_IPV6, p)
}

func (a *arena) claimMagicIP(who string) error {
	defer a.impersonate(who, a.magic())()
	a.claim(who, a.magic().Addr())
	return errors.Join(a.want("client", a.magic(), "answered by echo"), a.want(lab.Host, a.magic(), "answered by echo"))
}

// claimTarget works on a bridge, as for every address there.
func (a *arena) claimTarget(who string) error {
	defer a.impersonate(who, at(a.target, port))()
	if who == routed {
		a.claim(who, a.target)
		return a.want("client", a.magic(), "answered by echo")
	}
	err := lab.Eventually(patience(a.t), func() error {
		a.claim(who, a.target)
		return a.want(lab.Host, a.magic(), "answered by impostor")
	})
	a.run(fmt.Sprintf("ip neighbour replace %s lladdr $(ip netns exec echo cat /sys/class/net/eth0/address) dev cni1 nud reachable", a.target))
	return errors.Join(err, a.want(lab.Host, a.magic(), "answered by echo"))
}

// advertise has the node believe a router advertisement (RFC 4861) that an attacker sends to it alone, by this link of the node, until it has a
// route that ip prints so.
func (a *arena) advertise(who, link string, lifetime uint32, options []byte, route string) (end func(), err error) {
	a.t.Helper()
	accept := func(value string) {
		if err := a.Sysctl(lab.Host, "ipv6/conf/"+link+"/accept_ra", value); err != nil {
			a.t.Fatal(err)
		}
	}
	accept("2") // that of a router
	router, all := netip.MustParseAddr("fe80::bad"), netip.MustParseAddr("ff02::1")
	protocol, data := icmpError(router, all, 134, 0, 64<<24|8<<16|lifetime, append(make([]byte, 8), options...)) // of high preference
	p := packet(router, all, protocol, data)
	p[7] = 255
	node, err := net.ParseMAC(strings.TrimSpace(a.run("cat /sys/class/net/" + link + "/address")))
	if err != nil {
		a.t.Fatal(err)
	}
	a.sendFrame(who, node, unix.ETH_P_IPV6, p)
	end = func() {
		a.t.Helper()
		accept("0")
		a.run("ip -6 route delete " + route)
	}
	return end, lab.Eventually(patience(a.t), func() error {
		if routes := a.run("ip -6 route show"); !strings.Contains(routes, route) {
			return fmt.Errorf("the node has the routes %s", routes)
		}
		return nil
	})
}

// seen waits until the agent has seen the node's routes: it serves a pod that comes later.
func (a *arena) seen() error {
	later := lab.Pod{Name: fmt.Sprint("later", a.port), Namespace: "elsewhere"}
	a.addPod("ptp", later)
	return lab.Eventually(patience(a.t), func() error { return a.want(later.Name, magic(false), "answered by echo") })
}

func (a *arena) routerAdvertisement(who string) error {
	if !a.six {
		return nil // there is no such thing
	}
	link := "cni1"
	if who == routed {
		link = hostInterface(a.t, a.Node, routed).Name
	}
	end, err := a.advertise(who, link, 1800, nil, "default via fe80::bad dev "+link)
	if err != nil {
		return err
	}
	defer end()
	return errors.Join(a.seen(), a.want("client", a.magic(), "answered by echo"), a.want(who, a.magic(), "answered by echo"), a.want(host, a.magic(), "silence"))
}

func (a *arena) prefixAdvertisement(who string) error {
	if !a.six {
		return nil
	}
	prefix := slices.Concat([]byte{3, 4, 128, 0x80, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0}, a.target.AsSlice())
	end, err := a.advertise(who, "eth0", 0, prefix, a.target.String()+" dev eth0")
	if err != nil {
		return err
	}
	getsNothing := func() error {
		return a.neverArrives(host,
			func() { a.datagram("client", at(a.client, a.port), a.magic(), attack) },
			func() { a.datagram("client", at(a.client, a.port), at(a.far(), 9), marker) })
	}
	err = errors.Join(getsNothing(), a.seen(), getsNothing())
	end()
	return errors.Join(err, lab.Eventually(patience(a.t), func() error { return a.want("client", a.magic(), "answered by echo") }))
}

// externalIP puts the rule that kube-proxy would make before all others.
func (a *arena) externalIP(who string) error {
	tool := a.iptables(a.six)
	rule := fmt.Sprintf(" PREROUTING -d %s -p tcp -j DNAT --to-destination %s", a.magic().Addr(), at(a.address(who), port))
	impostor := a.echoAt(who, "impostor", at(a.address(who), port).String())
	defer func() { _ = impostor.Close() }()
	a.run(tool + " -t nat -I" + rule)
	defer a.run(tool + " -t nat -D" + rule)
	err := a.want("client", a.magic(), "answered by echo")
	if a.backend != "nftables" {
		err = lab.Eventually(patience(a.t), func() error { return a.want("client", a.magic(), "answered by echo") })
	}
	return err
}

// dressed sends datagrams behind extension headers, or with IP options.
func (a *arena) dressed(who string, from netip.Addr, to netip.AddrPort) {
	d := datagram(at(from, a.port), to, attack)
	if !a.six {
		for _, options := range [][]byte{{148, 4, 0, 0}, {7, 7, 4, 0, 0, 0, 0, 0}, {68, 8, 5, 0, 0, 0, 0, 0}, {1, 1, 1, 0}, {130, 4, 1, 1}, {0x83, 3, 4, 0}} {
			a.send(who, to.Addr(), packetWithOptions(from, to.Addr(), unix.IPPROTO_UDP, options, d))
		}
		return
	}
	options := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
	routing := func(kind, left byte) []byte {
		return append([]byte{unix.IPPROTO_UDP, 2, kind, left, 0, 0, 0, 0}, a.target.AsSlice()...)
	}
	for protocol, headers := range map[byte][][]byte{
		0:   {options(unix.IPPROTO_UDP), append(options(60), options(unix.IPPROTO_UDP)...)},
		60:  {options(unix.IPPROTO_UDP), append(options(60), options(unix.IPPROTO_UDP)...), append(options(0), options(unix.IPPROTO_UDP)...)},
		43:  {routing(0, 0), routing(0, 1), routing(2, 0), routing(2, 1), routing(4, 0), routing(4, 1)},
		44:  {{unix.IPPROTO_UDP, 0, 0, 0, 0, 0, 0, 1}}, // an atomic fragment
		51:  {append([]byte{unix.IPPROTO_UDP, 1, 0, 0}, make([]byte, 8)...)},
		135: {options(unix.IPPROTO_UDP)}, 139: {options(unix.IPPROTO_UDP)}, 140: {options(unix.IPPROTO_UDP)},
	} {
		for _, header := range headers {
			a.inject(who, from, to.Addr(), protocol, append(header, d...))
		}
	}
}

// sourceRouted sends packets to the node that are to go on to a magic IP.
func (a *arena) sourceRouted(who string) {
	d := datagram(at(a.address(who), a.port), a.magic(), attack)
	if !a.six {
		for _, kind := range []byte{131, 137} { // loose and strict
			a.send(who, a.node, packetWithOptions(a.address(who), a.node, unix.IPPROTO_UDP, append([]byte{1, kind, 7, 4}, a.magic().Addr().AsSlice()...), d))
		}
		return
	}
	for _, kind := range []byte{0, 2, 4} {
		header := append([]byte{unix.IPPROTO_UDP, 2, kind, 1, 0, 0, 0, 0}, a.magic().Addr().AsSlice()...)
		a.inject(who, a.address(who), a.node, 43, append(header, d...))
	}
}

// sourceRoutingAccepted: the kernel puts the next address into the packet behind the forward hook (ip_forward_finish), but for one that is
// the node's own, as a magic IP is by its local route.
func (a *arena) sourceRoutingAccepted(who string) error {
	if a.six {
		return nil
	}
	accept := func(value string) {
		a.run("for accept in /proc/sys/net/ipv4/conf/*/accept_source_route; do echo " + value + " >$accept; done")
	}
	accept("1")
	defer accept("0")
	return a.neverLeaves(func() { a.sourceRouted(who) })
}

// fragments sends datagrams in fragments: one whose ports are in the second, the second alone, and two that overlap.
func (a *arena) fragments(who string, from netip.Addr, to netip.AddrPort) {
	d := datagram(at(from, a.port), to, attack+strings.Repeat(attack, 10))
	type fragment struct {
		offset, end int
		more        bool
	}
	for id, fragments := range [][]fragment{{{0, 8, true}, {8, len(d), false}}, {{8, len(d), false}}, {{0, 16, true}, {8, len(d), false}}, {{0, 0, true}, {0, len(d), false}}} {
		for _, f := range fragments {
			offset := uint16(f.offset)
			if a.six {
				header := make([]byte, 8, 200)
				header[0] = unix.IPPROTO_UDP
				if f.more {
					offset |= 1
				}
				binary.BigEndian.PutUint16(header[2:], offset)
				binary.BigEndian.PutUint32(header[4:], uint32(a.port)<<8+uint32(id))
				a.inject(who, from, to.Addr(), 44, append(header, d[f.offset:f.end]...))
				continue
			}
			p := packet(from, to.Addr(), unix.IPPROTO_UDP, d[f.offset:f.end])
			offset /= 8
			if f.more {
				offset |= 0x2000
			}
			binary.BigEndian.PutUint16(p[4:], a.port<<4+uint16(id))
			binary.BigEndian.PutUint16(p[6:], offset)
			a.send(who, to.Addr(), p)
		}
	}
}

// tunnelled sends a datagram of a client to the node in packets of IPIP or SIT, GRE, and VXLAN, of which it has the link vx0.
func (a *arena) tunnelled(who string, to netip.AddrPort, payload string) {
	a.t.Helper()
	inner := packet(a.client, to.Addr(), unix.IPPROTO_UDP, datagram(at(a.client, a.port), to, payload))
	kind, protocol := []byte{0x08, 0}, byte(unix.IPPROTO_IPIP)
	if a.six {
		kind, protocol = []byte{0x86, 0xdd}, unix.IPPROTO_IPV6
	}
	mac, err := net.ParseMAC(strings.TrimSpace(a.run("cat /sys/class/net/vx0/address")))
	if err != nil {
		a.t.Fatal(err)
	}
	frame := slices.Concat(mac, []byte{2, 0, 0, 0, 0, 1}, kind, inner)
	for _, outer := range [][2]string{{lab.UplinkIPv6, lab.NodeIPv6}, {lab.UplinkIPv4, lab.NodeIPv4}} {
		from, to := netip.MustParseAddr(outer[0]), netip.MustParseAddr(outer[1])
		a.inject(who, from, to, protocol, inner)
		a.inject(who, from, to, unix.IPPROTO_GRE, slices.Concat([]byte{0, 0}, kind, inner))
		a.inject(who, from, to, unix.IPPROTO_UDP, datagram(at(from, 5), at(to, 4789), string(slices.Concat([]byte{8, 0, 0, 0, 0, 0, 7, 0}, frame))))
	}
}

// frames sends packets to a magic IP in frames to everybody, with VLAN tags too.
func (a *arena) frames(who string, from netip.Addr) {
	p := packet(from, a.magic().Addr(), unix.IPPROTO_UDP, datagram(at(from, a.port), a.magic(), attack))
	kind := uint16(unix.ETH_P_IP)
	if a.six {
		kind = unix.ETH_P_IPV6
	}
	tagged := func(id uint16, p []byte) []byte {
		return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, id), kind), p...)
	}
	for _, to := range []string{"ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "33:33:00:00:00:01", "02:00:00:00:00:99"} {
		mac, err := net.ParseMAC(to)
		if err != nil {
			a.t.Fatal(err)
		}
		a.sendFrame(who, mac, kind, p)
		for _, id := range []uint16{0, 7} {
			a.sendFrame(who, mac, unix.ETH_P_8021Q, tagged(id, p))
		}
	}
}

// attackOutcomes is what became of the attacks, by row and backend; "" for those that send no packets.
var attackOutcomes = struct {
	sync.Mutex
	m map[[2]string]error
}{m: map[[2]string]error{}}

func noteAttack(row attackRow, backend string, err error) {
	attackOutcomes.Lock()
	defer attackOutcomes.Unlock()
	key := [2]string{row.by + row.how, backend}
	attackOutcomes.m[key] = errors.Join(attackOutcomes.m[key], err)
}

// TestAttacks tries what SECURITY.md says that cannot be done, and that can.
func TestAttacks(t *testing.T) {
	for _, row := range attackRows() {
		if row.test == nil {
			continue
		}
		t.Run(row.how, func(t *testing.T) {
			t.Cleanup(func() {
				var err error
				if t.Failed() {
					err = errors.New("see above")
				}
				noteAttack(row, "", err)
			})
			row.test(t)
		})
	}
	onEach(t, func(t *testing.T, backend string) {
		next := newArena(t, backend)
		for _, row := range attackRows() {
			for _, who := range row.from {
				for _, six := range []bool{false, true} {
					err := row.packets(next(six), who)
					if err != nil {
						err = fmt.Errorf("%s: %s (from %s, %s, %s): %w; it %s", row.by, row.how, who, backend, familyName(six), err, row.must)
						t.Error(err)
					}
					noteAttack(row, backend, err)
				}
			}
		}
	})
}

// printAttacks writes the suite with its outcomes ("-" where an attack was not tried), and returns the rows that were not tried.
func printAttacks(out io.Writer) (faults []string) {
	attackOutcomes.Lock()
	defer attackOutcomes.Unlock()
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "by\tattack\t\t%s\n", strings.Join(backends(), "\t"))
	for _, row := range attackRows() {
		cells := make([]string, len(backends()))
		for i, backend := range backends() {
			var err error
			tried := true
			switch {
			case row.test != nil && i > 0:
				continue
			case row.test != nil:
				err, tried = attackOutcomes.m[[2]string{row.by + row.how, ""}]
			case row.row != "":
				tried, err = results.of(row.row, backend)
			default:
				err, tried = attackOutcomes.m[[2]string{row.by + row.how, backend}]
			}
			switch {
			case !tried:
				cells[i] = "-"
				faults = append(faults, fmt.Sprintf("not tried: %s: %s (%s)", row.by, row.how, backend))
			case errors.As(err, new(cannot)):
				cells[i] = "cannot"
			case err != nil:
				cells[i] = "FAIL"
			default:
				cells[i] = "ok"
			}
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", row.by, row.how, row.must, strings.Join(cells, "\t"))
	}
	_ = table.Flush()
	return faults
}

// metricsPort holds connections to the port in every way that costs a server something. The agent does its work, does not run out of
// files, and answers who asks.
func metricsPort(t *testing.T) {
	t.Parallel()
	const address = lab.NodeIPv4 + ":9550"
	w := newWorld(t, "nftables", "bridge")
	w.flags = append(w.flags, "--metrics-address", address)
	w.start(config())
	const head = "GET /metrics HTTP/1.1\r\nHost: a\r\n"
	for range 8 { // four times what the agent takes at once; those in the queue wait for two rounds of its timeout
		for _, request := range []string{
			"", head, head + "X: " + strings.Repeat("x", 1<<20), "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n",
			strings.Repeat(head+"\r\n", 100), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", strings.Repeat("\r\n", 1000), "\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
		} {
			conn, err := w.Dial(lab.Uplink)(t.Context(), "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			go func() {
				if _, err := conn.Write([]byte(request)); err != nil {
					return
				}
				for range time.Tick(100 * time.Millisecond) { // and nothing is ever read
					if _, err := conn.Write([]byte("a")); err != nil {
						return
					}
				}
			}()
		}
	}
	w.addTarget("echo") // becomes the endpoint
	w.echo("echo")
	if err := w.want(lab.Host, magic(false), "answered by echo"); err != nil {
		t.Error(err)
	}
	files := strings.TrimSpace(w.run(`for exe in /proc/[0-9]*/exe; do case $(readlink $exe) in */magic-ip-agent) ls ${exe%exe}fd | wc -l;; esac; done`))
	if open, err := strconv.Atoi(files); err != nil || open > 50 {
		t.Errorf("the agent has %s files open", files)
	}
	if err := lab.Eventually(patience(t), func() error { _, err := w.scrape(address); return err }); err != nil {
		t.Errorf("another client is not answered: %v", err)
	}
}

// olderClaim: an agent believes another one's date.
func olderClaim(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "bridge", config())
	kubelet(t, w.Node)
	w.addTarget("echo")
	other := runtimedir.New(w.Path(lab.RuntimeDir)).Agent(otherName)
	lock, err := other.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	frontend := runtimedir.Frontend{Address: magic(false).Addr(), Protocol: runtimedir.TCP, Port: port}
	err = errors.Join(other.WriteClaims([]runtimedir.Claim{{Frontend: frontend, ClaimedAt: time.Unix(1, 0), Served: true}}), other.WriteStatus(runtimedir.Status{}))
	if err != nil {
		t.Fatal(err)
	}
	w.await("to give way", func(a *runtimedir.Status) bool {
		return slices.ContainsFunc(a.MagicIPs, func(m runtimedir.MagicIP) bool {
			return m.Frontend == frontend && strings.Contains(m.Reason, "is claimed by agent "+otherName)
		})
	})
}

// flappingLink: the node's end of a pod's link changes with the pod's, and the kernel reports it each time.
func flappingLink(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "ptp", config())
	w.addClient()
	flapping, err := w.Start("ip", "netns", "exec", "client", "sh", "-c", "while :; do ip link set eth0 down; ip link set eth0 up; done")
	if err != nil {
		t.Fatal(err)
	}
	defer flapping.Kill()
	for i := range 5 {
		name := fmt.Sprint("echo-", i)
		w.addPod("ptp", lab.Pod{Name: "asks-" + name, Namespace: "elsewhere"})
		w.addTarget(name)
		w.echo(name)
		if err := w.want("asks-"+name, magic(false), "answered by "+name); err != nil {
			t.Error(err)
		}
	}
}

// manyLabels: the runtime passes them to the plugin, which keeps those that selectors ask for.
func manyLabels(t *testing.T) {
	t.Parallel()
	node := hostileNode(t)
	labels := maps.Clone(echo)
	for i := range 1000 {
		labels[fmt.Sprintf("l%d", i)] = strings.Repeat("x", 63)
	}
	add(t, node, "bridge", lab.Pod{Name: "a", Labels: labels})
	wantPods(t, node, "a")
	if info, err := os.Stat(node.Path(stateFile)); err != nil || info.Size() > 2000 {
		t.Errorf("the state file: %v, %v", info, err)
	}
	startsAndStopsBeside(t, node, "a")
}

// hostileComment: somebody else's rule takes the magic IP's packets, so doctor names it, and how to remove it.
func hostileComment(t *testing.T) {
	t.Parallel()
	w := serving(t, "iptables-nft", "bridge", config())
	w.addTarget("echo")
	w.echo("echo")
	w.run(`for comment in "$(printf '\033[2J\033]0;bait\007')" '$(touch /run/bait)' '"; touch /run/bait; "' "'; touch /run/bait; '" '` + "`touch /run/bait`" + `'; do
		iptables-nft -t nat -I PREROUTING -d 169.254.210.210 -p tcp -m comment --comment "$comment" -j DNAT --to-destination 192.0.2.1
	done`)
	out, _ := w.doctor()
	if strings.ContainsFunc(out, func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f }) {
		t.Errorf("control characters reach the terminal: %q", out)
	}
	for line := range strings.Lines(out) {
		if _, command, found := strings.Cut(line, "→ iptables"); found {
			if _, err := w.Run(t.Context(), "bash", "-c", "iptables"+strings.TrimSpace(command)); err != nil {
				break // the verdict repeats the first of them
			}
		}
	}
	if left := w.run(`set -e; rules=$(iptables-nft-save -t nat); echo "$rules" | grep 192.0.2.1 || true`); left != "" {
		t.Errorf("the commands that doctor prints leave\n%s\nthey are in\n%s", left, out)
	}
	if _, err := os.Stat(w.Path("/run/bait")); err == nil {
		t.Error("a command that doctor prints runs what a comment says")
	}
}
