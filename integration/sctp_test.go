package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// association is one between sockets of the kernel: what each side reads and writes.
type association struct{ client, server int }

func (a association) Close() { _ = errors.Join(unix.Close(a.client), unix.Close(a.server)) }

// carries sends a word from one side to the other.
func (association) carries(from, to int) error {
	if _, err := unix.Write(from, []byte("word")); err != nil {
		return err
	}
	buffer := make([]byte, 16)
	if n, err := unix.Read(to, buffer); err != nil || string(buffer[:n]) != "word" {
		return fmt.Errorf("sctp read: %q, %w", buffer[:max(n, 0)], err)
	}
	return nil
}

// associate makes an SCTP association from one network namespace to an address that leads to a socket in
// another, and carries a word from there to here. The error is noSCTP where the kernel has no such sockets.
func (w *world) associate(from, to string, address netip.AddrPort) (association, error) {
	family, here := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: port})
	there := unix.Sockaddr(&unix.SockaddrInet4{Port: int(address.Port())})
	if address.Addr().Is6() {
		family, here = unix.AF_INET6, &unix.SockaddrInet6{Port: port}
		there = &unix.SockaddrInet6{Port: int(address.Port()), Addr: address.Addr().As16()}
	} else {
		there.(*unix.SockaddrInet4).Addr = address.Addr().As4()
	}
	socket := func(namespace string) (fd int, err error) {
		err = w.In(namespace, func() error {
			fd, err = unix.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
			return err
		})
		if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
			return -1, noSCTP
		}
		if err == nil { // both directions: accept, connect and read are bounded
			limit := unix.NsecToTimeval(int64(2 * time.Second))
			err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
		}
		return fd, err
	}
	none := association{client: -1, server: -1}
	listener, err := socket(to)
	if err != nil {
		return none, err
	}
	defer func() { _ = unix.Close(listener) }()
	client, err := socket(from)
	if err != nil {
		return none, err
	}
	a := association{client: client, server: -1}
	if err := errors.Join(unix.Bind(listener, here), unix.Listen(listener, 1)); err != nil {
		return a, err
	}
	if err := unix.Connect(client, there); err != nil {
		return a, fmt.Errorf("sctp connect to %s: %w", address, err)
	}
	if a.server, _, err = unix.Accept(listener); err != nil {
		return a, fmt.Errorf("sctp accept: %w", err)
	}
	return a, a.carries(a.server, a.client)
}

// The chunks of RFC 9260, section 3.3, that begin an association, and what it carries.
const (
	sctpChunkData       = 0
	sctpChunkInit       = 1
	sctpChunkInitAck    = 2
	sctpChunkCookieEcho = 10
	sctpChunkCookieAck  = 11
)

// sctpPacket is a packet with one chunk, such as INIT (RFC 9260, sections 3.1 and 3.3.2), as far as conntrack looks at it.
func sctpPacket(chunk byte, from, to uint16, verification, initiate uint32) []byte {
	p := make([]byte, 12+20)
	binary.BigEndian.PutUint16(p, from)
	binary.BigEndian.PutUint16(p[2:], to)
	binary.BigEndian.PutUint32(p[4:], verification)
	p[12] = chunk
	binary.BigEndian.PutUint16(p[14:], 20)
	binary.BigEndian.PutUint32(p[16:], initiate)
	binary.BigEndian.PutUint32(p[20:], 65536) // receiver window
	binary.BigEndian.PutUint16(p[24:], 1)     // streams out
	binary.BigEndian.PutUint16(p[26:], 1)     // streams in
	binary.BigEndian.PutUint32(p[28:], initiate)
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return p
}

