// Package conntrack deletes the entries of the kernel's connection table that a change of rules has made stale, and counts those of
// a frontend (ctnetlink; linux/netfilter/nfnetlink_conntrack.h).
package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Table is the connection table of the calling thread's network namespace.
type Table struct{}

// Attributes that the netlink library does not name (enum ctattr_type, ctattr_filter), and the bits of
// CTA_FILTER_*_FLAGS (CTA_FILTER_FLAG in net/netfilter/nf_conntrack_netlink.c).
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	ctaStatusMask       = 26
	ctaTupleZone        = 3      // CTA_TUPLE_ZONE of enum ctattr_tuple
	ctaProtoinfoSCTP    = 3      // CTA_PROTOINFO_SCTP of enum ctattr_protoinfo
	ipsSeenReply        = 1 << 1 // IPS_SEEN_REPLY
	ipsDstNAT           = 1 << 5 // IPS_DST_NAT

	filterIPSource      = 1 << 0
	filterIPDestination = 1 << 1
	filterProtocol      = 1 << 3
	filterSourcePort    = 1 << 4
	filterPort          = 1 << 5
)

// The state of an SCTP entry (enum ctattr_protoinfo_sctp), and those in which there is no association (enum sctp_conntrack).
const (
	ctaProtoinfoSCTPState = 1
	sctpClosed            = 1
	sctpCookieWait        = 2
	sctpHeartbeatSent     = 8
)

// mostFilteredDumps is where one unfiltered dump gets cheaper than a filtered one per frontend: each
// walks the whole table, and a filter saves nine tenths of a dump's cost by not copying.
const mostFilteredDumps = 16

// Sweep deletes the flows that p makes stale among those that change touches. Call it after the rules
// of p are in place, or a client's next packet makes the same entry anew.
func (Table) Sweep(ctx context.Context, p *plan.Plan, change plan.Change) (deleted int, err error) {
	if change.Empty() {
		return 0, nil
	}
	socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("conntrack: %w", err)
	}
	defer socket.Close()
	s := &sweep{plan: p, change: change, sockets: map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: socket}}}
	err = s.run(ctx)
	return s.deleted, err
}

// run dumps what the change touches.
func (s *sweep) run(ctx context.Context) (err error) {
	change := s.change
	frontends := slices.Concat(change.Frontends, change.Removed, change.Moved)
	var datagrams, connections []plan.Frontend
	for _, f := range frontends {
		switch {
		case f.Protocol != plan.TCP:
			datagrams = append(datagrams, f)
		case !slices.Contains(change.Untranslated, f):
			connections = append(connections, f)
		}
	}
	if len(datagrams)+len(change.Untranslated)+len(change.Gone) > mostFilteredDumps || len(change.Bridges) > 0 || !change.Bypassed.None() {
		families := map[uint8]bool{unix.AF_INET: change.Bypassed.Masquerade4, unix.AF_INET6: change.Bypassed.Masquerade6}
		for _, bridge := range change.Bridges {
			families[unix.AF_INET] = families[unix.AF_INET] || bridge.Unfiltered4
			families[unix.AF_INET6] = families[unix.AF_INET6] || bridge.Unfiltered6
		}
		for _, f := range frontends {
			families[family(f.Address)] = true
		}
		for _, a := range change.Gone {
			families[family(a)] = true
		}
		for f, concerned := range families {
			if !concerned {
				continue
			}
			err = errors.Join(err, s.dump(ctx, f))
		}
		return err
	}
	// What waits the least comes first: each datagram is lost until its flow is gone, and the next segment of an
	// established connection too; a SYN comes again after a second. Of SCTP, the status of a flow does not say whether it is half-open.
	for _, f := range datagrams {
		err = errors.Join(err, s.dump(ctx, family(f.Address), frontendFilter(f)...))
	}
	for _, inet := range []uint8{unix.AF_INET, unix.AF_INET6} {
		gone := slices.DeleteFunc(slices.Clone(change.Gone), func(a netip.Addr) bool { return family(a) != inet })
		switch {
		case len(gone) == 1:
			err = errors.Join(err, s.dump(ctx, inet, serverFilter(gone[0])...))
		case len(gone) > 1:
			err = errors.Join(err, s.dump(ctx, inet, statusFilter(ipsDstNAT, ipsDstNAT)...))
		}
	}
	for _, inet := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if concerned := slices.DeleteFunc(slices.Clone(connections), func(f plan.Frontend) bool { return family(f.Address) != inet }); len(concerned) > 0 {
			err = errors.Join(err, s.dump(ctx, inet, halfOpenFilter(concerned)...))
		}
	}
	for _, f := range change.Untranslated {
		if f.Protocol == plan.TCP {
			err = errors.Join(err, s.dump(ctx, family(f.Address), frontendFilter(f)...))
		}
		err = errors.Join(err, s.dump(ctx, family(f.Address), reversedFilter(f)...))
	}
	return err
}

