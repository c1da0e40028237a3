package config

import "testing"

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
