package probe

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Hop is where a probe ended.
type Hop string

// The hops, in the order in which a probe passes them.
const (
	// Client: no packet reached the node.
	Client Hop = "client"
	// Rejected: the node answered the client that nothing listens, before any translation.
	Rejected Hop = "rejected"
	// Output: the node let no packet of its own process go out (EPERM): a rule in the output hook drops or rejects it.
	Output Hop = "output"
	// Node: the packet reached the node, and no translated one left it: dropped, by rules, by routing or by a filter.
	Node Hop = "node"
	// Astray: the packet left the node as it was, or to an address that is no endpoint.
	Astray Hop = "astray"
	// Refused: the endpoint answered that nothing listens.
	Refused Hop = "refused"
	// Silent: the packet went to the endpoint, and nothing came back.
	Silent Hop = "silent"
	// Reply: the endpoint answered, and the answer did not reach the client, or not from the magic IP.
	Reply Hop = "reply"
	// Answered: the client has its answer.
	Answered Hop = "answered"
	// Unknown: what was seen does not tell.
	Unknown Hop = "unknown"
)

// Result is what the client's socket said.
type Result int

// The results.
const (
	Silence Result = iota // until the time was up
	Success               // TCP: connected; UDP: a datagram came back
	Refusal               // ECONNREFUSED
	Failure               // any other error
)

// Evidence is what was seen of one probe.
type Evidence struct {
	Target
	// Source is the client's address and port; only the port where no route leads to the magic IP.
	Source netip.AddrPort
	Result Result
	// Err is the socket's error where Result is Failure.
	Err error
	// Sniffed: the links of the node were listened at, and Packets are those of this probe, in order.
	Sniffed bool
	Packets []Packet
	// Local: the client is the node itself.
	Local bool
	// Flow is the entry in conntrack, nil where there was none.
	Flow *conntrack.Entry
}

// Packet is one packet of a probe at a link of the node.
type Packet struct {
	Link string
	// Out: it left the node by the link.
	Out      bool
	From, To netip.AddrPort
	// Reset is a TCP reset.
	Reset bool
}

// Trace is where a probe ended.
type Trace struct {
	Evidence
	Hop Hop
	// Link is the link that the packet came in by; empty where that was not seen.
	Link string
	// Text says what was seen, without its cause.
	Text string
}

// trace draws the conclusion from what was seen.
func (e Evidence) trace() Trace {
	t := Trace{Evidence: e}
	for _, p := range e.Packets { // the port of a bridge comes first, and then the bridge
		if !p.Out && p.From == e.Source && p.To == e.AddrPort() {
			t.Link = p.Link
		}
	}
	t.Hop, t.Text = e.hop(t.Link)
	return t
}

func (e *Evidence) hop(link string) (Hop, string) {
	server, out := e.server()
	known := server.IsValid()
	endpoint := slices.Contains(e.Endpoints, server)
	what := map[bool]string{true: "SYN", false: "datagram"}[e.Protocol == plan.TCP]
	by := ""
	if link != "" {
		by = " by " + link
	}
	switch {
	case known && server == e.AddrPort():
		return Astray, fmt.Sprintf("the %s left the node untranslated%s", what, out)
	case known && !endpoint:
		return Astray, fmt.Sprintf("the %s was translated to %s%s, which is no endpoint of the magic IP", what, server, out)
	case e.Result == Success && known:
		return Answered, fmt.Sprintf("answered by %s", server)
	case e.Result == Success:
		return Answered, "answered"
	case known:
		return e.behind(server, out, what)
	case e.Local && errors.Is(e.Err, unix.EPERM):
		return Output, fmt.Sprintf("the node let no %s out: its output hook drops or rejects it (%v)", what, e.Err)
	case e.Result == Failure && !e.arrived(link):
		return Client, fmt.Sprintf("the client cannot send to %s: %v", e.Address, e.Err)
	case e.Result == Refusal:
		return Rejected, fmt.Sprintf("the node rejected the %s%s", what, by)
	case e.Sniffed && !e.Local && link == "":
		return Client, fmt.Sprintf("no %s of the client reached the node: its next hop does not answer, or what it sends is dropped on the way", what)
	case e.Result == Failure:
		return Node, fmt.Sprintf("the %s came in%s and the node answered: %v", what, by, e.Err)
	case e.Sniffed || e.Protocol == plan.TCP || e.Flow == nil:
		came := fmt.Sprintf("the %s came in%s", what, by)
		switch {
		case e.Local:
			came = fmt.Sprintf("a process of the node sent the %s", what)
		case link == "":
			came = fmt.Sprintf("the %s was sent", what)
		}
		return Node, came + ", and nothing left the node for an endpoint: it was dropped"
	}
	return Unknown, "nothing came back"
}

// arrived reports whether a packet of the client was seen at the node.
func (e *Evidence) arrived(link string) bool { return link != "" || e.Flow != nil }

// behind is about a packet that was translated to an endpoint and brought no success.
func (e *Evidence) behind(server netip.AddrPort, out, what string) (Hop, string) {
	came, reset := false, false
	var back []Packet // answers that left the node for the client
	for _, p := range e.Packets {
		switch {
		case p.From == server && !p.Out:
			came, reset = true, reset || p.Reset
		case p.To == e.Source && p.Out && p.From != e.Source:
			back = append(back, p)
		}
	}
	bypassed := slices.IndexFunc(back, func(p Packet) bool { return p.From == server })
	translated := slices.ContainsFunc(back, func(p Packet) bool { return p.From == e.AddrPort() })
	switch {
	case e.Result == Refusal:
		return Refused, fmt.Sprintf("%s refused the %s: nothing listens there", server, what)
	case bypassed >= 0 && !translated:
		return Reply, fmt.Sprintf("%s answered, but its answer went to the client by %s untranslated, as from %s: the client knows nothing of that", server, back[bypassed].Link, server)
	case came && translated:
		return Reply, fmt.Sprintf("%s answered and the answer left the node for the client, which did not accept it", server)
	case came && reset:
		return Refused, fmt.Sprintf("%s refused the %s", server, what)
	case came:
		return Reply, fmt.Sprintf("%s answered, and the answer did not leave the node for the client", server)
	case !e.Sniffed && e.Flow != nil && e.Flow.Replied:
		return Reply, fmt.Sprintf("%s answered, and the answer did not reach the client", server)
	case !e.Sniffed:
		return Silent, fmt.Sprintf("the %s was translated to %s, and no answer of it came back through the node", what, server)
	case e.Result == Failure:
		return Silent, fmt.Sprintf("the %s was translated to %s, and the answer was: %v", what, server, e.Err)
	}
	return Silent, fmt.Sprintf("the %s was sent to %s%s, which did not answer", what, server, out)
}

// server is where the node sent the packet; out says by which link. It is invalid where no packet is known to have left.
func (e *Evidence) server() (server netip.AddrPort, out string) {
	for _, p := range e.Packets {
		// What is masqueraded comes from another address; a packet to the client itself is an answer.
		if p.Out && p.To != e.Source && p.To.Port() != e.Source.Port() && (p.From == e.Source || slices.Contains(e.Endpoints, p.To)) {
			server, out = p.To, " by "+p.Link
		}
	}
	if !server.IsValid() && e.Flow != nil {
		return e.Flow.Server, ""
	}
	return server, out
}

// String is a line for people.
func (t Trace) String() string {
	from := "a client"
	if t.Source.Addr().IsValid() {
		from = t.Source.Addr().String()
	}
	return strings.TrimSpace(fmt.Sprintf("from %s to %s: %s", from, t.Frontend, t.Text))
}
