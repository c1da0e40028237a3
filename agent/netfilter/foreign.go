package netfilter

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"
)

// ForeignDNAT names the rules of others that translate one of these addresses, such as one that the bash
// tool has left behind. They do no harm where our rules come first, and are the cause where they do not.
// Tools that are missing have made no rules.
func ForeignDNAT(ctx context.Context, addresses []netip.Addr) []string {
	var found []string
	told := map[string]bool{} // nft tables that a save command has told of
	for save, table := range map[string]string{"iptables-nft-save": "ip nat", "ip6tables-nft-save": "ip6 nat"} {
		if out, err := exec.CommandContext(ctx, save, "-t", "nat").Output(); err == nil {
			told[table] = true
			found = append(found, foreignIPTables(save, string(out), addresses)...)
		}
	}
	for family, l := range map[knftables.Family]layout{knftables.IPv4Family: layout4, knftables.IPv6Family: layout6} {
		if !legacyTable(family, "nat") {
			continue
		}
		save := map[knftables.Family]string{knftables.IPv4Family: "iptables-legacy-save", knftables.IPv6Family: "ip6tables-legacy-save"}[family]
		rules := ""
		if out, err := exec.CommandContext(ctx, save, "-t", "nat").Output(); err == nil {
			rules = string(out)
		} else if rules, err = legacyDNAT(l); err != nil { // the command is missing, or CAP_NET_RAW is
			continue
		}
		found = append(found, foreignIPTables(save, rules, addresses)...)
	}
	if out, err := exec.CommandContext(ctx, "nft", "--stateless", "list", "ruleset").Output(); err == nil {
		found = append(found, foreignNFT(string(out), told, addresses)...)
	}
	slices.Sort(found)
	return found
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
		case told[table] || strings.Contains(table, " "+tablePrefix) || !slices.Contains(words, "dnat"):
		case slices.ContainsFunc(words, func(w string) bool { return isOneOf(w, addresses) }):
			found = append(found, fmt.Sprintf("nft table %s, chain %s: %s", table, chain, strings.TrimSpace(line)))
		}
	}
	return found
}

func foreignIPTables(command, rules string, addresses []netip.Addr) []string {
	var found []string
	for line := range strings.Lines(rules) {
		words := strings.Fields(line)
		if len(words) < 4 || words[0] != "-A" || strings.HasPrefix(words[1], agentsPrefix) {
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
