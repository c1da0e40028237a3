package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Snapshot reads links, addresses and routes of the network namespace of the calling thread (rtnetlink).
func (k Kernel) Snapshot() (Snapshot, error) {
	s, err := snapshot(dump)
	s.Namespace = k.Namespace()
	return s, err
}

// Namespace is Snapshot.Namespace: the ID of the present boot and the inode of the network namespace, as far as they can be read.
func (Kernel) Namespace() string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	inode, _ := os.Readlink("/proc/thread-self/ns/net")
	return strings.TrimSpace(string(boot)) + " " + inode
}

// dumper asks for all messages of a kind. Where a change has interrupted the dump (NLM_F_DUMP_INTR), it returns
// nl.ErrDumpInterrupted and what was listed.
type dumper func(request, reply uint16, header []byte) ([][]byte, error)

func dump(request, reply uint16, header []byte) ([][]byte, error) {
	r := nl.NewNetlinkRequest(int(request), unix.NLM_F_DUMP)
	r.AddRawData(header)
	return r.Execute(unix.NETLINK_ROUTE, reply)
}

// dumpAttempts is how often an interrupted dump is repeated before its last list is taken as it is.
const dumpAttempts = 5

func snapshot(dump dumper) (Snapshot, error) {
	var s Snapshot
	read := func(what string, request, reply uint16, header int, parse func([]byte) error) error {
		var messages [][]byte
		var err error
		for range dumpAttempts {
			if messages, err = dump(request, reply, make([]byte, header)); !errors.Is(err, nl.ErrDumpInterrupted) {
				break
			}
		}
		if errors.Is(err, nl.ErrDumpInterrupted) {
			s.Torn = append(s.Torn, what)
			err = nil
		}
		for _, message := range messages {
			if err != nil {
				break
			}
			if len(message) < header {
				err = unix.EBADMSG
				break
			}
			err = parse(message)
		}
		if err != nil {
			return fmt.Errorf("%s of the node: %w", what, err)
		}
		return nil
	}
	if loose, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_loose"); err == nil {
		s.StrictTCP = strings.TrimSpace(string(loose)) == "0"
	}
	filtered4, filtered6 := bridgeSysctl("iptables"), bridgeSysctl("ip6tables")
	err := read("links", unix.RTM_GETLINK, unix.RTM_NEWLINK, unix.SizeofIfInfomsg, func(message []byte) error {
		link, own4, own6, err := parseLink(message)
		if link.Kind == "bridge" {
			link.Unfiltered4, link.Unfiltered6 = !filtered4.passes(own4), !filtered6.passes(own6)
		}
		s.Links = append(s.Links, link)
		return err
	})
	if err != nil {
		return Snapshot{}, err
	}
	err = read("addresses", unix.RTM_GETADDR, unix.RTM_NEWADDR, unix.SizeofIfAddrmsg, func(message []byte) error {
		address, err := parseAddress(message)
		if address.Prefix.IsValid() {
			s.Addresses = append(s.Addresses, address)
		}
		return err
	})
	if err != nil {
		return Snapshot{}, err
	}
	var objects []routeMessage // routes that name no link, but a next hop object
	err = read("routes", unix.RTM_GETROUTE, unix.RTM_NEWROUTE, unix.SizeofRtMsg, func(message []byte) error {
		route, err := parseRoute(message)
		if err != nil || route.skip {
			return err
		}
		s.IPv6 = s.IPv6 || route.Destination.Addr().Is6() && (route.Default() && !route.local || route.Destination.Addr().IsGlobalUnicast())
		switch {
		case route.local:
		case len(route.links) == 0 && route.object != 0:
			objects = append(objects, route)
		default:
			s.add(route.Route, route.links)
		}
		return nil
	})
	if err != nil || len(objects) == 0 {
		return s, err
	}
	hops := nextHops{}
	err = read("next hops", unix.RTM_GETNEXTHOP, unix.RTM_NEWNEXTHOP, sizeofNhmsg, hops.parse)
	for _, route := range objects {
		s.add(route.Route, hops.links(route.object))
	}
	return s, err
}

func (s *Snapshot) add(route Route, links []int) {
	for _, route.Link = range links {
		s.Routes = append(s.Routes, route)
	}
}

