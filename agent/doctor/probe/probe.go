// Package probe sends packets to magic IPs as a pod does, and says how far they come.
//
// It connects and sends no data: a TCP connection is closed again at once, a datagram is empty. What tells the way is the
// socket's result, the packets of the probe at the links of the node (a packet socket, where CAP_NET_RAW allows one) and its
// entry in conntrack, which is deleted at the end. Limits: SCTP is not probed; a server need not answer an empty datagram.
package probe

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Target is a magic IP and where packets to it should go.
type Target struct {
	plan.Frontend
	Endpoints []netip.AddrPort
}

// maxTargets is how many targets one run takes: each has a source port in one aligned block, by which its packets are known.
const maxTargets = 32

// ErrNotPermitted says that entering or making a network namespace needs CAP_SYS_ADMIN.
var ErrNotPermitted = errors.New("network namespaces cannot be entered without CAP_SYS_ADMIN")

// Run probes the targets, 32 at most, from the network namespace, each for as long as timeout. It is called in the network
// namespace of the node.
func Run(ctx context.Context, client netns.NsHandle, targets []Target, timeout time.Duration) ([]Trace, error) {
	targets = targets[:min(len(targets), maxTargets)]
	here, err := netns.Get()
	if err != nil {
		return nil, err
	}
	defer func() { _ = here.Close() }()
	base, err := freePorts(client)
	if err != nil {
		return nil, err
	}
	sniffer, err := newSniffer(base)
	if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	evidence := make([]Evidence, len(targets))
	var group sync.WaitGroup
	for i, target := range targets {
		group.Go(func() {
			e := &evidence[i]
			*e = Evidence{Target: target, Source: netip.AddrPortFrom(netip.Addr{}, base+uint16(i)), Local: here.Equal(client), Sniffed: sniffer != nil}
			if err := within(client, func() error { e.ask(ctx, timeout); return nil }); err != nil {
				e.Result, e.Err = Failure, err
			}
		})
	}
	group.Wait()
	packets := sniffer.stop()
	var traces []Trace
	for _, e := range evidence {
		for _, p := range packets {
			if e.owns(p) {
				e.Packets = append(e.Packets, p)
			}
		}
		if e.Source.Addr().IsValid() {
			// Without the rights to ask, the packets have to do.
			for _, zone := range e.zones() {
				if flow, found, err := (conntrack.Table{}).Lookup(e.Protocol, e.Source, e.AddrPort(), zone); err == nil && found {
					e.Flow = &flow
					_ = conntrack.Table{}.Delete(flow)
				}
			}
		}
		traces = append(traces, e.trace())
	}
	return traces, nil
}

// zones are those that the flow of the probe may be in.
func (e *Evidence) zones() []uint16 {
	zones := []uint16{0}
	for _, endpoint := range e.Endpoints {
		zones = append(zones, plan.ZoneOf(endpoint.Addr()))
	}
	return zones
}

// owns reports whether a packet is one of this probe: by the client's port, and an address that belongs to it.
func (e *Evidence) owns(p Packet) bool {
	if p.From.Port() != e.Source.Port() && p.To.Port() != e.Source.Port() {
		return false
	}
	for _, address := range []netip.AddrPort{p.From, p.To} {
		if address == e.Source || address == e.AddrPort() {
			return true
		}
		for _, endpoint := range e.Endpoints {
			if address == endpoint {
				return true
			}
		}
	}
	return false
}

