package netfilter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// setChange is what has to be done to a set.
type setChange struct {
	old, wanted set
	gone, added []string // keys
}

// changes are those from before to rs, which has the same structure.
func (rs *ruleset) changes(before *ruleset) []setChange {
	var all []setChange
	for i, s := range rs.sets {
		change := setChange{old: before.sets[i], wanted: s}
		stay := 0
		for key, value := range s.elements {
			if was, there := change.old.elements[key]; there && was == value {
				stay++
			} else {
				change.added = append(change.added, key)
			}
		}
		if stay < len(change.old.elements) {
			for key, value := range change.old.elements {
				if now, there := s.elements[key]; !there || now != value {
					change.gone = append(change.gone, key)
				}
			}
		}
		slices.Sort(change.gone)
		slices.Sort(change.added)
		if len(change.gone)+len(change.added) > 0 {
			all = append(all, change)
		}
	}
	return all
}

// elementSocket changes elements of sets by netlink (nfnetlink, linux/netfilter/nf_tables.h) in one transaction.
//
// It is what nft would do, without nft: a process that is to be started, that first asks the kernel for all chains
// and sets of the node, and whose end waits until the kernel has freed what the change removed (nft_rcv_nl_event),
// all of which lasts the longer the busier the node is. The socket is kept for the same reason.
type elementSocket struct {
	fd  int // 0: not open
	seq uint32
}

// elementsPerMessage keeps a list of elements below the 64 KiB that an attribute holds.
const elementsPerMessage = 200

// patience is how long the kernel may take for an answer, in seconds.
const patience = 10

// apply does these changes, all or none.
func (s *elementSocket) apply(family knftables.Family, table string, changes []setChange) (err error) {
	if s.fd == 0 {
		if err := s.open(); err != nil {
			return fmt.Errorf("nftables socket: %w", err)
		}
	}
	defer func() {
		if err != nil { // answers may be on their way
			_ = unix.Close(s.fd)
			s.fd = 0
		}
	}()
	b := batch{seq: s.seq, family: unix.NFPROTO_IPV4, table: table}
	if family == knftables.IPv6Family {
		b.family = unix.NFPROTO_IPV6
	}
	b.limit(unix.NFNL_MSG_BATCH_BEGIN)
	for _, change := range changes {
		for keys := range slices.Chunk(change.gone, elementsPerMessage) {
			err = errors.Join(err, b.elements(unix.NFT_MSG_DELSETELEM, 0, change.old, keys))
		}
		for keys := range slices.Chunk(change.added, elementsPerMessage) {
			err = errors.Join(err, b.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, change.wanted, keys))
		}
	}
	b.limit(unix.NFNL_MSG_BATCH_END)
	if err != nil {
		return err
	}
	s.seq = b.seq
	if err := unix.Sendto(s.fd, b.data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("nftables transaction: %w", err)
	}
	return s.answers(b.asked)
}

func (s *elementSocket) open() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}),
		// A transaction is one message to the socket, however many elements it has.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 1<<26),
	)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	s.fd = fd
	return nil
}

// answers waits for those to the messages with these numbers. The first that is an error is returned; the kernel has
// changed nothing then.
func (s *elementSocket) answers(asked []uint32) error {
	buffer := make([]byte, 1<<16)
	waiting := map[uint32]bool{}
	for _, seq := range asked {
		waiting[seq] = true
	}
	for len(waiting) > 0 {
		size, _, err := unix.Recvfrom(s.fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("answer to an nftables transaction: %w", err)
		}
		// struct nlmsghdr, and of an error its number.
		for data := buffer[:size]; len(data) >= unix.NLMSG_HDRLEN+4; {
			length := int(binary.NativeEndian.Uint32(data))
			if length < unix.NLMSG_HDRLEN+4 || length > len(data) {
				return fmt.Errorf("answer to an nftables transaction: message of %d bytes in %d", length, len(data))
			}
			kind, seq := binary.NativeEndian.Uint16(data[4:]), binary.NativeEndian.Uint32(data[8:])
			if kind == unix.NLMSG_ERROR {
				delete(waiting, seq)
				if number := int32(binary.NativeEndian.Uint32(data[unix.NLMSG_HDRLEN:])); number != 0 {
					return fmt.Errorf("nftables transaction: %w", unix.Errno(-number))
				}
			}
			data = data[min(align(length), len(data)):]
		}
	}
	return nil
}

// batch is a transaction as it goes to the kernel.
type batch struct {
	family byte
	table  string
	seq    uint32
	asked  []uint32 // the messages that are answered
	data   []byte
}

