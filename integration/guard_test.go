package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// standIn gives the host beyond the network a pod's addresses as well, and an impostor there: what a packet to the pod reaches
// that leaves the node.
func (w *world) standIn(addresses []netip.Addr) {
	w.t.Helper()
	for _, address := range addresses {
		family, far := "-4", "198.51.100.2"
		if address.Is6() {
			family, far = "-6", "2001:db8:2::2"
		}
		w.run(fmt.Sprintf("ip -n beyond address add %[2]s dev lo nodad; ip %[1]s -n uplink route add %[2]s via %[3]s table 100", family, address, far))
		w.echoAt("beyond", "impostor", netip.AddrPortFrom(address, port).String())
	}
}

// TestGuard takes away an endpoint's route while the agent is dead, and has a process of the node send by the uplink whatever
// the route says: no packet to a magic IP leaves the node, although the address of the endpoint is answered outside.
func TestGuard(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) { testGuard(t, newWorld(t, backend, kind)) })
}

func testGuard(t *testing.T, w *world) {
	elsewhere := w.otherKind()
	// Behind a bridge, iptables cannot have a reset come from the magic IP.
	byICMP := elsewhere == "bridge" && w.backend != "nftables"
	w.addPod(elsewhere, lab.Pod{Name: "client", Namespace: "elsewhere"})
	w.beyond(plain)
	w.start(config())
	target := w.addTarget("echo")
	w.echo("echo")
	ask := func(row, from, tcp, udp string) {
		t.Helper()
		bothFamilies(func(six bool) {
			reset := func() error { return nil }
			if from == "client" && tcp == "refused" && !byICMP {
				arrived := w.sniff(from)
				reset = func() error {
					_, err := arrived.until(w.t, sentAlready, "a reset of the magic IP", func(packet []byte) bool { return isReset(packet, magic(six)) })
					return err
				}
			}
			got := w.fateOfConnect(from, magic(six), byICMP && from == "client")
			err := errors.Join(want(got, tcp), reset(), want(w.fate(from, lab.UDP, magic(six)), udp))
			if err != nil {
				err = fmt.Errorf("%q: %w", from, err)
			}
			w.note(row, six, err)
		})
	}
	ask(goneRoute, "client", "answered by echo, seen as client", "answered by echo, seen as client")
	w.standIn(target.IPs)
	bothFamilies(func(six bool) {
		w.note(boundHost, six, w.boundTo("eth0", magic(six)))
	})
	streams := map[bool]*lab.Probe{}
	for _, six := range []bool{false, true} {
		streams[six] = w.StartProbe(lab.Client{Kind: lab.KeepAlive, From: "client", To: magic(six), Timeout: time.Second}, 5*time.Millisecond)
		defer streams[six].Stop()
		if _, err := streams[six].Await(patience(t), lab.AnsweredBy("echo")); err != nil {
			t.Fatal(err)
		}
	}

	w.agent.Kill()
	if w.kind == "bridge" {
		w.run("ip link set cni1 down")
	} else {
		w.run("ip link delete " + hostInterface(t, w.Node, "echo").Name)
	}
	bothFamilies(func(six bool) { // to the endpoint itself, so that the way out is seen to be there
		if err := w.want("client", netip.AddrPortFrom(family(target.IPs, six), port), "answered by impostor"); err != nil {
			t.Error(err)
		}
	})
	ask(goneRoute, "client", "refused", "refused")
	ask(goneRoute, lab.Host, "silence", "refused") // reject does not work in postrouting; send says EPERM
	for six, stream := range streams {
		outcome, err := stream.Await(patience(t), lab.Unanswered)
		if err == nil && !byICMP && errors.Is(outcome.Err, context.DeadlineExceeded) {
			err = errors.New("a live connection is not reset")
		}
		w.note(goneRoute, six, err)
		for _, outcome := range stream.Outcomes() {
			if outcome.Err == nil && outcome.Server != "echo" {
				w.note(goneRoute, six, fmt.Errorf("a live connection is answered by %s", outcome.Server))
				break
			}
		}
	}
}

