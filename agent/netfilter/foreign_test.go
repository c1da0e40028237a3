package netfilter

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
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
