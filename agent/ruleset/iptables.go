package ruleset

import (
	"slices"
	"strconv"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// IPTables is one table as iptables-save prints it.
type IPTables struct {
	policy map[string]string
	rules  map[string][]rule
	sets   map[string][]string
}

type rule struct {
	text   string // the whole line
	fields []string
}

// ParseIPTables reads what iptables-save prints of one table. sets are the members of sets of ipset by name, addresses and
// prefixes.
func ParseIPTables(save string, sets map[string][]string) *IPTables {
	t := &IPTables{policy: map[string]string{}, rules: map[string][]rule{}, sets: sets}
	for line := range strings.Lines(save) {
		fields := quote.Fields(strings.TrimSpace(line))
		switch {
		case len(fields) >= 2 && strings.HasPrefix(fields[0], ":"):
			t.policy[fields[0][1:]] = fields[1]
		case len(fields) >= 2 && fields[0] == "-A":
			t.rules[fields[1]] = append(t.rules[fields[1]], rule{strings.TrimSpace(line), fields[2:]})
		}
	}
	return t
}

// Sets are the names of the sets of ipset that rules match destinations with.
func (t *IPTables) Sets() (names []string) {
	for _, rules := range t.rules {
		for _, r := range rules {
			if i := slices.Index(r.fields, "--match-set"); i >= 0 && i+1 < len(r.fields) && !slices.Contains(names, r.fields[i+1]) {
				names = append(names, r.fields[i+1])
			}
		}
	}
	slices.Sort(names)
	return names
}

// Verdict is what becomes of a packet.
type Verdict int

// The verdicts.
const (
	Accept Verdict = iota
	Drop
	Unknown
)

// BuiltIn evaluates a built-in chain. by is the rule or policy that drops, or may drop, the packet; one that keeps it from being tracked
// (NOTRACK), and so from being translated, counts as well.
func (t *IPTables) BuiltIn(chain string, p Packet) (verdict Verdict, by string) {
	if t.policy[chain] == "-" { // somebody's own, of that name
		return Accept, ""
	}
	f := filter{t, p, map[string]ends{}}
	ends := f.chain(chain)
	accepted := ends.accept
	if ends.goesOn {
		if t.policy[chain] == "DROP" {
			ends.drop = "the policy of " + chain
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

// harmless are the targets that packets go on from.
func harmless() []string {
	return []string{"AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK", "DSCP", "ECN", "HL", "HMARK", "IDLETIMER", "LED", "LOG", "MARK", "NFLOG",
		"RATEEST", "SECMARK", "SET", "TCPMSS", "TCPOPTSTRIP", "TEE", "TOS", "TRACE", "TTL"}
}

// Takes reports whether a packet surely does not come to the end of a built-in chain: a rule accepts, drops or translates it before.
func (t *IPTables) Takes(chain string, p Packet) bool {
	f := filter{t, p, map[string]ends{}}
	return !f.chain(chain).goesOn
}

type filter struct {
	*IPTables
	packet Packet
	known  map[string]ends // of chains that have been evaluated
}

// ends are the ways in which a packet may leave a chain.
type ends struct {
	accept bool
	drop   string // the first rule that drops it; empty where none does
	goesOn bool   // it returns to where the chain was called
}

func (f *filter) chain(name string) (all ends) {
	if all, known := f.known[name]; known {
		return all
	}
	f.known[name] = ends{goesOn: true} // the kernel loads no loops
	defer func() { f.known[name] = all }()
	for _, rule := range f.rules[name] {
		m := f.match(&rule, f.packet)
		if m.meets == no {
			continue
		}
		inner := ends{goesOn: true}
		switch m.target {
		case "ACCEPT":
			inner = ends{accept: true}
		case "DROP", "REJECT", "NOTRACK":
			inner = ends{drop: "the rule " + rule.text}
		case "CT":
			if slices.Contains(rule.fields, "--notrack") {
				inner = ends{drop: "the rule " + rule.text}
			}
		case "RETURN":
			all.goesOn = true
			inner = ends{}
		case "TPROXY": // a kind of translation
			inner = ends{accept: true}
		default:
			switch _, known := f.policy[m.target]; {
			case m.target == "" || slices.Contains(harmless(), m.target):
			case !known: // a target that decides by itself, such as NFQUEUE
				inner = ends{accept: true, drop: "the rule " + rule.text}
			default:
				inner = f.chain(m.target)
				if !m.jump && inner.goesOn { // goto: it returns further up
					all.goesOn, inner.goesOn = true, false
				}
			}
		}
		all.accept = all.accept || inner.accept
		if all.drop == "" {
			all.drop = inner.drop
		}
		if m.meets == yes && !inner.goesOn {
			return all
		}
	}
	all.goesOn = true
	return all
}

// Translating are the rules of the table nat that translate the destination of a packet, of a pod or of the node, and those of the table
// mangle that take it to a transparent proxy: each is the one that chose the packet for its destination, as iptables-save prints it, or one that chose it without looking at that. passed says which chains are passed over.
func (t *IPTables) Translating(p Packet, passed func(chain string) bool) []string {
	w := translation{IPTables: t, packet: p, passed: passed, walk: walk{seen: map[step]bool{}}}
	for _, hook := range []string{"PREROUTING", "OUTPUT"} {
		w.chain(step{chain: hook, sure: true})
	}
	return w.found
}

type translation struct {
	*IPTables
	walk
	packet Packet
	passed func(chain string) bool
}

// chain reports whether the packet may return to where the chain was called.
func (w *translation) chain(s step) (returns bool) {
	if !w.enter(s) {
		return true
	}
	for _, rule := range w.rules[s.chain] {
		m := w.match(&rule, w.packet)
		if m.meets == no {
			continue
		}
		aim, isSure := s.aim, s.sure && m.meets == yes
		if m.aimed {
			aim = rule.text
		}
		goesOn := true
		switch m.target {
		case "ACCEPT":
			goesOn = false
		case "DNAT", "REDIRECT", "NETMAP", "TPROXY":
			w.translated(rule.text, aim, isSure)
			goesOn = false
		case "RETURN":
			if m.meets == yes {
				return true
			}
		default:
			if _, known := w.policy[m.target]; known && !w.passed(m.target) {
				goesOn = w.chain(step{m.target, aim, isSure})
				if !m.jump && goesOn && m.meets == yes { // goto: it returns further up
					return true
				}
			}
		}
		if m.meets == yes && !goesOn {
			return false
		}
	}
	return true
}

// matched is what a rule says of a packet.
type matched struct {
	meets certainty
	// aimed: the rule names the destination, in a prefix or a set or by itself.
	aimed  bool
	target string // what becomes of it
	jump   bool   // and not goto
}

// match reports whether the packet meets the rule, and what then.
func (t *IPTables) match(r *rule, p Packet) (m matched) {
	m = matched{meets: yes, jump: true}
	inverted := false
	meets := func(is certainty) {
		if inverted {
			is = is.not()
		}
		m.meets = min(m.meets, is)
		inverted = false
	}
	aimed := func(is certainty, wide bool) {
		m.aimed = m.aimed || is == yes && !inverted && !wide
		meets(is)
	}
	for i := 0; i < len(r.fields); i++ {
		value := func() string {
			if i++; i < len(r.fields) {
				return r.fields[i]
			}
			return ""
		}
		switch r.fields[i] {
		case "!":
			inverted = true
		case "-i", "--in-interface":
			meets(linkMatches(value(), p.In))
		case "-o", "--out-interface":
			meets(linkMatches(value(), p.Out))
		case "-s", "--source":
			is, _ := covers(value(), p.Source)
			meets(is)
		case "-d", "--destination", "--dst-range":
			aimed(covers(value(), p.Destination.Addr()))
		case "-p", "--protocol":
			if protocol := value(); protocol != "all" {
				meets(among(p.Protocol, protocol))
			}
		case "--dport", "--destination-port", "--dports", "--destination-ports":
			meets(within(p.Destination.Port(), portRanges(value())...))
		case "--ctstate", "--state":
			states := strings.Split(value(), ",")
			meets(sure(slices.Contains(states, "NEW") || p.Translated && slices.Contains(states, "DNAT")))
		case "--match-set":
			aimed(t.inSet(value(), value(), p))
		case "-m", "--match":
			if module := value(); !slices.Contains([]string{"comment", "conntrack", "state", "tcp", "udp", "sctp", "iprange", "multiport", "set"}, module) {
				m.meets = min(m.meets, maybe)
			}
		case "--comment":
			value()
		case "-j", "--jump", "-g", "--goto":
			m.jump = r.fields[i] == "-j" || r.fields[i] == "--jump"
			m.target = value()
			return m
		default: // an option of a match that is not known here; what follows may be its values
			inverted = false
			m.meets = min(m.meets, maybe)
		}
		if m.meets == no {
			return m
		}
	}
	return m
}

// inSet reports whether a set of ipset has the packet's destination.
func (t *IPTables) inSet(name, dimensions string, p Packet) (is certainty, wide bool) {
	members, known := t.sets[name]
	if first, _, _ := strings.Cut(dimensions, ","); !known || first != "dst" {
		return maybe, false
	}
	for _, member := range members {
		address, _, _ := strings.Cut(member, ",") // a port behind it is not looked at
		if is, wide := covers(address, p.Destination.Addr()); is == yes {
			return yes, wide
		}
	}
	return no, false
}

func linkMatches(pattern, name string) certainty {
	if prefix, wild := strings.CutSuffix(pattern, "+"); wild && name != "" {
		return sure(strings.HasPrefix(name, prefix))
	}
	return among(name, pattern)
}

// portRanges parses ports and ranges of ports, separated by commas.
func portRanges(text string) (ranges [][2]int) {
	for one := range strings.SplitSeq(text, ",") {
		low, high, isRange := strings.Cut(one, ":")
		if !isRange {
			high = low
		}
		from, _ := strconv.Atoi(low)
		if to, err := strconv.Atoi(high); err == nil {
			ranges = append(ranges, [2]int{from, to})
		}
	}
	return ranges
}
