// Package foreign finds rules of others that translate a magic IP, such as one that an older tool has left behind, or those of a
// Service with that address among its externalIPs, and rules that take packets to it to a transparent proxy.
//
// It looks at all rules of the node, so it is for the doctor command and for a look every few minutes. Rules of
// iptables-legacy are visible only where iptables-legacy-save can be run, which needs CAP_NET_RAW.
package foreign

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

// Kinds says which rules Rules finds.
const Kinds = "DNAT, REDIRECT and TPROXY of iptables and nftables, by address, prefix, range, set, map or port"

// Rule is a rule of others that translates a magic IP. Text is the rule with its place, and Next what to do about it.
type Rule struct{ Text, Next string }

// Rules are the rules of others that translate one of these frontends. They do no harm where the agent's rules come first,
// and are the cause of wrong answers where they do not. hidden says, one sentence each, which rules could not be read; where a tool is
// missing, those that it would read and that the kernel has.
func Rules(ctx context.Context, frontends []plan.Frontend) (found []Rule, hidden []string) {
	known := map[string]bool{} // nft tables that a save command has printed
	look := func(family plan.Family, save, name string) error {
		rules, sets, err := saved(ctx, save, name)
		if err != nil {
			return err
		}
		passed := func(chain string) bool { return strings.HasPrefix(chain, iptables.ChainPrefix) }
		table := ruleset.ParseIPTables(rules, sets)
		unread := slices.DeleteFunc(table.Sets(), func(name string) bool { _, read := sets[name]; return read })
		assumed := maps.Clone(sets)
		perhaps := ruleset.ParseIPTables(rules, assumed)
		for _, p := range packets(frontends, family) {
			certain := table.Translating(p, passed)
			for _, text := range certain {
				found = append(found, Rule{Text: save + " -t " + name + ": " + text, Next: removeSaved(save, name, text, p)})
			}
			if len(unread) == 0 {
				continue
			}
			for _, name := range unread { // as if they had this address
				assumed[name] = []string{p.Destination.Addr().String()}
			}
			for _, text := range perhaps.Translating(p, passed) {
				if !slices.Contains(certain, text) {
					hidden = append(hidden, fmt.Sprintf("whether %s -t %s: %s translates a magic IP: the members of its set cannot be read here (ipset save)", save, name, text))
				}
			}
		}
		return nil
	}
	for _, family := range plan.Families() {
		command := map[plan.Family]string{plan.IPv4: "iptables", plan.IPv6: "ip6tables"}[family]
		for _, name := range []string{"nat", "mangle"} {
			err := look(family, command+"-nft-save", name)
			known[fmt.Sprintf("%s %s", family, name)] = err == nil
			if err != nil && !errors.Is(err, exec.ErrNotFound) && nftables.Supported() { // without it there are no such rules
				hidden = append(hidden, fmt.Sprintf("rules of iptables-nft (%s) cannot be read here: %v", family, err))
			}
			inUse, err := iptables.LegacyTable(family, name)
			if err != nil {
				hidden = append(hidden, fmt.Sprintf("whether the %s table of iptables-legacy is in use (%s) cannot be read here: %v", name, family, err))
			}
			if !inUse {
				continue
			}
			if err := look(family, command+"-legacy-save", name); err != nil { // the command or CAP_NET_RAW is missing
				hidden = append(hidden, fmt.Sprintf("the %s table of iptables-legacy is in use (%s) and cannot be read here: %v", name, family, err))
			}
		}
	}
	rules, err := nftRules(ctx, frontends, known)
	if err != nil {
		hidden = append(hidden, err.Error())
	}
	found = append(found, rules...)
	slices.SortStableFunc(found, func(a, b Rule) int { return strings.Compare(a.Text, b.Text) })
	found = slices.CompactFunc(found, func(a, b Rule) bool { return a.Text == b.Text })
	slices.Sort(hidden)
	return found, slices.Compact(hidden)
}

// packets are what is looked for: for each address a packet of which nothing else is known, and for each frontend one to it.
func packets(frontends []plan.Frontend, family plan.Family) (all []ruleset.Packet) {
	seen := map[netip.Addr]bool{}
	for _, f := range frontends {
		if plan.FamilyOf(f.Address) != family {
			continue
		}
		if !seen[f.Address] {
			seen[f.Address] = true
			all = append(all, ruleset.Packet{Destination: netip.AddrPortFrom(f.Address, 0)})
		}
		all = append(all, ruleset.Packet{Destination: f.AddrPort(), Protocol: string(f.Protocol)})
	}
	return all
}

// saved is what a save command prints of a table, and the members of the sets that its rules match with.
func saved(ctx context.Context, save, table string) (rules string, sets map[string][]string, err error) {
	rules, err = program.Output(ctx, program.Timeout, "", save, "-t", table)
	if err != nil {
		return "", nil, err
	}
	sets = map[string][]string{}
	for _, name := range ruleset.ParseIPTables(rules, nil).Sets() {
		members, err := program.Output(ctx, program.Timeout, "", "ipset", "save", name)
		if err != nil {
			continue // what depends on it is not known
		}
		sets[name] = []string{}
		for line := range strings.Lines(members) { // add NAME MEMBER …
			if words := strings.Fields(line); len(words) >= 3 && words[0] == "add" {
				sets[name] = append(sets[name], words[2])
			}
		}
	}
	return rules, sets, nil
}

