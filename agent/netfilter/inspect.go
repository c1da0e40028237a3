package netfilter

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Tools are the versions of the commands that make rules, as they print them; those that are missing are not named.
func Tools(ctx context.Context) []string {
	var found []string
	for _, command := range []string{"nft", "iptables-nft", "iptables-legacy", "iptables"} {
		if out, err := exec.CommandContext(ctx, command, "--version").Output(); err == nil {
			name := ""
			if version := strings.TrimSpace(string(out)); !strings.HasPrefix(version, command+" ") {
				name = command + ": "
			}
			found = append(found, name+strings.TrimSpace(string(out)))
		}
	}
	return found
}

// TrialLoad says why the rules cannot be made with nftables on this node; nil where they can. Nothing is loaded.
func TrialLoad(ctx context.Context) error {
	_, err := NewNFTables(ctx, "trial")
	return err
}

// Inspect says in which respects the rules in the kernel differ from what the agent called agentName serves, and
// changes nothing. It sees that its hooks are complete, and that each service leads where it should: not, who may
// use it.
func Inspect(ctx context.Context, backendName, agentName string, services []plan.Service) ([]string, error) {
	p := plan.Build(plan.Input{Services: services})
	var differs []string
	var err error
	inspect := func(family knftables.Family, look func() ([]string, error)) {
		if !slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return familyOf(r.Address) == family }) {
			return
		}
		found, lookErr := look()
		differs, err = append(differs, found...), errors.Join(err, lookErr)
	}
	if backendName == BackendNFTables {
		for _, family := range []knftables.Family{knftables.IPv4Family, knftables.IPv6Family} {
			inspect(family, func() ([]string, error) { return inspectTable(ctx, family, tablePrefix+agentName, &p) })
		}
		return differs, err
	}
	v, err := kubeletVariant()
	if err != nil {
		return nil, err
	}
	for _, f := range newIPTables(agentName, v).families {
		inspect(f.family, func() ([]string, error) { return f.inspect(ctx, &p) })
	}
	return differs, err
}

func inspectTable(ctx context.Context, family knftables.Family, name string, p *plan.Plan) ([]string, error) {
	there, err := listTable(ctx, family, name)
	if err != nil {
		return nil, err
	}
	table := fmt.Sprintf("table %s %s", family, name)
	if !there.exists {
		return []string{table + " is missing"}, nil
	}
	wanted := render(p, family)
	var differs []string
	for _, c := range wanted.chains {
		if c.hook == "" {
			continue
		}
		if count := strings.Count("\n"+there.structure, "\nrule in chain "+c.name+": "); count != len(c.rules) {
			differs = append(differs, fmt.Sprintf("%s: chain %s has %d rules instead of %d", table, c.name, count, len(c.rules)))
		}
	}
	// The rest of the data follows from what is not known here.
	known := []string{"addresses", "endpoints", "spread"}
	wanted.sets = slices.DeleteFunc(wanted.sets, func(s set) bool { return !slices.Contains(known, s.name) })
	for _, s := range wanted.sets {
		if there.elements[s.name] == nil {
			differs = append(differs, fmt.Sprintf("%s: %s %s is missing", table, s.kind(), s.name))
		}
	}
	for _, difference := range there.compare(&wanted, there.structure) {
		differs = append(differs, table+": "+difference)
	}
	return differs, nil
}

func (f *xfamily) inspect(ctx context.Context, p *plan.Plan) ([]string, error) {
	var differs []string
	for _, t := range renderXTables(p, f.family, f.agent) {
		there, err := f.list(ctx, t.name)
		if err != nil {
			return nil, err
		}
		for _, j := range t.jumps {
			if count, _ := there.jump(j); count != 1 {
				differs = append(differs, fmt.Sprintf("%s table %s: %d jumps from %s to our chain instead of 1", f.command, t.name, count, j.hook))
			}
		}
		if t.name != "nat" {
			continue
		}
		for _, rule := range p.Rules {
			for _, endpoint := range rule.Endpoints {
				if familyOf(rule.Address) == f.family && !there.leads(rule, endpoint.String()) {
					differs = append(differs, fmt.Sprintf("%s table nat: no rule leads %s to %s", f.command, rule, endpoint))
				}
			}
		}
	}
	return differs, nil
}

// leads says whether a rule translates a frontend to an endpoint.
func (l *xlisting) leads(rule plan.Rule, endpoint string) bool {
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

// RemoveForeign is the command that removes a rule which ForeignDNAT has named; empty where it takes two, or
// where a part of the rule is not known.
func RemoveForeign(ctx context.Context, rule string) string {
	if strings.Contains(rule, unknown) {
		return ""
	}
	if save, line, ok := strings.Cut(rule, " -t nat: -A "); ok {
		return strings.TrimSuffix(save, "-save") + " -t nat -D " + line
	}
	var family, table, chain string
	place, text, _ := strings.Cut(rule, ": ")
	if _, err := fmt.Sscanf(strings.NewReplacer(",", "").Replace(place), "nft table %s %s chain %s", &family, &table, &chain); err != nil {
		return ""
	}
	out, err := exec.CommandContext(ctx, "nft", "--stateless", "--handle", "list", "chain", family, table, chain).Output()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if found, handle, ok := strings.Cut(strings.TrimSpace(line), " # handle "); ok && found == text {
			return fmt.Sprintf("nft delete rule %s %s %s handle %s", family, table, chain, handle)
		}
	}
	return ""
}
