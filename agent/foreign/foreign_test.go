package foreign

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/ruleset"
)

var frontends = []plan.Frontend{ //nolint:gochecknoglobals // a constant
	{Address: netip.MustParseAddr("169.254.210.210"), Protocol: plan.TCP, Port: 8080},
	{Address: netip.MustParseAddr("169.254.210.210"), Protocol: plan.UDP, Port: 8125},
	{Address: netip.MustParseAddr("fd00:a::1"), Protocol: plan.UDP, Port: 53},
}

func texts(rules []Rule) (all []string) {
	for _, r := range rules {
		all = append(all, r.Text)
	}
	return all
}

// TestNFTables: rules of nftables are found by address, prefix, range, set, map and port, whatever chain translates in the end; those
// of agents, of iptables-nft that its save command prints, and of other destinations are not.
func TestNFTables(t *testing.T) {
	const rules = `
table ip magic-ip-default.a {
  chain pre {
    type nat hook prerouting priority -110
    ip daddr 169.254.210.210 dnat to 10.0.0.1
  }
}
table ip kube-proxy {
  map service-ips {
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = { 169.254.210.210 . tcp . 80 comment "a" : goto external, 10.96.0.1 . tcp . 443 : goto service }
  }
  chain endpoint {
    meta l4proto tcp dnat to 10.0.0.1:80
  }
  chain service {
    numgen random mod 1 vmap { 0 : goto endpoint }
  }
  chain external {
    goto service
  }
  chain pre {
    type nat hook prerouting priority -100
    ip daddr . meta l4proto . th dport vmap @service-ips
    fib daddr type local tcp dport vmap { 8080 : goto endpoint }
  }
}
table inet theirs {
  set many {
    type ipv4_addr
    flags interval
    elements = { 169.254.0.0/16, 10.0.0.1-10.0.0.9 }
  }
  map to {
    type ipv4_addr : ipv4_addr
    elements = { 169.254.210.210 : 10.0.0.1, 192.0.2.1 : 10.0.0.1 }
  }
  chain redirects {
    meta l4proto tcp redirect to :3128
  }
  chain pre {
    type nat hook prerouting priority -100
    ip daddr 169.254.210.211 dnat ip to 10.0.0.1
    ip daddr 169.254.210.210 tcp dport 80 accept
    ip daddr @many tcp dport { 80, 90-99 } jump redirects
    ip daddr { 192.0.2.1, 169.254.0.0/16 } udp dport 8125 dnat ip to 10.0.0.2
    ip daddr 169.254.210.200-169.254.210.220 tcp dport 81 dnat ip to 10.0.0.3
    ip daddr != 10.0.0.0/8 tcp dport 8080 redirect
    ip daddr != 169.254.0.0/16 tcp dport 8080 redirect
    udp dport 50-60 redirect to :53
    tcp dport 25 redirect
    meta l4proto tcp dnat ip to ip daddr map @to
    ip6 daddr fd00:a::1 udp dport 53 dnat ip6 to [fd00::5]:53
    iifname "cni0" limit rate 5/second ip daddr 169.254.210.210 udp dport 1 dnat ip to 10.0.0.4
  }
  chain out {
    type nat hook output priority -100
    ip daddr 169.254.210.210 tcp dport 82 redirect
  }
  chain forward {
    type filter hook forward priority 0
    ct status dnat ip daddr 169.254.210.210 accept
  }
}
`
	want := []string{
		"nft table inet theirs, chain out: ip daddr 169.254.210.210 tcp dport 82 redirect",
		`nft table inet theirs, chain pre: iifname "cni0" limit rate 5/second ip daddr 169.254.210.210 udp dport 1 dnat ip to 10.0.0.4`,
		"nft table inet theirs, chain pre: ip daddr != 10.0.0.0/8 tcp dport 8080 redirect",
		"nft table inet theirs, chain pre: ip daddr 169.254.210.200-169.254.210.220 tcp dport 81 dnat ip to 10.0.0.3",
		"nft table inet theirs, chain pre: ip daddr @many tcp dport { 80, 90-99 } jump redirects, and many has 169.254.0.0/16",
		"nft table inet theirs, chain pre: ip daddr { 169.254.0.0/16, 192.0.2.1 } udp dport 8125 dnat ip to 10.0.0.2",
		"nft table inet theirs, chain pre: ip6 daddr fd00:a::1 udp dport 53 dnat ip6 to [fd00::5]:53",
		"nft table inet theirs, chain pre: meta l4proto tcp dnat ip to ip daddr map @to, and to has 169.254.210.210",
		"nft table inet theirs, chain pre: udp dport 50-60 redirect to :53",
		"nft table ip kube-proxy, chain pre: ip daddr . meta l4proto . th dport vmap @service-ips, and service-ips has 169.254.210.210 . tcp . 80",
	}
	nodetest.Namespace(t, "link set lo up")
	file := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	nodetest.Run(t, "nft", "--file", file)
	found, hidden := Rules(t.Context(), frontends)
	if len(hidden) > 0 {
		t.Errorf("hidden: %q", hidden)
	}
	if diff := cmp.Diff(want, texts(found)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, r := range found {
		if strings.Contains(r.Text, "kube-proxy") {
			if !strings.Contains(r.Next, "take 169.254.210.210 out of its externalIPs") {
				t.Errorf("what to do about %s: %s", r.Text, r.Next)
			}
			continue
		}
		if !strings.Contains(r.Text, ", and ") {
			nodetest.Run(t, "sh", "-c", r.Next)
		}
	}
	found, _ = Rules(t.Context(), frontends)
	for _, r := range found {
		if !strings.Contains(r.Text, ", and ") {
			t.Errorf("after the command it is still there: %s", r.Text)
		}
	}
}

// TestSavedRules: a rule of iptables-nft is told once, as iptables writes it; sets of ipset are looked into where that can be run.
func TestSavedRules(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	const rule = "PREROUTING -d 169.254.210.210/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 3128"
	nodetest.Run(t, "iptables-nft", append([]string{"-t", "nat", "-A"}, strings.Fields(rule)...)...)
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-N", "MIP-0123abcd-x")
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.210.210/32", "-j", "MIP-0123abcd-x")
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-A", "MIP-0123abcd-x", "-j", "DNAT", "--to-destination", "10.0.0.1")
	found, hidden := Rules(t.Context(), frontends)
	if diff := cmp.Diff([]string{"iptables-nft-save -t nat: -A " + rule}, texts(found)); diff != "" || len(hidden) > 0 {
		t.Fatalf("(-want +got):\n%s\nhidden: %q", diff, hidden)
	}
	nodetest.Run(t, "sh", "-c", found[0].Next)
	if found, _ := Rules(t.Context(), frontends); len(found) > 0 {
		t.Errorf("after the command it is still there: %v", found)
	}
}

// TestRulesOfLegacy: what iptables-legacy-save prints, and where it cannot be run (the agent's container has no CAP_NET_RAW),
// that the rules cannot be seen.
func TestRulesOfLegacy(t *testing.T) {
	const rule = "PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 9200 -j DNAT --to-destination 10.0.0.2:9200"
	nodetest.Namespace(t, "link set lo up")
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	nodetest.Run(t, "iptables-legacy", append([]string{"-t", "nat", "-A"}, strings.Fields(rule)...)...)
	found, hidden := Rules(t.Context(), frontends)
	if diff := cmp.Diff([]string{"iptables-legacy-save -t nat: -A " + rule}, texts(found)); diff != "" || len(hidden) > 0 {
		t.Fatalf("(-want +got):\n%s\nhidden: %q", diff, hidden)
	}
	if found[0].Next != "iptables-legacy -t nat -D "+rule {
		t.Errorf("removed by %q", found[0].Next)
	}
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0); err != nil { // of this thread, for what it executes
		t.Fatal(err)
	}
	found, hidden = Rules(t.Context(), frontends)
	if len(found) > 0 || len(hidden) != 1 || !strings.Contains(hidden[0], "iptables-legacy") {
		t.Errorf("without CAP_NET_RAW: found %q, hidden %q, want only that it cannot be seen", found, hidden)
	}
}

