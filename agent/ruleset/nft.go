package ruleset

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// NFTables are the rules of nftables as `nft --json --handle list ruleset` prints them (libnftables-json(5)).
type NFTables struct {
	// Flowtables are those by which packets of standing flows pass by the rules (Documentation/networking/nf_flowtable.rst): family, table
	// and name.
	Flowtables []string
	chains     []*nftChain
	sets       map[string]*nftSet // by family, table and name
}

// NFTRule is a rule of nftables.
type NFTRule struct {
	Family, Table, Chain string
	Handle               int
	// Set and Element are the named set or map by which the rule chose the packet, and what that has; empty where it did so by itself.
	Set, Element string
}

type nftChain struct {
	Family, Table, Name, Type, Hook string
	Policy                          string          // of a base chain
	Prio                            json.RawMessage // of a base chain, a number
	Dev                             json.RawMessage // of a base chain in a hook of links, one or several; not every nft prints them
	devices                         []string
	rules                           []nftRule
}

type nftRule struct {
	Family, Table, Chain string
	Handle               int
	Expr                 []map[string]json.RawMessage
}

type nftSet struct {
	Family, Table, Name string
	Elem                []json.RawMessage
}

// ParseNFTables reads what nft prints.
func ParseNFTables(printed []byte) (*NFTables, error) {
	var document struct{ NFTables []map[string]json.RawMessage }
	if err := json.Unmarshal(printed, &document); err != nil {
		return nil, fmt.Errorf("what nft prints: %w", err)
	}
	t := &NFTables{sets: map[string]*nftSet{}}
	byName := map[string]*nftChain{}
	for _, object := range document.NFTables {
		for kind, data := range object {
			var err error
			switch kind {
			case "chain":
				chain := &nftChain{}
				err = json.Unmarshal(data, chain)
				chain.devices = texts(chain.Dev)
				t.chains = append(t.chains, chain)
				byName[name(chain.Family, chain.Table, chain.Name)] = chain
			case "flowtable":
				var found struct{ Family, Table, Name string }
				err = json.Unmarshal(data, &found)
				t.Flowtables = append(t.Flowtables, name(found.Family, found.Table, found.Name))
			case "set", "map":
				set := &nftSet{}
				err = json.Unmarshal(data, set)
				t.sets[name(set.Family, set.Table, set.Name)] = set
			case "rule":
				var rule nftRule
				if err = json.Unmarshal(data, &rule); err == nil && byName[name(rule.Family, rule.Table, rule.Chain)] != nil {
					chain := byName[name(rule.Family, rule.Table, rule.Chain)]
					chain.rules = append(chain.rules, rule)
				}
			}
			if err != nil {
				return nil, fmt.Errorf("what nft prints of a %s: %w", kind, err)
			}
		}
	}
	return t, nil
}

func name(parts ...string) string { return strings.Join(parts, " ") }

// Translating are the rules that translate the destination of a packet, of a pod or of the node, or take a packet of a pod at a priority
// before this one to a transparent proxy: each is the one that chose the packet for its destination, or one that chose it without looking
// at that. passed says which chains are passed over.
func (t *NFTables) Translating(p Packet, before int, passed func(family, table, chain string) bool) (found []NFTRule) {
	for _, base := range t.chains {
		priority, err := strconv.Atoi(string(base.Prio))
		translates := base.Type == "nat" && (base.Hook == "prerouting" || base.Hook == "output")
		diverts := base.Type == "filter" && base.Hook == "prerouting" && err == nil && priority < before && base.Family != "bridge"
		if !translates && !diverts || !p.of(base.Family) || passed(base.Family, base.Table, base.Name) {
			continue
		}
		w := nftWalk{nftPacket: nftPacket{t, p, translates || priority >= trackingPriority}, walk: walk{seen: map[step]bool{}}, nat: translates, passed: passed, places: map[string]NFTRule{}}
		w.chain(base, "", true)
		for _, place := range w.found {
			if !slices.Contains(found, w.places[place]) {
				found = append(found, w.places[place])
			}
		}
	}
	return found
}