// boundTo has a process of the node ask by a link, whatever the route says (SO_BINDTODEVICE); nobody may answer.
func (w *world) boundTo(link string, to netip.AddrPort) error {
	for _, network := range []string{"tcp", "udp"} {
		var answer []byte
		err := w.In(lab.Host, func() error {
			dialer := net.Dialer{Timeout: 300 * time.Millisecond, Control: func(_, _ string, c syscall.RawConn) (err error) {
				return errors.Join(c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), link) }), err)
			}}
			conn, err := dialer.DialContext(w.t.Context(), network, to.String())
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			if _, err := conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
				return err
			}
			if err := conn.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
				return err
			}
			answer = make([]byte, 1000)
			n, err := conn.Read(answer)
			answer = answer[:n]
			return err
		})
		if len(answer) > 0 || err == nil {
			return fmt.Errorf("%s by %s: answered: %q", network, link, answer)
		}
	}
	return nil
}

// TestGuardAndOtherTranslations has another tool translate packets: to a magic IP, which they do not leave the node by, and those of a
// frontend that passes, of an exempt client or of what processes of this node do not use, which are that tool's, although the same
// address is guarded. The node has no local routes: they would keep the former on the node, too.
func TestGuardAndOtherTranslations(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) { testGuardAndOtherTranslations(t, newWorld(t, backend, kind)) })
}

func testGuardAndOtherTranslations(t *testing.T, w *world) {
	const second = "second.magic-ip"
	const passes, anothers, notOurs, unserved = 8081, 8082, 8083, 8084
	w.addClient()
	w.addPod(w.otherKind(), lab.Pod{Name: "other", Namespace: "elsewhere"})
	onBridge := map[string]string{"bridge": "client", "ptp": "other"}[w.kind]
	w.beyond(plain)
	translate := func(six bool, from, to netip.AddrPort) {
		t.Helper()
		for _, chain := range []string{"PREROUTING", "OUTPUT"} {
			for _, protocol := range []string{"tcp", "udp"} {
				w.run(fmt.Sprintf("%s -t nat -A %s -d %s -p %s --dport %d -j DNAT --to-destination %s", w.iptables(six), chain, from.Addr(), protocol, from.Port(), to))
			}
		}
	}
	at := func(n int, six bool, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(magicAt(n, six).Addr(), port)
	}
	service := func(six bool, port uint16) netip.AddrPort {
		if six {
			return netip.AddrPortFrom(netip.MustParseAddr("fd00:10:96::1"), port)
		}
		return netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), port)
	}
	for _, six := range []bool{false, true} {
		remote := netip.AddrPortFrom(netip.MustParseAddr(map[bool]string{false: "198.51.100.2", true: "2001:db8:2::2"}[six]), port)
		w.echoAt("beyond", "remote", remote.String())
		w.echoAt("beyond", "impostor", at(plain, six, unserved).String())
		for _, port := range []uint16{port, unserved} {
			translate(six, service(six, port), at(plain, six, port))
		}
		for _, port := range []uint16{passes, notOurs} {
			translate(six, at(plain, six, port), remote)
		}
		translate(six, at(excluding, six, anothers), remote) // the first agent has nothing that passes there
		translate(six, magicAt(excluding, six), remote)
	}
	ask := func(row, from string, to func(six bool) netip.AddrPort, tcp, udp string) {
		t.Helper()
		bothFamilies(func(six bool) {
			byICMP := w.backend != "nftables" && from == onBridge // see testGuard
			err := errors.Join(want(w.fateOfConnect(from, to(six), byICMP), tcp), want(w.fate(from, lab.UDP, to(six)), udp))
			if err != nil {
				err = fmt.Errorf("%q to %s: %w", from, to(six), err)
			}
			w.note(row, six, err)
		})
	}
	for _, from := range []string{"client", "other", lab.Host} {
		ask(guardedOthers, from, func(six bool) netip.AddrPort { return service(six, port) }, "answered by impostor", "answered by impostor")
	}

	entries := []string{entry(plain, ""), entry(excluding, "excludeTarget: true")}
	for _, six := range []bool{false, true} {
		entries = append(entries,
			entryOf(plain, six, fmt.Sprintf("selector: app=none, noEndpoint: pass, ports: [{port: %d}, {port: %[1]d, protocol: udp}]", passes)),
			entryOf(plain, six, fmt.Sprintf("selector: app=none, hostClients: false, ports: [{port: %d}, {port: %[1]d, protocol: udp}]", notOurs)))
	}
	w.start([]byte("dataPlane: netfilter\n" + string(configOf(agentName, entries...))))
	w.startAs(second, []byte("dataPlane: netfilter\n"+string(configOf(second, entry(excluding, fmt.Sprintf("selector: app=none, noEndpoint: pass, ports: [{port: %d}, {port: %[1]d, protocol: udp}]", anothers))))))
	target := w.addPod(w.kind, target("echo"))
	w.echo("echo")
	w.await("to have an endpoint", func(a *runtimedir.Status) bool { return len(a.MagicIPs[0].Endpoints) > 0 })

	checked := func() {
		t.Helper()
		for _, from := range []string{"client", "other"} {
			for _, port := range []uint16{port, unserved} {
				ask(guardedOthers, from, func(six bool) netip.AddrPort { return service(six, port) }, "refused", "refused")
			}
			ask(passedOthers, from, func(six bool) netip.AddrPort { return at(plain, six, passes) }, "answered by remote", "answered by remote")
			ask(passedOthers, from, func(six bool) netip.AddrPort { return at(excluding, six, anothers) }, "answered by remote", "answered by remote")
			ask(passedOthers, from, func(six bool) netip.AddrPort { return at(plain, six, notOurs) }, "refused", "refused")
			ask(passedOthers, from, magic, "answered by echo", "answered by echo")
		}
		ask(passedOthers, lab.Host, func(six bool) netip.AddrPort { return at(excluding, six, anothers) }, "answered by remote", "answered by remote")
		for _, port := range []uint16{passes, notOurs} {
			ask(passedOthers, lab.Host, func(six bool) netip.AddrPort { return at(plain, six, port) }, "answered by remote", "answered by remote")
		}
		tcp := "refused"
		if w.backend == "nftables" { // postrouting is where it is seen, and reject does not work there
			tcp = "silence"
		}
		ask(guardedOthers, lab.Host, func(six bool) netip.AddrPort { return service(six, port) }, tcp, "refused")
		ask(passedOthers, "echo", func(six bool) netip.AddrPort { return magicAt(excluding, six) }, "answered by remote", "answered by remote")
		ask(passedOthers, "client", func(six bool) netip.AddrPort { return magicAt(excluding, six) }, "answered by echo", "answered by echo")
	}
	checked()
	w.agent.Kill()
	checked()

	// The rest of the address is guarded.
	w.standIn(target.IPs)
	if w.kind == "bridge" {
		w.run("ip link set cni1 down")
	} else {
		w.run("ip link delete " + hostInterface(t, w.Node, "echo").Name)
	}
	from := "client"
	if w.kind == "bridge" {
		from = "other"
	}
	ask(guardedOthers, from, magic, "refused", "refused")
	ask(guardedOthers, from, func(six bool) netip.AddrPort { return magicAt(excluding, six) }, "refused", "refused")
	ask(guardedOthers, lab.Host, magic, "silence", "refused")
	ask(passedOthers, from, func(six bool) netip.AddrPort { return at(plain, six, passes) }, "answered by remote", "answered by remote")
}

