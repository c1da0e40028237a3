package probe

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Site is a network namespace that is joined to the node as a pod's would be.
//
// The namespace has no name and the link to it is made with its other end inside: the kernel takes both away when this
// process ends, however it ends. Routes and addresses go with the link. A link that outlives its process, because
// another process holds the namespace open, is removed by the next run, by the link's name and alias.
type Site struct {
	Namespace netns.NsHandle
	// Link is the node's end.
	Link string
	// Addresses are those inside, of at most one a family.
	Addresses []netip.Addr
	claims    []net.PacketConn
}

const (
	linkPrefix  = "mipdoc"
	aliasPrefix = "magic-ip-agent doctor until boot+"
	// lifetime is how long a link is left alone that another run has made.
	lifetime = 2 * time.Minute
)

// Gateways inside where there is no bridge: no link has these addresses, as with Calico.
var (
	gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1}) //nolint:gochecknoglobals // constants
	gateway6 = netip.MustParseAddr("fe80::1")           //nolint:gochecknoglobals // constants
)

// NewSite makes one: a port of the bridge of this name, or a veth with routes to it where the name is empty. taken are
// addresses that pods have.
func NewSite(bridge string, taken []netip.Addr) (site *Site, err error) {
	if err := removeLeftovers(); err != nil {
		return nil, err
	}
	namespace, err := newNamespace()
	if err != nil {
		return nil, err
	}
	s := &Site{Namespace: namespace, Link: fmt.Sprintf("%s%08x", linkPrefix, rand.Uint32())}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	veth := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "eth0", PeerNamespace: netlink.NsFd(namespace)}
	veth.Name = s.Link
	var networks []network
	if bridge != "" {
		master, err := netlink.LinkByName(bridge)
		if err != nil {
			return nil, fmt.Errorf("bridge %s: %w", bridge, err)
		}
		veth.MasterIndex, veth.MTU = master.Attrs().Index, master.Attrs().MTU
		if networks, err = s.freeAddresses(master, taken); err != nil {
			return nil, err
		}
		veth.PeerHardwareAddr = hardware(networks[0].Addr())
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("veth %s: %w", s.Link, err)
	}
	outside, err := netlink.LinkByName(s.Link)
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetAlias(outside, aliasPrefix+strconv.FormatInt(int64((sinceBoot()+lifetime)/time.Second), 10)); err != nil {
		return nil, err
	}
	if bridge != "" {
		if err := isolateLikeOthers(outside); err != nil {
			return nil, err
		}
	}
	if err := netlink.LinkSetUp(outside); err != nil {
		return nil, err
	}
	handle, err := netlink.NewHandleAt(namespace)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	inside, err := handle.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	if err := errors.Join(handle.LinkSetUp(inside), loopbackUp(handle)); err != nil {
		return nil, err
	}
	if bridge != "" {
		return s, s.join(handle, inside, networks)
	}
	return s, s.route(handle, inside, outside)
}

// isolateLikeOthers isolates a port of a bridge where any other port of it is isolated (the bridge plugin's option portIsolation).
func isolateLikeOthers(port netlink.Link) error {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, other := range links {
		if other.Attrs().MasterIndex != port.Attrs().MasterIndex {
			continue
		}
		if info, err := netlink.LinkGetProtinfo(other); err == nil && info.Isolated { // one that has gone since is no error
			return netlink.LinkSetIsolated(port, true)
		}
	}
	return nil
}

// Close removes it.
func (s *Site) Close() error {
	link, err := netlink.LinkByName(s.Link)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if errors.As(err, new(netlink.LinkNotFoundError)) || errors.Is(err, unix.ENODEV) {
		err = nil
	}
	for _, claim := range s.claims {
		err = errors.Join(err, claim.Close())
	}
	s.claims = nil
	return errors.Join(err, s.Namespace.Close())
}

// network is a free address of one of a bridge's networks, and the bridge's own there.
type network struct {
	netip.Prefix
	gateway netip.Addr
}

