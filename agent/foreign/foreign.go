// Package foreign finds rules of others that translate a magic IP, such as one that an older tool has left behind.
//
// It looks at all rules of the node, so it is for the doctor command and one look at start, not for a loop. Rules of
// iptables-legacy are visible only where iptables-legacy-save can be run, which needs CAP_NET_RAW.
package foreign

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// Rules are the rules of others that translate one of these addresses. They do no harm where the agent's rules come first,
// and are the cause of wrong answers where they do not. hidden says, one sentence each, which rules could not be read.
// Tools that are missing have made no rules.
func Rules(ctx context.Context, addresses []netip.Addr) (found, hidden []string) {
	told := map[string]bool{} // nft tables that a save command has told of
	for save, table := range map[string]string{"iptables-nft-save": "ip nat", "ip6tables-nft-save": "ip6 nat"} {
		if out, err := exec.CommandContext(ctx, save, "-t", "nat").Output(); err == nil {
			told[table] = true
			found = append(found, foreignIPTables(save, string(out), addresses)...)
		}
	}
	for family, save := range map[plan.Family]string{plan.IPv4: "iptables-legacy-save", plan.IPv6: "ip6tables-legacy-save"} {
		if !iptables.LegacyTable(family, "nat") {
			continue
		}
		out, err := exec.CommandContext(ctx, save, "-t", "nat").Output()
		if err != nil { // the command or CAP_NET_RAW is missing
			hidden = append(hidden, fmt.Sprintf("the nat table of iptables-legacy is in use (%s) and cannot be read here: %s: %v", family, save, err))
			continue
		}
		found = append(found, foreignIPTables(save, string(out), addresses)...)
	}
	if out, err := exec.CommandContext(ctx, "nft", "--stateless", "list", "ruleset").Output(); err == nil {
		found = append(found, foreignNFT(string(out), told, addresses)...)
	}
	slices.Sort(found)
	slices.Sort(hidden)
	return found, hidden
}

// foreignNFT looks through what `nft list ruleset` prints, but for the tables that have been told of.
func foreignNFT(ruleset string, told map[string]bool, addresses []netip.Addr) []string {
	var found []string
	table, chain := "", ""
	for line := range strings.Lines(ruleset) {
		words := strings.Fields(line)
		switch {
		case len(words) >= 3 && words[0] == "table":
			table = words[1] + " " + words[2]
		case len(words) >= 2 && words[0] == "chain":
			chain = words[1]
		case told[table] || strings.Contains(table, " "+nftables.TablePrefix) || strings.HasPrefix(chain, iptables.ChainPrefix): // theirs is known, or an agent's
		case !translates(words):
		case slices.ContainsFunc(words, func(w string) bool { return isOneOf(w, addresses) }):
			found = append(found, fmt.Sprintf("nft table %s, chain %s: %s", table, chain, strings.TrimSpace(line)))
		}
	}
	return found
}

// translates says whether a rule of nftables has a dnat statement. "ct status dnat" is a match.
func translates(words []string) bool {
	i := slices.Index(words, "dnat")
	return i >= 0 && (i == 0 || words[i-1] != "status")
}

func foreignIPTables(command, rules string, addresses []netip.Addr) []string {
	var found []string
	for line := range strings.Lines(rules) {
		words := strings.Fields(line)
		if len(words) < 4 || words[0] != "-A" || strings.HasPrefix(words[1], iptables.ChainPrefix) {
			continue
		}
		jump, destination := slices.Index(words, "-j"), slices.Index(words, "-d")
		if jump < 0 || jump+1 == len(words) || words[jump+1] != "DNAT" || destination < 0 || destination+1 == len(words) {
			continue
		}
		if isOneOf(words[destination+1], addresses) {
			found = append(found, fmt.Sprintf("%s -t nat: %s", command, strings.TrimSpace(line)))
		}
	}
	return found
}

// isOneOf says whether a word is one of the addresses, alone or as a prefix of full length.
func isOneOf(word string, addresses []netip.Addr) bool {
	word, _, _ = strings.Cut(word, "/")
	address, err := netip.ParseAddr(strings.TrimSuffix(word, ","))
	return err == nil && slices.Contains(addresses, address)
}

// Remove is the command that removes a rule which Rules has found, safe to paste into a shell; empty where it takes two.
func Remove(ctx context.Context, rule string) string {
	if save, line, ok := strings.Cut(rule, " -t nat: -A "); ok {
		return quote.Shell(append([]string{strings.TrimSuffix(save, "-save"), "-t", "nat", "-D"}, quote.Fields(line)...)...)
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
			return quote.Shell("nft", "delete", "rule", family, table, chain, "handle", handle)
		}
	}
	return ""
}
