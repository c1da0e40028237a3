package ruleset

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
)

// Hook is where base chains of nftables are: the name of the hook, and their priorities, from From on and before Before.
type Hook struct {
	Name         string
	From, Before int
	// Bridge: of the bridge family, whose hooks have the same names; else of all others.
	Bridge bool
}

// Stop is a rule that drops a packet, or keeps it from being tracked and so from being translated.
type Stop struct {
	NFTRule // its Handle is 0 where it is the policy of a base chain
	// Sure: it does, and not only may.
	Sure bool
}

// trackingPriority is that of connection tracking (NF_IP_PRI_CONNTRACK): notrack comes too late from there on.
const trackingPriority = -200

// Stopping are the first rules of the base chains at a hook that stop a packet, or may stop it. passed says which chains are passed
// over. Chains in a hook of links (ingress, egress) are looked at where the link that the packet comes in by, or leaves by, is among theirs.
func (t *NFTables) Stopping(p Packet, at Hook, passed func(family, table, chain string) bool) (found []Stop) {
	for _, base := range t.chains {
		priority, err := strconv.Atoi(string(base.Prio))
		isThere := err == nil && base.Hook == at.Name && at.From <= priority && priority < at.Before && (base.Family == "bridge") == at.Bridge
		if !isThere || !p.of(base.Family) || passed(base.Family, base.Table, base.Name) {
			continue
		}
		if link, ofLinks := map[string]string{"ingress": p.In, "egress": p.Out}[base.Hook]; ofLinks && !slices.Contains(base.devices, link) {
			continue
		}
		early := base.Hook == "ingress" || at.Bridge || (base.Hook == "prerouting" || base.Hook == "output") && priority < trackingPriority
		f := nftFilter{nftPacket{t, p, !early}, passed, map[*nftChain]nftEnds{}}
		all := f.chain(base)
		if all.goesOn && base.Policy == "drop" {
			all.drop = &NFTRule{Family: base.Family, Table: base.Table, Chain: base.Name}
		} else if all.goesOn {
			all.accept = true
		}
		if all.drop != nil {
			found = append(found, Stop{*all.drop, !all.accept})
		}
	}
	return found
}