// Attributes and values that x/sys does not name: linux/if_link.h, linux/if_tun.h, linux/rtnetlink.h.
const (
	iflaLinkNetNSID       = 37
	iflaInfoKind          = 1
	iflaInfoData          = 2
	iflaInfoSlaveKind     = 4
	iflaInfoSlaveData     = 5
	iflaBrportMode        = 4 // hairpin
	iflaTunType           = 3
	iflaBrNfCallIptables  = 36
	iflaBrNfCallIP6tables = 37
	iffTap                = 2
	sizeofNhmsg           = 8
	sizeofNextHopGrp      = 8
	sizeofRtNexthop       = 8
	rtaNhID               = 30
	rtmFCloned            = 0x200
)

// decode reads the attributes behind a header.
func decode(message []byte, header int, each func(*netlink.AttributeDecoder)) error {
	decoder, err := netlink.NewAttributeDecoder(message[header:])
	if err != nil {
		return err
	}
	for decoder.Next() {
		each(decoder)
	}
	return decoder.Err()
}

// parseLink reads struct ifinfomsg and its attributes; filtered4 and filtered6 are a bridge's own flags
// nf_call_iptables and nf_call_ip6tables.
func parseLink(message []byte) (l LinkState, filtered4, filtered6 bool, err error) {
	l.Index = int(binary.NativeEndian.Uint32(message[4:]))
	l.Loopback = binary.NativeEndian.Uint32(message[8:])&unix.IFF_LOOPBACK != 0
	var data, slaveData []byte
	slaveKind := ""
	err = decode(message, unix.SizeofIfInfomsg, func(a *netlink.AttributeDecoder) {
		switch a.Type() {
		case unix.IFLA_IFNAME:
			l.Name = a.String()
		case unix.IFLA_MASTER:
			l.Master = int(a.Uint32())
		case unix.IFLA_LINK:
			l.Lower = int(a.Uint32())
		case iflaLinkNetNSID:
			l.Elsewhere, l.NetNS = true, int(a.Int32())
		case unix.IFLA_LINKINFO:
			a.Nested(func(a *netlink.AttributeDecoder) error {
				for a.Next() {
					switch a.Type() {
					case iflaInfoKind:
						l.Kind = a.String()
					case iflaInfoData:
						data = a.Bytes()
					case iflaInfoSlaveKind:
						slaveKind = a.String()
					case iflaInfoSlaveData:
						slaveData = a.Bytes()
					}
				}
				return a.Err()
			})
		}
	})
	on := func(b []byte) bool { return len(b) > 0 && b[0] != 0 }
	if err == nil && slaveKind == "bridge" {
		err = decode(slaveData, 0, func(a *netlink.AttributeDecoder) {
			if a.Type() == iflaBrportMode {
				l.Hairpin = on(a.Bytes())
			}
		})
	}
	if err != nil || l.Kind != "tun" && l.Kind != "bridge" {
		return l, false, false, err
	}
	err = decode(data, 0, func(a *netlink.AttributeDecoder) {
		switch {
		case l.Kind == "tun" && a.Type() == iflaTunType:
			l.Tap = a.Uint8() == iffTap
		case l.Kind == "bridge" && a.Type() == iflaBrNfCallIptables:
			filtered4 = on(a.Bytes())
		case l.Kind == "bridge" && a.Type() == iflaBrNfCallIP6tables:
			filtered6 = on(a.Bytes())
		}
	})
	return l, filtered4, filtered6, err
}

// parseAddress reads struct ifaddrmsg and its attributes.
func parseAddress(message []byte) (a Address, err error) {
	a.Link = int(binary.NativeEndian.Uint32(message[4:]))
	var address, local []byte
	err = decode(message, unix.SizeofIfAddrmsg, func(d *netlink.AttributeDecoder) {
		switch d.Type() {
		case unix.IFA_ADDRESS:
			address = d.Bytes()
		case unix.IFA_LOCAL: // the node's own, where IFA_ADDRESS is the other end's
			local = d.Bytes()
		}
	})
	if local != nil {
		address = local
	}
	if ip, ok := netip.AddrFromSlice(address); ok {
		a.Prefix = netip.PrefixFrom(ip, int(message[1]))
	}
	return a, err
}

// routeMessage is a route before its next hops are told apart.
type routeMessage struct {
	Route
	links  []int
	object uint32 // the ID of a next hop object
	// gateway: there is one, or several next hops.
	gateway bool
	local   bool // of the local table: no route to another
	skip    bool // leads nowhere, or is no route
}

// parseRoute reads struct rtmsg and its attributes.
func parseRoute(message []byte) (r routeMessage, err error) {
	family, bits, table, kind := message[0], int(message[1]), message[4], message[7]
	flags := binary.NativeEndian.Uint32(message[8:])
	unspecified := netip.IPv4Unspecified()
	switch family {
	case unix.AF_INET:
	case unix.AF_INET6:
		unspecified = netip.IPv6Unspecified()
	default:
		r.skip = true
	}
	r.skip = r.skip || flags&rtmFCloned != 0 || kind != unix.RTN_UNICAST && kind != unix.RTN_LOCAL
	if r.skip {
		return r, nil
	}
	r.Table = int(table)
	r.Destination = netip.PrefixFrom(unspecified, bits)
	err = decode(message, unix.SizeofRtMsg, func(a *netlink.AttributeDecoder) {
		switch a.Type() {
		case unix.RTA_DST:
			if ip, ok := netip.AddrFromSlice(a.Bytes()); ok {
				r.Destination = netip.PrefixFrom(ip, bits)
			}
		case unix.RTA_TABLE:
			r.Table = int(a.Uint32())
		case unix.RTA_OIF:
			r.links = append(r.links, int(a.Uint32()))
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			r.gateway = true
		case rtaNhID:
			r.object, r.gateway = a.Uint32(), true
		case unix.RTA_MULTIPATH: // struct rtnexthop: length, flags, hops, ifindex, then attributes
			r.gateway = true
			for hops := a.Bytes(); len(hops) >= sizeofRtNexthop; {
				length := (int(binary.NativeEndian.Uint16(hops)) + 3) &^ 3
				r.links = append(r.links, int(binary.NativeEndian.Uint32(hops[4:])))
				if length < sizeofRtNexthop || length > len(hops) {
					break
				}
				hops = hops[length:]
			}
		}
	})
	r.local = kind == unix.RTN_LOCAL || r.Table == unix.RT_TABLE_LOCAL
	return r, err
}

// nextHops are the node's next hop objects by ID (ip-nexthop(8)): routes name only these where the sysctl
// net.ipv4.nexthop_compat_mode is 0.
type nextHops map[uint32]nextHop

type nextHop struct {
	link  int
	group []uint32 // or the IDs of others
}

func (n nextHops) parse(message []byte) error {
	var id uint32
	var hop nextHop
	err := decode(message, sizeofNhmsg, func(a *netlink.AttributeDecoder) {
		switch a.Type() {
		case unix.NHA_ID:
			id = a.Uint32()
		case unix.NHA_OIF:
			hop.link = int(a.Uint32())
		case unix.NHA_GROUP: // struct nexthop_grp: ID, weight, padding
			for group := a.Bytes(); len(group) >= sizeofNextHopGrp; group = group[sizeofNextHopGrp:] {
				hop.group = append(hop.group, binary.NativeEndian.Uint32(group))
			}
		}
	})
	n[id] = hop
	return err
}

func (n nextHops) links(id uint32) (links []int) {
	hop := n[id]
	if hop.link != 0 {
		links = append(links, hop.link)
	}
	for _, member := range hop.group { // groups are not nested
		if link := n[member].link; link != 0 {
			links = append(links, link)
		}
	}
	return links
}

type sysctl struct{ loaded, on bool }

// passes says whether the frames of a bridge with this flag of its own pass netfilter.
func (s sysctl) passes(own bool) bool { return s.on || s.loaded && own }

// bridgeSysctl reads net.bridge.bridge-nf-call-<tables>, which is per network namespace. It is missing
// where br_netfilter is not loaded: then no bridge's frames pass netfilter, whatever its own flag says.
func bridgeSysctl(tables string) sysctl {
	value, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-" + tables)
	return sysctl{loaded: err == nil, on: err == nil && strings.TrimSpace(string(value)) != "0"}
}
