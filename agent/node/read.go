package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Snapshot reads links, addresses and routes of the network namespace of the calling thread (rtnetlink).
func (k Kernel) Snapshot() (Snapshot, error) {
	s, err := snapshot(dump, true)
	s.Namespace = k.Namespace()
	return s, err
}

// SnapshotWithoutLocalRoutes is Snapshot but for LocalRoutes, of which there may be thousands.
func (k Kernel) SnapshotWithoutLocalRoutes() (Snapshot, error) {
	s, err := snapshot(dump, false)
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
	if request == unix.RTM_GETROUTE && header[rtmType] != 0 {
		socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
		if err != nil {
			return nil, err
		}
		defer socket.Close()
		// Without it the kernel does not heed the header (Linux before 4.20 never does), and lists all.
		_ = unix.SetsockoptInt(socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
		r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: socket}}
	}
	return r.Execute(unix.NETLINK_ROUTE, reply)
}

// dumpAttempts is how often an interrupted dump is repeated before its last list is taken as it is.
const dumpAttempts = 5

func snapshot(dump dumper, localRoutes bool) (Snapshot, error) {
	var s Snapshot
	read := func(what string, request, reply uint16, header []byte, parse func([]byte)) error {
		var messages [][]byte
		var err error
		for range dumpAttempts {
			if messages, err = dump(request, reply, header); !errors.Is(err, nl.ErrDumpInterrupted) {
				break
			}
		}
		if errors.Is(err, nl.ErrDumpInterrupted) {
			if !slices.Contains(s.Torn, what) {
				s.Torn = append(s.Torn, what)
			}
			err = nil
		}
		if slices.ContainsFunc(messages, func(m []byte) bool { return len(m) < len(header) }) {
			err = unix.EBADMSG
		}
		if err != nil {
			return fmt.Errorf("%s of the node: %w", what, err)
		}
		for _, message := range messages {
			parse(message)
		}
		return nil
	}
	if loose, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_loose"); err == nil {
		s.StrictTCP = strings.TrimSpace(string(loose)) == "0"
	}
	filtered4, filtered6 := bridgeSysctl("iptables"), bridgeSysctl("ip6tables")
	err := read("links", unix.RTM_GETLINK, unix.RTM_NEWLINK, make([]byte, unix.SizeofIfInfomsg), func(message []byte) {
		link, own4, own6 := parseLink(message)
		if link.Kind == "bridge" {
			link.Unfiltered4, link.Unfiltered6 = !filtered4.passes(own4), !filtered6.passes(own6)
		}
		s.Links = append(s.Links, link)
	})
	if err != nil {
		return Snapshot{}, err
	}
	err = read("addresses", unix.RTM_GETADDR, unix.RTM_NEWADDR, make([]byte, unix.SizeofIfAddrmsg), func(message []byte) {
		if address := parseAddress(message); address.Prefix.IsValid() {
			s.Addresses = append(s.Addresses, address)
			s.IPv6 = s.IPv6 || isGlobalIPv6(address.Prefix.Addr())
		}
	})
	if err != nil {
		return Snapshot{}, err
	}
	var objects []routeMessage // routes that name no link, but a next hop object
	parse := func(message []byte) {
		route := parseRoute(message)
		if route.ours && localRoutes {
			s.LocalRoutes = append(s.LocalRoutes, LocalRoute{Address: route.Destination.Addr(), Source: route.source})
		}
		if route.skip || route.local {
			return
		}
		destination := route.Destination.Addr()
		s.IPv6 = s.IPv6 || destination.Is6() && route.Default() || isGlobalIPv6(destination)
		switch {
		case len(route.links) == 0 && route.object != 0:
			objects = append(objects, route)
		default:
			s.add(route.Route, route.links)
		}
	}
	for _, header := range routeHeaders(localRoutes) {
		if err := read("routes", unix.RTM_GETROUTE, unix.RTM_NEWROUTE, header, parse); err != nil {
			return Snapshot{}, err
		}
	}
	if len(objects) == 0 {
		return s, nil
	}
	hops := nextHops{}
	if err := read("next hops", unix.RTM_GETNEXTHOP, unix.RTM_NEWNEXTHOP, make([]byte, sizeofNhmsg), hops.parse); err != nil {
		return Snapshot{}, err
	}
	for _, route := range objects {
		s.add(route.Route, hops.links(route.object))
	}
	return s, nil
}

