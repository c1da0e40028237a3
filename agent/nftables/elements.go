package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// setChange is what has to be done to a set.
type setChange struct {
	old, wanted set
	gone, added []string // keys
}

// changes are those from one plan to another that has the same chains. What makes the same elements in both is left
// out: there may be thousands of rules, and one pod.
func changes(before, after *plan.Plan, family plan.Family) (all []setChange) {
	was, now := *before, *after
	if slices.Equal(before.HostAddresses, after.HostAddresses) { // they decide about hairpins
		was.Rules, now.Rules = plan.Apart(before, after)
	}
	old, wanted := elements(&was, family), elements(&now, family)
	for i, s := range wanted {
		change := setChange{old: old[i], wanted: s}
		change.gone = keysWithout(change.old, s, after)
		change.added = keysWithout(s, change.old, before)
		if len(change.gone)+len(change.added) > 0 {
			all = append(all, change)
		}
	}
	return all
}

// keysWithout are the keys of s that are not in other with the same value, nor needed by other rules of its plan.
func keysWithout(s, other set, of *plan.Plan) (keys []string) {
	for key, value := range s.elements {
		if there, ok := other.elements[key]; (!ok || there != value) && !shared(of, s.name, key) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// shared says whether a plan makes an element of one of the sets in which several rules may have the same.
func shared(p *plan.Plan, set, key string) bool {
	var needs func(plan.Rule, netip.Addr) bool
	switch set {
	case addressesSet:
		needs = func(r plan.Rule, a netip.Addr) bool { return r.Address == a && !r.Foreign() }
	case hostAddressesSet:
		needs = func(r plan.Rule, a netip.Addr) bool { return r.Address == a && !r.Foreign() && r.HostClients }
	case hairpinsSet:
		needs = func(r plan.Rule, a netip.Addr) bool {
			return !slices.Contains(p.HostAddresses, a) && slices.ContainsFunc(r.Endpoints, func(e netip.AddrPort) bool { return e.Addr() == a })
		}
	default:
		return false
	}
	text, _, _ := strings.Cut(key, " . ")
	address, err := netip.ParseAddr(text)
	return err == nil && slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return needs(r, address) })
}

// elementSocket changes elements of sets by netlink, in one transaction.
//
// It is what nft would do, without nft: a process that is to be started, that first asks the kernel for all chains
// and sets of the node, and whose end waits until the kernel has freed what the change removed (nft_rcv_nl_event),
// all of which lasts the longer the busier the node is. The socket is kept for the same reason.
type elementSocket struct {
	conn   *nftables.Conn // nil: not open
	socket *netlink.Conn  // the one below
}

const (
	// elementsPerMessage keeps a list of elements below the 64 KiB that an attribute holds.
	elementsPerMessage = 200
	// transactionBytes is what the kernel takes as one message: a transaction, however many elements it has.
	transactionBytes = 1 << 26
	// patience is how long the kernel may take for an answer.
	patience = 10 * time.Second
)

// apply does these changes, all or none.
func (s *elementSocket) apply(family plan.Family, table string, changes []setChange) (err error) {
	if s.conn == nil {
		if err := s.open(); err != nil {
			return fmt.Errorf("nftables socket: %w", err)
		}
	}
	defer func() {
		if err != nil { // answers may be on their way
			_ = s.conn.CloseLasting()
			s.conn = nil
		}
	}()
	of := &nftables.Table{Name: table, Family: nftables.TableFamilyIPv4}
	if family == plan.IPv6 {
		of.Family = nftables.TableFamilyIPv6
	}
	for _, change := range changes {
		set := &nftables.Set{Table: of, Name: change.wanted.name}
		for keys := range slices.Chunk(change.gone, elementsPerMessage) {
			list, errGone := encodeElements(change.old, keys)
			err = errors.Join(err, errGone, s.conn.SetDeleteElements(set, list))
		}
		for keys := range slices.Chunk(change.added, elementsPerMessage) {
			list, errAdded := encodeElements(change.wanted, keys)
			err = errors.Join(err, errAdded, s.conn.SetAddElements(set, list))
		}
	}
	if err == nil {
		err = errors.Join(s.socket.SetDeadline(time.Now().Add(patience)), s.conn.Flush())
	}
	if err != nil {
		return fmt.Errorf("nftables transaction: %w", err)
	}
	return nil
}

func (s *elementSocket) open() (err error) {
	s.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(socket *netlink.Conn) error {
		s.socket = socket
		return socket.SetWriteBuffer(transactionBytes)
	}))
	return err
}

func encodeElements(s set, keys []string) ([]nftables.SetElement, error) {
	list := make([]nftables.SetElement, 0, len(keys))
	for _, key := range keys {
		element, err := encodeElement(s, key)
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s.name, err)
		}
		list = append(list, element)
	}
	return list, nil
}

func encodeElement(s set, key string) (element nftables.SetElement, err error) {
	if element.Key, err = encode(s.key, key); err != nil {
		return element, err
	}
	value := s.elements[key]
	verb, chain, _ := strings.Cut(value, " ")
	switch {
	case s.value == "":
	case s.value != "verdict":
		element.Val, err = encode(s.value, value)
	case verb == "accept":
		element.VerdictData = &expr.Verdict{Kind: expr.VerdictAccept}
	case verb == "goto":
		element.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
	default:
		err = fmt.Errorf("unknown verdict %q", value)
	}
	return element, err
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
			value = append(value, make([]byte, -len(value)&3)...)
		}
		encoded = append(encoded, value...)
	}
	return encoded, nil
}
