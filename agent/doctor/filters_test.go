package doctor

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: magic IP 169.254.210.210:8080, its endpoint 10.244.2.2:8080 behind veth1, and beside it bridge cni1 with the pods of
// 10.244.3.0/24, one of them behind port veth2.

// examinationOf makes the test's network namespace such a node, and returns an examination of it that has found nothing yet.
func examinationOf(t *testing.T, endpoint string) *examination {
	t.Helper()
	nodetest.Namespace(t, "link set lo up")
	pod := nodetest.Another(t)
	nodetest.IP(t, strings.ReplaceAll(`link add veth1 type veth peer name eth0 netns POD
		link set veth1 up
		route add 10.244.2.2 dev veth1
		link add cni1 type bridge
		link set cni1 up
		address add 10.244.3.1/24 dev cni1
		link add veth2 type veth peer name eth1 netns POD
		link set veth2 master cni1 up`, "POD", pod))
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
	e := &examination{}
	e.agents = []status.Agent{{Status: runtimedir.Status{Name: "a"}, MagicIPs: []status.MagicIP{{MagicIP: runtimedir.MagicIP{
		HostClients: true,
		Frontend:    plan.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: plan.TCP, Port: 8080},
		Endpoints:   []runtimedir.Endpoint{{Address: netip.MustParseAddrPort(endpoint), Pod: "default/echo"}},
	}}}}}
	return e
}

// look has it look at the node's links and filters.
func (e *examination) look(t *testing.T) {
	t.Helper()
	snapshot, err := node.Kernel{}.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	e.network = node.Classify(snapshot, node.Known{})
	e.filters(t.Context())
}

// wants says that the findings of a check are one of this level and with these words, and no worse ones.
func (e *examination) wants(t *testing.T, check string, level Level, words string) {
	t.Helper()
	found := false
	for _, f := range e.found {
		if f.Check != check {
			continue
		}
		found = found || f.Level == level && strings.Contains(f.Text, words)
		if f.Level == Fail && level != Fail || f.Level == Hidden && level != Hidden || f.Level == Warn && level == OK {
			t.Errorf("%s: %s: %s", f.Level, f.Check, f.Text)
		}
	}
	if !found {
		t.Errorf("no finding of %s is %s: %q: %+v", check, level, words, e.found)
	}
}

// chain is a script that makes a chain of nftables with rules.
func chain(family, spec string, rules ...string) string {
	text := "add table " + family + " w; add chain " + family + " w c { type filter hook " + spec + "; }"
	for _, rule := range rules {
		text += "; add rule " + family + " w c " + rule
	}
	return "nft '" + text + "'"
}

const bridged = "10.244.3.2:8080"