// message appends one with this payload after struct nfgenmsg.
func (b *batch) message(kind, flags uint16, family byte, resource uint16, payload []byte) {
	b.seq++
	if flags&unix.NLM_F_ACK != 0 {
		b.asked = append(b.asked, b.seq)
	}
	b.data = binary.NativeEndian.AppendUint32(b.data, uint32(unix.NLMSG_HDRLEN+nl.SizeofNfgenmsg+len(payload)))
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = binary.NativeEndian.AppendUint16(b.data, unix.NLM_F_REQUEST|flags)
	b.data = binary.NativeEndian.AppendUint32(b.data, b.seq)
	b.data = append(b.data, 0, 0, 0, 0, family, nl.NFNETLINK_V0)
	b.data = binary.BigEndian.AppendUint16(b.data, resource)
	b.data = append(b.data, payload...)
}

// limit begins or ends the transaction.
func (b *batch) limit(kind uint16) {
	b.message(kind, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
}

// elements adds or deletes those of a set.
func (b *batch) elements(kind, flags uint16, s set, keys []string) error {
	var list []byte
	for _, key := range keys {
		encodedKey, err := encode(s.key, key)
		if err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
		element := attribute(unix.NFTA_SET_ELEM_KEY|unix.NLA_F_NESTED, attribute(unix.NFTA_DATA_VALUE, encodedKey))
		if s.value != "" && kind == unix.NFT_MSG_NEWSETELEM {
			value, err := encodeValue(s.value, s.elements[key])
			if err != nil {
				return fmt.Errorf("map %s: %w", s.name, err)
			}
			element = append(element, attribute(unix.NFTA_SET_ELEM_DATA|unix.NLA_F_NESTED, value)...)
		}
		list = append(list, attribute(unix.NFTA_LIST_ELEM|unix.NLA_F_NESTED, element)...)
	}
	payload := slices.Concat(
		attribute(unix.NFTA_SET_ELEM_LIST_TABLE, nl.ZeroTerminated(b.table)),
		attribute(unix.NFTA_SET_ELEM_LIST_SET, nl.ZeroTerminated(s.name)),
		attribute(unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED, list),
	)
	b.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags|unix.NLM_F_ACK, b.family, 0, payload)
	return nil
}

// encodeValue is that of a map's element.
func encodeValue(kind, value string) ([]byte, error) {
	if kind != "verdict" {
		encoded, err := encode(kind, value)
		return attribute(unix.NFTA_DATA_VALUE, encoded), err
	}
	verb, name, _ := strings.Cut(value, " ")
	var verdict []byte
	switch {
	case value == "accept":
		verdict = attribute(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, 1)) // NF_ACCEPT
	case verb == "goto":
		jump := int32(unix.NFT_GOTO)
		verdict = append(attribute(unix.NFTA_VERDICT_CODE, binary.BigEndian.AppendUint32(nil, uint32(jump))),
			attribute(unix.NFTA_VERDICT_CHAIN, nl.ZeroTerminated(name))...)
	default:
		return nil, fmt.Errorf("verdict %q", value)
	}
	return attribute(unix.NFTA_DATA_VERDICT|unix.NLA_F_NESTED, verdict), nil
}

// encode writes a key or value of one of nft's types, or of several that are joined: each part then fills registers
// of 32 bits.
func encode(kind, text string) ([]byte, error) {
	kinds, parts := strings.Split(kind, " . "), strings.Split(text, " . ")
	if len(kinds) != len(parts) {
		return nil, fmt.Errorf("%q is no %s", text, kind)
	}
	var encoded []byte
	for i, part := range parts {
		var value []byte
		var err error
		switch kinds[i] {
		case "ipv4_addr", "ipv6_addr":
			var address netip.Addr
			address, err = netip.ParseAddr(part)
			value = address.AsSlice()
		case "inet_proto":
			value = []byte{plan.Protocol(part).Number()}
		case "inet_service":
			var port uint64
			port, err = strconv.ParseUint(part, 10, 16)
			value = binary.BigEndian.AppendUint16(nil, uint16(port))
		case "ifname":
			value = make([]byte, unix.IFNAMSIZ)
			if copy(value, part) == unix.IFNAMSIZ {
				err = errors.New("too long")
			}
		default:
			err = errors.New("unknown type")
		}
		if err != nil {
			return nil, fmt.Errorf("%q as %s: %w", part, kinds[i], err)
		}
		if len(kinds) > 1 {
			value = append(value, make([]byte, align(len(value))-len(value))...)
		}
		encoded = append(encoded, value...)
	}
	return encoded, nil
}

// attribute is a netlink attribute, padded.
func attribute(kind uint16, value []byte) []byte {
	length := unix.SizeofNlAttr + len(value)
	data := make([]byte, 0, align(length))
	data = binary.NativeEndian.AppendUint16(data, uint16(length))
	data = binary.NativeEndian.AppendUint16(data, kind)
	data = append(data, value...)
	return data[:align(length)]
}

// align is up to the next multiple of the alignment of netlink messages and attributes.
func align(length int) int { return (length + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }
