package nftables

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

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
		case zoneType:
			var zone uint64
			zone, err = strconv.ParseUint(part, 10, 16)
			value = binary.NativeEndian.AppendUint16(nil, uint16(zone))
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

// sizes are the bytes of each of nft's types.
func sizeOf(kind string) int {
	return map[string]int{"ipv4_addr": 4, "ipv6_addr": 16, "inet_proto": 1, "inet_service": 2, zoneType: 2, "ifname": unix.IFNAMSIZ}[kind]
}

// decode is the opposite of encode. What is of another length than the type is hexadecimal, for people.
func decode(kind string, encoded []byte) string {
	kinds := strings.Split(kind, " . ")
	parts := make([]string, len(kinds))
	rest := encoded
	for i, kind := range kinds {
		size := sizeOf(kind)
		padded := size
		if len(kinds) > 1 {
			padded = (size + 3) &^ 3
		}
		if size == 0 || len(rest) < padded {
			return hex.EncodeToString(encoded)
		}
		value := rest[:size]
		rest = rest[padded:]
		switch kind {
		case "ipv4_addr", "ipv6_addr":
			address, _ := netip.AddrFromSlice(value)
			parts[i] = address.String()
		case "inet_proto":
			parts[i] = string(plan.ProtocolOf(value[0]))
		case "inet_service":
			parts[i] = strconv.Itoa(int(binary.BigEndian.Uint16(value)))
		case zoneType:
			parts[i] = strconv.Itoa(int(binary.NativeEndian.Uint16(value)))
		case "ifname":
			parts[i] = unix.ByteSliceToString(value)
		}
	}
	if len(rest) > 0 {
		return hex.EncodeToString(encoded)
	}
	return concat(parts...)
}
