package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Inspect says in which respects the kernel's chains of an agent differ from a plan, and changes nothing. It sees that there
// is one jump from each hook, before rules of others that would take the packets, that no chain has been emptied, and that each frontend leads to its endpoints; in the table raw, nothing. Of
// the plan's input it needs the services, without ExcludeTarget, the links and HostAddresses.
func Inspect(ctx context.Context, agentName string, p *plan.Plan) (differs []string, err error) {
	v, err := InUse(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range New(agentName, v).families {
		if p.Has(f.family) {
			found, inspectErr := f.inspect(ctx, p)
			differs, err = append(differs, found...), errors.Join(err, inspectErr)
		}
	}
	return differs, err
}

func (f *chains) inspect(ctx context.Context, p *plan.Plan) ([]string, error) {
	tables := render(p, f.family, f.agent)
	listings, err := f.list(ctx, names(tables)...)
	if err != nil {
		return nil, err
	}
	var differs []string
	for _, t := range tables {
		there := listings[t.name]
		for _, j := range t.jumps {
			switch count, behind := there.jump(j); {
			case count != 1:
				differs = append(differs, fmt.Sprintf("%s table %s: %d jumps from %s to our chain instead of 1", f.command, t.name, count, j.hook))
			case behind > 0:
				if err := f.taken(t.name, j, there, p.Rules); err != nil {
					differs = append(differs, err.Error())
				}
			}
		}
		for _, c := range there.chains {
			rendered := func(r chain) bool { return r.name == c.name && len(r.rules) == 0 }
			if len(t.jumps) > 0 && len(c.rules) == 0 && !slices.ContainsFunc(t.chains, rendered) {
				differs = append(differs, fmt.Sprintf("%s table %s: chain %s has no rules", f.command, t.name, c.name))
			}
		}
		if t.name != "nat" {
			continue
		}
		for _, rule := range p.Rules {
			for _, endpoint := range rule.Endpoints {
				if plan.FamilyOf(rule.Address) == f.family && !there.leads(rule, endpoint.String()) {
					differs = append(differs, fmt.Sprintf("%s table nat: no rule leads %s to %s", f.command, rule, endpoint))
				}
			}
		}
	}
	return differs, nil
}

// leads reports whether a rule translates a frontend to an endpoint.
func (l *listing) leads(rule plan.Rule, endpoint string) bool {
	for _, c := range l.chains {
		for _, r := range c.rules {
			words := strings.Fields(r)
			if slices.Contains(words, endpoint) && (len(rule.Endpoints) > 1 || slices.Contains(words, one(rule.Address))) {
				return true
			}
		}
	}
	return false
}