// routeHeaders ask for all routes, or for the unicast routes of each family: not all families can leave out some.
func routeHeaders(localRoutes bool) (headers [][]byte) {
	if localRoutes {
		return [][]byte{make([]byte, unix.SizeofRtMsg)}
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		header := make([]byte, unix.SizeofRtMsg)
		header[0], header[rtmType] = family, unix.RTN_UNICAST
		headers = append(headers, header)
	}
	return headers
}

func isGlobalIPv6(address netip.Addr) bool { return address.Is6() && address.IsGlobalUnicast() }

func (s *Snapshot) add(route Route, links []int) {
	for _, route.Link = range links {
		s.Routes = append(s.Routes, route)
	}
}

// What x/sys does not name, of linux/if_link.h, linux/if_tun.h, linux/rtnetlink.h and linux/nexthop.h.
const (
	rtmType               = 7 // offset of rtm_type in struct rtmsg
	iflaLinkNetNSID       = 37
	iflaInfoKind          = 1
	iflaInfoData          = 2
	iflaInfoSlaveKind     = 4
	iflaInfoSlaveData     = 5
	iflaBrportMode        = 4 // hairpin
	iflaBrportIsolated    = 33
	iflaTunType           = 3
	iflaBrNfCallIptables  = 36
	iflaBrNfCallIP6tables = 37
	rtaNhID               = 30
	sizeofNhmsg           = 8
	sizeofNexthopGrp      = 8
)

// attributes are those behind a header, or nested in another, by type.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			length := int(binary.NativeEndian.Uint16(b))
			if length < unix.SizeofRtAttr || length > len(b) ||
				!yield(binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK, b[unix.SizeofRtAttr:length]) {
				return
			}
			b = b[min(len(b), (length+3)&^3):] // NLA_ALIGN
		}
	}
}

// number reads a u32, or the u8 or u16 that some attributes have.
func number(b []byte) int {
	switch len(b) {
	case 1:
		return int(b[0])
	case 4:
		return int(int32(binary.NativeEndian.Uint32(b)))
	}
	return 0
}

// parseLink reads struct ifinfomsg and its attributes; filtered4 and filtered6 are a bridge's own flags
// nf_call_iptables and nf_call_ip6tables.
func parseLink(message []byte) (l LinkState, filtered4, filtered6 bool) {
	l.Index = number(message[4:8])
	l.Loopback = binary.NativeEndian.Uint32(message[8:])&unix.IFF_LOOPBACK != 0
	for kind, value := range attributes(message[unix.SizeofIfInfomsg:]) {
		switch kind {
		case unix.IFLA_IFNAME:
			l.Name = unix.ByteSliceToString(value)
		case unix.IFLA_MASTER:
			l.Master = number(value)
		case unix.IFLA_LINK:
			l.Lower = number(value)
		case iflaLinkNetNSID:
			l.Elsewhere, l.NetNS = true, number(value)
		case unix.IFLA_LINKINFO:
			filtered4, filtered6 = l.parseInfo(value)
		}
	}
	return l, filtered4, filtered6
}

func (l *LinkState) parseInfo(info []byte) (filtered4, filtered6 bool) {
	var data, portData []byte
	portKind := ""
	for kind, value := range attributes(info) {
		switch kind {
		case iflaInfoKind:
			l.Kind = unix.ByteSliceToString(value)
		case iflaInfoData:
			data = value
		case iflaInfoSlaveKind:
			portKind = unix.ByteSliceToString(value)
		case iflaInfoSlaveData:
			portData = value
		}
	}
	for kind, value := range attributes(data) {
		switch {
		case l.Kind == "tun" && kind == iflaTunType:
			l.Tap = number(value) == unix.IFF_TAP
		case l.Kind == "bridge" && kind == iflaBrNfCallIptables:
			filtered4 = number(value) != 0
		case l.Kind == "bridge" && kind == iflaBrNfCallIP6tables:
			filtered6 = number(value) != 0
		}
	}
	for kind, value := range attributes(portData) {
		switch {
		case portKind == "bridge" && kind == iflaBrportMode:
			l.Hairpin = number(value) != 0
		case portKind == "bridge" && kind == iflaBrportIsolated:
			l.Isolated = number(value) != 0
		}
	}
	return filtered4, filtered6
}

