package ask

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The addresses are of the loopback interface: what answers there is this test.
func TestAll(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it only binds
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	packets, err := net.ListenPacket("udp", "127.0.0.1:0") //nolint:noctx // it only binds
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = packets.Close() }()
	echo, err := net.ListenPacket("udp", "127.0.0.1:0") //nolint:noctx // it only binds
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = echo.Close() }()
	go func() {
		for {
			_, from, err := echo.ReadFrom(make([]byte, 10))
			if err != nil {
				return
			}
			_, _ = echo.WriteTo([]byte("x"), from)
		}
	}()
	port := func(address net.Addr) uint16 { return netip.MustParseAddrPort(address.String()).Port() }
	closed, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it only binds
	if err != nil {
		t.Fatal(err)
	}
	nobody := port(closed.Addr()) // nobody listens there, for TCP nor for UDP
	_ = closed.Close()

	for _, test := range []struct {
		name     string
		protocol runtimedir.Protocol
		port     uint16
		action   string
		reason   string
		wrong    bool
		text     string
	}{
		{"accepted", "tcp", port(listener.Addr()), "serve", "", false, "accepted in"},
		{"refused by the endpoint", "tcp", nobody, "serve", "", true, "refused in"},
		{"rejected", "tcp", nobody, "reject", "", false, "refused in"},
		{"accepted without an endpoint", "tcp", port(listener.Addr()), "reject", "", true, "accepted in"},
		{"silent", "udp", port(packets.LocalAddr()), "serve", "", false, "sent, not refused"},
		{"answered", "udp", port(echo.LocalAddr()), "serve", "", false, "answered"},
		{"refused datagram", "udp", nobody, "serve", "", true, "refused; endpoint"},
		{"rejected datagram", "udp", nobody, "reject", "", false, "refused; no endpoint"},
		{"rejection that the kernel held back", "udp", port(packets.LocalAddr()), "reject", "", false, "no answer"},
		{"answered without an endpoint", "udp", port(echo.LocalAddr()), "reject", "", true, "answered; no endpoint"},
		{"held", "tcp", nobody, "hold", "", false, "noEndpoint is hold"},
		{"passed", "udp", nobody, "pass", "", false, "noEndpoint is pass"},
		{"another protocol", "sctp", nobody, "serve", "", false, "not asked: sctp"},
		{"unserved", "tcp", port(listener.Addr()), "", "claimed by another agent", true, "unserved: claimed by another agent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			address := netip.MustParseAddr("127.0.0.1")
			m := runtimedir.MagicIP{
				Frontend: runtimedir.Frontend{Address: address, Protocol: test.protocol, Port: test.port}, Action: test.action, Reason: test.reason,
				Endpoints: []runtimedir.Endpoint{{Address: netip.AddrPortFrom(address, test.port), Pod: "n/p"}},
			}
			got := All(context.Background(), []runtimedir.MagicIP{m})
			if len(got) != 1 || got[0].Wrong != test.wrong || !strings.Contains(got[0].Text, test.text) {
				t.Errorf("got %v, want wrong: %v, %q", got, test.wrong, test.text)
			}
		})
	}
}

// The status is another process' text.
func TestOutcomeIsQuoted(t *testing.T) {
	got := All(context.Background(), []runtimedir.MagicIP{{Frontend: runtimedir.Frontend{Address: netip.MustParseAddr("127.0.0.1"), Protocol: "tcp", Port: 1}, Reason: "\x1b[2J\n"}})
	got[0].Frontend.Protocol = "tcp\x1b]0;x\a\nok  "
	if text := got[0].String(); strings.ContainsAny(text, "\x1b\a\n") {
		t.Errorf("printed as %q", text)
	}
}

// Many frontends are asked at the same time, and the outcomes stand in their order.
func TestAllInOrder(t *testing.T) {
	var magicIPs []runtimedir.MagicIP
	for i := range uint16(200) {
		magicIPs = append(magicIPs, runtimedir.MagicIP{Frontend: runtimedir.Frontend{Address: netip.MustParseAddr("127.0.0.1"), Protocol: "sctp", Port: i + 1}, Action: "serve"})
	}
	for i, o := range All(context.Background(), magicIPs) {
		if o.Frontend != magicIPs[i].Frontend {
			t.Fatalf("outcome %d is of %s", i, o.Frontend)
		}
	}
}