// TestFilters: what drops packets to a magic IP is named, in whatever hook, and what may drop them is no ok.
func TestFilters(t *testing.T) {
	for _, test := range []struct {
		name, script string
		endpoint     string // "" for the one behind veth1
		level        Level
		words        string
	}{
		{"none", "true", "", OK, "none drops"},
		{"none, on a bridge", "true", bridged, OK, "none drops"},
		{"forward, a drop at the end", chain("ip", "forward priority 0", "ct state established accept", "drop"), "", Fail, "nftables chain ip w c: a packet of a pod to endpoint 10.244.2.2:8080 is dropped by its rule with handle 3"},
		{"forward, a reject at the end", chain("inet", "forward priority 10", "ct state established,related accept", "reject with icmpx admin-prohibited"), "", Fail, "by its rule with handle 3"},
		{"forward, policy", chain("inet", "forward priority 0; policy drop"), "", Fail, "inet w c: a packet of a pod to endpoint 10.244.2.2:8080 is dropped by its policy"},
		{"forward, another destination", chain("ip", "forward priority 0", "ip daddr 10.0.0.0/9 drop"), "", OK, ""},
		{"forward, a mark", chain("ip", "forward priority 0; policy drop", "meta mark 1 accept"), "", Warn, "nftables chain ip w c: its policy"},
		{"forward, of IPv6", chain("ip6", "forward priority 0", "drop"), "", OK, ""},
		{"forward, an output hook of ARP", chain("arp", "output priority 0", "drop"), "", OK, ""},
		{"mangle FORWARD, iptables-nft", "iptables-nft -t mangle -A FORWARD -j DROP", "", Fail, "iptables-nft, table mangle: a packet of a pod to endpoint 10.244.2.2:8080 is dropped by the rule -A FORWARD -j DROP"},
		{"mangle FORWARD by policy, iptables-nft", "iptables-nft -t mangle -P FORWARD DROP", "", Fail, "by the policy of FORWARD"},
		{"mangle FORWARD, iptables-legacy", "iptables-legacy -t mangle -A FORWARD -j DROP", "", Fail, "iptables-legacy, table mangle: "},
		{"mangle POSTROUTING, iptables-legacy", "iptables-legacy -t mangle -A POSTROUTING -j DROP", "", Fail, "by the rule -A POSTROUTING -j DROP"},
		{"mangle PREROUTING, the endpoint's address is not there yet", "iptables-legacy -t mangle -A PREROUTING -d 10.244.0.0/16 -j DROP", "", OK, ""},
		{"security FORWARD, iptables-legacy", "iptables-legacy -t security -A FORWARD -j DROP", "", Fail, "iptables-legacy, table security: "},
		{"security FORWARD, a log", "iptables-legacy -t security -A FORWARD -j LOG", "", OK, ""},
		{"prerouting, policy", chain("inet", "prerouting priority -150; policy drop", "ct state established accept", "iifname eth0 accept"), "", Fail, "a packet of a pod to 169.254.210.210:8080/tcp is dropped, or kept from being tracked and so from being translated, by its policy"},
		{"prerouting, a policy and exceptions", chain("inet", "prerouting priority -150; policy drop", "iifname veth1 accept"), "", OK, ""},
		{"prerouting, iif", chain("inet", "prerouting priority -150", "iif veth1 drop"), "", Fail, "handle 2"},
		{"prerouting, iif of another link", chain("inet", "prerouting priority -150", "iif lo drop"), "", OK, ""},
		{"prerouting behind the translation", chain("inet", "prerouting priority 0", "ip daddr 10.244.0.0/16 drop"), "", Fail, "to endpoint 10.244.2.2:8080"},
		{"prerouting behind the translation, the magic IP is gone", chain("inet", "prerouting priority 0", "ip daddr 169.254.0.0/16 drop"), "", OK, ""},
		{"prerouting, a state before there is one", chain("inet", "prerouting priority -300; policy drop", "ct state new accept"), "", Warn, "its policy"},
		{"prerouting, reverse path", chain("inet", "prerouting priority 10", "fib saddr . iif oif missing drop"), "", Warn, "handle 2"},
		{"postrouting", chain("inet", "postrouting priority 0", "ip daddr 10.244.0.0/16 drop"), "", Fail, "to endpoint 10.244.2.2:8080"},
		{"ingress", chain("netdev", "ingress device veth1 priority 0", "ip daddr 169.254.0.0/16 drop"), "", Fail, "netdev w c: a packet of a pod to 169.254.210.210:8080/tcp"},
		{"ingress of several links", chain("netdev", "ingress devices = { lo, veth1 } priority 0; policy drop"), "", Fail, "by its policy"},
		{"ingress of the family inet", chain("inet", "ingress device veth1 priority 0", "ip daddr 169.254.0.0/16 drop"), "", Fail, "inet w c: "},
		{"ingress of another link", chain("netdev", "ingress device lo priority 0; policy drop"), "", OK, ""},
		{"ingress of a port", chain("netdev", "ingress device veth2 priority 0", "ip daddr 169.254.0.0/16 drop"), bridged, Fail, "netdev w c: "},
		{"egress", chain("netdev", "egress device veth1 priority 0; policy drop"), "", Fail, "to endpoint 10.244.2.2:8080"},
		{"egress of a port, perhaps of another pod", chain("netdev", "egress device veth2 priority 0; policy drop"), bridged, Warn, "netdev w c: its policy"},
		{"bridge", chain("bridge", "prerouting priority 0", "ip daddr 169.254.0.0/16 drop"), bridged, Fail, "nftables chain bridge w c: a packet of a pod to 169.254.210.210:8080/tcp"},
		{"bridge, some ports", chain("bridge", "prerouting priority 0", "iifname veth9 drop"), bridged, Warn, "bridge w c"},
		{"bridge, forwarded", chain("bridge", "forward priority 0; policy drop"), bridged, Warn, "bridge w c"},
		{"bridge, pods on none", chain("bridge", "prerouting priority 0; policy drop"), "", OK, ""},
		{"input, the endpoint is a process of the node", chain("inet", "input priority 0", "tcp dport 8080 drop"), "10.244.3.1:8080", Fail, "a packet of a pod to endpoint 10.244.3.1:8080 is dropped"},
		{"input, the endpoint is a pod", chain("inet", "input priority 0", "tcp dport 8080 drop"), "", OK, ""},
		{"a chain that is called as a hook is", "iptables-nft -N INGRESS; iptables-nft -A INGRESS -j DROP", "", OK, ""},
		{"output", chain("inet", "output priority -150", "ip daddr 169.254.0.0/16 drop"), "", Fail, "inet w c: a packet of a process of the node to 169.254.210.210:8080/tcp is dropped"},
		{"output, for one user", chain("inet", "output priority -150", "meta skuid 1000 ip daddr 169.254.0.0/16 drop"), "", Warn, "inet w c"},
		{"output behind the translation", chain("inet", "output priority 0", "ip daddr 10.244.2.2 drop"), "", Fail, "a packet of a process of the node to endpoint 10.244.2.2:8080"},
		{"output, iptables-nft", "iptables-nft -A OUTPUT -d 10.244.0.0/16 -j REJECT", "", Fail, "iptables-nft, table filter: a packet of a process of the node to endpoint"},
		{"output, the magic IP is gone", "iptables-nft -A OUTPUT -d 169.254.0.0/16 -j REJECT", "", OK, ""},
		{"output, iptables-legacy", "iptables-legacy -t raw -A OUTPUT -d 169.254.0.0/16 -j DROP", "", Fail, "iptables-legacy, table raw: a packet of a process of the node to 169.254.210.210:8080/tcp"},
		{"a queue", "iptables-nft -A FORWARD -j NFQUEUE --queue-num 1", "", Warn, "NFQUEUE"},

		{"Docker, forwarding is not allowed", "iptables-nft -N DOCKER-USER; iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -j DOCKER-USER; iptables-nft -A FORWARD -i docker0 ! -o docker0 -j ACCEPT", "", Fail, "by the policy of FORWARD"},
		{"Docker, raw", "iptables-nft -t raw -A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP", "", OK, ""},
		{"ufw, forwarding is allowed", "iptables-nft -N ufw-before-forward; iptables-nft -N ufw-logging; iptables-nft -A FORWARD -j ufw-before-forward; iptables-nft -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT; iptables-nft -A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT; iptables-nft -A FORWARD -j ufw-logging; iptables-nft -A ufw-logging -m limit --limit 3/min -j LOG", "", OK, ""},
		{"firewalld, which accepts what is translated", "nft -f testdata/firewalld.nft", "", OK, ""},
		{"kube-proxy, nftables", "nft -f testdata/kube-proxy.nft", "", OK, ""},
		{"kube-proxy, iptables", "iptables-nft -N KUBE-FORWARD; iptables-nft -N KUBE-FIREWALL; iptables-nft -A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD; iptables-nft -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP; iptables-nft -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT; iptables-nft -A OUTPUT -j KUBE-FIREWALL; iptables-nft -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP", "", OK, ""},
		{"Calico, a policy by marks", "iptables-nft -N cali-fw; iptables-nft -A FORWARD -i veth+ -g cali-fw; iptables-nft -A cali-fw -m conntrack --ctstate INVALID -j DROP; iptables-nft -A cali-fw -j MARK --set-xmark 0x0/0x10000; iptables-nft -A cali-fw -m mark --mark 0x10000/0x10000 -j RETURN; iptables-nft -A cali-fw -j DROP", "", Warn, "-A cali-fw -j DROP"},
		{"Cilium", "iptables-nft -N CILIUM_FORWARD; iptables-nft -A FORWARD -j CILIUM_FORWARD; iptables-nft -A CILIUM_FORWARD -o cilium_host -m comment --comment \"cilium: any->cluster on cilium_host forward accept\" -j ACCEPT; iptables-nft -t raw -N CILIUM_PRE_raw; iptables-nft -t raw -A PREROUTING -j CILIUM_PRE_raw; iptables-nft -t raw -A CILIUM_PRE_raw -m mark --mark 0x200/0xf00 -j CT --notrack", "", Warn, "CILIUM_PRE_raw"},
	} {
		t.Run(test.name, func(t *testing.T) {
			endpoint := test.endpoint
			if endpoint == "" {
				endpoint = "10.244.2.2:8080"
			}
			e := examinationOf(t, endpoint)
			nodetest.Run(t, "sh", "-ec", test.script)
			e.look(t)
			e.wants(t, "filters", test.level, test.words)
		})
	}
}