// TestRulesThatCannotBeRead: where a save command is there and fails, doctor does not say that there are no rules.
func TestRulesThatCannotBeRead(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "iptables-nft-save"), []byte("#!/bin/sh\necho no raw socket >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", broken+":"+os.Getenv("PATH"))
	found, hidden := Rules(t.Context(), frontends)
	if len(found) > 0 || len(hidden) != 2 {
		t.Errorf("found %q, hidden %q, want what hides the tables mangle and nat", texts(found), hidden)
	}
	for _, text := range hidden {
		if !strings.Contains(text, "iptables-nft") || !strings.Contains(text, "no raw socket") {
			t.Errorf("hidden %q", text)
		}
	}
}

// TestRulesOnlyLooks: a look at rules does not bring a table into use.
func TestRulesOnlyLooks(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	if found, hidden := Rules(t.Context(), frontends); len(found)+len(hidden) > 0 {
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
	rule := `-A PREROUTING -d 169.254.210.210/32 -m comment --comment "$(reboot) \"x\" ; true" -j DNAT --to-destination 10.0.0.1:1`
	want := `iptables-nft -t nat -D PREROUTING -d 169.254.210.210/32 -m comment --comment '$(reboot) "x" ; true' -j DNAT --to-destination 10.0.0.1:1`
	if got := removeSaved("iptables-nft-save", "nat", rule, ruleset.Packet{}); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// TestTransparentProxy: rules that take packets to a transparent proxy ahead of the translation are found, and others are not.
func TestTransparentProxy(t *testing.T) {
	for _, test := range []struct {
		name, script string
		want         string
	}{
		{"nftables", "nft 'table ip w { chain p { type filter hook prerouting priority mangle; tcp dport 8080 tproxy to :3128 meta mark set 1 accept; }; }'",
			"nft table ip w, chain p: tcp dport 8080 tproxy to :3128 meta mark set 0x00000001 accept"},
		{"nftables, of another family", "nft 'table ip6 w { chain p { type filter hook prerouting priority mangle; tcp dport 8080 tproxy to :3128 accept; }; }'", ""},
		{"nftables, behind the translation", "nft 'table ip w { chain p { type filter hook prerouting priority 0; tcp dport 8080 tproxy to :3128 accept; }; }'", ""},
		{"nftables, marked packets", "nft 'table ip w { chain p { type filter hook prerouting priority mangle; meta mark 0x200 tcp dport 8080 tproxy to :3128 accept; }; }'", ""},
		{"iptables-nft", "iptables-nft -t mangle -A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128 --tproxy-mark 1",
			"iptables-nft-save -t mangle: -A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128 --on-ip 0.0.0.0 --tproxy-mark 0x1/0xffffffff"},
		{"iptables-legacy", "iptables-legacy -t mangle -A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128 --tproxy-mark 1",
			"iptables-legacy-save -t mangle: -A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128 --on-ip 0.0.0.0 --tproxy-mark 0x1/0xffffffff"},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodetest.Namespace(t, "link set lo up")
			t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
			nodetest.Run(t, "sh", "-ec", test.script)
			found, hidden := Rules(t.Context(), frontends)
			var want []string
			if test.want != "" {
				want = []string{test.want}
			}
			if diff := cmp.Diff(want, texts(found)); diff != "" || len(hidden) > 0 {
				t.Fatalf("(-want +got):\n%s\nhidden: %q", diff, hidden)
			}
			for _, rule := range found {
				nodetest.Run(t, "sh", "-c", rule.Next)
			}
			if found, _ := Rules(t.Context(), frontends); len(found) > 0 {
				t.Errorf("after the command it is still there: %v", found)
			}
		})
	}
}

