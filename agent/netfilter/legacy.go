package netfilter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errTable says that the kernel's answer is not of the form that this file knows.
var errTable = errors.New("a table of iptables-legacy has an unknown form")

// layout is where things are in a rule of iptables-legacy (linux/netfilter_ipv4/ip_tables.h, struct ipt_entry, and
// ip6_tables.h, struct ip6t_entry).
type layout struct {
	domain, level      int
	address            int // bytes of one; source, destination and their masks come first
	interfaces         int // in, out, and their masks
	protocol           int
	inverted           int
	targetAt, nextAt   int // offsets from the rule's beginning
	size               int
	getInfo, getValues int // socket options
}

var (
	layout4 = layout{unix.AF_INET, unix.IPPROTO_IP, 4, 16, 80, 83, 88, 90, 112, 64, 65}         //nolint:gochecknoglobals // constants
	layout6 = layout{unix.AF_INET6, unix.IPPROTO_IPV6, 16, 64, 128, 132, 140, 142, 168, 64, 65} //nolint:gochecknoglobals // constants
)

const (
	tableName     = 32 // XT_TABLE_MAXNAMELEN
	extensionHead = 32 // of a match or a target: its size, its name, its revision

	invertedInterface, invertedDestination = 0x01, 0x10 // IPT_INV_VIA_IN, IPT_INV_DSTIP
	mapsAddresses, mapsPorts               = 1, 2       // NF_NAT_RANGE_MAP_IPS, NF_NAT_RANGE_PROTO_SPECIFIED
)

// natChains are the chains that the kernel calls itself, by hook.
func natChains() [5]string { return [5]string{"PREROUTING", "INPUT", "", "OUTPUT", "POSTROUTING"} }

// unknown stands in a rule for a match that this file cannot spell.
const unknown = "…"

// legacyDNAT are the DNAT rules of iptables-legacy, spelled as iptables-legacy-save spells them, a line each.
//
// That command opens a raw socket, which takes CAP_NET_RAW; the kernel answers on any socket to whoever has
// CAP_NET_ADMIN (do_ipt_get_ctl in net/ipv4/netfilter/ip_tables.c). It must not be asked for a table that is not in
// use: that would bring it into use.
func legacyDNAT(l layout) (string, error) {
	socket, err := unix.Socket(l.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer func() { _ = unix.Close(socket) }()
	// struct ipt_getinfo: name, valid hooks, where they begin, underflows, number of rules, size of all.
	info := make([]byte, tableName+13*4)
	copy(info, "nat")
	if err := getSocketOption(socket, l.level, l.getInfo, info); err != nil {
		return "", err
	}
	number := func(i int) uint32 { return binary.NativeEndian.Uint32(info[tableName+4*i:]) }
	begins := map[int]string{}
	for hook, chain := range natChains() {
		if number(0)&(1<<hook) != 0 {
			begins[int(number(1+hook))] = chain
		}
	}
	const head = tableName + 8 // struct ipt_get_entries: name, size, aligned to eight bytes
	values := make([]byte, head+int(number(12)))
	copy(values, "nat")
	binary.NativeEndian.PutUint32(values[tableName:], number(12))
	if err := getSocketOption(socket, l.level, l.getValues, values); err != nil {
		return "", err // EAGAIN where somebody has changed it in between
	}
	return l.rules(values[head:], begins)
}

func getSocketOption(socket, level, option int, value []byte) error {
	length := uint32(len(value))
	_, _, failed := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
	if failed != 0 {
		return failed
	}
	return nil
}

// rules spells the DNAT rules of a table. begins are the offsets at which the built-in chains begin; others begin with a
// rule of their own that bears their name.
func (l layout) rules(table []byte, begins map[int]string) (string, error) {
	var out strings.Builder
	chain := ""
	for at := 0; at < len(table); {
		if name, first := begins[at]; first {
			chain = name
		}
		rule := table[at:]
		if len(rule) < l.size {
			return "", errTable
		}
		target, next := int(binary.NativeEndian.Uint16(rule[l.targetAt:])), int(binary.NativeEndian.Uint16(rule[l.nextAt:]))
		if target < l.size || target+extensionHead > next || next > len(rule) {
			return "", errTable
		}
		switch name, _, data := extension(rule[target:next]); name {
		case "ERROR":
			chain = unix.ByteSliceToString(data)
		case "DNAT":
			if spelled := l.spell(rule[:target], rule[target:next]); spelled != "" {
				fmt.Fprintf(&out, "-A %s %s\n", chain, spelled)
			}
		}
		at += next
	}
	return out.String(), nil
}

// extension takes a match or a target apart.
func extension(data []byte) (name string, revision byte, content []byte) {
	return unix.ByteSliceToString(data[2 : extensionHead-1]), data[extensionHead-1], data[extensionHead:]
}

// spell is a rule without its chain; empty for one that is about no certain destination.
func (l layout) spell(rule, target []byte) string {
	destination, ok := l.prefix(rule, 1)
	if !ok || rule[l.inverted]&invertedDestination != 0 {
		return ""
	}
	words := []string{"-d", destination}
	if source, ok := l.prefix(rule, 0); ok {
		words = append([]string{"-s", source}, words...)
	}
	if in := unix.ByteSliceToString(rule[l.interfaces:][:unix.IFNAMSIZ]); in != "" {
		if rule[l.inverted]&invertedInterface != 0 {
			words = append(words, "!")
		}
		words = append(words, "-i", in)
	}
	if rule[l.inverted]&^(invertedInterface|invertedDestination) != 0 || rule[l.interfaces+unix.IFNAMSIZ] != 0 {
		words = append(words, unknown)
	}
	protocols := map[uint16]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}
	if protocol := binary.NativeEndian.Uint16(rule[l.protocol:]); protocol != 0 {
		name := protocols[protocol]
		if name == "" {
			name = fmt.Sprint(protocol)
		}
		words = append(words, "-p", name)
	}
	for rest := rule[l.size:]; len(rest) >= extensionHead; {
		size := int(binary.NativeEndian.Uint16(rest))
		if size < extensionHead || size > len(rest) {
			return ""
		}
		words = append(words, spellMatch(rest[:size])...)
		rest = rest[size:]
	}
	return strings.Join(append(words, "-j", "DNAT", "--to-destination", l.to(target)), " ")
}