// nftPacket compares a packet with what rules of nftables match.
type nftPacket struct {
	*NFTables
	packet  Packet
	tracked bool // connection tracking has had the packet
}

type nftWalk struct {
	nftPacket
	walk
	nat    bool // the base chain is of this type
	passed func(family, table, chain string) bool
	places map[string]NFTRule
}

// place is the rule under a name that walk keeps.
func (w *nftWalk) place(r *nftRule, hit element) string {
	p := NFTRule{Family: r.Family, Table: r.Table, Chain: r.Chain, Handle: r.Handle, Set: hit.set, Element: hit.text}
	text := fmt.Sprint(p)
	w.places[text] = p
	return text
}

// chain reports whether the packet may return to where the chain was called.
func (w *nftWalk) chain(c *nftChain, aim string, isSure bool) (returns bool) {
	if w.passed(c.Family, c.Table, c.Name) || !w.enter(step{name(c.Family, c.Table, c.Name), aim, isSure}) {
		return true
	}
	for n := range c.rules {
		switch end, meets := w.rule(&c.rules[n], aim, isSure); {
		case end == ended && meets == yes:
			return false
		case end == returned && meets == yes:
			return true
		}
	}
	return true
}

// outcome is where a packet goes after a rule.
type outcome int

const (
	goesOn outcome = iota
	ended
	returned
)

// rule evaluates the statements of a rule in their order.
func (w *nftWalk) rule(r *nftRule, aim string, isSure bool) (end outcome, meets certainty) {
	meets = yes
	for n, statement := range r.Expr {
		for kind, data := range statement {
			if kind == "xt" {
				kind = xtKind(data, n == len(r.Expr)-1)
			}
			switch kind {
			case "match":
				is, hit := w.match(r, data)
				meets = min(meets, is)
				if hit.aimed {
					aim = w.place(r, hit)
				}
			case "vmap":
				var m struct{ Key, Data json.RawMessage }
				if json.Unmarshal(data, &m) != nil {
					return goesOn, no
				}
				return w.vmap(r, m.Key, m.Data, aim, isSure, meets)
			case "dnat", "redirect":
				is, hit := w.mapped(r, data)
				if meets = min(meets, is); meets == no {
					return goesOn, no
				}
				if hit.aimed {
					aim = w.place(r, hit)
				}
				w.translated(w.place(r, element{}), aim, isSure && meets == yes)
				return ended, meets
			case "jump", "goto", "accept", "drop", "return", "continue", "reject", "queue":
				return w.verdict(r, kind, data, aim, isSure && meets == yes), meets
			case "tproxy":
				w.translated(w.place(r, element{}), aim, isSure && meets == yes)
			case unknownTarget:
				if w.nat { // there are few others in such chains
					w.translated(w.place(r, element{}), aim, false)
				}
			case "counter", "log", "mangle", "notrack", "snat", "masquerade", "comment", "set", "meter", "flow", "dup", "fwd", "ct helper":
			default: // a match of iptables, limit, quota, …
				meets = min(meets, maybe)
			}
			if meets == no {
				return goesOn, no
			}
		}
	}
	return goesOn, meets
}

func (w *nftWalk) verdict(r *nftRule, kind string, data json.RawMessage, aim string, isSure bool) outcome {
	switch kind {
	case "jump", "goto":
		var to struct{ Target string }
		if json.Unmarshal(data, &to) != nil {
			return goesOn
		}
		i := slices.IndexFunc(w.chains, func(c *nftChain) bool { return c.Family == r.Family && c.Table == r.Table && c.Name == to.Target })
		switch {
		case i < 0:
			return goesOn
		case !w.chain(w.chains[i], aim, isSure):
			return ended
		case kind == "goto":
			return returned
		}
		return goesOn
	case "continue":
		return goesOn
	case "return":
		return returned
	}
	return ended
}

