package netfilter

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// TestLegacyDNAT: what is read from the kernel is what iptables-legacy-save prints.
func TestLegacyDNAT(t *testing.T) {
	for _, family := range []struct {
		command string
		layout  layout
		rules   []string
	}{
		{"iptables-legacy", layout4, []string{
			"PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200",
			"PREROUTING -s 10.0.0.0/8 -d 169.254.210.0/24 -i veth+ -p udp -m udp --sport 1:1023 --dport 53 -j DNAT --to-destination 10.0.0.2-10.0.0.5:53-59",
			"PREROUTING -d 169.254.210.211/32 ! -i eth0 -j DNAT --to-destination 10.0.0.3",
			"OUTPUT -d 169.254.210.210/32 -p tcp -j DNAT --to-destination :8080",
			"THEIRS -d 169.254.210.212/32 -p sctp -j DNAT --to-destination 10.0.0.4",
		}},
		{"ip6tables-legacy", layout6, []string{
			"PREROUTING -d fd00:a::1/128 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination [fd00::2]:9200",
			"THEIRS -s fd00::/16 -d fd00:a::2/128 -p udp -m udp --dport 1:2 -j DNAT --to-destination fd00::3",
		}},
	} {
		t.Run(family.command, func(t *testing.T) {
			nodetest.Namespace(t, "")
			run := func(args ...string) { nodetest.Run(t, family.command, append([]string{"-t", "nat"}, args...)...) }
			run("-N", "THEIRS")
			run("-A", "PREROUTING", "-j", "THEIRS")
			run("-A", "POSTROUTING", "-j", "MASQUERADE")
			for _, rule := range family.rules {
				run(append([]string{"-A"}, strings.Fields(rule)...)...)
			}
			got, err := legacyDNAT(family.layout)
			if err != nil {
				t.Fatal(err)
			}
			saved := slices.DeleteFunc(strings.SplitAfter(nodetest.Run(t, family.command+"-save", "-t", "nat"), "\n"), func(line string) bool {
				return !strings.Contains(line, "-j DNAT")
			})
			if diff := cmp.Diff(strings.Join(saved, ""), got); diff != "" {
				t.Errorf("(-saved +read):\n%s", diff)
			}
		})
	}
}

// TestForeignDNATWithoutNetRaw: the agent's container has NET_ADMIN alone, with which iptables-legacy-save cannot be used.
func TestForeignDNATWithoutNetRaw(t *testing.T) {
	for _, test := range []struct{ name, rule, found, remove string }{
		{
			name:   "of the bash tool",
			rule:   "-d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200",
			found:  "-d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200",
			remove: "iptables-legacy -t nat -D PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200",
		},
		{
			name:  "with a match that is not spelled",
			rule:  "-d 169.254.210.210/32 -m mark --mark 0x1 -j DNAT --to-destination 10.0.0.2",
			found: "-d 169.254.210.210/32 -m mark … -j DNAT --to-destination 10.0.0.2",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodetest.Namespace(t, "")
			nodetest.Run(t, "iptables-legacy", append([]string{"-t", "nat", "-A", "PREROUTING"}, strings.Fields(test.rule)...)...)
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0); err != nil { // of this thread, for what it executes
				t.Fatal(err)
			}
			found := ForeignDNAT(t.Context(), []netip.Addr{netip.MustParseAddr("169.254.210.210")})
			if diff := cmp.Diff([]string{"iptables-legacy-save -t nat: -A PREROUTING " + test.found}, found); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
			if remove := RemoveForeign(t.Context(), found[0]); remove != test.remove {
				t.Errorf("removed by %q, want %q", remove, test.remove)
			}
		})
	}
}

// TestForeignDNATBringsNothingIntoUse: looking for rules makes no table of iptables-legacy.
func TestForeignDNATBringsNothingIntoUse(t *testing.T) {
	nodetest.Namespace(t, "")
	if found := ForeignDNAT(t.Context(), []netip.Addr{netip.MustParseAddr("169.254.210.210"), netip.MustParseAddr("fd00:a::1")}); len(found) > 0 {
		t.Errorf("found %q", found)
	}
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		if names := nodetest.Run(t, "cat", "/proc/thread-self/net/"+file); names != "" {
			t.Errorf("%s: %q", file, names)
		}
	}
}