// prefix is an address with its mask: 0 is the source, 1 the destination.
func (l layout) prefix(rule []byte, which int) (string, bool) {
	address, mask := rule[which*l.address:][:l.address], rule[(2+which)*l.address:][:l.address]
	addr, _ := netip.AddrFromSlice(address)
	bits := 0
	for _, b := range mask {
		for ; b&0x80 != 0; b <<= 1 {
			bits++
		}
	}
	return netip.PrefixFrom(addr, bits).String(), bits > 0
}

// spellMatch spells the ports of struct xt_tcp and xt_udp; of others the name alone.
func spellMatch(data []byte) []string {
	name, revision, content := extension(data)
	if name != "tcp" && name != "udp" || revision != 0 || len(content) < 8 {
		return []string{"-m", name, unknown}
	}
	port := func(i int) uint16 { return binary.NativeEndian.Uint16(content[2*i:]) }
	words := []string{"-m", name}
	for i, option := range []string{"--sport", "--dport"} {
		switch first, last := port(2*i), port(2*i+1); {
		case first == 0 && last == 0xffff:
		case first == last:
			words = append(words, option, fmt.Sprint(first))
		default:
			words = append(words, option, fmt.Sprintf("%d:%d", first, last))
		}
	}
	if inverted := content[8:]; len(bytes.Trim(inverted, "\x00")) > 0 { // flags of TCP too
		words = append(words, unknown)
	}
	return words
}

// to is where a DNAT target leads (linux/netfilter/nf_nat.h): struct nf_nat_ipv4_multi_range_compat in revision 0 of
// IPv4, else struct nf_nat_range or nf_nat_range2, which begin alike.
func (l layout) to(target []byte) string {
	_, revision, data := extension(target)
	addresses, width := 4, 16
	if l.domain == unix.AF_INET && revision == 0 {
		if len(data) < 4 {
			return unknown
		}
		data, width = data[4:], 4 // behind the number of ranges
	}
	if len(data) < addresses+2*width+4 {
		return unknown
	}
	flags := binary.NativeEndian.Uint32(data)
	text := ""
	if flags&mapsAddresses != 0 {
		first, _ := netip.AddrFromSlice(data[addresses:][:l.address])
		last, _ := netip.AddrFromSlice(data[addresses+width:][:l.address])
		text = first.String()
		if last != first {
			text += "-" + last.String()
		}
		if first.Is6() && flags&mapsPorts != 0 {
			text = "[" + text + "]"
		}
	}
	if flags&mapsPorts != 0 {
		first, last := binary.BigEndian.Uint16(data[addresses+2*width:]), binary.BigEndian.Uint16(data[addresses+2*width+2:])
		text += fmt.Sprintf(":%d", first)
		if last != first {
			text += fmt.Sprintf("-%d", last)
		}
	}
	if flags&^(mapsAddresses|mapsPorts) != 0 {
		text += " " + unknown
	}
	return text
}
