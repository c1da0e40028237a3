package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Entry is one connection.
type Entry struct {
	plan.Flow
	// ReplyTo is where replies are sent: Source, unless the connection is masqueraded.
	ReplyTo netip.AddrPort
	// Replied: the kernel has seen a reply (IPS_SEEN_REPLY).
	Replied bool

	message []byte
}

// Lookup returns the connection from source to destination, as the client sent it, in a zone of the original direction; found is false
// where there is none.
func (Table) Lookup(protocol plan.Protocol, source, destination netip.AddrPort, zone uint16) (e Entry, found bool, err error) {
	request := request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_ACK, family(source.Addr()))
	request.AddData(originalTuple(protocol, source, destination, zone))
	messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return Entry{}, false, nil
	case err != nil:
		return Entry{}, false, fmt.Errorf("conntrack lookup: %w", err)
	case len(messages) == 0:
		return Entry{}, false, nil
	}
	e.message = messages[0]
	if e.Flow, err = parseFlow(e.message); err != nil {
		return Entry{}, false, fmt.Errorf("conntrack lookup: %w", err)
	}
	err = attributes(e.message[nl.SizeofNfgenmsg:], func(kind int, value []byte) (err error) {
		switch kind {
		case nl.CTA_TUPLE_REPLY:
			_, e.ReplyTo, _, _, err = parseTuple(value)
		case nl.CTA_STATUS:
			if len(value) >= 4 {
				e.Replied = binary.BigEndian.Uint32(value)&ipsSeenReply != 0
			}
		}
		return err
	})
	return e, err == nil, err
}

// Zones is why the kernel has no zones of connection tracking (CONFIG_NF_CONNTRACK_ZONES); nil where it has. iptables-restore --test does
// not ask it, and rules that need them would not be loaded.
func (t Table) Zones() error {
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), 1)
	_, _, err := t.Lookup(plan.UDP, nobody, nobody, 1)
	return err
}

// Delete deletes a connection that Lookup has returned; one that has ended meanwhile is no error.
func (Table) Delete(e Entry) error {
	request := request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, family(e.Source.Addr()))
	identity, err := entry{e.Flow, e.message}.identity()
	if err != nil {
		return err
	}
	for _, attribute := range identity {
		request.AddData(attribute)
	}
	if _, err := request.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("conntrack delete: %w", err)
	}
	return nil
}

func request(message, flags int, family uint8) *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|message, flags)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return request
}

func originalTuple(protocol plan.Protocol, source, destination netip.AddrPort, zone uint16) *nl.RtAttr {
	from, to := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if source.Addr().Is6() {
		from, to = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	tuple := nl.NewRtAttr(nl.CTA_TUPLE_ORIG|unix.NLA_F_NESTED, nil)
	ip := tuple.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil)
	ip.AddRtAttr(from, source.Addr().AsSlice())
	ip.AddRtAttr(to, destination.Addr().AsSlice())
	transport := tuple.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil)
	transport.AddRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(protocol.Number()))
	transport.AddRtAttr(nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, source.Port()))
	transport.AddRtAttr(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, destination.Port()))
	if zone != 0 {
		tuple.AddRtAttr(ctaTupleZone, binary.BigEndian.AppendUint16(nil, zone))
	}
	return tuple
}