type sweep struct {
	plan    *plan.Plan
	change  plan.Change
	sockets map[int]*nl.SocketHandle
	seen    int // entries that the kernel sent
	deleted int
}

// dump goes through the entries that the kernel lets through the filter and deletes those that are stale.
// A kernel that does not know CTA_FILTER (before 5.8) sends all: the decision never rests on the filter.
func (s *sweep) dump(ctx context.Context, family uint8, filter ...*nl.RtAttr) error {
	var stale []entry
	err := each(s.sockets, family, filter, func(flow plan.Flow, message []byte) {
		s.seen++
		if s.plan.Stale(flow, s.change) {
			stale = append(stale, entry{flow, message})
		}
	})
	if err != nil {
		return err
	}
	for _, e := range stale {
		if err := ctx.Err(); err != nil {
			return err
		}
		request := request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, family)
		request.Sockets = s.sockets
		identity, err := e.identity()
		if err != nil {
			return err
		}
		for _, attribute := range identity {
			request.AddData(attribute)
		}
		_, err = request.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, unix.ENOENT) {
			continue // ended by itself
		}
		if err != nil {
			return fmt.Errorf("conntrack delete %+v: %w", e.flow, err)
		}
		s.deleted++
	}
	return nil
}

// Count returns how many flows the kernel has translated for each of the frontends: TCP connections that are open, and the flows of
// UDP and SCTP that it remembers. It reads the connection table once for each family.
func (Table) Count(frontends []plan.Frontend) (map[plan.Frontend]int, error) {
	counts, families := map[plan.Frontend]int{}, map[uint8]bool{}
	for _, f := range frontends {
		counts[f], families[family(f.Address)] = 0, true
	}
	for family := range families {
		err := each(nil, family, statusFilter(ipsDstNAT, ipsDstNAT), func(flow plan.Flow, _ []byte) {
			f := plan.Frontend{Address: flow.Destination.Addr(), Protocol: flow.Protocol, Port: flow.Destination.Port()}
			if _, wanted := counts[f]; wanted && flow.Server != flow.Destination && !(flow.Protocol == plan.TCP && flow.HalfOpen) && !flow.Closed {
				counts[f]++
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return counts, nil
}

// each calls f for the entries that the kernel lets through the filter. A kernel that does not know the filter lets all through.
// sockets may be nil.
func each(sockets map[int]*nl.SocketHandle, family uint8, filter []*nl.RtAttr, f func(flow plan.Flow, message []byte)) error {
	request := request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family)
	request.Sockets = sockets
	for _, attribute := range filter {
		request.AddData(attribute)
	}
	var parseErr error
	err := request.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(message []byte) bool {
		flow, err := parseFlow(message)
		if err != nil {
			parseErr = err
		} else {
			f(flow, message)
		}
		return true
	})
	if err = errors.Join(err, parseErr); err != nil {
		return fmt.Errorf("conntrack dump: %w", err)
	}
	return nil
}

func family(address netip.Addr) uint8 {
	if address.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// frontendFilter lets flows through whose client sent to f; for IPv6, to the port of f on any address,
// since kernels compare IPv6 addresses the wrong way round here: they send all flows but those asked for
// (ctnetlink_filter_match_tuple; seen on Linux 6.18).
func frontendFilter(f plan.Frontend) []*nl.RtAttr {
	return tupleAt(f, nl.CTA_IP_V4_DST, nl.CTA_PROTO_DST_PORT, filterIPDestination, filterPort)
}

// halfOpenFilter lets TCP flows through whose client has heard nothing yet (CTA_STATUS_MASK since Linux 5.12): those of the frontend, or, as
// one dump costs less than many, of any where there are several. An established TCP flow goes with its sandbox and not with its frontend,
// unless it was not translated.
func halfOpenFilter(frontends []plan.Frontend) []*nl.RtAttr {
	unanswered := statusFilter(0, ipsSeenReply)
	if len(frontends) == 1 {
		return append(frontendFilter(frontends[0]), unanswered...)
	}
	tuple := nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, nil)
	tuple.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil).AddRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(unix.IPPROTO_TCP))
	return append([]*nl.RtAttr{tuple, tupleFilter(filterProtocol, 0)}, unanswered...)
}