// TestFiltersSeenByNFTAlone: where iptables-nft-save is missing, nft shows its chains, and its targets by their names at most.
func TestFiltersSeenByNFTAlone(t *testing.T) {
	for name, test := range map[string]struct {
		script string
		level  Level
		words  string
	}{
		"reject": {"iptables-nft -A FORWARD -j REJECT", Fail, "nftables chain ip filter FORWARD"},
		"a set":  {"iptables-nft -t raw -A PREROUTING -m addrtype --dst-type LOCAL -j DROP", Warn, "nftables chain ip raw PREROUTING"},
		"a mark": {"iptables-nft -A FORWARD -m comment --comment x -j MARK --set-mark 1", OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			e := examinationOf(t, "10.244.2.2:8080")
			nodetest.Run(t, "sh", "-ec", test.script)
			onlyTools(t, "nft")
			e.look(t)
			e.wants(t, "filters", test.level, test.words)
		})
	}
}

// TestFiltersWithoutTools: without nft and iptables it is not known what filters do, unless the kernel has none.
func TestFiltersWithoutTools(t *testing.T) {
	for script, level := range map[string]Level{
		"true": OK, chain("inet", "forward priority 0; policy drop"): Hidden, "iptables-legacy -A FORWARD -j DROP": Hidden, "nft add table inet magic-ip-default.a": OK,
	} {
		t.Run(script, func(t *testing.T) {
			e := examinationOf(t, "10.244.2.2:8080")
			nodetest.Run(t, "sh", "-ec", script)
			onlyTools(t)
			e.look(t)
			e.wants(t, "filters", level, "")
		})
	}
}

