package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
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
	return sum(append(all, data...))
}

// sum is the Internet checksum (RFC 1071).
func sum(data []byte) uint16 {
	total := uint32(0)
	for i, b := range data {
		total += uint32(b) << (8 * (1 - i%2))
	}
	for total>>16 != 0 {
		total = total&0xffff + total>>16
	}
	return ^uint16(total)
}

// packet is an IP packet without options (RFC 791, RFC 8200).
func packet(from, to netip.Addr, protocol byte, data []byte) []byte {
	if to.Is6() {
		p := make([]byte, 40, 40+len(data))
		p[0], p[6], p[7] = 0x60, protocol, 64
		binary.BigEndian.PutUint16(p[4:], uint16(len(data)))
		copy(p[8:], from.AsSlice())
		copy(p[24:], to.AsSlice())
		return append(p, data...)
	}
	return packetWithOptions(from, to, protocol, nil, data)
}

// packetWithOptions is an IPv4 packet whose header ends in options, of a multiple of four bytes.
func packetWithOptions(from, to netip.Addr, protocol byte, options, data []byte) []byte {
	p := make([]byte, 20, 20+len(options)+len(data))
	p[0], p[8], p[9] = 0x45+byte(len(options)/4), 64, protocol
	binary.BigEndian.PutUint16(p[2:], uint16(20+len(options)+len(data)))
	copy(p[12:], from.AsSlice())
	copy(p[16:], to.AsSlice())
	p = append(p, options...)
	binary.BigEndian.PutUint16(p[10:], sum(p))
	return append(p, data...)
}

// inject sends a packet from a network namespace, whatever the addresses of the namespace are.
func (w *world) inject(namespace string, from, to netip.Addr, protocol byte, data []byte) {
	w.t.Helper()
	w.send(namespace, to, packet(from, to, protocol, data))
}

// send sends a packet to where the route to an address leads.
func (w *world) send(namespace string, to netip.Addr, packet []byte) {
	w.t.Helper()
	err := w.In(namespace, func() error {
		family := unix.AF_INET
		var address unix.Sockaddr = &unix.SockaddrInet4{}
		if to.Is6() {
			family, address = unix.AF_INET6, &unix.SockaddrInet6{Addr: to.As16()}
		} else {
			address = &unix.SockaddrInet4{Addr: to.As4()}
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
		return unix.Sendto(socket, packet, 0, address)
	})
	if errors.Is(err, unix.EPERM) {
		err = nil // dropped on its way out
	}
	if err != nil {
		w.t.Fatalf("sending from %s to %s: %v", namespace, to, err)
	}
}

// sendFrame sends a frame by eth0 of a network namespace. kind is its EtherType, after which a VLAN tag may follow.
func (w *world) sendFrame(namespace string, to net.HardwareAddr, kind uint16, data []byte) {
	w.t.Helper()
	err := w.In(namespace, func() error {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		socket, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(socket) }()
		frame := binary.BigEndian.AppendUint16(slices.Concat(to, link.HardwareAddr), kind)
		return unix.Sendto(socket, append(frame, data...), 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6})
	})
	if err != nil {
		w.t.Fatalf("sending a frame from %s to %s: %v", namespace, to, err)
	}
}

// receiver receives packets in a network namespace.
type receiver struct{ *os.File }

// receive receives by a raw socket what the IP layer of a namespace takes for itself, without an IP header in IPv6.
func (w *world) receive(namespace string, six bool, protocol int) receiver {
	w.t.Helper()
	family := unix.AF_INET
	if six {
		family = unix.AF_INET6
	}
	return w.receiver(namespace, func() (int, error) {
		return unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	})
}

// sniff receives all packets that come in by eth0 of a namespace, whoever they are for.
func (w *world) sniff(namespace string) receiver {
	w.t.Helper()
	return w.receiver(namespace, func() (int, error) {
		link, err := net.InterfaceByName("eth0")
		if err != nil {
			return 0, err
		}
		socket, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return 0, err
		}
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return socket, errors.Join(unix.SetsockoptInt(socket, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.Bind(socket, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}))
	})
}

