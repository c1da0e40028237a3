package iptables

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

// listing is what iptables-save shows of one table, as far as it concerns one agent.
type listing struct {
	// chains are the agent's, in the order listed, with their rules as listed. They are compared with an
	// earlier listing by the same iptables, never with what we wrote: it words rules in its own way.
	chains []chain
	// others are all other chains with all their rules: "-A PREROUTING …".
	others map[string][]string
}

// parseListing reads these tables from the output of iptables-save. Those that it does not show are empty.
func parseListing(out, prefix string, tables []string) (map[string]*listing, error) {
	all := map[string]*listing{}
	for _, table := range tables {
		all[table] = &listing{others: map[string][]string{}}
	}
	l := &listing{others: map[string][]string{}} // a table that was not asked for
	index := map[string]int{}
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		switch {
		case incompatible.MatchString(line):
			if all[incompatible.FindStringSubmatch(line)[1]] != nil {
				return nil, fmt.Errorf("iptables does not understand its table any more, because it was edited with nft: %s",
					strings.TrimLeft(line, "# "))
			}
		case strings.HasPrefix(line, "*"):
			index = map[string]int{}
			if l = all[line[1:]]; l == nil {
				l = &listing{others: map[string][]string{}}
			}
		case strings.HasPrefix(line, ":"+prefix):
			name, _, _ := strings.Cut(line[1:], " ")
			index[name] = len(l.chains)
			l.chains = append(l.chains, chain{name: name})
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			l.others[name] = nil
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[3:], " ")
			if i, ours := index[chain]; ours {
				l.chains[i].rules = append(l.chains[i].rules, rule)
			} else {
				l.others[chain] = append(l.others[chain], line)
			}
		}
	}
	return all, nil
}

// incompatible is what iptables-nft-save says of a table that iptables cannot have made.
var incompatible = regexp.MustCompile("^# Table `([^']*)' is incompatible, use 'nft' tool")

// target is the chain or the extension that a listed rule leads to.
func target(rule string) string {
	words := strings.Fields(rule)
	for i := len(words) - 2; i >= 0; i-- {
		if words[i] == "-j" || words[i] == "-g" {
			return words[i+1]
		}
	}
	return ""
}

// unconditional is a listed jump without any match but its comment.
var unconditional = regexp.MustCompile(`^-A \S+ (-m comment --comment ("[^"]*"|\S+) )?-j \S+$`)

// jump says how often a jump is there, and behind how many rules that are not of an agent of this kind.
func (l *listing) jump(j jump) (count, behind int) {
	foreign := 0
	for _, rule := range l.others[j.hook] {
		switch {
		case target(rule) == j.chain && unconditional.MatchString(rule):
			if count == 0 {
				behind = foreign
			}
			count++
		case !strings.HasPrefix(target(rule), ChainPrefix):
			foreign++
		}
	}
	return count, behind
}

// taken is the first rule of others before a jump that surely takes a new packet to one of these frontends, so that ours never see it; empty
// where none does. Most rules there concern other packets, such as the jumps of kube-proxy.
func (l *listing) taken(j jump, rules []plan.Rule, family plan.Family) string {
	var chains strings.Builder
	for name, rules := range l.others {
		fmt.Fprintf(&chains, ":%s - [0:0]\n", name)
		if name != j.hook {
			fmt.Fprintln(&chains, strings.Join(rules, "\n"))
		}
	}
	for _, before := range l.others[j.hook] {
		if strings.HasPrefix(target(before), ChainPrefix) {
			if target(before) == j.chain {
				break
			}
			continue
		}
		t := ruleset.ParseIPTables(chains.String()+before+"\n", nil)
		for i := range rules {
			r := &rules[i]
			packet := ruleset.Packet{Destination: netip.AddrPortFrom(r.Address, r.Port), Protocol: string(r.Protocol)}
			if plan.FamilyOf(r.Address) == family && !r.Foreign() && (j.hook != "OUTPUT" || r.HostClients) && t.Takes(j.hook, packet) {
				return before
			}
		}
	}
	return ""
}

// empty says that nothing is there of the agent whose chains begin with prefix.
func (l *listing) empty(prefix string) bool {
	return len(l.chains) == 0 && len(l.leadingTo(prefix)) == 0
}

// leadingTo are the rules of others, and our own jumps, that lead to chains that begin with prefix.
func (l *listing) leadingTo(prefix string) []string {
	var rules []string
	for _, chain := range l.others {
		for _, rule := range chain {
			if strings.HasPrefix(target(rule), prefix) {
				rules = append(rules, rule)
			}
		}
	}
	slices.Sort(rules)
	return rules
}

// write is the input of iptables-restore --noflush that puts t in place of what the listing shows: one
// transaction. Nothing is said of built-in chains, so that nobody else's rules are touched. A jump that is
// right stays as it is; move says of which hooks a jump behind foreign rules is to come first again.
func (t table) write(there *listing, prefix string, move func(hook string) bool) string {
	var w strings.Builder
	fmt.Fprintf(&w, "*%s\n", t.name)
	wanted := map[string]bool{}
	for _, c := range t.chains {
		wanted[c.name] = true
		fmt.Fprintf(&w, ":%s - [0:0]\n", c.name) // makes it, or empties it
	}
	for _, c := range there.chains {
		if !wanted[c.name] {
			fmt.Fprintf(&w, ":%s - [0:0]\n", c.name)
		}
	}
	kept := map[jump]bool{}
	for _, j := range t.jumps {
		count, behind := there.jump(j)
		kept[j] = count == 1 && (behind == 0 || !move(j.hook))
	}
	for _, rule := range there.leadingTo(prefix) {
		isKept := func(j jump) bool {
			return kept[j] && strings.HasPrefix(rule, "-A "+j.hook+" ") && target(rule) == j.chain && unconditional.MatchString(rule)
		}
		if !slices.ContainsFunc(t.jumps, isKept) {
			fmt.Fprintln(&w, "-D "+strings.TrimPrefix(rule, "-A "))
		}
	}
	for _, j := range t.jumps {
		if !kept[j] {
			fmt.Fprintf(&w, "-I %s\n", j)
		}
	}
	for _, c := range t.chains {
		c.write(&w)
	}
	for _, c := range there.chains {
		if !wanted[c.name] {
			fmt.Fprintf(&w, "-X %s\n", c.name)
		}
	}
	w.WriteString("COMMIT\n")
	return w.String()
}