// freeAddresses finds an address for each family that the bridge has.
func (s *Site) freeAddresses(bridge netlink.Link, taken []netip.Addr) (networks []network, err error) {
	addresses, err := netlink.AddrList(bridge, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("addresses of bridge %s: %w", bridge.Attrs().Name, err)
	}
	for _, a := range addresses {
		gateway, ok := netip.AddrFromSlice(a.IP)
		gateway = gateway.Unmap()
		bits, _ := a.Mask.Size()
		if !ok || !gateway.IsGlobalUnicast() || slices.ContainsFunc(networks, func(n network) bool { return n.gateway.Is4() == gateway.Is4() }) {
			continue
		}
		if address, free := s.freeAddress(netip.PrefixFrom(gateway, bits), bridge.Attrs().Index, taken); free {
			networks = append(networks, network{netip.PrefixFrom(address, bits), gateway})
		}
	}
	if len(networks) == 0 {
		return nil, fmt.Errorf("bridge %s has no address with a free one beside it", bridge.Attrs().Name)
	}
	return networks, nil
}

// hardware is the hardware address that goes with an address: always the same, since pods remember for a while which one an
// earlier run had. Locally administered.
func hardware(address netip.Addr) net.HardwareAddr {
	bytes := address.As16()
	return append(net.HardwareAddr{0x0e, 'm'}, bytes[12:]...)
}

// join gives it its addresses, and the bridge as the gateway.
func (s *Site) join(handle *netlink.Handle, inside netlink.Link, networks []network) error {
	for _, n := range networks {
		if err := s.add(handle, inside, n.Prefix); err != nil {
			return err
		}
		if err := handle.RouteAdd(&netlink.Route{LinkIndex: inside.Attrs().Index, Gw: net.IP(n.gateway.AsSlice())}); err != nil {
			return fmt.Errorf("default route by %s: %w", n.gateway, err)
		}
	}
	return nil
}

// freeAddress finds an address of the bridge's network that nothing answers for, from the far end of where IPAM begins.
func (s *Site) freeAddress(prefix netip.Prefix, bridge int, taken []netip.Addr) (netip.Addr, bool) {
	if prefix.Addr().Is6() {
		if prefix.Bits() > 112 {
			return netip.Addr{}, false
		}
		bytes := prefix.Masked().Addr().As16()
		for i := prefix.Bits()/8 + 1; i < len(bytes); i++ { // the odds that a pod has it are below 1 in 65,000
			bytes[i] = byte(rand.Uint32())
		}
		return netip.AddrFrom16(bytes), true
	}
	if prefix.Bits() > 28 {
		return netip.Addr{}, false
	}
	const candidates = 8
	address := lastOf(prefix).Prev() // the last one is for broadcasts
	for range candidates {
		if address != prefix.Addr() && !slices.Contains(taken, address) && s.claim(address) && !answers(address, bridge) {
			return address, true
		}
		address = address.Prev()
	}
	return netip.Addr{}, false
}

// claim reserves an address among those that run at the same time, by an abstract socket (unix(7)): its name is the network namespace's, and
// goes with the process. ARP does not tell them apart, since all of them have the same hardware address.
func (s *Site) claim(address netip.Addr) bool {
	socket, err := net.ListenPacket("unixgram", "@magic-ip-agent doctor "+address.String())
	if err != nil {
		return false
	}
	s.claims = append(s.claims, socket)
	return true
}

// lastOf is the last address of an IPv4 prefix.
func lastOf(prefix netip.Prefix) netip.Addr {
	bytes := prefix.Masked().Addr().As4()
	for bit := prefix.Bits(); bit < 32; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	return netip.AddrFrom4(bytes)
}

// answers asks by ARP whether anybody on the link has the address. No packet but the question is sent.
func answers(address netip.Addr, link int) bool {
	entry := &netlink.Neigh{LinkIndex: link, IP: net.IP(address.AsSlice()), State: netlink.NUD_NONE, Flags: netlink.NTF_USE, Family: unix.AF_INET}
	if netlink.NeighSet(entry) != nil {
		return true
	}
	defer func() { _ = netlink.NeighDel(&netlink.Neigh{LinkIndex: link, IP: entry.IP, Family: unix.AF_INET}) }()
	for deadline := time.Now().Add(200 * time.Millisecond); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		known, err := netlink.NeighList(link, unix.AF_INET)
		if err != nil {
			return true
		}
		for _, n := range known {
			if n.IP.Equal(entry.IP) && len(n.HardwareAddr) > 0 && n.State&netlink.NUD_FAILED == 0 {
				return !bytes.Equal(n.HardwareAddr, hardware(address))
			}
		}
	}
	return false
}