// TestGuardByOtherLinks: links that no default route goes by lead out of the node as well, such as a second network interface and a
// tunnel. Their networks have routes that are shorter than the endpoint's own, which is gone.
func TestGuardByOtherLinks(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "ptp")
		w.addPod("ptp", lab.Pod{Name: "client", Namespace: "elsewhere"})
		if err := w.secondNIC(); errors.As(err, new(cannot)) {
			t.Skip(err)
		} else if err != nil {
			t.Fatal(err)
		}
		w.run(`ip link add vx0 type vxlan id 7 dstport 4789 local 203.0.113.1 remote 203.0.113.2; ip link set vx0 up; ip address add 10.99.0.1/24 dev vx0; ip address add 2001:db8:99::1/64 dev vx0 nodad
			ip -n lan link add vx0 type vxlan id 7 dstport 4789 local 203.0.113.2 remote 203.0.113.1; ip -n lan link set vx0 up; ip -n lan address add 10.99.0.2/24 dev vx0; ip -n lan address add 2001:db8:99::2/64 dev vx0 nodad`)
		w.start(config())
		target := w.addTarget("echo")
		w.echo("echo")
		bothFamilies(func(six bool) {
			if err := w.want("client", magic(six), "answered by echo"); err != nil {
				t.Error(err)
			}
		})
		for _, address := range target.IPs {
			w.run(fmt.Sprintf("ip -n lan address add %s dev lo nodad", address))
			w.echoAt("lan", "impostor", netip.AddrPortFrom(address, port).String())
		}
		w.agent.Kill()
		w.run("ip link delete " + hostInterface(t, w.Node, "echo").Name)
		for _, by := range []struct{ link, four, six string }{{"eth1", "203.0.113.2", "2001:db8:3::2"}, {"vx0", "10.99.0.2", "2001:db8:99::2"}} {
			bothFamilies(func(six bool) {
				far := by.four
				if six {
					far = by.six
				}
				to := family(target.IPs, six)
				w.run(fmt.Sprintf("ip route replace %s via %s dev %s", netip.PrefixFrom(to, to.BitLen()-1).Masked(), far, by.link))
				// To the endpoint itself, so that the way out is seen to be there.
				err := errors.Join(
					w.want("client", netip.AddrPortFrom(to, port), "answered by impostor"),
					w.want("client", magic(six), "refused"), w.boundTo(by.link, magic(six)),
					want(w.fate(lab.Host, lab.NewConnection, magic(six)), "silence"), want(w.fate(lab.Host, lab.UDP, magic(six)), "refused"),
				)
				if err != nil {
					t.Errorf("by %s: %v", by.link, err)
				}
			})
		}
	})
}