// reversedFilter lets flows through whose first packet came from f; see frontendFilter for IPv6.
func reversedFilter(f plan.Frontend) []*nl.RtAttr {
	return tupleAt(f, nl.CTA_IP_V4_SRC, nl.CTA_PROTO_SRC_PORT, filterIPSource, filterSourcePort)
}

// tupleAt compares one end of the original direction with f.
func tupleAt(f plan.Frontend, address, port int, addressFlag, portFlag uint32) []*nl.RtAttr {
	tuple := nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, nil)
	ip := tuple.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil)
	flags := filterProtocol | portFlag
	if f.Address.Is4() {
		ip.AddRtAttr(address, f.Address.AsSlice())
		flags |= addressFlag
	}
	transport := tuple.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil)
	transport.AddRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(f.Protocol.Number()))
	transport.AddRtAttr(port, binary.BigEndian.AppendUint16(nil, f.Port))
	return []*nl.RtAttr{tuple, tupleFilter(flags, 0)}
}

// serverFilter lets flows through that are answered from address; for IPv6, see above, all that are
// translated (CTA_STATUS_MASK since Linux 5.12).
func serverFilter(address netip.Addr) []*nl.RtAttr {
	if address.Is6() {
		return statusFilter(ipsDstNAT, ipsDstNAT)
	}
	tuple := nl.NewRtAttr(nl.CTA_TUPLE_REPLY|unix.NLA_F_NESTED, nil)
	ip := tuple.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil)
	ip.AddRtAttr(nl.CTA_IP_V4_SRC, address.AsSlice())
	return []*nl.RtAttr{tuple, tupleFilter(0, filterIPSource)}
}

// statusFilter lets flows through whose bits of the mask have this value.
func statusFilter(value, mask uint32) []*nl.RtAttr {
	return []*nl.RtAttr{
		nl.NewRtAttr(nl.CTA_STATUS, binary.BigEndian.AppendUint32(nil, value)),
		nl.NewRtAttr(ctaStatusMask, binary.BigEndian.AppendUint32(nil, mask)),
	}
}

// tupleFilter says which parts of the tuples that go with it count.
func tupleFilter(original, reply uint32) *nl.RtAttr {
	filter := nl.NewRtAttr(ctaFilter|unix.NLA_F_NESTED, nil)
	filter.AddRtAttr(ctaFilterOrigFlags, nl.Uint32Attr(original))
	filter.AddRtAttr(ctaFilterReplyFlags, nl.Uint32Attr(reply))
	return filter
}

// entry is a conntrack entry, and its netlink message.
type entry struct {
	flow    plan.Flow
	message []byte
}

// identity is by what the kernel finds the entry again: the tuple, the zone and the ID, so that a new entry with the
// same tuple is not taken for it.
func (e entry) identity() (identity []*nl.RtAttr, err error) {
	err = attributes(e.message[nl.SizeofNfgenmsg:], func(kind int, value []byte) error {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			identity = append(identity, nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, value))
		case nl.CTA_ID, nl.CTA_ZONE:
			identity = append(identity, nl.NewRtAttr(kind, value))
		}
		return nil
	})
	return identity, err
}

