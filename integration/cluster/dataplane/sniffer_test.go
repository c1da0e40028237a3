//go:build dataplane

package dataplane_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// sniffer hears what is on the network that the nodes are connected by (packet(7)).
type sniffer struct {
	socket   int
	stopping atomic.Bool
	done     chan struct{}
	heard    []string // packets to or from the magic IPs
	control  atomic.Bool
}

func listen(t *testing.T) *sniffer {
	t.Helper()
	s := &sniffer{done: make(chan struct{})}
	err := cluster.Network().In(lab.Host, func() (err error) {
		all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
		if s.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all)); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptTimeval(s.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000}),
			unix.SetsockoptInt(s.socket, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	go s.run()
	return s
}

func (s *sniffer) run() {
	defer close(s.done)
	buffer := make([]byte, 256)
	for {
		size, from, err := unix.Recvfrom(s.socket, buffer, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil && s.stopping.Load():
			return
		case err == nil:
			link := 0
			if ll, ok := from.(*unix.SockaddrLinklayer); ok {
				link = ll.Ifindex
			}
			s.see(link, buffer[:size])
		}
	}
}

// see notes a frame that is about a magic IP: ARP, IPv4, and IPv4 in VXLAN.
func (s *sniffer) see(link int, frame []byte) {
	if len(frame) < 34 {
		return
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_ARP:
		if len(frame) >= 42 {
			s.note(link, "ARP", frame[28:32], frame[38:42])
		}
	case unix.ETH_P_IP:
		s.note(link, "IPv4", frame[26:30], frame[30:34])
		const vxlan = 14 + 20 + 8 + 8 // Ethernet, IPv4, UDP, VXLAN
		if frame[23] == unix.IPPROTO_UDP && len(frame) >= vxlan+34 && binary.BigEndian.Uint16(frame[36:]) == 8472 {
			s.see(link, frame[vxlan:])
		}
	}
}

func (s *sniffer) note(link int, kind string, addresses ...[]byte) {
	for _, bytes := range addresses {
		address, _ := netip.AddrFromSlice(bytes)
		switch address {
		case control.Addr():
			s.control.Store(true)
		case magic.Addr(), unserved.Addr():
			s.heard = append(s.heard, fmt.Sprintf("%s with %s by link %d", kind, address, link))
		}
	}
}

// silent ends the sniffer: nothing about a magic IP may have been on the network, although the node's packets are heard.
func (s *sniffer) silent(t *testing.T, when string) bool {
	t.Helper()
	s.end(t, when)
	if len(s.heard) > 0 {
		t.Errorf("%s: %d packets about magic IPs have left the node, the first: %s", when, len(s.heard), s.heard[0])
	}
	return len(s.heard) == 0
}

// end ends the sniffer once it has heard the node.
func (s *sniffer) end(t *testing.T, when string) {
	t.Helper()
	ctx, cancel := lab.Patience(context.WithoutCancel(t.Context()), 10*time.Second)
	defer cancel()
	err := lab.Eventually(ctx, func() error {
		err := node.Lab().In(lab.Host, func() error {
			socket, err := net.Dial("udp", control.String())
			if err != nil {
				return err
			}
			_, err = socket.Write([]byte("heard"))
			return errors.Join(err, socket.Close())
		})
		if err == nil && !s.control.Load() {
			err = errors.New("the sniffer does not hear the node")
		}
		return err
	})
	if err != nil {
		t.Errorf("%s: %v", when, err)
	}
	s.stopping.Store(true)
	<-s.done
	_ = unix.Close(s.socket)
}
