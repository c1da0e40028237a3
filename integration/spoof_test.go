package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// What packets made by hand carry. Each attack is followed by a marker that takes the same way and has to arrive, so that nothing
// is concluded from waiting.
const (
	attack = "attack"
	marker = "marker"
)

const (
	tcpRST = 4
	tcpPSH = 8
	tcpACK = 16
	tcpSYN = 2
)

// datagram is a UDP datagram (RFC 768).
func datagram(from, to netip.AddrPort, payload string) []byte {
	d := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(d, from.Port())
	binary.BigEndian.PutUint16(d[2:], to.Port())
	binary.BigEndian.PutUint16(d[4:], uint16(8+len(payload)))
	d = append(d, payload...)
	binary.BigEndian.PutUint16(d[6:], checksum(from.Addr(), to.Addr(), unix.IPPROTO_UDP, d))
	return d
}

// segment is a TCP segment (RFC 9293).
func segment(from, to netip.AddrPort, sequence, acknowledgement uint32, flags byte, payload string) []byte {
	s := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(s, from.Port())
	binary.BigEndian.PutUint16(s[2:], to.Port())
	binary.BigEndian.PutUint32(s[4:], sequence)
	binary.BigEndian.PutUint32(s[8:], acknowledgement)
	s[12], s[13] = 5<<4, flags
	binary.BigEndian.PutUint16(s[14:], 0xffff) // window
	s = append(s, payload...)
	binary.BigEndian.PutUint16(s[16:], checksum(from.Addr(), to.Addr(), unix.IPPROTO_TCP, s))
	return s
}

// checksum is that of a transport protocol, with its pseudo header.
func checksum(from, to netip.Addr, protocol byte, data []byte) uint16 {
	all := append(from.AsSlice(), to.AsSlice()...)
	all = append(all, 0, protocol, byte(len(data)>>8), byte(len(data)))
	all = append(all, data...)
	if len(all)%2 != 0 {
		all = append(all, 0)
	}
	sum := uint32(0)
	for i := 0; i < len(all); i += 2 {
		sum += uint32(all[i])<<8 | uint32(all[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// inject sends a packet from a network namespace, whatever the addresses of the namespace are.
func (w *world) inject(namespace string, from, to netip.Addr, protocol byte, data []byte) {
	w.t.Helper()
	err := w.In(namespace, func() error {
		family, header := unix.AF_INET, make([]byte, 20)
		var address unix.Sockaddr
		if to.Is4() {
			address = &unix.SockaddrInet4{Addr: to.As4()}
			header[0], header[8], header[9] = 0x45, 64, protocol // the kernel fills in length and checksum
			copy(header[12:], from.AsSlice())
			copy(header[16:], to.AsSlice())
		} else {
			family, header = unix.AF_INET6, make([]byte, 40)
			header[0], header[6], header[7] = 0x60, protocol, 64
			binary.BigEndian.PutUint16(header[4:], uint16(len(data)))
			copy(header[8:], from.AsSlice())
			copy(header[24:], to.AsSlice())
			address = &unix.SockaddrInet6{Addr: to.As16()}
		}
		socket, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(socket) }()
		if to.Is6() {
			if err := unix.SetsockoptInt(socket, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, 1); err != nil {
				return err
			}
		}
		return unix.Sendto(socket, append(header, data...), 0, address)
	})
	if errors.Is(err, unix.EPERM) {
		err = nil // dropped on its way out
	}
	if err != nil {
		w.t.Fatalf("sending from %s as %s to %s: %v", namespace, from, to, err)
	}
}

// receiver is a raw socket: what the IP layer of a namespace takes for itself.
type receiver struct{ net.PacketConn }

func (w *world) receive(namespace string, six bool, protocol int) receiver {
	w.t.Helper()
	network, local := fmt.Sprintf("ip4:%d", protocol), "0.0.0.0"
	if six {
		network, local = fmt.Sprintf("ip6:%d", protocol), "::"
	}
	conn, err := w.ListenPacket(namespace, network, local)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	return receiver{conn}
}

// containing waits for a packet that contains one of these texts.
func (r receiver) containing(t *testing.T, texts ...string) (data []byte, err error) {
	limit, cancel := lab.Patience(t.Context(), 5*time.Second)
	defer cancel()
	defer context.AfterFunc(limit, func() { _ = r.SetReadDeadline(time.Unix(1, 0)) })()
	buffer := make([]byte, 2000)
	for {
		n, _, err := r.ReadFrom(buffer)
		if err != nil {
			return nil, fmt.Errorf("no packet with any of %q arrived: %w", texts, err)
		}
		if slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(string(buffer[:n]), text) }) {
			return buffer[:n], nil
		}
	}
}

// onlyMarker says what is wrong unless the marker arrives and no attack before it.
func (r receiver) onlyMarker(t *testing.T) error {
	data, err := r.containing(t, attack, marker)
	if err == nil && !strings.Contains(string(data), marker) {
		err = errors.New("the attack arrived")
	}
	return err
}

// TestSpoofing sends packets with addresses that are not the sender's.
func TestSpoofing(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.beyond(plain, excluding)
		client := w.addClient()
		w.addPod("ptp", lab.Pod{Name: "other", Namespace: "elsewhere"})
		for _, link := range []string{"all", "eth0"} { // else the kernel drops some of it
			if err := w.Sysctl(lab.Host, "ipv4/conf/"+link+"/rp_filter", "0"); err != nil {
				t.Fatal(err)
			}
		}
		w.start(configOf(agentName, entry(plain, ""), entry(excluding, "excludeTarget: true")))
		target := w.addTarget("echo")
		w.echo("echo")
		for _, six := range []bool{false, true} {
			uplink := netip.MustParseAddr(map[bool]string{false: lab.UplinkIPv4, true: lab.UplinkIPv6}[six])
			pod, server := family(client.IPs, six), family(target.IPs, six)
			at := netip.AddrPortFrom

			// A segment that conntrack calls invalid, of each kind, as if it came from the service.
			for _, flags := range []byte{tcpSYN | tcpACK, tcpRST, tcpRST | tcpACK, 0, tcpSYN | tcpRST} {
				arrived := w.receive("client", six, unix.IPPROTO_TCP)
				w.inject(lab.Uplink, magic(six).Addr(), pod, unix.IPPROTO_TCP, segment(magic(six), at(pod, 4000), 1, 1, flags, attack))
				w.inject(lab.Uplink, uplink, pod, unix.IPPROTO_TCP, segment(at(uplink, 4001), at(pod, 4000), 1, 1, tcpSYN|tcpACK, marker))
				w.note(spoofInvalid, six, arrived.onlyMarker(t))
			}

			// The magic IP on both sides, from a pod and from the network.
			arrived := w.receive("echo", six, unix.IPPROTO_UDP)
			for _, from := range []string{"client", lab.Uplink} {
				w.inject(from, magic(six).Addr(), magic(six).Addr(), unix.IPPROTO_UDP, datagram(at(magic(six).Addr(), 4002), magic(six), attack))
			}
			w.inject("client", pod, magic(six).Addr(), unix.IPPROTO_UDP, datagram(at(pod, 4003), magic(six), marker))
			w.note(spoofBoth, six, arrived.onlyMarker(t))

			// The flow that the marker has begun, from another link.
			arrived = w.receive("echo", six, unix.IPPROTO_UDP)
			w.inject(lab.Uplink, pod, magic(six).Addr(), unix.IPPROTO_UDP, datagram(at(pod, 4003), magic(six), attack))
			w.inject("client", pod, magic(six).Addr(), unix.IPPROTO_UDP, datagram(at(pod, 4003), magic(six), marker))
			w.note(spoofFlow, six, arrived.onlyMarker(t))

			// The target's address by another pod's link: what the target may send to the network, others may not.
			outside := magicAt(excluding, six)
			arrived = w.receive("beyond", six, unix.IPPROTO_UDP)
			w.inject("other", server, outside.Addr(), unix.IPPROTO_UDP, datagram(at(server, 4004), outside, attack))
			w.inject("echo", server, outside.Addr(), unix.IPPROTO_UDP, datagram(at(server, 4005), outside, marker))
			w.note(spoofTarget, six, arrived.onlyMarker(t))
		}
	})
}

