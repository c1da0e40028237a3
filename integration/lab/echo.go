package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Dial makes connections, as http.Transport.DialContext does.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Dial makes connections from a network namespace of the node.
// Addresses are literal: a name would be looked up with the machine's resolver.
func (n *Node) Dial(namespace string) Dial {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = n.In(namespace, func() error {
			var dialer net.Dialer
			conn, err = dialer.DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

// Listen listens in a network namespace of the node.
func (n *Node) Listen(namespace, network, address string) (listener net.Listener, err error) {
	err = n.whileInUse(namespace, func() error {
		listener, err = net.Listen(network, address)
		return err
	})
	return listener, err
}

// ListenPacket listens for datagrams in a network namespace of the node.
func (n *Node) ListenPacket(namespace, network, address string) (conn net.PacketConn, err error) {
	err = n.whileInUse(namespace, func() error {
		conn, err = net.ListenPacket(network, address)
		return err
	})
	return conn, err
}

// whileInUse listens again for a while where the address is in use: a socket that this process has closed lives on in a child that it has
// forked meanwhile, until that executes its program.
func (n *Node) whileInUse(namespace string, listen func() error) error {
	ctx, cancel := Patience(context.Background(), 5*time.Second)
	defer cancel()
	var other error
	inUse := Eventually(ctx, func() error {
		other = n.In(namespace, listen)
		if errors.Is(other, unix.EADDRINUSE) {
			return other
		}
		return nil
	})
	return cmp.Or(inUse, other)
}

// Answer is what an Echo answers: who it is and from where it saw the request come.
type Answer struct {
	Server string
	Client netip.AddrPort
}

func parseAnswer(line string) (Answer, error) {
	server, client, _ := strings.Cut(line, " ")
	addr, err := netip.ParseAddrPort(client)
	if err != nil {
		return Answer{}, fmt.Errorf("lab: not the answer of an echo server: %q", line)
	}
	return Answer{Server: server, Client: addr}, nil
}

func formatAnswer(server string, client netip.AddrPort) string {
	return server + " " + netip.AddrPortFrom(client.Addr().Unmap(), client.Port()).String()
}

// Echo is a server that answers HTTP requests and datagrams with its name and the client's address.
type Echo struct {
	http *http.Server
	udp  []net.PacketConn
}

// StartEcho starts a server on a TCP and UDP port, on all addresses of a network namespace of the node.
// The name contains no space.
func (n *Node) StartEcho(namespace, name string, port uint16) (*Echo, error) {
	return n.StartEchoAt(namespace, name, fmt.Sprintf(":%d", port))
}

// StartEchoAt is StartEcho on one address (host:port), from which it then answers datagrams too.
func (n *Node) StartEchoAt(namespace, name, address string) (*Echo, error) {
	tcp, err := n.Listen(namespace, "tcp", address)
	if err != nil {
		return nil, err
	}
	udp, err := n.ListenPacket(namespace, "udp", address)
	if err != nil {
		return nil, errors.Join(err, tcp.Close())
	}
	return NewEcho(name, tcp, udp), nil
}

// NewEcho serves on these sockets, which are its own from now on. The name contains no space.
func NewEcho(name string, tcp net.Listener, udp ...net.PacketConn) *Echo {
	return NewSlowEcho(name, 0, tcp, udp...)
}

// NewSlowEcho is NewEcho for a server that takes so long for each answer. Without a socket for datagrams it takes none;
// clients of a Unix socket have the address 0.0.0.0:0.
func NewSlowEcho(name string, delay time.Duration, listener net.Listener, udp ...net.PacketConn) *Echo {
	echo := &Echo{udp: udp}
	echo.http = &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			client, err := netip.ParseAddrPort(r.RemoteAddr)
			if err != nil {
				client = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
			}
			time.Sleep(delay)
			fmt.Fprint(w, formatAnswer(name, client))
		}),
	}
	go func() { _ = echo.http.Serve(listener) }()
	for _, packets := range udp {
		go serveUDP(name, delay, packets)
	}
	return echo
}

// serveUDP answers "<payload>" with "<answer> <payload>".
func serveUDP(name string, delay time.Duration, packets net.PacketConn) {
	buffer := make([]byte, 2048)
	for {
		size, from, err := packets.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		client := from.(*net.UDPAddr).AddrPort()
		answer := fmt.Appendf(nil, "%s %s", formatAnswer(name, client), buffer[:size])
		if delay > 0 {
			time.AfterFunc(delay, func() { _, _ = packets.WriteTo(answer, from) })
		} else {
			_, _ = packets.WriteTo(answer, from)
		}
	}
}

// Shutdown takes no more connections and closes the others when their requests are answered.
func (e *Echo) Shutdown(ctx context.Context) error {
	return errors.Join(e.http.Shutdown(ctx), e.closeUDP())
}

// Close closes all sockets at once, connections included, as a killed process does: clients are told,
// unless the interface has gone before (see Node.Del).
func (e *Echo) Close() error { return errors.Join(e.http.Close(), e.closeUDP()) }

func (e *Echo) closeUDP() (err error) {
	for _, packets := range e.udp {
		err = errors.Join(err, packets.Close())
	}
	return err
}

// Instance names one of the processes that may run under a name, one after the other.
func Instance(name string, started time.Time) string {
	return name + "." + strconv.FormatInt(started.UnixMilli(), 10)
}

// ListenUnix listens at a path, and takes it over from a server that listens there still.
func ListenUnix(path string) (net.Listener, error) {
	temp := path + "." + strconv.FormatInt(time.Now().UnixNano(), 10)
	listener, err := net.Listen("unix", temp)
	if err != nil {
		return nil, err
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // the path may be another server's by then
	if err := os.Rename(temp, path); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}