// vmap follows the verdicts of all elements that the packet may meet.
func (w *nftWalk) vmap(r *nftRule, key, data json.RawMessage, aim string, isSure bool, meets certainty) (outcome, certainty) {
	best := no
	for _, e := range w.elements(r, data) {
		is, hit := w.compare(key, e)
		if is == no {
			continue
		}
		best = max(best, is)
		to := aim
		if hit.aimed {
			to = w.place(r, hit)
		}
		var verdict map[string]json.RawMessage
		if json.Unmarshal(e.value, &verdict) != nil {
			continue
		}
		for kind, data := range verdict {
			if end := w.verdict(r, kind, data, to, isSure && min(meets, is) == yes); is == yes {
				return end, meets
			}
		}
	}
	return goesOn, min(meets, best)
}

// mapped evaluates the map by which a dnat statement finds the address; yes without one.
func (w *nftPacket) mapped(r *nftRule, data json.RawMessage) (certainty, element) {
	var to struct {
		Addr struct {
			Map *struct{ Key, Data json.RawMessage }
		}
	}
	if json.Unmarshal(data, &to) != nil || to.Addr.Map == nil { // an address, or redirect
		return yes, element{}
	}
	best, hit := no, element{}
	for _, e := range w.elements(r, to.Addr.Map.Data) {
		if is, aimed := w.compare(to.Addr.Map.Key, e); is > best {
			best, hit = is, aimed
		}
	}
	return best, hit
}

func (w *nftPacket) match(r *nftRule, data json.RawMessage) (is certainty, hit element) {
	var m struct {
		Op          string
		Left, Right json.RawMessage
	}
	if json.Unmarshal(data, &m) != nil {
		return maybe, element{}
	}
	for _, e := range w.elements(r, m.Right) {
		if found, aimed := w.compare(m.Left, e); found > is {
			is, hit = found, aimed
		}
	}
	var left struct{ CT struct{ Key string } }
	switch bits := json.Unmarshal(m.Left, &left) == nil && left.CT.Key == "status"; {
	case bits && (m.Op == "==" || m.Op == "!="): // with all bits, of which one is known
	case m.Op == "==", m.Op == "in":
		return is, hit
	case m.Op == "!=", m.Op == "!": // none of these bits
		return is.not(), element{}
	}
	return maybe, element{}
}

// element is what a key is compared with: one of a named set, of an anonymous one, or alone.
type element struct {
	key, value json.RawMessage
	set        string // named
	text       string
	aimed      bool
}

// elements are those of a set or map, which may be a name behind @, and otherwise the one that data is.
func (w *nftPacket) elements(r *nftRule, data json.RawMessage) (all []element) {
	var named string
	var anonymous struct{ Set json.RawMessage }
	var list []json.RawMessage
	switch {
	case json.Unmarshal(data, &named) == nil && strings.HasPrefix(named, "@"):
		set := w.sets[name(r.Family, r.Table, named[1:])]
		if set == nil {
			return nil
		}
		for _, e := range set.Elem {
			one := toElement(e)
			one.set, one.text = set.Name, text(one.key)
			all = append(all, one)
		}
		return all
	case json.Unmarshal(data, &anonymous) == nil && len(anonymous.Set) > 0:
		data = anonymous.Set
		if json.Unmarshal(data, &list) != nil { // a set of one
			list = []json.RawMessage{data}
		}
	case json.Unmarshal(data, &list) == nil: // flags, such as those of ct state
	default:
		list = []json.RawMessage{data}
	}
	for _, e := range list {
		all = append(all, toElement(e))
	}
	return all
}

// toElement takes apart an element of a map, [key, value], and what stands around a key with a comment or a timeout.
func toElement(data json.RawMessage) element {
	e := element{key: data}
	var pair []json.RawMessage
	if json.Unmarshal(data, &pair) == nil && len(pair) == 2 {
		e.key, e.value = pair[0], pair[1]
	}
	var decorated struct{ Elem struct{ Val json.RawMessage } }
	if json.Unmarshal(e.key, &decorated) == nil && len(decorated.Elem.Val) > 0 {
		e.key = decorated.Elem.Val
	}
	return e
}

