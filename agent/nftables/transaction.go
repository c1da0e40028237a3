package nftables

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// ruleset is the content of one table: chains that hardly ever change, and sets and maps that hold the data.
type ruleset struct {
	chains []chain
	sets   []set
}

// render is the content for p in one family.
func render(p *plan.Plan, family plan.Family) ruleset {
	return ruleset{chains: slices.Concat(chains(p, family), spreadChains(p.Rules, family)), sets: sets(p, family)}
}

// write is the transaction that fills the table with rs, whatever was in it before.
//
// It empties what is there and fills it again, in one step, and never deletes the table to make it anew: a
// packet on its way through the old chains would meet deleted sets, find its address in none of them and
// be rejected (seen on Linux 6.18: a walk through the rules belongs to one generation, but each lookup in a
// set to the one that is current by then).
func (rs *ruleset) write(tx *knftables.Transaction) {
	table := &knftables.Table{Comment: knftables.PtrTo(tableComment)}
	tx.Add(table)
	tx.Flush(table)
	for _, c := range rs.chains {
		tx.Add(c.object())
	}
	for _, s := range rs.sets {
		tx.Add(s.object())
		tx.Flush(s.object())
		for _, key := range slices.Sorted(maps.Keys(s.elements)) {
			s.add(tx, key)
		}
	}
	for _, c := range rs.chains {
		c.fill(tx)
	}
}

// replace is the transaction that deletes the table, where there is one, and makes it anew with rs.
func (rs *ruleset) replace(tx *knftables.Transaction) {
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	rs.write(tx)
}

// prune is the transaction that deletes what rs does not have. It comes after write: nothing refers to these chains and sets
// any more. Maps go before the chains that their elements lead to.
func (rs *ruleset) prune(tx *knftables.Transaction, there []object) {
	sets := slices.DeleteFunc(slices.Clone(there), func(o object) bool { return o.kind == "chain" })
	chains := slices.DeleteFunc(slices.Clone(there), func(o object) bool { return o.kind != "chain" })
	for _, o := range append(sets, chains...) {
		isChain := func(c chain) bool { return o.kind == "chain" && o.name == c.name }
		isSet := func(s set) bool { return o.kind == s.kind() && o.name == s.name }
		if slices.ContainsFunc(rs.chains, isChain) || slices.ContainsFunc(rs.sets, isSet) {
			continue
		}
		switch o.kind {
		case "chain":
			tx.Delete(&knftables.Chain{Name: o.name})
		case "set":
			tx.Delete(&knftables.Set{Name: o.name})
		case "map":
			tx.Flush(&knftables.Map{Name: o.name})
			tx.Delete(&knftables.Map{Name: o.name})
		}
	}
}

// write is the transaction that does d.
func (d diff) write(tx *knftables.Transaction) {
	for _, c := range d.chains {
		tx.Add(c.object())
		tx.Flush(c.object())
	}
	for _, c := range d.chains {
		c.fill(tx)
	}
	for _, change := range d.sets {
		for _, key := range change.gone {
			tx.Delete(change.old.element(key))
		}
		for _, key := range change.added {
			change.wanted.add(tx, key)
		}
	}
	for _, c := range d.gone {
		tx.Flush(c.object())
		tx.Delete(c.object())
	}
}

func (c chain) object() *knftables.Chain {
	object := &knftables.Chain{Name: c.name}
	if c.comment != "" {
		object.Comment = knftables.PtrTo(c.comment)
	}
	if c.hook != "" {
		object.Type, object.Hook, object.Priority = &c.kind, &c.hook, &c.priority
	}
	return object
}

func (c chain) fill(tx *knftables.Transaction) {
	for _, rule := range c.rules {
		tx.Add(&knftables.Rule{Chain: c.name, Rule: rule})
	}
}

func (s set) kind() string {
	if s.value != "" {
		return "map"
	}
	return "set"
}

func (s set) object() knftables.Object {
	if s.value == zoneType {
		ip := plan.IPv4
		if strings.HasPrefix(s.key, "ipv6_addr") {
			ip = plan.IPv6
		}
		return &knftables.Map{Name: s.name, TypeOf: string(ip) + " daddr . udp dport : " + zoneType, Comment: &s.comment}
	}
	if s.value != "" {
		object := &knftables.Map{Name: s.name, Type: s.key + " : " + s.value, Comment: &s.comment}
		if s.counted { // knftables has no word for it
			object.Type += " ; counter"
		}
		return object
	}
	object := &knftables.Set{Name: s.name, Type: s.key, Comment: &s.comment}
	if s.until != nil {
		object.Flags = []knftables.SetFlag{knftables.TimeoutFlag}
	}
	return object
}

// add adds an element, with its timeout where it has one.
func (s set) add(tx *knftables.Transaction, key string) {
	element := s.element(key)
	timeout, wanted := s.timeout(key)
	if !wanted {
		return
	}
	if timeout > 0 { // knftables has no timeouts of elements; nft takes them behind the key
		element.Key[len(element.Key)-1] += fmt.Sprintf("%s%dms", timeoutWord, timeout.Milliseconds())
	}
	tx.Add(element)
}

const timeoutWord = " timeout "

// timeout is how long the kernel is to keep an element, 0 for ever; wanted is false where its time is over.
func (s set) timeout(key string) (timeout time.Duration, wanted bool) {
	until := s.until[key]
	if until.IsZero() {
		return 0, true
	}
	timeout = time.Until(until).Truncate(time.Millisecond)
	return timeout, timeout > 0
}

func (s set) element(key string) *knftables.Element {
	element := &knftables.Element{Key: strings.Split(key, " . ")}
	if strings.Contains(s.key, "ifname") { // nft wants them in quotes
		for i := range element.Key {
			element.Key[i] = strconv.Quote(element.Key[i])
		}
	}
	if s.value == "" {
		element.Set = s.name
		return element
	}
	element.Map, element.Value = s.name, strings.Split(s.elements[key], " . ")
	return element
}
