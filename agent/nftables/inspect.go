package nftables

import (
	"errors"
	"fmt"
	"slices"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Inspect says in which respects the kernel's tables of an agent differ from a plan, and changes nothing. It sees that the
// hooks are complete and that each frontend leads to its endpoints: not, which clients are served.
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
		if c.hook == "" {
			continue
		}
		if count := there.rules[c.name]; count != len(c.rules) {
			differs = append(differs, fmt.Sprintf("%s: chain %s has %d rules instead of %d", table, c.name, count, len(c.rules)))
		}
	}
	// The rest of the data follows from what is not known here.
	known := []string{"addresses", "destinations", "spreads"}
	wanted.sets = slices.DeleteFunc(slices.Clone(wanted.sets), func(s set) bool { return !slices.Contains(known, s.name) })
	for _, s := range wanted.sets {
		if there.elements[s.name] == nil {
			differs = append(differs, fmt.Sprintf("%s: %s %s is missing", table, s.kind(), s.name))
		}
	}
	for _, difference := range there.differs(&wanted, there.structure) {
		differs = append(differs, table+": "+difference)
	}
	return differs
}
