package foreign

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

func TestForeignNFT(t *testing.T) {
	const ruleset = `table ip magic-ip-default.a {
	chain translate {
		dnat ip to ip daddr . meta l4proto . th dport map @endpoints
		ip daddr 169.254.210.210 dnat to 10.0.0.1
	}
}
table ip nat {
	chain PREROUTING {
		ip daddr 169.254.210.210 tcp dport 80 dnat to 10.0.0.2:80
	}
}
table ip filter {
	chain MIP-0123abcd-bridge {
		ct status dnat ct original daddr 169.254.210.210 counter meta mark set mark or 0x1000
		ip daddr 169.254.210.210 dnat to 10.0.0.6
	}
	chain FORWARD {
		ct status dnat ip daddr 169.254.210.210 accept
	}
}
table inet theirs {
	chain pre {
		type nat hook prerouting priority dstnat; policy accept;
		ip daddr 169.254.210.210 tcp dport 80 dnat ip to 10.0.0.3:80
		ip daddr 169.254.210.211 tcp dport 80 dnat ip to 10.0.0.4:80
		ip daddr 169.254.210.210 tcp dport 80 accept
		ip6 daddr fd00:a::1 udp dport 53 dnat ip6 to [fd00::5]:53
	}
}
`
	addresses := []netip.Addr{netip.MustParseAddr("169.254.210.210"), netip.MustParseAddr("fd00:a::1")}
	want := []string{
		"nft table inet theirs, chain pre: ip daddr 169.254.210.210 tcp dport 80 dnat ip to 10.0.0.3:80",
		"nft table inet theirs, chain pre: ip6 daddr fd00:a::1 udp dport 53 dnat ip6 to [fd00::5]:53",
	}
	if diff := cmp.Diff(want, foreignNFT(ruleset, map[string]bool{"ip nat": true}, addresses)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestForeignIPTables(t *testing.T) {
	const rules = `*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80
-A PREROUTING -d 169.254.210.211/32 -p tcp -j DNAT --to-destination 10.0.0.3:80
-A PREROUTING -d 169.254.210.210/32 -p tcp -j ACCEPT
-A PREROUTING -s 169.254.210.210/32 -p tcp -j DNAT --to-destination 10.0.0.4:80
-A MIP-0123abcd-x -d 169.254.210.210/32 -p tcp -j DNAT --to-destination 10.0.0.5:80
COMMIT
`
	want := []string{"iptables-save -t nat: -A PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80"}
	got := foreignIPTables("iptables-save", rules, []netip.Addr{netip.MustParseAddr("169.254.210.210")})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestRulesOfLegacy: what iptables-legacy-save prints, and where it cannot be run (the agent's container has no CAP_NET_RAW),
// that the rules cannot be seen.
func TestRulesOfLegacy(t *testing.T) {
	const rule = "PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200"
	nodetest.Namespace(t, "link set lo up")
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	nodetest.Run(t, "iptables-legacy", append([]string{"-t", "nat", "-A"}, strings.Fields(rule)...)...)
	addresses := []netip.Addr{netip.MustParseAddr("169.254.210.210")}
	found, hidden := Rules(t.Context(), addresses)
	if diff := cmp.Diff([]string{"iptables-legacy-save -t nat: -A " + rule}, found); diff != "" || len(hidden) > 0 {
		t.Fatalf("(-want +got):\n%s\nhidden: %q", diff, hidden)
	}
	if remove := Remove(t.Context(), found[0]); remove != "iptables-legacy -t nat -D "+rule {
		t.Errorf("removed by %q", remove)
	}
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0); err != nil { // of this thread, for what it executes
		t.Fatal(err)
	}
	found, hidden = Rules(t.Context(), addresses)
	if len(found) > 0 || len(hidden) != 1 || !strings.Contains(hidden[0], "iptables-legacy") {
		t.Errorf("without CAP_NET_RAW: found %q, hidden %q, want only that it cannot be seen", found, hidden)
	}
}

// TestRulesOnlyLooks: a look at rules does not bring a table into use.
func TestRulesOnlyLooks(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	if found, hidden := Rules(t.Context(), []netip.Addr{netip.MustParseAddr("169.254.210.210"), netip.MustParseAddr("fd00:a::1")}); len(found)+len(hidden) > 0 {
		t.Errorf("found %q and %q on an empty node", found, hidden)
	}
	for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
		if names := nodetest.Run(t, "cat", "/proc/thread-self/net/"+file); names != "" {
			t.Errorf("%s: %q", file, names)
		}
	}
	if tables := nodetest.Run(t, "nft", "list", "tables"); tables != "" {
		t.Errorf("tables that were not there: %s", tables)
	}
}

func TestRemoveIsSafeToPaste(t *testing.T) {
	rule := `iptables-nft-save -t nat: -A PREROUTING -d 169.254.210.210/32 -m comment --comment "$(reboot) \"x\" ; true" -j DNAT --to-destination 10.0.0.1:1`
	want := `iptables-nft -t nat -D PREROUTING -d 169.254.210.210/32 -m comment --comment '$(reboot) "x" ; true' -j DNAT --to-destination 10.0.0.1:1`
	if got := Remove(t.Context(), rule); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
