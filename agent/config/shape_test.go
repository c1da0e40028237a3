package config

import (
	"fmt"
	"strings"
	"testing"
)

// TestAliases: what the decoder does not look at, because the key above it is misspelt, ends too: aliases that are a part of what they
// stand for, and aliases of aliases, a billion in twelve lines. Aliases that are neither are followed.
func TestAliases(t *testing.T) {
	billion := "name: a\nmagicIP:\n- &a0 {prots: []}\n"
	for i := range 9 {
		billion += fmt.Sprintf("- &a%d {<<: [%s]}\n", i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d, ", i), 10), ", "))
	}
	for text, want := range map[string]string{
		"name: a\nmagicIP: [&n {<<: *n}]":                                               "line 2: magicIP[0]: *n is a part of what it stands for",
		"name: a\nmagicIP: [&n {<<: [{}, *n]}]":                                         "line 2: magicIP[0]: *n is a part of what it stands for",
		"name: a\nmagicIP: &n [*n]":                                                     "line 2: magicIP[0]: a list is not allowed; allowed: a mapping",
		"name: a\nmagicIP: [&m {prots: [&n {<<: {<<: *n}}], <<: *m}]":                   "line 2: magicIP[0]: *m is a part of what it stands for",
		"name: a\nmagicIP:\n- &n {prots: [1]}" + strings.Repeat("\n- *n", maxAliases):   fmt.Sprintf("line %d: magicIP[%d].prots[0]: ", maxAliases+3, maxAliases),
		"name: a\nmagicIP:\n- &n {prots: [1]}" + strings.Repeat("\n- *n", maxAliases+1): fmt.Sprintf("line %d: magicIP[%d]: there are more than %d aliases", maxAliases+4, maxAliases+1, maxAliases),
		billion: ": there are more than 1000 aliases, when those in aliases are counted too",
		"name: a\nmagicIP:\n- &n {ipAddress: 169.254.1.2, prots: [1]}\n- *n": "line 4: magicIP[1].prots[0]: \"1\" is not allowed; allowed: a mapping",
	} {
		_, err := Parse(strings.NewReader(text), true)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Count(err.Error(), want) > 1 {
			t.Errorf("%.40s:\n%.2000v\nwant once\n%s", text, err, want)
		}
	}
}

// TestSimilar: a key is taken for the one that it has in it or is in, or that differs in two letters at most. Words of three letters
// are near everything, so they are taken for nothing.
func TestSimilar(t *testing.T) {
	names := []string{"name", "pollInterval", "dataPlane", "magicIPs", "port", "targetPort", "owner"}
	for word, want := range map[string]string{
		"names": "name", "nama": "name", "mane": "name", "NAME": "name", "agentname": "name", "ame": "name", "nam": "name", "nae": "name", "nan": "",
		"magicIp": "magicIPs", "magicAddresses": "", "ip": "", "": "",
		"targetPorts": "targetPort", "nodePort": "port", "interval": "pollInterval", "ovnar": "owner", "avnar": "", "polintervall": "pollInterval",
	} {
		if got := similar(word, names); got != want {
			t.Errorf("%q is taken for %q, want %q", word, got, want)
		}
	}
}

func TestDistance(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "abc", 0}, {"a", "b", 1}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2}, {"abc", "xyz", 3},
		{"owner", "own", 2}, {"abcdef", "def", 3}, {"ab", "ba", 2},
	} {
		if got, back := distance(tt.a, tt.b), distance(tt.b, tt.a); got != tt.want || back != tt.want {
			t.Errorf("%q and %q: %d, and the other way round %d, want %d", tt.a, tt.b, got, back, tt.want)
		}
	}
}