func (w *world) receiver(namespace string, open func() (int, error)) receiver {
	w.t.Helper()
	var file *os.File
	err := w.In(namespace, func() error {
		socket, err := open()
		if err == nil {
			file = os.NewFile(uintptr(socket), "packets in "+namespace)
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = file.Close() })
	return receiver{file}
}

// until sends, each second again, until a packet comes that is wanted, and closes the receiver. No packet is sent once alone: one may be
// lost on its way, to a neighbour that does not answer yet, say.
func (r receiver) until(t *testing.T, send func(), what string, wanted func(packet []byte) bool) ([]byte, error) {
	defer func() { _ = r.Close() }()
	limit, cancel := lab.Patience(t.Context(), 5*time.Second)
	defer cancel()
	buffer := make([]byte, 2000)
	for limit.Err() == nil {
		send()
		if err := r.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			return nil, err
		}
		for {
			n, err := r.Read(buffer)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, err
			}
			if wanted(buffer[:n]) {
				return buffer[:n], nil
			}
		}
	}
	return nil, fmt.Errorf("%s did not arrive", what)
}

// sentAlready is for until where somebody else sends, and sends again.
func sentAlready() {}

// containing waits for a packet that contains one of these texts; see until.
func (r receiver) containing(t *testing.T, send func(), texts ...string) ([]byte, error) {
	return r.until(t, send, fmt.Sprintf("a packet with any of %q", texts), func(packet []byte) bool {
		return slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(string(packet), text) })
	})
}

// onlyMarker says what is wrong unless the marker that mark sends arrives, and no attack before it.
func (r receiver) onlyMarker(t *testing.T, mark func()) error {
	data, err := r.containing(t, mark, attack, marker)
	if err == nil && !strings.Contains(string(data), marker) {
		err = errors.New("the attack arrived")
	}
	return err
}

// TestOutOfWindow has a server send segments that are out of its client's window, and a client those that are out of its server's. A
// client that got one untranslated would reset the server's connection, which it does not know by that name; and a node that got one
// would reset the client's, for the magic IP is an address of the node.
func TestOutOfWindow(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) {
		w := serving(t, backend, kind, config())
		w.addClient()
		target := w.addTarget("echo")
		server := w.listen("echo")
		for _, six := range []bool{false, true} {
			for _, from := range []string{"client", "echo", lab.Host} {
				w.note(outOfWindow, six, w.survives(server, from, netip.AddrPortFrom(family(target.IPs, six), port), magic(six)))
			}
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
	local := client.LocalAddr().(*net.TCPAddr).AddrPort()
	local = netip.AddrPortFrom(local.Addr().Unmap(), local.Port())
	// The client's first segment says what it expects, and what a reset has to bear to be believed.
	const first = "the first segment"
	seen := w.receive("echo", endpoint.Addr().Is6(), unix.IPPROTO_TCP)
	if _, err := client.Write([]byte(first)); err != nil {
		return err
	}
	if _, err := conn.Read(make([]byte, 100)); err != nil {
		return err
	}
	data, err := seen.containing(w.t, sentAlready, first)
	if err != nil {
		return err
	}
	if endpoint.Addr().Is4() {
		data = data[20:]
	}
	sequence, acknowledgement := binary.BigEndian.Uint32(data[8:]), binary.BigEndian.Uint32(data[4:])+uint32(len(first))
	for _, ahead := range []uint32{1 << 20, 1 << 28, 1 << 30} {
		w.inject("echo", endpoint.Addr(), peer.Addr(), unix.IPPROTO_TCP, segment(endpoint, peer, sequence+ahead, acknowledgement, tcpACK|tcpPSH, attack))
		w.inject(from, local.Addr(), to.Addr(), unix.IPPROTO_TCP, segment(local, to, acknowledgement+ahead, sequence, tcpACK|tcpPSH, attack))
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