// route gives it an address of each family, and the node a route to each. Both ends know the other's hardware address.
func (s *Site) route(handle *netlink.Handle, inside, outside netlink.Link) error {
	// Of 198.18.0.0/15 (RFC 2544), which no cluster has pods in, and a unique local prefix of our own.
	four := netip.AddrFrom4([4]byte{198, 18 + byte(rand.N(2)), byte(rand.N(256)), byte(1 + rand.N(254))})
	six := [16]byte{0xfd, 'm', 'i', 'p', 'd', 'o', 'c'}
	for i := 8; i < len(six); i++ {
		six[i] = byte(rand.Uint32())
	}
	for _, pair := range []struct{ address, gateway netip.Addr }{{four, gateway4}, {netip.AddrFrom16(six), gateway6}} {
		ip, bits := net.IP(pair.address.AsSlice()), pair.address.BitLen()
		if err := s.add(handle, inside, netip.PrefixFrom(pair.address, bits)); err != nil {
			if pair.address.Is6() { // a node without IPv6
				return nil //nolint:nilerr // IPv4 does
			}
			return err
		}
		family := unix.AF_INET
		if pair.address.Is6() {
			family = unix.AF_INET6
		}
		neighbour := func(link netlink.Link, ip net.IP, hardware net.HardwareAddr) *netlink.Neigh {
			return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: hardware}
		}
		gateway := net.IP(pair.gateway.AsSlice())
		err := errors.Join(
			handle.NeighSet(neighbour(inside, gateway, outside.Attrs().HardwareAddr)),
			handle.RouteAdd(&netlink.Route{LinkIndex: inside.Attrs().Index, Gw: gateway, Flags: int(netlink.FLAG_ONLINK)}),
			netlink.NeighSet(neighbour(outside, ip, inside.Attrs().HardwareAddr)),
			netlink.RouteAdd(&netlink.Route{LinkIndex: outside.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}}),
		)
		if err != nil {
			return fmt.Errorf("route to %s: %w", pair.address, err)
		}
	}
	return nil
}

func (s *Site) add(handle *netlink.Handle, inside netlink.Link, prefix netip.Prefix) error {
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.IP(prefix.Addr().AsSlice()), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}}
	if prefix.Addr().Is6() {
		address.Flags = unix.IFA_F_NODAD
	}
	if err := handle.AddrAdd(inside, address); err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	s.Addresses = append(s.Addresses, prefix.Addr())
	return nil
}

func loopbackUp(handle *netlink.Handle) error {
	link, err := handle.LinkByName("lo")
	if err != nil {
		return err
	}
	return handle.LinkSetUp(link)
}

// newNamespace makes a network namespace, and stays in the one that it was called in.
func newNamespace() (netns.NsHandle, error) {
	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return netns.None(), err
	}
	defer func() { _ = origin.Close() }()
	namespace, err := netns.New()
	if err != nil {
		runtime.UnlockOSThread()
		if errors.Is(err, unix.EPERM) {
			err = ErrNotPermitted
		}
		return netns.None(), err
	}
	if err := netns.Set(origin); err != nil {
		return netns.None(), errors.Join(err, namespace.Close()) // the thread stays locked, and ends with its goroutine
	}
	runtime.UnlockOSThread()
	return namespace, nil
}

// removeLeftovers removes links of runs that must have ended long ago.
func removeLeftovers() error {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, link := range links {
		until, ours := strings.CutPrefix(link.Attrs().Alias, aliasPrefix)
		seconds, err := strconv.ParseInt(until, 10, 64)
		if !ours || err != nil || !strings.HasPrefix(link.Attrs().Name, linkPrefix) || sinceBoot() < time.Duration(seconds)*time.Second {
			continue
		}
		if err := netlink.LinkDel(link); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("link %s of an earlier run: %w", link.Attrs().Name, err)
		}
	}
	return nil
}

// sinceBoot is a clock that nobody sets.
func sinceBoot() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	return time.Duration(now.Nano())
}
