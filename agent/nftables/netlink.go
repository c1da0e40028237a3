package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// reader asks the kernel for nftables objects (linux/netfilter/nf_tables.h). It keeps its socket: closing one waits until the
// kernel has freed what the last change removed (nft_rcv_nl_event), which takes more than 10 ms.
type reader struct {
	conn *netlink.Conn // nil: not open
}

// answerTimeout is how long the kernel may take for an answer.
const answerTimeout = 10 * time.Second

// get sends a request and returns all messages of the answer.
func (r *reader) get(kind uint16, flags netlink.HeaderFlags, family uint8, attributes ...netlink.Attribute) (messages []netlink.Message, err error) {
	if r.conn == nil {
		if r.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return nil, fmt.Errorf("nftables socket: %w", err)
		}
	}
	defer func() {
		if err != nil { // messages may be on their way
			_ = r.conn.Close()
			r.conn = nil
		}
	}()
	data, err := netlink.MarshalAttributes(attributes)
	if err != nil {
		return nil, err
	}
	if err := r.conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return nil, err
	}
	return r.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...), // struct nfgenmsg
	})
}

// sizeofNfgenmsg is the size of the header before the attributes of each message.
const sizeofNfgenmsg = 4

// attributesOf calls f for each attribute of data.
func attributesOf(data []byte, f func(kind uint16, value []byte)) error {
	attributes, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	for attributes.Next() {
		f(attributes.Type(), attributes.Bytes())
	}
	return attributes.Err()
}

// attributeMap is the attributes of data; of those of one kind the last.
func attributeMap(data []byte) (map[uint16][]byte, error) {
	attributes := map[uint16][]byte{}
	return attributes, attributesOf(data, func(kind uint16, value []byte) { attributes[kind] = value })
}

func text(kind uint16, value string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(value), 0)}
}

// NewGeneration returns a function that asks the kernel for the generation of its nftables rules
// (NFT_MSG_GETGEN): a counter per network namespace that every change by anybody moves on, of iptables-nft too. While it
// stands still no table has changed, and there is no need to list any.
func NewGeneration() func() (uint32, error) {
	var r reader
	return func() (uint32, error) {
		messages, err := r.get(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC)
		if err != nil {
			return 0, fmt.Errorf("generation of the nftables rules: %w", err)
		}
		for _, message := range messages {
			generation, known := uint32(0), false
			if len(message.Data) < sizeofNfgenmsg {
				continue
			}
			err := attributesOf(message.Data[sizeofNfgenmsg:], func(kind uint16, value []byte) {
				if kind == unix.NFTA_GEN_ID && len(value) >= 4 {
					generation, known = binary.BigEndian.Uint32(value), true
				}
			})
			if err != nil || known {
				return generation, err
			}
		}
		return 0, errors.New("the kernel's answer to NFT_MSG_GETGEN holds no generation")
	}
}

// Supported reports whether the kernel has nftables at all. nfnetlink answers EINVAL for a subsystem that it does not have.
func Supported() bool {
	_, err := NewGeneration()()
	return !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPROTONOSUPPORT)
}

// familyNumber is a family as nfgenmsg has it.
func familyNumber(family plan.Family) uint8 {
	if family == plan.IPv6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}
