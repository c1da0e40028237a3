package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// associate makes an SCTP association from one network namespace to an address that leads to a socket in
// another, and carries a word from there to here. The error is noSCTP where the kernel has no such sockets.
func (w *world) associate(from, to string, address netip.AddrPort) error {
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
	server, err := socket(to)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(server) }()
	client, err := socket(from)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(client) }()
	if err := errors.Join(unix.Bind(server, here), unix.Listen(server, 1)); err != nil {
		return err
	}
	if err := unix.Connect(client, there); err != nil {
		return fmt.Errorf("sctp connect to %s: %w", address, err)
	}
	accepted, _, err := unix.Accept(server)
	if err != nil {
		return fmt.Errorf("sctp accept: %w", err)
	}
	defer func() { _ = unix.Close(accepted) }()
	if _, err := unix.Write(accepted, []byte("word")); err != nil {
		return err
	}
	buffer := make([]byte, 16)
	if n, err := unix.Read(client, buffer); err != nil || string(buffer[:n]) != "word" {
		return fmt.Errorf("sctp read from %s: %q, %w", address, buffer[:max(n, 0)], err)
	}
	return nil
}

// The chunks of RFC 9260, section 3.3, that begin an association.
const (
	sctpChunkInit    = 1
	sctpChunkInitAck = 2
)

// sctpPacket is a packet with one INIT or INIT ACK chunk (RFC 9260, sections 3.1 and 3.3.2), as far as
// conntrack looks at it.
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
		if got := fateOf(err, lab.WorkingTime(start, time.Now())); got != "refused" {
			return fmt.Errorf("sctp to %s: got %q, want refused", address, got)
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