// initiate sends an INIT by a raw socket. Where it is to be served, a raw socket in namespace to must get it
// with the sender's own address, and its INIT ACK must come back; else the INIT must be refused at once.
func (w *world) initiate(from, to string, address netip.AddrPort, served bool) error {
	network, local := "ip4:132", "0.0.0.0"
	if address.Addr().Is6() {
		network, local = "ip6:132", "::"
	}
	const clientPort, clientTag, serverTag = 40000, 0x1234, 0x5678
	server, err := w.ListenPacket(to, network, local)
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()
	dialled, err := w.Dial(from)(w.t.Context(), network, address.Addr().String())
	if err != nil {
		return err
	}
	client := dialled.(*net.IPConn)
	defer func() { _ = client.Close() }()
	start := time.Now()
	limit, cancel := lab.Patience(w.t.Context(), 500*time.Millisecond)
	defer cancel()
	context.AfterFunc(limit, func() { _ = errors.Join(server.SetDeadline(time.Now()), client.SetDeadline(time.Now())) })
	if _, err := client.Write(sctpPacket(sctpChunkInit, clientPort, address.Port(), 0, clientTag)); err != nil {
		return err
	}
	buffer := make([]byte, 1500)
	if !served {
		_, _, err := client.ReadFrom(buffer)
		if err == nil {
			return fmt.Errorf("sctp to %s was answered", address)
		}
		unreachable := syscall.ENOPROTOOPT // the protocol, which ends an association
		if address.Addr().Is6() {
			unreachable = syscall.ECONNREFUSED // the port: there is no other answer by rules
		}
		if took := lab.WorkingTime(start, time.Now()); !errors.Is(err, unreachable) || took > atOnce {
			return fmt.Errorf("sctp to %s: got %w after %v, want %w", address, err, took, unreachable)
		}
		return nil
	}
	size, peer, err := server.ReadFrom(buffer)
	if err != nil {
		return fmt.Errorf("the target got no INIT: %w", err)
	}
	if size < 32 || buffer[12] != sctpChunkInit || binary.BigEndian.Uint16(buffer[2:]) != port {
		return fmt.Errorf("the target got % x", buffer[:size])
	}
	if seen, _ := netip.AddrFromSlice(peer.(*net.IPAddr).IP); w.nameOf(seen.Unmap()) != from {
		return fmt.Errorf("the target has seen %s", seen)
	}
	if _, err := server.WriteTo(sctpPacket(sctpChunkInitAck, port, clientPort, clientTag, serverTag), peer); err != nil {
		return err
	}
	if size, _, err = client.ReadFrom(buffer); err != nil {
		return fmt.Errorf("no INIT ACK came back: %w", err)
	}
	if size < 32 || buffer[12] != sctpChunkInitAck || binary.BigEndian.Uint16(buffer) != address.Port() {
		return fmt.Errorf("the client got % x", buffer[:size])
	}
	return nil
}

// crafted is an SCTP association made by hand, with a raw socket at each end.
type crafted struct {
	client *net.IPConn
	server net.PacketConn
	peer   net.Addr // the client, as the server sees it
	to     uint16
}

const (
	craftedPort, craftedClientTag, craftedServerTag = 40001, 0x1234, 0x5678
)

// craft makes an association from one network namespace to an address that leads to another.
func (w *world) craft(from, to string, address netip.AddrPort) (c *crafted, err error) {
	network, local := "ip4:132", "0.0.0.0"
	if address.Addr().Is6() {
		network, local = "ip6:132", "::"
	}
	c = &crafted{to: address.Port()}
	if c.server, err = w.ListenPacket(to, network, local); err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = c.server.Close() })
	dialled, err := w.Dial(from)(w.t.Context(), network, address.Addr().String())
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = dialled.Close() })
	c.client = dialled.(*net.IPConn)
	for _, step := range []func() error{
		func() error { return c.sends(w.t, sctpChunkInit, 0) },
		func() error { return c.answers(w.t, sctpChunkInitAck) },
		func() error { return c.sends(w.t, sctpChunkCookieEcho, craftedServerTag) },
		func() error { return c.answers(w.t, sctpChunkCookieAck) },
		func() error { return c.sends(w.t, sctpChunkData, craftedServerTag) },
	} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// sends says what is wrong unless a chunk of the client reaches the server.
func (c *crafted) sends(t *testing.T, chunk byte, tag uint32) error {
	if _, err := c.client.Write(sctpPacket(chunk, craftedPort, c.to, tag, craftedClientTag)); err != nil {
		return err
	}
	peer, err := sctpArrives(t, c.server, chunk)
	if err == nil {
		c.peer = peer
	}
	return err
}

// answers says what is wrong unless a chunk of the server reaches the client.
func (c *crafted) answers(t *testing.T, chunk byte) error {
	if _, err := c.server.WriteTo(sctpPacket(chunk, port, craftedPort, craftedClientTag, craftedServerTag), c.peer); err != nil {
		return err
	}
	_, err := sctpArrives(t, c.client, chunk)
	return err
}

// refused says what is wrong unless the node answers the client's data: by an ICMP error, since this kernel has no SCTP.
func (c *crafted) refused() error {
	_, err := c.client.Write(sctpPacket(sctpChunkData, craftedPort, c.to, craftedServerTag, craftedClientTag))
	if err == nil {
		if err := c.client.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			return err
		}
		_, err = c.client.Read(make([]byte, 1500))
	}
	for _, refusal := range []error{unix.ENOPROTOOPT, unix.EPROTO, unix.ECONNREFUSED} {
		if errors.Is(err, refusal) {
			return nil
		}
	}
	return fmt.Errorf("data of an association that is gone: %w", err)
}

// sctpArrives waits for a packet with this chunk.
func sctpArrives(t *testing.T, at net.PacketConn, chunk byte) (peer net.Addr, err error) {
	limit, cancel := lab.Patience(t.Context(), 2*time.Second)
	defer cancel()
	if err := at.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	defer context.AfterFunc(limit, func() { _ = at.SetDeadline(time.Unix(1, 0)) })()
	for buffer := make([]byte, 1500); ; {
		n, peer, err := at.ReadFrom(buffer)
		if err != nil || n > 12 && buffer[12] == chunk {
			if err != nil {
				err = fmt.Errorf("no chunk %d arrived: %w", chunk, err)
			}
			return peer, err
		}
	}
}