// parseAddress reads struct ifaddrmsg and its attributes.
func parseAddress(message []byte) (a Address) {
	a.Link = number(message[4:8])
	var address, local []byte
	for kind, value := range attributes(message[unix.SizeofIfAddrmsg:]) {
		switch kind {
		case unix.IFA_ADDRESS:
			address = value
		case unix.IFA_LOCAL: // the node's own, where IFA_ADDRESS is the other end's
			local = value
		}
	}
	if local != nil {
		address = local
	}
	if ip, ok := netip.AddrFromSlice(address); ok {
		a.Prefix = netip.PrefixFrom(ip, int(message[1]))
	}
	return a
}

// routeMessage is a route before its next hops are told apart.
type routeMessage struct {
	Route
	links  []int
	object uint32 // the ID of a next hop object
	// gateway: there is one, or several next hops.
	gateway bool
	local   bool // of the local table: no route to another
	ours    bool // a LocalRoute of an agent, with this source
	source  netip.Addr
	skip    bool // leads nowhere, or is no route
}

// parseRoute reads struct rtmsg and its attributes.
func parseRoute(message []byte) (r routeMessage) {
	family, bits, table, kind := message[0], int(message[1]), message[4], message[rtmType]
	unspecified := netip.IPv4Unspecified()
	switch family {
	case unix.AF_INET:
	case unix.AF_INET6:
		unspecified = netip.IPv6Unspecified()
	default:
		r.skip = true
	}
	cloned := binary.NativeEndian.Uint32(message[8:])&unix.RTM_F_CLONED != 0
	r.skip = r.skip || cloned || kind != unix.RTN_UNICAST && kind != unix.RTN_LOCAL
	r.Table = int(table)
	r.Destination = netip.PrefixFrom(unspecified, bits)
	for kind, value := range attributes(message[unix.SizeofRtMsg:]) {
		switch kind {
		case unix.RTA_DST:
			if ip, ok := netip.AddrFromSlice(value); ok {
				r.Destination = netip.PrefixFrom(ip, bits)
			}
		case unix.RTA_TABLE:
			r.Table = number(value)
		case unix.RTA_PREFSRC:
			r.source, _ = netip.AddrFromSlice(value)
		case unix.RTA_OIF:
			r.links = append(r.links, number(value))
		case unix.RTA_GATEWAY, unix.RTA_VIA:
			r.gateway = true
		case rtaNhID:
			r.object, r.gateway = uint32(number(value)), true
		case unix.RTA_MULTIPATH:
			r.links, r.gateway = append(r.links, nextHopLinks(value)...), true
		}
	}
	r.local = kind == unix.RTN_LOCAL || r.Table == unix.RT_TABLE_LOCAL
	r.ours = r.local && message[5] == routeProtocol
	return r
}

// nextHopLinks reads the ifindexes of struct rtnexthop: length, flags, hops, ifindex, and then attributes.
func nextHopLinks(hops []byte) (links []int) {
	for len(hops) >= unix.SizeofRtNexthop {
		links = append(links, number(hops[4:8]))
		length := (int(binary.NativeEndian.Uint16(hops)) + 3) &^ 3
		if length < unix.SizeofRtNexthop || length > len(hops) {
			break
		}
		hops = hops[length:]
	}
	return links
}

// nextHops are the node's next hop objects by ID (ip-nexthop(8)): routes name only these where the sysctl
// net.ipv4.nexthop_compat_mode is 0.
type nextHops map[uint32]nextHop

type nextHop struct {
	link  int
	group []uint32 // or the IDs of others
}

func (n nextHops) parse(message []byte) {
	var id uint32
	var hop nextHop
	for kind, value := range attributes(message[sizeofNhmsg:]) {
		switch kind {
		case unix.NHA_ID:
			id = uint32(number(value))
		case unix.NHA_OIF:
			hop.link = number(value)
		case unix.NHA_GROUP: // struct nexthop_grp: ID, weight, padding
			for group := value; len(group) >= sizeofNexthopGrp; group = group[sizeofNexthopGrp:] {
				hop.group = append(hop.group, binary.NativeEndian.Uint32(group))
			}
		}
	}
	n[id] = hop
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

// passes reports whether the frames of a bridge with this flag of its own pass netfilter.
func (s sysctl) passes(own bool) bool { return s.on || s.loaded && own }

// bridgeSysctl reads net.bridge.bridge-nf-call-<tables>, which is per network namespace. It is missing
// where br_netfilter is not loaded: then no bridge's frames pass netfilter, whatever its own flag says.
func bridgeSysctl(tables string) sysctl {
	value, err := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-" + tables)
	return sysctl{loaded: err == nil, on: err == nil && strings.TrimSpace(string(value)) != "0"}
}
