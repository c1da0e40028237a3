package integration

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The rules of others, as small as they can be and still do to packets what the real ones do. Pods of the
// bridge are 10.244.3.0/24 and fd00:10:244:3::/64.
func neighbours() map[string]string {
	both := func(script string) string {
		return strings.ReplaceAll(script, "$T", "iptables") + strings.ReplaceAll(strings.ReplaceAll(script, "$T", "ip6tables"), "10.244.0.0/16", "fd00:10:244::/48")
	}
	return map[string]string{
		// kube-proxy: services at dstnat and in OUTPUT, invalid packets dropped in the forward hook before
		// anything else, masquerade of what bears its mark.
		"kube-proxy nftables": `
for f in ip ip6; do nft -f - <<END
table $f kube-proxy {
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain services { meta l4proto tcp th dport 443 meta mark set meta mark or 0x4000; }
	chain filter-forward { type filter hook forward priority -110; ct state new jump firewall-check; ct state invalid drop; }
	chain firewall-check { }
	chain nat-postrouting { type nat hook postrouting priority srcnat; mark and 0x4000 != 0 masquerade fully-random; }
}
END
done`,
		"kube-proxy iptables": both(`
$T -t nat -N KUBE-SERVICES; $T -t nat -A PREROUTING -j KUBE-SERVICES; $T -t nat -A OUTPUT -j KUBE-SERVICES
$T -t nat -N KUBE-POSTROUTING; $T -t nat -A POSTROUTING -j KUBE-POSTROUTING
$T -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
$T -t nat -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000; $T -t nat -A KUBE-POSTROUTING -j MASQUERADE
$T -N KUBE-FORWARD; $T -A FORWARD -j KUBE-FORWARD
$T -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
$T -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
$T -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
`),
		// A node that forwards nothing but what pods send and get, as its CNI has asked for.
		"FORWARD drops by default": both(`
$T -P FORWARD DROP; $T -A FORWARD -s 10.244.0.0/16 -j ACCEPT; $T -A FORWARD -d 10.244.0.0/16 -j ACCEPT
`),
		// firewalld: whatever is not established, translated or of a trusted zone is rejected.
		"firewalld": `nft -f - <<END
table inet firewalld {
	chain filter_PREROUTING { type filter hook prerouting priority filter + 10; icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
	chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; }
	chain filter_INPUT { type filter hook input priority filter + 10; ct state { established, related } accept; ct status dnat accept; iifname lo accept; ct state invalid drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; reject with icmpx admin-prohibited; }
	chain filter_FORWARD { type filter hook forward priority filter + 10; ct state { established, related } accept; ct status dnat accept; iifname lo accept; ct state invalid drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; reject with icmpx admin-prohibited; }
	chain filter_OUTPUT { type filter hook output priority filter + 10; ct state { established, related } accept; oifname lo accept; }
}
END`,
	}
}

// TestNeighbours: beside the rules of others pods and the host are served and refused as without, and not a byte
// of those rules changes.
func TestNeighbours(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		for name, rules := range neighbours() {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, backend, "bridge")
				// The tables that a backend makes by itself are there before.
				w.run("for t in nat filter mangle raw; do iptables-nft -t $t -L -n; ip6tables-nft -t $t -L -n; done")
				w.run(rules)
				before := theirRules(w)
				w.addClient()
				w.start(config())
				ask := func(pod, host string) {
					t.Helper()
					bothFamilies(func(six bool) {
						for from, want := range map[string]string{"client": pod, lab.Host: host} {
							if err := w.want(from, magic(six), want); err != nil {
								t.Error(err)
							}
						}
					})
				}
				ask("refused", "refused")
				w.addTarget("echo")
				w.echo("echo")
				ask("answered by echo, seen as client", "answered by echo, seen as node")
				if diff := cmp.Diff(before, theirRules(w)); diff != "" {
					t.Errorf("the rules of others (-before +after):\n%s", diff)
				}
			})
		}
	})
}

// theirRules is every rule on the node that is not the agent's, in the words of the tool that made it.
func theirRules(w *world) []string {
	var lines []string
	for line := range strings.Lines(w.run(`
for kind in nft legacy; do for t in iptables ip6tables; do for table in nat filter mangle raw; do
	echo "# $t-$kind $table"; $t-$kind-save -t $table | grep -v "^#"
done; done; done
nft list tables | grep -v magic-ip- | grep -vE "ip6? (nat|filter|mangle|raw)" | while read -r _ family table; do nft --stateless list table $family $table; done`)) {
		if !strings.Contains(line, "MIP-") && !strings.HasPrefix(line, "COMMIT") {
			if counters := strings.Index(line, " ["); strings.HasPrefix(line, ":") && counters > 0 {
				line = line[:counters]
			}
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}