// nftRules looks through all tables of nft but those in known and those of agents.
func nftRules(ctx context.Context, frontends []plan.Frontend, known map[string]bool) (found []Rule, err error) {
	tables, err := NFTables(ctx, func(family, table string) bool { return known[family+" "+table] })
	if err != nil {
		return nil, err
	}
	passed := func(family, table, chain string) bool {
		return known[family+" "+table] || strings.HasPrefix(table, nftables.TablePrefix) || strings.HasPrefix(chain, iptables.ChainPrefix)
	}
	var texts map[string]string
	for _, family := range plan.Families() {
		for _, p := range packets(frontends, family) {
			for _, r := range tables.Translating(p, nftables.TranslationPriority, passed) {
				if texts == nil {
					texts = nftTexts(ctx)
				}
				found = append(found, nftRule(r, texts, p))
			}
		}
	}
	return found, nil
}

// NFTables are the tables of nftables. Where nft is missing, there are none if the kernel has none, but those of agents and those that
// known says have been read otherwise.
func NFTables(ctx context.Context, known func(family, table string) bool) (*ruleset.NFTables, error) {
	out, err := program.Output(ctx, program.Timeout, "", "nft", "--json", "--stateless", "list", "ruleset")
	if errors.Is(err, exec.ErrNotFound) {
		return &ruleset.NFTables{}, withoutNFT(known)
	}
	if err != nil {
		return nil, fmt.Errorf("the rules of nftables cannot be read here: %w", err)
	}
	tables, err := ruleset.ParseNFTables([]byte(out))
	if err != nil {
		return nil, err
	}
	if listing, err := program.Output(ctx, program.Timeout, "", "nft", "list", "chains"); err == nil { // without it, only links are missing
		tables.AddDevices(listing)
	}
	return tables, nil
}

// withoutNFT is an error that names the tables that are not known.
func withoutNFT(known func(family, table string) bool) error {
	tables, err := kernelTables()
	if err != nil {
		return fmt.Errorf("nft is missing, and which tables nftables has cannot be read here: %w", err)
	}
	var unread []string
	for _, t := range tables {
		if !known(t[0], t[1]) && !strings.HasPrefix(t[1], nftables.TablePrefix) {
			unread = append(unread, t[0]+" "+t[1])
		}
	}
	if len(unread) > 0 {
		return fmt.Errorf("the rules of nftables cannot be read here: nft is missing, and the kernel has tables: %s", strings.Join(unread, ", "))
	}
	return nil
}

func nftRule(r ruleset.NFTRule, texts map[string]string, p ruleset.Packet) Rule {
	place := fmt.Sprintf("nft table %s %s, chain %s", r.Family, r.Table, r.Chain)
	rule := Rule{
		Text: place + ": " + texts[fmt.Sprintf("%s handle %d", place, r.Handle)],
		Next: quote.Shell("nft", "delete", "rule", r.Family, r.Table, r.Chain, "handle", fmt.Sprint(r.Handle)),
	}
	if r.Set != "" {
		rule.Text += fmt.Sprintf(", and %s has %s", r.Set, r.Element)
		rule.Next = fmt.Sprintf("take %s out of %s", r.Element, r.Set)
	}
	if r.Table == "kube-proxy" {
		rule.Next = takeFromService(p)
	}
	return rule
}

// nftTexts are all rules as nft writes them, by their place and handle.
func nftTexts(ctx context.Context) map[string]string {
	out, err := program.Output(ctx, program.Timeout, "", "nft", "--stateless", "--handle", "list", "ruleset")
	if err != nil {
		return nil
	}
	texts := map[string]string{}
	table, chain := "", ""
	for line := range strings.Lines(out) {
		text, handle, ok := strings.Cut(strings.TrimSpace(line), " # handle ")
		words := strings.Fields(line)
		switch {
		case len(words) >= 3 && words[0] == "table":
			table = words[1] + " " + words[2]
		case len(words) >= 2 && words[0] == "chain":
			chain = words[1]
		case ok:
			texts["nft table "+table+", chain "+chain+" handle "+handle] = text
		}
	}
	return texts
}

// removeSaved is the command that removes a rule of iptables, safe to paste into a shell.
func removeSaved(save, table, text string, p ruleset.Packet) string {
	words := quote.Fields(text)
	if strings.HasPrefix(words[1], "KUBE-") {
		return takeFromService(p)
	}
	return quote.Shell(append([]string{strings.TrimSuffix(save, "-save"), "-t", table, "-D"}, words[1:]...)...)
}

// takeFromService is what to do about a rule of kube-proxy, which would put it back.
func takeFromService(p ruleset.Packet) string {
	return fmt.Sprintf("it is of a Service: take %s out of its externalIPs or load balancer addresses; kubectl get services --all-namespaces -o wide shows it", p.Destination.Addr())
}
