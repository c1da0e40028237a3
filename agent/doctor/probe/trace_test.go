package probe

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// The plan: the client is 10.244.1.254 behind veth1 on cni0, the endpoint 10.244.1.3 behind veth2.
var (
	source   = netip.MustParseAddrPort("10.244.1.254:40000")
	magic    = netip.MustParseAddrPort("169.254.210.210:80")
	endpoint = netip.MustParseAddrPort("10.244.1.3:8080")
	stranger = netip.MustParseAddrPort("192.0.2.9:80")
	bridge   = netip.MustParseAddrPort("10.244.1.1:40000")
)

func in(link string, from, to netip.AddrPort) Packet { return Packet{Link: link, From: from, To: to} }
func out(link string, from, to netip.AddrPort) Packet {
	return Packet{Link: link, Out: true, From: from, To: to}
}
func reset(p Packet) Packet { p.Reset = true; return p }

func TestTrace(t *testing.T) {
	arrived := []Packet{in("veth1", source, magic), in("cni0", source, magic)}
	forwarded := slices.Concat(arrived, []Packet{out("cni0", source, endpoint), out("veth2", source, endpoint)})
	reply := slices.Concat(forwarded, []Packet{in("veth2", endpoint, source), in("cni0", endpoint, source)})
	flow := func(server netip.AddrPort, replied bool) *conntrack.Entry {
		return &conntrack.Entry{Flow: plan.Flow{Protocol: plan.TCP, Source: source, Destination: magic, Server: server}, ReplyTo: source, Replied: replied}
	}
	for _, test := range []struct {
		name     string
		evidence Evidence
		hop      Hop
		text     string
	}{
		{"answered", Evidence{Result: Success, Sniffed: true, Packets: reply}, Answered, "answered by 10.244.1.3:8080"},
		{"answered, not seen", Evidence{Result: Success}, Answered, "answered"},
		{"no route", Evidence{Result: Failure, Err: unix.ENETUNREACH, Sniffed: true}, Client, "cannot send to 169.254.210.210: network is unreachable"},
		{"no route, nothing seen", Evidence{Result: Failure, Err: unix.ENETUNREACH}, Client, "network is unreachable"},
		{"its next hop does not answer", Evidence{Sniffed: true}, Client, "no SYN of the client reached the node"},
		{"rejected", Evidence{Result: Refusal, Sniffed: true, Packets: append(arrived[:2:2], reset(out("cni0", magic, source)))}, Rejected, "the node rejected the SYN by cni0"},
		{"rejected, not seen", Evidence{Result: Refusal}, Rejected, "the node rejected the SYN"},
		{"dropped", Evidence{Sniffed: true, Packets: arrived}, Node, "the SYN came in by cni0, and nothing left the node for an endpoint"},
		{"dropped, not seen", Evidence{}, Node, "the SYN was sent, and nothing left"},
		{"a filter's ICMP", Evidence{Result: Failure, Err: unix.EHOSTUNREACH, Sniffed: true, Packets: arrived}, Node, "no route to host"},
		{"the node's own, dropped", Evidence{Local: true, Sniffed: true}, Node, "a process of the node sent the SYN, and nothing left the node"},
		{"the node's own, not let out", Evidence{Local: true, Sniffed: true, Result: Failure, Err: unix.EPERM}, Output, "the node let no SYN out"},
		{"to an impostor", Evidence{Result: Success, Sniffed: true, Packets: append(arrived[:2:2], out("eth0", source, stranger))}, Astray, "translated to 192.0.2.9:80 by eth0"},
		{"to an impostor, not seen", Evidence{Flow: flow(stranger, false)}, Astray, "translated to 192.0.2.9:80"},
		{"untranslated", Evidence{Sniffed: true, Packets: append(arrived[:2:2], out("eth0", source, magic))}, Astray, "left the node untranslated by eth0"},
		{"untranslated, not seen", Evidence{Flow: flow(magic, false)}, Astray, "left the node untranslated"},
		{"refused by the endpoint", Evidence{Result: Refusal, Sniffed: true, Packets: append(forwarded[:4:4], reset(in("veth2", endpoint, source)), reset(out("cni0", magic, source)))}, Refused, "10.244.1.3:8080 refused the SYN"},
		{"refused by the endpoint, not seen", Evidence{Result: Refusal, Flow: flow(endpoint, true)}, Refused, "10.244.1.3:8080 refused"},
		{"the endpoint is silent", Evidence{Sniffed: true, Packets: forwarded}, Silent, "sent to 10.244.1.3:8080 by veth2, which did not answer"},
		{"silence, not seen", Evidence{Flow: flow(endpoint, false)}, Silent, "no answer of it came back through the node"},
		{"the reply bypasses the rules", Evidence{Sniffed: true, Packets: append(forwarded[:4:4], in("veth2", endpoint, source), out("veth1", endpoint, source))}, Reply, "went to the client by veth1 untranslated"},
		{"the reply is dropped", Evidence{Sniffed: true, Packets: reply}, Reply, "did not leave the node for the client"},
		{"the reply is lost, not seen", Evidence{Flow: flow(endpoint, true)}, Reply, "did not reach the client"},
		{"masqueraded and silent", Evidence{Sniffed: true, Packets: append(arrived[:2:2], out("cni0", bridge, endpoint))}, Silent, "10.244.1.3:8080"},
	} {
		e := test.evidence
		e.Target = Target{Frontend: plan.Frontend{Address: magic.Addr(), Port: magic.Port(), Protocol: plan.TCP}, Endpoints: []netip.AddrPort{endpoint}}
		e.Source = source
		if got := e.trace(); got.Hop != test.hop || !strings.Contains(got.Text, test.text) {
			t.Errorf("%s: %s: %s; want %s: %s", test.name, got.Hop, got.Text, test.hop, test.text)
		}
	}
}