// isReset reports whether a packet without IP options is a TCP reset from a server.
func isReset(packet []byte, from netip.AddrPort) bool {
	header, protocol, source := 20, 9, 12
	if from.Addr().Is6() {
		header, protocol, source = 40, 6, 8
	}
	return len(packet) >= header+20 && packet[protocol] == unix.IPPROTO_TCP && packet[header+13]&tcpRST != 0 &&
		bytes.HasPrefix(packet[source:], from.Addr().AsSlice()) && binary.BigEndian.Uint16(packet[header:]) == from.Port()
}

// TestReplyToGoneClient has a server answer a client whose link is gone: the reply, which has the magic IP as its source, does not
// follow the default route.
func TestReplyToGoneClient(t *testing.T) {
	const asked = 9000
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.beyond()
		leaver := w.addPod("ptp", lab.Pod{Name: "leaver", Namespace: "elsewhere"})
		w.start(configOf(agentName, entry(plain, fmt.Sprintf("ports: [{port: %d, protocol: udp}]", asked))))
		w.addTarget("echo")
		server, err := w.ListenPacket("echo", "udp", fmt.Sprintf(":%d", asked))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = server.Close() }()
		peers := map[bool]net.Addr{}
		for _, six := range []bool{false, true} {
			client, err := w.Dial("leaver")(t.Context(), "udp", netip.AddrPortFrom(magic(six).Addr(), asked).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = client.Close() }()
			err = lab.Eventually(patience(t), func() (err error) {
				asked, data := fmt.Sprintf("asked, six: %t", six), make([]byte, 100)
				if _, err := client.Write([]byte(asked)); err != nil {
					return err
				}
				if err := server.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
					return err
				}
				n, peer, err := server.ReadFrom(data)
				if err == nil && string(data[:n]) != asked {
					err = fmt.Errorf("received %q, want %q", data[:n], asked)
				}
				peers[six] = peer
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		w.run("ip link delete " + hostInterface(t, w.Node, "leaver").Name)
		w.standIn(leaver.IPs)
		for _, six := range []bool{false, true} {
			outside := w.receive("beyond", six, unix.IPPROTO_UDP)
			if _, err := server.WriteTo([]byte(attack), peers[six]); err != nil {
				t.Fatal(err)
			}
			// A datagram of the same server that no client has asked for goes the same way.
			other, err := w.ListenPacket("echo", "udp", ":0")
			if err != nil {
				t.Fatal(err)
			}
			w.note(lateReply, six, outside.onlyMarker(t, func() {
				if _, err := other.WriteTo([]byte(marker), peers[six]); err != nil {
					t.Fatal(err)
				}
			}))
			_ = other.Close()
		}
	})
}

// TestStrictTCP: where conntrack picks up no connection that it has not seen from its start, the segments of one whose flow was
// deleted are invalid. Its client is reset all the same, and does not hang.
func TestStrictTCP(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		if err := w.Sysctl(lab.Host, "netfilter/nf_conntrack_tcp_loose", "0"); err != nil {
			t.Fatal(err)
		}
		w.addClient()
		w.start(configOf(agentName, entry(plain, fmt.Sprintf("ports: [{port: %d}]", streams))))
		w.addTarget("old")
		w.serveStreams("old")
		type client struct {
			stream *stream
			six    bool
		}
		var clients []client
		for _, six := range []bool{false, true} {
			for _, from := range []string{"client", lab.Host} {
				clients = append(clients, client{w.startStream(from, netip.AddrPortFrom(magic(six).Addr(), streams)), six})
			}
		}
		for _, c := range clients {
			if err := c.stream.flows(t); err != nil {
				t.Fatal(err)
			}
		}
		w.addPod("bridge", target("new")) // so that it is not for want of an endpoint
		w.serveStreams("new")
		w.awaitEndpoint("new")
		for _, c := range clients {
			w.note(strictTCP, c.six, c.stream.flows(t))
		}
		w.delTarget("old")
		for _, c := range clients {
			w.note(strictTCP, c.six, c.stream.isReset(t))
		}
	})
}