func (c chain) write(w *strings.Builder) {
	for _, rule := range c.rules {
		fmt.Fprintf(w, "-A %s %s\n", c.name, rule)
	}
}

// changes are the lines of iptables-restore --noflush that lead from before to t: first those that add, with which what is new counts
// and not what is old behind it, and then those that delete. Both are empty where nothing differs. Jumps and rules that stay as they are
// go unmentioned.
func (t table) changes(before table) (additions, deletions string) {
	var declared, added, deleted strings.Builder
	old := map[string]chain{}
	for _, c := range before.chains {
		old[c.name] = c
	}
	for _, c := range t.chains {
		o, there := old[c.name]
		delete(old, c.name)
		if !there {
			fmt.Fprintf(&declared, ":%s - [0:0]\n", c.name)
			c.write(&added)
			continue
		}
		first, last := differing(o.rules, c.rules)
		fresh := c.rules[first : len(c.rules)-last]
		for i, rule := range fresh {
			fmt.Fprintf(&added, "-I %s %d %s\n", c.name, first+i+1, rule)
		}
		for range o.rules[first : len(o.rules)-last] {
			fmt.Fprintf(&deleted, "-D %s %d\n", c.name, first+len(fresh)+1)
		}
	}
	for _, verb := range []string{"-F", "-X"} { // they may lead to each other
		for _, c := range before.chains {
			if _, gone := old[c.name]; gone {
				fmt.Fprintf(&deleted, "%s %s\n", verb, c.name)
			}
		}
	}
	return declared.String() + added.String(), deleted.String()
}

// differing is how many rules at the beginning, and how many of the rest at the end, two chains have in common.
func differing(before, now []string) (first, last int) {
	for first < min(len(before), len(now)) && before[first] == now[first] {
		first++
	}
	for last < min(len(before), len(now))-first && before[len(before)-1-last] == now[len(now)-1-last] {
		last++
	}
	return first, last
}

// strayed are the chains of which a listing after t.changes(before) does not show the rules that stay as the listing before has shown
// them: somebody else has changed them, so that rules of theirs may have been deleted instead of ours.
func (t table) strayed(before table, listed, there []chain) (names []string) {
	rules := func(chains []chain, name string) []string {
		if i := slices.IndexFunc(chains, func(c chain) bool { return c.name == name }); i >= 0 {
			return chains[i].rules
		}
		return nil
	}
	for _, c := range t.chains {
		if !slices.ContainsFunc(before.chains, func(o chain) bool { return o.name == c.name }) {
			continue
		}
		first, last := differing(rules(before.chains, c.name), c.rules)
		was, is := rules(listed, c.name), rules(there, c.name)
		if len(was) < first+last || len(is) < first+last || !slices.Equal(was[:first], is[:first]) || !slices.Equal(was[len(was)-last:], is[len(is)-last:]) {
			names = append(names, c.name)
		}
	}
	return names
}

// missing says which chains, rules and jumps of t the listing does not show, by count.
func (t table) missing(there *listing) []string {
	var differs []string
	listed := map[string]int{}
	for _, c := range there.chains {
		listed[c.name] = len(c.rules)
	}
	for _, c := range t.chains {
		if count, shown := listed[c.name]; !shown || count != len(c.rules) {
			differs = append(differs, fmt.Sprintf("chain %s has %d rules instead of %d", c.name, count, len(c.rules)))
		}
	}
	for _, j := range t.jumps {
		if count, _ := there.jump(j); count != 1 {
			differs = append(differs, fmt.Sprintf("%d jumps from %s to %s", count, j.hook, j.chain))
		}
	}
	return differs
}

// compareChains says in which respects the chains of l differ from those listed when they were loaded.
func (l *listing) compareChains(loaded []chain) []string {
	lines := func(chains []chain) (all []string) {
		for _, c := range chains {
			all = append(all, "chain "+c.name)
			for _, rule := range c.rules {
				all = append(all, "-A "+c.name+" "+rule)
			}
		}
		slices.Sort(all)
		return all
	}
	same := func(a, b chain) bool { return a.name == b.name && slices.Equal(a.rules, b.rules) }
	if slices.EqualFunc(l.chains, loaded, same) {
		return nil
	}
	wanted, there := lines(loaded), lines(l.chains)
	var differs []string
	differs = append(differs, nftables.Summary("missing", without(wanted, there))...)
	differs = append(differs, nftables.Summary("foreign", without(there, wanted))...)
	if len(differs) == 0 {
		// The order of chains means nothing, that of rules does.
		byName := func(a, b chain) int { return strings.Compare(a.name, b.name) }
		if slices.EqualFunc(slices.SortedFunc(slices.Values(l.chains), byName), slices.SortedFunc(slices.Values(loaded), byName), same) {
			return nil
		}
		differs = []string{"the same rules in another order or number"}
	}
	return differs
}

// without are the elements of a that are not in b; both are in order.
func without(a, b []string) []string {
	var rest []string
	for _, element := range a {
		if _, found := slices.BinarySearch(b, element); !found {
			rest = append(rest, element)
		}
	}
	return rest
}
