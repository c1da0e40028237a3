package nftables

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// element is one of a set, as it is in the kernel. packets is how many have met it, in a set that counts.
type element struct {
	key, value string
	packets    uint64
}

// Counts is how often each frontend was asked for since the agent started: what the kernel counts now, and what it has counted in
// elements that were since replaced. It is nil where the plan has too many rules.
func (b *Backend) Counts() (map[plan.Frontend]plan.Count, error) {
	all := map[plan.Frontend]plan.Count{}
	for _, t := range b.tables {
		if t.plan == nil || t.counters == nil {
			continue
		}
		if !t.plan.Counted() {
			return nil, nil
		}
		counts, err := t.count(nil)
		if err != nil {
			return nil, fmt.Errorf("nftables table %s %s: counters: %w", t.family, t.name, err)
		}
		maps.Copy(all, counts)
	}
	return all, nil
}

// count is what is remembered and what the elements with these keys have counted, by set; nil is all elements.
//
// Endpoints are looked up by the first packet of a flow alone. Where the action is looked up, the packet was not translated: of elements
// that lead to a refusal, all packets count.
func (t *table) count(keys map[string][]string) (map[plan.Frontend]plan.Count, error) {
	frontends, counts := map[string]plan.Frontend{}, map[plan.Frontend]plan.Count{}
	for _, rule := range t.plan.Rules {
		if plan.FamilyOf(rule.Address) == t.family && !rule.Foreign() {
			frontends[elementKey(rule.Frontend)] = rule.Frontend
			counts[rule.Frontend] = t.counted[rule.Frontend]
		}
	}
	var errs []error
	for _, s := range sets(&plan.Plan{}, t.family) {
		if !s.counted || keys != nil && keys[s.name] == nil {
			continue
		}
		elements, err := t.counters(s)
		errs = append(errs, err)
		for _, e := range elements {
			frontend, known := frontends[e.key]
			if !known || keys != nil && !slices.Contains(keys[s.name], e.key) {
				continue
			}
			count := counts[frontend]
			if !strings.HasSuffix(s.name, actionsSuffix) {
				count.Opened += e.packets
			} else if refuses(e.value) {
				count.Refused += e.packets
			}
			counts[frontend] = count
		}
	}
	return counts, errors.Join(errs...)
}

// refuses reports whether a verdict is one for packets of frontends without an endpoint.
func refuses(verdict string) bool {
	return strings.HasPrefix(verdict, "goto "+string(plan.Reject)) || strings.HasPrefix(verdict, "goto "+string(plan.Hold))
}

// keptCounts is what has to be remembered once elements are replaced: those of a change, or all with nil. What they count until
// then is lost, and where they cannot be read, all of it: rules are worth more than their counters.
func (t *table) keptCounts(d *diff) map[plan.Frontend]plan.Count {
	if t.plan == nil || t.counters == nil || !t.plan.Counted() {
		return t.counted
	}
	var keys map[string][]string
	if d != nil {
		keys = map[string][]string{}
		for _, change := range d.sets {
			if change.old.counted && len(change.gone) > 0 {
				keys[change.old.name] = change.gone
			}
		}
		if len(keys) == 0 {
			return t.counted
		}
	}
	counts, err := t.count(keys)
	if err != nil {
		return t.counted
	}
	return counts
}

// listCounters dumps a set that counts.
func (r *reader) listCounters(family plan.Family, table string, s set) (all []element, err error) {
	messages, err := r.get(unix.NFT_MSG_GETSETELEM, netlink.Dump, familyNumber(family),
		text(unix.NFTA_SET_ELEM_LIST_TABLE, table), text(unix.NFTA_SET_ELEM_LIST_SET, s.name))
	if err != nil {
		return nil, fmt.Errorf("set %s: %w", s.name, err)
	}
	for _, message := range messages {
		if len(message.Data) < sizeofNfgenmsg {
			continue
		}
		attributes, err := attributeMap(message.Data[sizeofNfgenmsg:])
		if err == nil {
			err = decodeElements(s, attributes[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(e element) { all = append(all, e) })
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}