// onlyTools leaves these commands alone on PATH.
func onlyTools(t *testing.T, names ...string) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		path := strings.TrimSpace(nodetest.Run(t, "which", name))
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
}

// TestProbeFromNode: processes of the node are tried where they are clients.
func TestProbeFromNode(t *testing.T) {
	for name, test := range map[string]struct {
		exempt bool
		rules  string
		level  Level
		words  string
	}{
		"refused":         {false, "table ip n { chain c { type nat hook output priority -105; ip daddr 169.254.210.210 dnat to 10.244.3.1; }; }", Fail, "from a process of the node to 169.254.210.210:8080/tcp: "},
		"dropped":         {false, "table ip n { chain c { type filter hook output priority -150; ip daddr 169.254.0.0/16 drop; }; }", Fail, "a process of the node sent the SYN, and nothing left the node for an endpoint: it was dropped; probably because of filters: nftables chain ip n c"},
		"not its clients": {true, "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			e := examinationOf(t, bridged)
			nodetest.IP(t, "route add 169.254.0.0/16 dev cni1")
			e.agents[0].MagicIPs[0].HostClients = !test.exempt
			nodetest.Run(t, "nft", test.rules)
			e.look(t)
			e.probeFromNode(t.Context(), e.targets())
			if test.level == "" {
				if last := e.found[len(e.found)-1]; last.Check == "probe" {
					t.Errorf("%+v", last)
				}
				return
			}
			e.wants(t, "probe", test.level, test.words)
		})
	}
}

// TestSettleFilters: a probe that passes decides what could not be evaluated, and one that does not, or cannot be made, does not.
func TestSettleFilters(t *testing.T) {
	for probed, want := range map[Level]Level{OK: OK, Hidden: Warn, Fail: Warn} {
		e := &examination{}
		e.add(Warn, filtersCheck, "it depends", "")
		e.add(OK, probeCheck, "4 answered", "")
		e.add(probed, probeCheck, "more", "")
		e.settleFilters()
		e.found = e.found[:1]
		e.wants(t, filtersCheck, want, "it depends")
	}
}
