package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// sniffer listens at all links of the node for packets to or from a block of ports (packet(7)): what comes in is seen before
// any rule, what goes out after all of them. A nil sniffer hears nothing.
type sniffer struct {
	socket   int
	stopping atomic.Bool
	done     chan struct{}
	heard    []heard
}

type heard struct {
	link int
	Packet
}

// newSniffer begins to listen for the maxTargets ports from base on.
func newSniffer(base uint16) (*sniffer, error) {
	// Packets of this type begin with the IP header. With protocol 0 none is received before bind, when the filter is in place.
	socket, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	s := &sniffer{socket: socket, done: make(chan struct{})}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	err = errors.Join(
		attach(socket, base),
		unix.Bind(socket, &unix.SockaddrLinklayer{Protocol: all}),
		// How often the reader looks whether it shall stop.
		unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000}),
	)
	if err != nil {
		_ = unix.Close(socket)
		return nil, err
	}
	go s.run()
	return s, nil
}

func (s *sniffer) run() {
	defer close(s.done)
	buffer := make([]byte, 2048)
	for {
		size, from, err := unix.Recvfrom(s.socket, buffer, 0)
		switch {
		case errors.Is(err, unix.EAGAIN) && s.stopping.Load():
			return
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if p, isOne := parse(buffer[:size]); ok && isOne {
			p.Out = link.Pkttype == unix.PACKET_OUTGOING
			s.heard = append(s.heard, heard{link.Ifindex, p})
		}
	}
}

// stop ends it when nothing more is queued, and returns what it has heard, in order.
func (s *sniffer) stop() []Packet {
	if s == nil {
		return nil
	}
	s.stopping.Store(true)
	<-s.done
	_ = unix.Close(s.socket)
	var packets []Packet
	for _, h := range s.heard {
		h.Link = fmt.Sprintf("link %d", h.link)
		if link, err := net.InterfaceByIndex(h.link); err == nil {
			h.Link = link.Name
		}
		packets = append(packets, h.Packet)
	}
	return packets
}

// parse reads addresses, ports and the reset flag of a TCP or UDP packet that begins with its IP header.
func parse(data []byte) (p Packet, ok bool) {
	var from, to netip.Addr
	var protocol byte
	switch {
	case len(data) >= 20 && data[0]>>4 == 4:
		from, _ = netip.AddrFromSlice(data[12:16])
		to, _ = netip.AddrFromSlice(data[16:20])
		protocol, data = data[9], data[min(int(data[0]&0xf)*4, len(data)):]
	case len(data) >= 40 && data[0]>>4 == 6:
		from, _ = netip.AddrFromSlice(data[8:24])
		to, _ = netip.AddrFromSlice(data[24:40])
		protocol, data = data[6], data[40:]
	}
	if protocol == unix.IPPROTO_TCP && len(data) >= 14 {
		p.Reset = data[13]&0x04 != 0
	} else if protocol != unix.IPPROTO_UDP || len(data) < 8 {
		return Packet{}, false
	}
	p.From = netip.AddrPortFrom(from, binary.BigEndian.Uint16(data))
	p.To = netip.AddrPortFrom(to, binary.BigEndian.Uint16(data[2:]))
	return p, true
}

// attach has the kernel drop all packets but TCP and UDP of these ports, so that a busy node costs nothing.
func attach(socket int, base uint16) error {
	const block = 0xffff &^ (maxTargets - 1)
	// port compares a port at an offset, and skips the instructions to the end of this half where it is in the block.
	port := func(offset uint32, relative bool, skip uint8) []bpf.Instruction {
		load := bpf.Instruction(bpf.LoadAbsolute{Off: offset, Size: 2})
		if relative { // to the register that holds the length of the IPv4 header
			load = bpf.LoadIndirect{Off: offset, Size: 2}
		}
		return []bpf.Instruction{load, bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: block}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(base), SkipTrue: skip}}
	}
	// half is what to do with a family: the protocol is at an offset, the ports behind the header.
	half := func(protocol uint32, header []bpf.Instruction, ports uint32, relative bool) []bpf.Instruction {
		program := []bpf.Instruction{
			bpf.LoadAbsolute{Off: protocol, Size: 1},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 2},
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_UDP, SkipTrue: 1},
			bpf.RetConstant{Val: 0},
		}
		program = append(program, header...)
		program = append(program, port(ports, relative, 4)...)
		program = append(program, port(ports+2, relative, 1)...)
		return append(program, bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: 0xffff})
	}
	four := half(9, []bpf.Instruction{bpf.LoadMemShift{Off: 0}}, 0, true)
	program := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipTrue: uint8(len(four)) + 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}
	program = append(program, four...)
	program = append(program, half(6, nil, 40, false)...)
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	filters := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filters[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return unix.SetsockoptSockFprog(socket, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filters)), Filter: &filters[0]})
}