// parseFlow reads a message. There may be hundreds of thousands, so it allocates nothing.
func parseFlow(message []byte) (flow plan.Flow, err error) {
	if len(message) < nl.SizeofNfgenmsg {
		return flow, errors.New("short message")
	}
	err = attributes(message[nl.SizeofNfgenmsg:], func(kind int, value []byte) (err error) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			flow.Source, flow.Destination, flow.Protocol, flow.Zone, err = parseTuple(value)
		case nl.CTA_TUPLE_REPLY:
			var to netip.AddrPort
			flow.Server, to, _, _, err = parseTuple(value)
			flow.ReplyTo = to.Addr()
		case nl.CTA_ZONE:
			flow.OtherZone = true
		case nl.CTA_PROTOINFO:
			flow.HalfOpen, flow.Closed, err = parseState(value)
		}
		return err
	})
	return flow, err
}

func parseTuple(tuple []byte) (source, destination netip.AddrPort, protocol plan.Protocol, zone uint16, err error) {
	var addresses [2]netip.Addr
	var ports [2]uint16
	err = attributes(tuple, func(kind int, part []byte) error {
		if kind == ctaTupleZone { // the zone of this direction alone
			if len(part) >= 2 {
				zone = binary.BigEndian.Uint16(part)
			}
			return nil
		}
		return attributes(part, func(inner int, value []byte) error {
			switch {
			case kind == nl.CTA_TUPLE_IP:
				address, ok := netip.AddrFromSlice(value)
				if !ok {
					return fmt.Errorf("address of %d bytes", len(value))
				}
				switch inner {
				case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
					addresses[0] = address
				case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
					addresses[1] = address
				}
			case kind != nl.CTA_TUPLE_PROTO:
			case inner == nl.CTA_PROTO_NUM && len(value) >= 1:
				protocol = plan.ProtocolOf(value[0])
			case inner == nl.CTA_PROTO_SRC_PORT && len(value) >= 2:
				ports[0] = binary.BigEndian.Uint16(value)
			case inner == nl.CTA_PROTO_DST_PORT && len(value) >= 2:
				ports[1] = binary.BigEndian.Uint16(value)
			}
			return nil
		})
	})
	return netip.AddrPortFrom(addresses[0], ports[0]), netip.AddrPortFrom(addresses[1], ports[1]), protocol, zone, err
}

// parseState reads the state of a TCP or SCTP entry.
func parseState(info []byte) (halfOpen, closed bool, err error) {
	err = attributes(info, func(protocol int, part []byte) error {
		return attributes(part, func(kind int, value []byte) error {
			switch {
			case len(value) < 1:
			case protocol == nl.CTA_PROTOINFO_TCP && kind == nl.CTA_PROTOINFO_TCP_STATE:
				halfOpen, closed = value[0] == nl.TCP_CONNTRACK_SYN_SENT, value[0] == nl.TCP_CONNTRACK_TIME_WAIT
			case protocol == ctaProtoinfoSCTP && kind == ctaProtoinfoSCTPState:
				halfOpen = slices.Contains([]byte{sctpClosed, sctpCookieWait, sctpHeartbeatSent}, value[0])
			}
			return nil
		})
	})
	return halfOpen, closed, err
}

// attributes calls f for each netlink attribute in data, without the flags of its type.
func attributes(data []byte, f func(kind int, value []byte) error) error {
	for len(data) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(data))
		if length < unix.SizeofNlAttr || length > len(data) {
			return fmt.Errorf("attribute of %d bytes in %d", length, len(data))
		}
		kind := int(binary.NativeEndian.Uint16(data[2:]) & nl.NLA_TYPE_MASK)
		if err := f(kind, data[unix.SizeofNlAttr:length]); err != nil {
			return err
		}
		data = data[min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(data)):]
	}
	return nil
}