// ask sends, and waits for what becomes of it. It runs in the client's namespace.
func (e *Evidence) ask(ctx context.Context, timeout time.Duration) {
	network, local := string(e.Protocol), net.Addr(&net.TCPAddr{Port: int(e.Source.Port())})
	if e.Protocol == plan.UDP {
		local = &net.UDPAddr{Port: int(e.Source.Port())}
	}
	if address, err := sourceTo(e.AddrPort()); err == nil {
		e.Source = netip.AddrPortFrom(address, e.Source.Port())
	}
	dialer := net.Dialer{Timeout: timeout, LocalAddr: local}
	conn, err := dialer.DialContext(ctx, network, e.AddrPort().String())
	if err == nil && e.Protocol == plan.UDP {
		err = exchange(ctx, conn.(*net.UDPConn), timeout)
	}
	if conn != nil {
		_ = conn.Close()
	}
	switch {
	case err == nil:
		e.Result = Success
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET):
		e.Result = Refusal
	case isTimeout(err):
		e.Result = Silence
	default:
		e.Result, e.Err = Failure, cause(err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// cause is the system's error, without the addresses that the text around it has already.
func cause(err error) error {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// exchange sends empty datagrams, and is nil once one comes back.
func exchange(ctx context.Context, conn *net.UDPConn, timeout time.Duration) error {
	const sends = 3 // a link that was just made may not be served yet
	deadline := time.Now().Add(timeout)
	for i := range sends {
		if _, _, err := conn.WriteMsgUDP(nil, nil, nil); err != nil {
			return err
		}
		if err := conn.SetReadDeadline(deadline.Add(-timeout * time.Duration(sends-1-i) / sends)); err != nil {
			return err
		}
		_, err := conn.Read(make([]byte, 1))
		if err == nil || !isTimeout(err) || ctx.Err() != nil {
			return err
		}
	}
	return os.ErrDeadlineExceeded
}

// sourceTo is the address that the calling thread's namespace sends from; nothing is sent.
func sourceTo(to netip.AddrPort) (netip.Addr, error) {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return netip.Addr{}, err
	}
	defer func() { _ = conn.Close() }()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// freePorts finds an aligned block of maxTargets ports that nothing in the namespace is bound to, and returns the first.
func freePorts(client netns.NsHandle) (base uint16, err error) {
	const first, last = 32768, 60999 // net.ipv4.ip_local_port_range of the kernel
	for range 64 {
		base = (first + uint16(rand.N(last-first-maxTargets))) &^ (maxTargets - 1)
		free := true
		err := within(client, func() error {
			for port := base; port < base+maxTargets && free; port++ {
				for _, bind := range []func() (interface{ Close() error }, error){
					func() (interface{ Close() error }, error) { return net.ListenTCP("tcp", &net.TCPAddr{Port: int(port)}) },
					func() (interface{ Close() error }, error) { return net.ListenUDP("udp", &net.UDPAddr{Port: int(port)}) },
				} {
					socket, err := bind()
					if err != nil {
						free = false
						return nil //nolint:nilerr // the port is in use
					}
					_ = socket.Close()
				}
			}
			return nil
		})
		if err != nil || free {
			return base, err
		}
	}
	return 0, errors.New("the client has no 32 free ports in a row")
}

// within runs f in a network namespace; sockets that f opens stay there. To run it in the caller's own needs no rights.
func within(namespace netns.NsHandle, f func() error) error {
	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer func() { _ = origin.Close() }()
	if origin.Equal(namespace) {
		defer runtime.UnlockOSThread()
		return f()
	}
	if err := netns.Set(namespace); err != nil {
		runtime.UnlockOSThread()
		if errors.Is(err, unix.EPERM) {
			return ErrNotPermitted
		}
		return fmt.Errorf("entering the network namespace: %w", err)
	}
	err = f()
	// A thread that cannot go back stays locked: it ends with its goroutine.
	if back := netns.Set(origin); back != nil {
		return errors.Join(err, fmt.Errorf("leaving the network namespace: %w", back))
	}
	runtime.UnlockOSThread()
	return err
}

// Open opens the network namespace at a path.
func Open(path string) (netns.NsHandle, error) {
	// Not blocking: the path may be a FIFO.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return netns.None(), &os.PathError{Op: "open", Path: path, Err: err}
	}
	handle := netns.NsHandle(fd)
	// A namespace may be empty of everything and its path a plain file still: the one that was bound there is gone.
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		_ = handle.Close()
		return netns.None(), fmt.Errorf("%s is not a network namespace: the one that was there is gone", path)
	}
	return handle, nil
}