// compare reports whether what the packet has in key is the element's; aimed where its destination is a part of that.
func (w *nftPacket) compare(key json.RawMessage, e element) (certainty, element) {
	var keys, parts struct{ Concat []json.RawMessage }
	if json.Unmarshal(key, &keys) == nil && len(keys.Concat) > 0 {
		if json.Unmarshal(e.key, &parts) != nil || len(parts.Concat) != len(keys.Concat) {
			return maybe, e
		}
	} else {
		keys.Concat, parts.Concat = []json.RawMessage{key}, []json.RawMessage{e.key}
	}
	is := yes
	for n := range keys.Concat {
		found, aimed := w.field(keys.Concat[n], text(parts.Concat[n]))
		is, e.aimed = min(is, found), e.aimed || aimed
	}
	if is == no {
		e.aimed = false
	}
	return is, e
}

// field compares one field of the packet.
func (w *nftPacket) field(key json.RawMessage, with string) (is certainty, aimed bool) {
	var left struct {
		Payload struct{ Protocol, Field string }
		Meta    struct{ Key string }
		CT      struct{ Key string }
	}
	if json.Unmarshal(key, &left) != nil || with == "*" { // what no other element has
		return maybe, false
	}
	p := &w.packet
	protocol := strings.NewReplacer("6", "tcp", "17", "udp", "132", "sctp")
	switch family := left.Payload.Protocol; {
	case left.Payload.Field == "daddr" && (family == "ip" || family == "ip6"):
		if p.Destination.Addr().Is6() != (family == "ip6") {
			return no, false
		}
		is, wide := covers(with, p.Destination.Addr())
		return is, is == yes && !wide
	case left.Payload.Field == "saddr" && (family == "ip" || family == "ip6"):
		is, _ = covers(with, p.Source)
		return is, false
	case left.Payload.Field == "dport":
		if family != "th" && p.Protocol != "" && family != p.Protocol {
			return no, false
		}
		return within(p.Destination.Port(), portRanges(strings.ReplaceAll(with, "-", ":"))...), false
	case left.Payload.Field == "protocol" || left.Payload.Field == "nexthdr" || left.Meta.Key == "l4proto":
		return among(p.Protocol, with, protocol.Replace(with)), false
	case left.Meta.Key == "nfproto":
		return sure(with == map[bool]string{false: "ipv4", true: "ipv6"}[p.Destination.Addr().Is6()]), false
	case left.Meta.Key == "protocol" || left.Payload.Protocol == "ether" && left.Payload.Field == "type":
		return sure(with == map[bool]string{false: "ip", true: "ip6"}[p.Destination.Addr().Is6()]), false
	case left.Meta.Key == "iifname" || left.Meta.Key == "iif":
		return linkMatches(strings.ReplaceAll(with, "*", "+"), p.In), false
	case left.Meta.Key == "oifname" || left.Meta.Key == "oif":
		return linkMatches(strings.ReplaceAll(with, "*", "+"), p.Out), false
	case !w.tracked:
	case left.CT.Key == "state":
		return sure(with == "new"), false
	case left.CT.Key == "status" && with == "dnat":
		return sure(p.Translated), false
	}
	return maybe, false
}

// text is how a value is written: an address, a number, a prefix, a range, or several with dots between.
func text(value json.RawMessage) string {
	var v struct {
		Prefix struct {
			Addr string
			Len  int
		}
		Range  []json.RawMessage
		Concat []json.RawMessage
	}
	var plain string
	switch {
	case json.Unmarshal(value, &plain) == nil:
		return plain
	case json.Unmarshal(value, &v) != nil: // a number
		return string(value)
	case v.Prefix.Addr != "":
		if address, err := netip.ParseAddr(v.Prefix.Addr); err == nil {
			return netip.PrefixFrom(address, v.Prefix.Len).String()
		}
	case len(v.Range) == 2:
		return text(v.Range[0]) + "-" + text(v.Range[1])
	case len(v.Concat) > 0:
		parts := make([]string, len(v.Concat))
		for n, part := range v.Concat {
			parts[n] = text(part)
		}
		return strings.Join(parts, " . ")
	}
	return string(value)
}

// texts are one or several words.
func texts(value json.RawMessage) (all []string) {
	var one string
	if json.Unmarshal(value, &one) == nil && one != "" {
		return []string{one}
	}
	_ = json.Unmarshal(value, &all)
	return all
}
