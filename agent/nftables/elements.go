package nftables

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// elementSocket changes elements of sets by netlink, in one transaction.
//
// nft would do the same, but as a process that first lists all chains and sets of the node, and whose end waits until the
// kernel has freed what the change removed (nft_rcv_nl_event): the busier the node, the longer. The socket is kept open for
// that reason too.
type elementSocket struct {
	conn   *nftables.Conn // nil: not open
	socket *netlink.Conn  // the one below
}

const (
	// elementsPerMessage keeps a list of elements below the 64 KiB that an attribute holds.
	elementsPerMessage = 200
	// transactionBytes is the largest message to the kernel: a transaction, however many elements it has.
	transactionBytes = 1 << 26
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
		timeouts := change.wanted.until != nil
		set := &nftables.Set{Table: of, Name: change.wanted.name, HasTimeout: timeouts}
		for keys := range slices.Chunk(change.gone, elementsPerMessage) {
			list, errGone := encodeElements(change.old, keys)
			err = errors.Join(err, errGone, s.conn.SetDeleteElements(set, list))
		}
		for keys := range slices.Chunk(change.added, elementsPerMessage) {
			list, errAdded := encodeElements(change.wanted, keys)
			if timeouts {
				// Kernels before 6.12 keep the old timeout of an element that is there, and none deletes one that is not.
				err = errors.Join(err, s.conn.SetAddElements(set, list), s.conn.SetDeleteElements(set, list))
			}
			err = errors.Join(err, errAdded, s.conn.SetAddElements(set, list))
		}
	}
	if err == nil {
		err = errors.Join(s.socket.SetDeadline(time.Now().Add(answerTimeout)), s.conn.Flush())
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
		timeout, wanted := s.timeout(key)
		if !wanted {
			continue
		}
		element, err := encodeElement(s, key)
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", s.name, err)
		}
		element.Timeout = timeout
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