// TestHalfClose: a client that has said all, and waits for the answer of a server whose sandbox has ended, is reset: conntrack begins no flow by
// a FIN.
func TestHalfClose(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		w.addClient()
		w.addTarget("old")
		w.listen("old")
		clients := map[*net.TCPConn]bool{}
		for _, six := range []bool{false, true} {
			for _, from := range []string{"client", lab.Host} {
				conn, err := w.Dial(from)(t.Context(), "tcp", magic(six).String())
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = conn.Close() }()
				clients[conn.(*net.TCPConn)] = six
			}
		}
		w.addPod("bridge", target("new")) // so that it is not for want of an endpoint
		w.awaitEndpoint("new")
		w.delTarget("old")
		for conn := range clients { // before one sends a keepalive, which is answered by a reset anyway
			if err := errors.Join(conn.CloseWrite(), conn.SetReadDeadline(time.Now().Add(10*time.Second))); err != nil {
				t.Fatal(err)
			}
		}
		for conn, six := range clients {
			_, err := conn.Read(make([]byte, 1))
			if errors.Is(err, syscall.ECONNRESET) {
				err = nil
			} else {
				err = fmt.Errorf("%s: %w, want a reset", conn.LocalAddr(), err)
			}
			w.note(halfClosed, six, err)
		}
	})
}

// TestNewVeth attaches a pod while the agent is dead. Rules of nftables tell its link by its kind; those of iptables name links.
func TestNewVeth(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		for _, kind := range []string{"ptp", "cali"} {
			t.Run(kind, func(t *testing.T) {
				t.Parallel()
				w := serving(t, backend, kind, config())
				w.addTarget("echo")
				w.echo("echo")
				w.agent.Kill()
				w.addClient()
				expected := "answered by echo, seen as client"
				if backend != "nftables" {
					expected = "silence"
				}
				bothFamilies(func(six bool) { w.note(newVeth, six, w.want("client", magic(six), expected)) })
			})
		}
	})
}

// TestNames gives links names that mean something in rules. Nobody else notices, and the uplink stays one.
func TestNames(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "ptp")
		w.addClient()
		w.run(makeNetNS + `
			n=0
			for name in 'a"b' 'eth+' 'x*' '-j' "q'q" 'b\\'; do
				n=$((n + 1))
				netns odd$n
				ip link add name "$name" type veth peer name eth0 netns odd$n
				ip link set dev "$name" up
				ip -n odd$n link set eth0 up
				ip -n odd$n address add 10.244.9.$n/32 dev eth0
				ip -n odd$n route add 169.254.1.1 dev eth0
				ip -n odd$n route add default via 169.254.1.1
				ip -n odd$n neighbour add 169.254.1.1 dev eth0 lladdr $(cat "/sys/class/net/$name/address")
				ip route add 10.244.9.$n dev "$name"
			done`)
		w.start(config())
		w.addTarget("echo")
		w.echo("echo")
		ask := func(from, expected string) {
			t.Helper()
			w.note(oddNames, false, w.want(from, magic(false), expected))
		}
		bothFamilies(func(six bool) {
			w.note(oddNames, six, errors.Join(w.want("client", magic(six), "answered by echo, seen as client"), w.want(lab.Uplink, magic(six), "silence")))
		})
		for n := range 6 {
			if backend == "nftables" { // told by its kind
				ask(fmt.Sprintf("odd%d", n+1), "answered by echo")
			} else {
				ask(fmt.Sprintf("odd%d", n+1), "silence")
			}
		}
		status, err := w.RunAgent(t.Context(), "status", "--runtime-dir", lab.RuntimeDir)
		if err != nil || !strings.Contains(status, `a\"b`) && !strings.Contains(status, `a"b`) {
			t.Errorf("status does not name the link: %v\n%s", err, status)
		}
	})
}
