package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// listing is what the kernel has in one table.
//
// It is read by dumps of our own and not by google/nftables, whose lists do not say when a change has interrupted them: beside
// a busy writer of other tables nothing would be certain. Rules and sets are kept as the kernel encodes them, and compared with
// an earlier listing, never with the text that nft was given.
type listing struct {
	exists bool
	// interrupted: rules changed while it was read, those of this table or of others.
	interrupted bool
	// structure is the encoding of each object: "chain NAME" and "set NAME" their properties, "rules NAME" those of a chain, in order.
	structure map[string]string
	rules     map[string]int               // how many, by chain
	objects   []object                     // chains, sets and maps; not anonymous ones
	elements  map[string]map[string]string // by set, key to value
}

type object struct{ kind, name string }

// listTable reads one table. The elements of sets are read for those in known alone; nil reads none.
func (r *reader) listTable(family plan.Family, name string, known []set) (*listing, error) {
	l := &listing{structure: map[string]string{}, rules: map[string]int{}, elements: map[string]map[string]string{}}
	_, err := r.get(unix.NFT_MSG_GETTABLE, 0, familyNumber(family), text(unix.NFTA_TABLE_NAME, name))
	if errors.Is(err, unix.ENOENT) {
		return l, nil
	}
	if err != nil {
		return nil, fmt.Errorf("table %s %s: %w", family, name, err)
	}
	l.exists = true
	dump := func(kind uint16, each func(attributes map[uint16][]byte) error, filter ...netlink.Attribute) error {
		messages, err := r.get(kind, netlink.Dump, familyNumber(family), filter...)
		if errors.Is(err, unix.ENOENT) { // gone since
			l.interrupted = true
			return nil
		}
		if err != nil {
			return fmt.Errorf("table %s %s: %w", family, name, err)
		}
		for _, message := range messages {
			l.interrupted = l.interrupted || message.Header.Flags&netlink.DumpInterrupted != 0
			if len(message.Data) < sizeofNfgenmsg {
				continue
			}
			attributes, err := attributeMap(message.Data[sizeofNfgenmsg:])
			if err == nil {
				err = each(attributes)
			}
			if err != nil {
				return fmt.Errorf("table %s %s: %w", family, name, err)
			}
		}
		return nil
	}
	// The kernel does not filter chains by table.
	err = dump(unix.NFT_MSG_GETCHAIN, func(a map[uint16][]byte) error {
		if cString(a[unix.NFTA_CHAIN_TABLE]) == name {
			l.add("chain", cString(a[unix.NFTA_CHAIN_NAME]), a, unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE, nftaChainFlags, nftaChainUserdata)
		}
		return nil
	})
	err = errors.Join(err, dump(unix.NFT_MSG_GETRULE, func(a map[uint16][]byte) error {
		chain := cString(a[unix.NFTA_RULE_CHAIN])
		l.rules[chain]++
		l.structure["rules "+chain] += encoding(a, unix.NFTA_RULE_EXPRESSIONS, unix.NFTA_RULE_USERDATA)
		return nil
	}, text(unix.NFTA_RULE_TABLE, name)))
	err = errors.Join(err, dump(unix.NFT_MSG_GETSET, func(a map[uint16][]byte) error {
		flags := uint32(0) // not sent where there is none
		if value := a[unix.NFTA_SET_FLAGS]; len(value) >= 4 {
			flags = binary.BigEndian.Uint32(value)
		}
		switch {
		case flags&unix.NFT_SET_ANONYMOUS != 0: // constant, and a part of its rule
		case flags&unix.NFT_SET_MAP != 0:
			l.add("map", cString(a[unix.NFTA_SET_NAME]), a, unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_KEY_LEN, unix.NFTA_SET_DATA_TYPE, unix.NFTA_SET_DATA_LEN)
		default:
			l.add("set", cString(a[unix.NFTA_SET_NAME]), a, unix.NFTA_SET_FLAGS, unix.NFTA_SET_KEY_TYPE, unix.NFTA_SET_KEY_LEN)
		}
		return nil
	}, text(unix.NFTA_SET_TABLE, name)))
	for _, s := range known {
		if !slices.Contains(l.objects, object{s.kind(), s.name}) {
			continue
		}
		elements := map[string]string{}
		l.elements[s.name] = elements
		err = errors.Join(err, dump(unix.NFT_MSG_GETSETELEM, func(a map[uint16][]byte) error {
			return decodeElements(s, a[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(e element) { elements[e.key] = e.value })
		}, text(unix.NFTA_SET_ELEM_LIST_TABLE, name), text(unix.NFTA_SET_ELEM_LIST_SET, s.name)))
	}
	return l, err
}

// HasChain reports whether a table of a family has a chain whose name begins with prefix. It reads tables of iptables-nft too, also where
// iptables-nft-save cannot: that loads the library of each match, and the one of ipset wants a raw socket (CAP_NET_RAW).
func HasChain(family plan.Family, table, prefix string) (bool, error) {
	var r reader
	has := func(l *listing) bool {
		return slices.ContainsFunc(l.objects, func(o object) bool { return o.kind == "chain" && strings.HasPrefix(o.name, prefix) })
	}
	l, err := listAgain(func() (*listing, error) { return r.listTable(family, table, nil) }, has)
	if err != nil {
		return false, err
	}
	return has(l), nil
}

// Attributes that x/sys does not name.
const (
	nftaChainFlags    = 10
	nftaChainUserdata = 12
)

// add takes down an object and the attributes that make it what it is.
func (l *listing) add(kind, name string, attributes map[uint16][]byte, which ...uint16) {
	o := object{kind, name}
	if slices.Contains(l.objects, o) { // listed twice, since the dump was interrupted
		return
	}
	l.objects = append(l.objects, o)
	l.structure[kind+" "+name] = encoding(attributes, which...)
}

func encoding(attributes map[uint16][]byte, which ...uint16) string {
	var all []byte
	for _, kind := range which {
		all = binary.BigEndian.AppendUint32(all, uint32(len(attributes[kind])))
		all = append(all, attributes[kind]...)
	}
	return string(all)
}

func cString(value []byte) string { return unix.ByteSliceToString(value) }

// differs says in which respects the listing is not rules, whose structure was listed as structure when they were loaded.
func (l *listing) differs(rules *ruleset, structure map[string]string) []string {
	all := structureDiff(structure, l.structure)
	for _, s := range rules.sets {
		there, exists := l.elements[s.name]
		if !exists {
			continue // said by the structure
		}
		var missing, foreign []string
		for key, value := range s.elements {
			if found, ok := there[key]; (!ok || found != value) && !s.mayBeGone(key) {
				missing = append(missing, key)
			}
		}
		for key := range there {
			if _, ok := s.elements[key]; !ok && s.until == nil {
				foreign = append(foreign, key)
			}
		}
		all = append(all, Summary("missing from "+s.name, missing)...)
		all = append(all, Summary("foreign in "+s.name, foreign)...)
	}
	return all
}

// mayBeGone reports whether the kernel may have removed an element, or is about to.
func (s set) mayBeGone(key string) bool {
	timeout, wanted := s.timeout(key)
	return !wanted || timeout > 0 && timeout < time.Second
}

// lacks says which chains, rules and sets of rs the listing does not have, by name and number.
func (l *listing) lacks(rs *ruleset) []string {
	var all []string
	for _, c := range rs.chains {
		if count := l.rules[c.name]; !slices.Contains(l.objects, object{"chain", c.name}) || count != len(c.rules) {
			all = append(all, fmt.Sprintf("chain %s has %d rules instead of %d", c.name, count, len(c.rules)))
		}
	}
	for _, s := range rs.sets {
		if !slices.Contains(l.objects, object{s.kind(), s.name}) {
			all = append(all, s.kind()+" "+s.name+" is missing")
		}
	}
	return all
}

// structureDiff names the objects that two structures differ in.
func structureDiff(wanted, there map[string]string) []string {
	var all []string
	for name, encoded := range wanted {
		if found, ok := there[name]; !ok {
			all = append(all, "missing "+name)
		} else if found != encoded {
			all = append(all, "changed "+name)
		}
	}
	for name := range there {
		if _, ok := wanted[name]; !ok {
			all = append(all, "foreign "+name)
		}
	}
	slices.Sort(all)
	return all
}

// Summary names the first few of a long list.
func Summary(what string, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	const most = 3
	if more := len(names) - most; more > 0 {
		return []string{fmt.Sprintf("%s: %s and %d more", what, strings.Join(names[:most], ", "), more)}
	}
	return []string{what + ": " + strings.Join(names, ", ")}
}

// decodeElements calls each for the elements of a message (NFTA_SET_ELEM_LIST_ELEMENTS).
func decodeElements(s set, list []byte, each func(element)) (err error) {
	fail := func(e error) {
		if err == nil && e != nil {
			err = fmt.Errorf("set %s: %w", s.name, e)
		}
	}
	fail(attributesOf(list, func(_ uint16, data []byte) {
		var e element
		fail(attributesOf(data, func(kind uint16, data []byte) {
			switch kind {
			case unix.NFTA_SET_ELEM_KEY:
				var err error
				e.key, err = decodeData(s.key, data)
				fail(err)
			case unix.NFTA_SET_ELEM_DATA:
				var err error
				e.value, err = decodeData(s.value, data)
				fail(err)
			case unix.NFTA_SET_ELEM_EXPR:
				var err error
				e.packets, err = decodeCounter(data)
				fail(err)
			}
		}))
		each(e)
	}))
	return err
}

// decodeCounter is the packets of an expression, which is a counter.
func decodeCounter(expression []byte) (packets uint64, err error) {
	attributes, err := attributeMap(expression)
	if err == nil {
		attributes, err = attributeMap(attributes[unix.NFTA_EXPR_DATA])
	}
	if value := attributes[unix.NFTA_COUNTER_PACKETS]; err == nil && len(value) >= 8 {
		packets = binary.BigEndian.Uint64(value)
	}
	return packets, err
}

// decodeData is the text of a key or a value: NFTA_DATA_VALUE, or NFTA_DATA_VERDICT of a verdict map.
func decodeData(kinds string, data []byte) (decoded string, err error) {
	errAttributes := attributesOf(data, func(kind uint16, value []byte) {
		switch kind {
		case unix.NFTA_DATA_VALUE:
			decoded = decode(kinds, value)
		case unix.NFTA_DATA_VERDICT:
			code, chain := int32(0), ""
			err = attributesOf(value, func(kind uint16, value []byte) {
				switch {
				case kind == unix.NFTA_VERDICT_CODE && len(value) >= 4:
					code = int32(binary.BigEndian.Uint32(value))
				case kind == unix.NFTA_VERDICT_CHAIN:
					chain = cString(value)
				}
			})
			names := map[int32]string{unix.NFT_GOTO: "goto " + chain, unix.NFT_JUMP: "jump " + chain, 1: "accept", 0: "drop"} // NF_ACCEPT, NF_DROP
			decoded = names[code]
		}
	})
	return decoded, errors.Join(err, errAttributes)
}