// TestOutOfWindow has a server send segments that are out of its client's window. A client that got one untranslated would reset
// the server's connection, which it does not know by that name.
func TestOutOfWindow(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		for _, kind := range onEveryKind {
			t.Run(kind, func(t *testing.T) {
				t.Parallel()
				w := serving(t, backend, kind, config())
				w.addClient()
				target := w.addTarget("echo")
				server, err := w.Listen("echo", "tcp", fmt.Sprintf(":%d", port))
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = server.Close() }()
				for _, six := range []bool{false, true} {
					for _, from := range []string{"client", "echo", lab.Host} {
						w.note(outOfWindow, six, w.survives(server, from, netip.AddrPortFrom(family(target.IPs, six), port), magic(six)))
					}
				}
			})
		}
	})
}

// survives says what is wrong unless a connection lives on after segments out of its window.
func (w *world) survives(server net.Listener, from string, endpoint, to netip.AddrPort) error {
	client, err := w.Dial(from)(w.t.Context(), "tcp", to.String())
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	conn, err := server.Accept()
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	peer = netip.AddrPortFrom(peer.Addr().Unmap(), peer.Port())
	// The client's first segment says what it expects, and what a reset has to bear to be believed.
	const first = "the first segment"
	seen := w.receive("echo", endpoint.Addr().Is6(), unix.IPPROTO_TCP)
	if _, err := client.Write([]byte(first)); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 100)); err != nil {
		return err
	}
	data, err := seen.containing(w.t, first)
	if err != nil {
		return err
	}
	sequence, acknowledgement := binary.BigEndian.Uint32(data[8:]), binary.BigEndian.Uint32(data[4:])+uint32(len(first))
	for _, ahead := range []uint32{1 << 20, 1 << 28, 1 << 30} {
		w.inject("echo", endpoint.Addr(), peer.Addr(), unix.IPPROTO_TCP, segment(endpoint, peer, sequence+ahead, acknowledgement, tcpACK|tcpPSH, attack))
	}
	limit, cancel := lab.Patience(w.t.Context(), 5*time.Second)
	defer cancel()
	defer context.AfterFunc(limit, func() { _ = errors.Join(client.SetDeadline(time.Unix(1, 0)), conn.SetDeadline(time.Unix(1, 0))) })()
	for range 3 {
		buffer := make([]byte, 100)
		if _, err := client.Write([]byte("to the server")); err != nil {
			return fmt.Errorf("%q: %w", from, err)
		}
		if _, err := conn.Read(buffer); err != nil {
			return fmt.Errorf("%q, the server: %w", from, err)
		}
		if _, err := conn.Write([]byte("to the client")); err != nil {
			return fmt.Errorf("%q, the server: %w", from, err)
		}
		if n, err := client.Read(buffer); err != nil || string(buffer[:n]) != "to the client" {
			return fmt.Errorf("%q: %q, %w", from, buffer[:n], err)
		}
	}
	return nil
}
