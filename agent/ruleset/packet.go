// Package ruleset evaluates the rules of iptables and nftables for one packet: whether a chain of iptables lets it pass, and which
// rules of others translate its destination, or stop it before that.
//
// It knows the matches on interfaces, addresses, sets, protocol, port and state. What depends on any other match, or on what is
// not known of the packet, is Unknown, never a guess.
package ruleset

import (
	"net/netip"
	"strings"
)

// Packet is the first packet of a connection. What is empty, invalid or 0 is not known.
type Packet struct {
	In, Out     string
	Source      netip.Addr
	Destination netip.AddrPort
	Protocol    string
	// Translated: its destination was translated before.
	Translated bool
}

// of reports whether it passes chains of this family of nftables.
func (p Packet) of(family string) bool {
	switch family {
	case "ip":
		return p.Destination.Addr().Is4()
	case "ip6":
		return p.Destination.Addr().Is6()
	}
	return family != "arp"
}

// certainty reports whether a packet meets a condition.
type certainty int

const (
	no certainty = iota
	maybe
	yes
)

func sure(is bool) certainty {
	if is {
		return yes
	}
	return no
}

func (c certainty) not() certainty { return yes - c }

// among reports whether text is one of these; nothing is known of empty text.
func among(text string, of ...string) certainty {
	if text == "" {
		return maybe
	}
	for _, one := range of {
		if one == text {
			return yes
		}
	}
	return no
}

// within reports whether the port is in one of these ranges.
func within(port uint16, ranges ...[2]int) certainty {
	if port == 0 {
		return maybe
	}
	for _, r := range ranges {
		if r[0] <= int(port) && int(port) <= r[1] {
			return yes
		}
	}
	return no
}

// covers reports whether text, which is an address, a prefix or a range of addresses, has the address. wide says that it has every one.
func covers(text string, address netip.Addr) (covers certainty, wide bool) {
	if !address.IsValid() {
		return maybe, false
	}
	if first, last, isRange := strings.Cut(text, "-"); isRange {
		from, err := netip.ParseAddr(first)
		to, errTo := netip.ParseAddr(last)
		return sure(err == nil && errTo == nil && from.Compare(address) <= 0 && address.Compare(to) <= 0), false
	}
	if prefix, err := netip.ParsePrefix(text); err == nil {
		return sure(prefix.Contains(address)), prefix.Bits() == 0
	}
	one, err := netip.ParseAddr(text)
	return sure(err == nil && one == address), false
}

// walk is the way of a packet through chains to the rules that translate it.
type walk struct {
	seen map[step]bool
	// found are the rules that say so, by the place that the caller gives them, in order.
	found []string
}

type step struct {
	chain, aim string
	sure       bool
}

// enter reports whether a chain is still to be looked at.
func (w *walk) enter(s step) bool {
	if w.seen[s] {
		return false
	}
	w.seen[s] = true
	return true
}

// translated takes down what translates the packet: the rule that chose it for its destination (aim), or else one that takes any.
func (w *walk) translated(by, aim string, sure bool) {
	switch {
	case aim != "":
		by = aim
	case !sure: // whether it takes this packet is not known, and nothing says that it is meant
		return
	}
	for _, known := range w.found {
		if known == by {
			return
		}
	}
	w.found = append(w.found, by)
}
