// Package filter evaluates the FORWARD chain of iptables for one packet.
//
// It knows the matches on interfaces, addresses, protocol, port and state. Where the verdict depends on any other match it is
// Unknown, never a guess.
package filter

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// Packet is the first packet of a connection, translated, in the forward hook.
type Packet struct {
	In, Out     string
	Source      netip.Addr
	Destination netip.AddrPort
	Protocol    string
}

// Verdict is what becomes of a packet.
type Verdict int

// The verdicts.
const (
	Accept Verdict = iota
	Drop
	Unknown
)

// Forward evaluates the table filter as iptables-save prints it. by is the rule or policy that drops, or may drop, the packet.
func Forward(rules string, p Packet) (verdict Verdict, by string) {
	t := table{policy: map[string]string{}, rules: map[string][]string{}, known: map[string]ends{}, packet: p}
	for line := range strings.Lines(rules) {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 2 && strings.HasPrefix(fields[0], ":"):
			t.policy[fields[0][1:]] = fields[1]
		case len(fields) >= 2 && fields[0] == "-A":
			t.rules[fields[1]] = append(t.rules[fields[1]], strings.TrimSpace(line))
		}
	}
	ends := t.chain("FORWARD")
	accepted := ends.accept
	if ends.goesOn {
		if t.policy["FORWARD"] == "DROP" {
			ends.drop = "the policy of FORWARD"
		} else {
			accepted = true
		}
	}
	switch {
	case ends.drop == "":
		return Accept, ""
	case accepted:
		return Unknown, ends.drop
	}
	return Drop, ends.drop
}

type table struct {
	policy map[string]string
	rules  map[string][]string
	known  map[string]ends // of chains that have been evaluated
	packet Packet
}

// ends are the ways in which a packet may leave a chain.
type ends struct {
	accept bool
	drop   string // the first rule that drops it; empty where none does
	goesOn bool   // it returns to where the chain was called
}

func (t *table) chain(name string) (all ends) {
	if all, known := t.known[name]; known {
		return all
	}
	t.known[name] = ends{goesOn: true} // the kernel loads no loops
	defer func() { t.known[name] = all }()
	for _, rule := range t.rules[name] {
		match, target, jump := t.match(rule)
		if match == no {
			continue
		}
		inner := ends{goesOn: true}
		switch target {
		case "ACCEPT":
			inner = ends{accept: true}
		case "DROP", "REJECT":
			inner = ends{drop: "the rule " + rule}
		case "RETURN":
			all.goesOn = true
			inner = ends{}
		case "", "LOG", "MARK", "CONNMARK", "NFLOG", "TCPMSS", "TRACE":
		default:
			switch _, known := t.policy[target]; {
			case !known: // a target that decides by itself, such as NFQUEUE
				inner = ends{accept: true, drop: "the rule " + rule}
			default:
				inner = t.chain(target)
				if !jump && inner.goesOn { // goto: it returns further up
					all.goesOn, inner.goesOn = true, false
				}
			}
		}
		all.accept = all.accept || inner.accept
		if all.drop == "" {
			all.drop = inner.drop
		}
		if match == yes && !inner.goesOn {
			return all
		}
	}
	all.goesOn = true
	return all
}

type matches int

const (
	no matches = iota
	maybe
	yes
)

// match says whether the packet meets the rule, and what then.
func (t *table) match(rule string) (result matches, target string, jump bool) {
	fields := quote.Fields(rule)[2:]
	result, jump = yes, true
	inverted := false
	meets := func(is bool) {
		if is == inverted {
			result = no
		}
		inverted = false
	}
	for i := 0; i < len(fields); i++ {
		value := func() string {
			if i++; i < len(fields) {
				return fields[i]
			}
			return ""
		}
		switch fields[i] {
		case "!":
			inverted = true
		case "-i", "--in-interface":
			meets(linkMatches(value(), t.packet.In))
		case "-o", "--out-interface":
			meets(linkMatches(value(), t.packet.Out))
		case "-s", "--source":
			meets(contains(value(), t.packet.Source))
		case "-d", "--destination":
			meets(contains(value(), t.packet.Destination.Addr()))
		case "-p", "--protocol":
			protocol := value()
			meets(protocol == t.packet.Protocol || protocol == "all")
		case "--dport", "--destination-port":
			meets(portMatches(value(), t.packet.Destination.Port()))
		case "--ctstate", "--state":
			states := strings.Split(value(), ",")
			meets(slices.Contains(states, "NEW") || slices.Contains(states, "DNAT"))
		case "-m", "--match":
			if module := value(); !slices.Contains([]string{"comment", "conntrack", "state", "tcp", "udp", "sctp"}, module) && result == yes {
				result = maybe
			}
		case "--comment":
			value()
		case "-j", "--jump":
			return result, value(), true
		case "-g", "--goto":
			return result, value(), false
		default: // an option of a match that is not known here; what follows may be its values
			inverted = false
			if result == yes {
				result = maybe
			}
		}
		if result == no {
			return no, "", true
		}
	}
	return result, "", true
}

func linkMatches(pattern, name string) bool {
	if prefix, wild := strings.CutSuffix(pattern, "+"); wild {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

func contains(text string, address netip.Addr) bool {
	if !strings.Contains(text, "/") {
		one, err := netip.ParseAddr(text)
		return err == nil && one == address
	}
	prefix, err := netip.ParsePrefix(text)
	return err == nil && prefix.Contains(address)
}

func portMatches(text string, port uint16) bool {
	low, high, isRange := strings.Cut(text, ":")
	if !isRange {
		high = low
	}
	from, _ := strconv.Atoi(low)
	to, err := strconv.Atoi(high)
	return err == nil && from <= int(port) && int(port) <= to
}