// Devices are the links of all base chains in this hook of links, ingress or egress.
func (t *NFTables) Devices(hook string) (all []string) {
	for _, base := range t.chains {
		if base.Hook == hook {
			all = append(all, base.devices...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// AddDevices reads the links of base chains from what `nft list chains` prints: in JSON not every nft does.
func (t *NFTables) AddDevices(listing string) {
	var family, table, chain string
	for line := range strings.Lines(listing) {
		words := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\",;{}=", r) })
		switch {
		case len(words) == 3 && words[0] == "table":
			family, table = words[1], words[2]
		case len(words) == 2 && words[0] == "chain":
			chain = words[1]
		}
		from := slices.IndexFunc(words, func(w string) bool { return w == "device" || w == "devices" })
		to := slices.Index(words, "priority")
		i := slices.IndexFunc(t.chains, func(c *nftChain) bool { return c.Family == family && c.Table == table && c.Name == chain })
		if i >= 0 && from >= 0 && from < to && len(t.chains[i].devices) == 0 {
			t.chains[i].devices = words[from+1 : to]
		}
	}
}

// nftEnds are the ways in which a packet may leave a rule or a chain.
type nftEnds struct {
	accept  bool
	drop    *NFTRule // the rule that drops all that is left, else the first that may; nil where none does
	goesOn  bool     // of a rule: to the next one; of a chain: to where it was called
	returns bool     // of a rule: to where the chain was called
}

// or adds the ways of a rule that the packet may meet too.
func (e *nftEnds) or(other nftEnds) {
	e.accept, e.goesOn, e.returns = e.accept || other.accept, e.goesOn || other.goesOn, e.returns || other.returns
	if e.drop == nil {
		e.drop = other.drop
	}
}

type nftFilter struct {
	nftPacket
	passed func(family, table, chain string) bool
	known  map[*nftChain]nftEnds // of chains that have been evaluated
}

func (f *nftFilter) chain(c *nftChain) (all nftEnds) {
	if all, known := f.known[c]; known {
		return all
	}
	f.known[c] = nftEnds{goesOn: true} // the kernel loads no loops
	if f.passed(c.Family, c.Table, c.Name) {
		return f.known[c]
	}
	defer func() { f.known[c] = all }()
	for n := range c.rules {
		rule := f.rule(&c.rules[n])
		goesOn := rule.goesOn
		rule.goesOn, rule.returns = rule.returns, false
		if rule.drop != nil && !goesOn && !rule.goesOn && !rule.accept {
			all.drop = rule.drop
		}
		if all.or(rule); !goesOn {
			return all
		}
	}
	all.goesOn = true
	return all
}

// rule evaluates the statements of a rule in their order.
func (f *nftFilter) rule(r *nftRule) (all nftEnds) {
	meets := yes
	end := func(with nftEnds) nftEnds {
		with.goesOn = with.goesOn || meets != yes
		all.or(with)
		return all
	}
	this := NFTRule{Family: r.Family, Table: r.Table, Chain: r.Chain, Handle: r.Handle}
	for n, statement := range r.Expr {
		for kind, data := range statement {
			if kind == "xt" {
				kind = xtKind(data, n == len(r.Expr)-1)
			}
			switch kind {
			case "match":
				is, _ := f.match(r, data)
				meets = min(meets, is)
			case "vmap":
				return end(f.vmap(r, data))
			case "dnat":
				is, _ := f.mapped(r, data)
				meets = min(meets, is)
				return end(nftEnds{accept: true})
			case "redirect", "snat", "masquerade", "accept", "drop", "reject", "queue", unknownTarget, "return", "continue", "jump", "goto":
				return end(f.verdict(this, kind, data))
			case "notrack":
				switch {
				case f.tracked:
				case meets == yes:
					return end(nftEnds{drop: &this})
				default:
					all.or(nftEnds{drop: &this})
				}
			case "counter", "log", "mangle", "comment", "flow", "dup", "ct helper", "tproxy":
			default: // a match of iptables, limit, quota, what adds to a set, …
				meets = min(meets, maybe)
			}
			if meets == no {
				all.goesOn = true
				return all
			}
		}
	}
	all.goesOn = true
	return all
}

// unknownTarget is the kind of a target of iptables whose name is not printed.
const unknownTarget = "unknown target"

// xtKind is the statement of nftables that does what a match or target of iptables does. Not every nft prints which one it is; a target comes last.
func xtKind(data json.RawMessage, last bool) string {
	var xt struct{ Type, Name string }
	_ = json.Unmarshal(data, &xt)
	switch {
	case xt.Name == "comment", slices.Contains(harmless(), xt.Name):
		return "comment"
	case xt.Type == "match", xt.Type == "" && !last:
		return "limit" // any that may match
	case xt.Name == "":
		return unknownTarget
	case xt.Name == "REJECT", xt.Name == "NOTRACK", xt.Name == "TPROXY", xt.Name == "SNAT", xt.Name == "MASQUERADE":
		return strings.ToLower(xt.Name)
	case xt.Name == "DNAT", xt.Name == "REDIRECT", xt.Name == "NETMAP":
		return "redirect"
	}
	return "queue" // it decides by itself
}

func (f *nftFilter) verdict(this NFTRule, kind string, data json.RawMessage) nftEnds {
	switch kind {
	case "drop", "reject":
		return nftEnds{drop: &this}
	case "queue", unknownTarget: // what decides is not known
		return nftEnds{accept: true, drop: &this}
	case "continue":
		return nftEnds{goesOn: true}
	case "return":
		return nftEnds{returns: true}
	case "jump", "goto":
		var to struct{ Target string }
		_ = json.Unmarshal(data, &to)
		i := slices.IndexFunc(f.chains, func(c *nftChain) bool { return c.Family == this.Family && c.Table == this.Table && c.Name == to.Target })
		if i < 0 {
			return nftEnds{goesOn: true}
		}
		inner := f.chain(f.chains[i])
		if kind == "goto" { // it returns further up
			inner.goesOn, inner.returns = false, inner.goesOn
		}
		return inner
	}
	return nftEnds{accept: true}
}

// vmap are the verdicts of all elements that the packet may meet.
func (f *nftFilter) vmap(r *nftRule, data json.RawMessage) (all nftEnds) {
	var m struct{ Key, Data json.RawMessage }
	_ = json.Unmarshal(data, &m)
	for _, e := range f.elements(r, m.Data) {
		is, _ := f.compare(m.Key, e)
		if is == no {
			continue
		}
		var verdict map[string]json.RawMessage
		_ = json.Unmarshal(e.value, &verdict)
		for kind, data := range verdict {
			all.or(f.verdict(NFTRule{Family: r.Family, Table: r.Table, Chain: r.Chain, Handle: r.Handle}, kind, data))
		}
		if is == yes {
			return all
		}
	}
	all.goesOn = true
	return all
}
