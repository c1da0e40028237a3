package nftables

import (
	"errors"
	"fmt"
	"slices"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Inspect says in which respects the kernel's tables of an agent differ from a plan, and changes nothing. It sees that the
// hooks are complete, that no chain or set that they need has been emptied, and that each frontend leads to its endpoints. Of the plan's
// input it needs the services, without ExcludeTarget, the links and HostAddresses.
func Inspect(agentName string, p *plan.Plan) (differs []string, err error) {
	for _, family := range plan.Families() {
		if p.Has(family) {
			found, inspectErr := inspectTable(family, TablePrefix+agentName, p)
			differs, err = append(differs, found...), errors.Join(err, inspectErr)
		}
	}
	return differs, err
}

func inspectTable(family plan.Family, name string, p *plan.Plan) ([]string, error) {
	var r reader
	wanted := render(p, family)
	differs := func(there *listing) []string {
		return inspectListing(there, wanted, fmt.Sprintf("table %s %s", family, name))
	}
	there, err := listAgain(func() (*listing, error) { return r.listTable(family, name, wanted.sets) }, func(l *listing) bool { return len(differs(l)) == 0 })
	if err != nil {
		return nil, err
	}
	return differs(there), nil
}

func inspectListing(there *listing, wanted ruleset, table string) (differs []string) {
	if !there.exists {
		return []string{table + " is missing"}
	}
	for _, c := range wanted.chains {
		switch count := there.rules[c.name]; {
		case c.hook != "" && count != len(c.rules):
			differs = append(differs, fmt.Sprintf("%s: chain %s has %d rules instead of %d", table, c.name, count, len(c.rules)))
		case count == 0 && len(c.rules) > 0: // their number depends on what is not known here
			differs = append(differs, fmt.Sprintf("%s: chain %s has no rules", table, c.name))
		}
	}
	// Of other sets, more elements follow from what is not known here; and whether one of held is there is a matter of time.
	exact := []string{addressesSet, "destinations", "spreads"}
	var compared []set
	for _, s := range wanted.sets {
		elements := there.elements[s.name]
		switch {
		case elements == nil:
			differs = append(differs, fmt.Sprintf("%s: %s %s is missing", table, s.kind(), s.name))
			continue
		case slices.Contains(exact, s.name):
			compared = append(compared, s)
			continue
		case s.until != nil:
			continue
		}
		var missing []string
		for key := range s.elements {
			if _, ok := elements[key]; !ok {
				missing = append(missing, key)
			}
		}
		differs = append(differs, Summary(table+": missing from "+s.name, missing)...)
	}
	wanted.sets = compared
	for _, difference := range there.differs(&wanted, there.structure) {
		differs = append(differs, table+": "+difference)
	}
	return differs
}