// TestWithoutTools: where a tool is missing, what it would read is hidden if the kernel has it, and is looked at by the tool that is there.
func TestWithoutTools(t *testing.T) {
	const dnat = "iptables-nft -t nat -A PREROUTING -d 169.254.210.210/32 -p tcp -j DNAT --to-destination 10.9.9.9:80"
	for _, test := range []struct {
		name, script  string
		tools         []string
		found, hidden string
	}{
		{"none, and no rules", "true", nil, "", ""},
		{"none, and a table", "nft add table inet theirs", nil, "", "nft is missing, and the kernel has tables: inet theirs"},
		{"none, and an agent's table", "nft add table inet magic-ip-default.a", nil, "", ""},
		{"none, and rules of iptables-nft", dnat, nil, "", "nft is missing, and the kernel has tables: ip nat"},
		{"none, and rules of iptables-legacy", "iptables-legacy -t nat -A PREROUTING -d 169.254.210.210/32 -j ACCEPT", nil, "", "the nat table of iptables-legacy is in use"},
		{"iptables, and rules of it", dnat, []string{"iptables-nft-save", "ip6tables-nft-save"}, "iptables-nft-save -t nat: -A PREROUTING", ""},
		{"iptables, and a table of nft", dnat + "; nft add table ip theirs", []string{"iptables-nft-save", "ip6tables-nft-save"}, "iptables-nft-save -t nat: -A PREROUTING", "nft is missing, and the kernel has tables: ip theirs"},
		{"nft, and rules of iptables", dnat, []string{"nft"}, "nft table ip nat, chain PREROUTING", ""},
		{"nft, and rules of iptables for another address", "iptables-nft -t nat -A PREROUTING -d 169.254.210.0/26 -p tcp -j DNAT --to-destination 10.9.9.9:80", []string{"nft"}, "", ""},
		{"nft, and a mark by iptables", "iptables-nft -t nat -A PREROUTING -d 169.254.210.210/32 -p tcp -j MARK --set-mark 1", []string{"nft"}, "", ""},
		{"nft, and a proxy of iptables", "iptables-nft -t mangle -A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128", []string{"nft"}, "nft table ip mangle, chain PREROUTING", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			nodetest.Namespace(t, "link set lo up")
			t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
			nodetest.Run(t, "sh", "-ec", test.script)
			dir := t.TempDir()
			for _, tool := range test.tools {
				if err := os.Symlink(strings.TrimSpace(nodetest.Run(t, "which", tool)), filepath.Join(dir, tool)); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir)
			found, hidden := Rules(t.Context(), frontends)
			if got := strings.Join(texts(found), "\n"); (got == "") != (test.found == "") || !strings.Contains(got, test.found) {
				t.Errorf("found %q, want %q", got, test.found)
			}
			if got := strings.Join(hidden, "\n"); (got == "") != (test.hidden == "") || !strings.Contains(got, test.hidden) {
				t.Errorf("hidden %q, want %q", got, test.hidden)
			}
		})
	}
}

// TestUnreadSets: a rule that translates what is in a set of ipset, which cannot be read, is hidden; one that does not translate is not.
func TestUnreadSets(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	const rules = `*nat
:PREROUTING ACCEPT [0:0]
-A PREROUTING -m set --match-set proxied dst -p tcp -j REDIRECT --to-ports 3128
-A PREROUTING -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
-A PREROUTING ! -d 169.254.0.0/16 -m set --match-set others dst -j REDIRECT
COMMIT
`
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "iptables-nft-save"), []byte("#!/bin/sh\n[ $2 = nat ] || exit 0\ncat <<E\n"+rules+"E\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ipset"), []byte("#!/bin/sh\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	found, hidden := Rules(t.Context(), frontends)
	if len(found) > 0 || len(hidden) != 1 || !strings.Contains(hidden[0], "-m set --match-set proxied dst") {
		t.Errorf("found %q, hidden %q", texts(found), hidden)
	}
}
