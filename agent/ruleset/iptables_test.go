package ruleset

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// builtIn is a table, and what becomes of a packet in a chain of it.
type builtIn struct {
	rules   string
	verdict Verdict
	by      string
}

func (b builtIn) check(t *testing.T, name, chain string, packet Packet) {
	t.Helper()
	if verdict, by := ParseIPTables(b.rules, nil).BuiltIn(chain, packet); verdict != b.verdict || by != b.by {
		t.Errorf("%s: %d by %q, want %d by %q", name, verdict, by, b.verdict, b.by)
	}
}

func TestForward(t *testing.T) {
	packet := Packet{In: "cni0", Out: "cni0", Source: netip.MustParseAddr("10.244.1.9"), Destination: netip.MustParseAddrPort("10.244.1.3:8080"), Protocol: "tcp", Translated: true}
	for name, test := range map[string]builtIn{
		"no table":                     {"", Accept, ""},
		"policy accept":                {":FORWARD ACCEPT [0:0]\n", Accept, ""},
		"policy drop":                  {":FORWARD DROP [0:0]\n", Drop, "the policy of FORWARD"},
		"docker":                       {":FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:DOCKER - [0:0]\n-A FORWARD -j DOCKER-USER\n-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A FORWARD -o docker0 -j DOCKER\n-A FORWARD -i docker0 ! -o docker0 -j ACCEPT\n-A DOCKER-USER -j RETURN\n", Drop, "the policy of FORWARD"},
		"flannel":                      {":FORWARD DROP [0:0]\n:FLANNEL-FWD - [0:0]\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n", Accept, ""},
		"the bridge plugin's firewall": {":FORWARD DROP [0:0]\n-A FORWARD -d 10.244.1.3/32 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A FORWARD -s 10.244.1.3/32 -j ACCEPT\n", Drop, "the policy of FORWARD"},
		"kube-proxy alone":             {":FORWARD DROP [0:0]\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n", Unknown, "the policy of FORWARD"},
		"state DNAT":                   {":FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n", Accept, ""},
		"reject at the end":            {":FORWARD ACCEPT [0:0]\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n", Drop, "the rule -A FORWARD -j REJECT --reject-with icmp-port-unreachable"},
		"another port":                 {":FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --dport 22 -j DROP\n-A FORWARD -p tcp -m tcp --dport 9000:9100 -j DROP\n-A FORWARD ! -p tcp -j DROP\n", Accept, ""},
		"this port":                    {":FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --dport 8000:8100 -j DROP\n", Drop, "the rule -A FORWARD -p tcp -m tcp --dport 8000:8100 -j DROP"},
		"a set":                        {":FORWARD ACCEPT [0:0]\n-A FORWARD -m set --match-set blocked src -j DROP\n", Unknown, "the rule -A FORWARD -m set --match-set blocked src -j DROP"},
		"a queue":                      {":FORWARD ACCEPT [0:0]\n-A FORWARD -j NFQUEUE --queue-num 1\n", Unknown, "the rule -A FORWARD -j NFQUEUE --queue-num 1"},
		"goto":                         {":FORWARD DROP [0:0]\n:A - [0:0]\n-A FORWARD -g A\n-A FORWARD -j ACCEPT\n-A A -s 192.0.2.1/32 -j ACCEPT\n", Drop, "the policy of FORWARD"},
		"wildcard":                     {":FORWARD DROP [0:0]\n-A FORWARD -i cni+ -j ACCEPT\n", Accept, ""},
		"an option that is not known":  {":FORWARD DROP [0:0]\n-A FORWARD --frobnicate -j ACCEPT\n", Unknown, "the policy of FORWARD"},
		"a quoted comment":             {":FORWARD DROP [0:0]\n-A FORWARD -m comment --comment \"a -j DROP \\\" b\" -j ACCEPT\n", Accept, ""},
	} {
		test.check(t, name, "FORWARD", packet)
	}
}

// TestTranslating: rules that take packets to 169.254.210.210 are found by the rule that names it, through whatever chains and
// sets; those that take packets to anything only where that is certain.
func TestTranslating(t *testing.T) {
	sets := map[string][]string{"mine": {"192.0.2.0/24", "169.254.210.0/24,tcp:80"}, "others": {"192.0.2.1"}}
	for name, test := range map[string]struct {
		rules string
		port  uint16
		want  string // the number of the rule, from 1
	}{
		"address":                       {"-A PREROUTING -d 169.254.210.210/32 -i cni0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2:80\n", 0, "1"},
		"address, of processes":         {"-A OUTPUT -d 169.254.210.210/32 -j REDIRECT --to-ports 80\n", 0, "1"},
		"another address":               {"-A PREROUTING -d 169.254.210.211/32 -j DNAT --to-destination 10.0.0.2:80\n", 0, ""},
		"prefix":                        {"-A PREROUTING -d 169.254.0.0/16 -p tcp -j REDIRECT --to-ports 3128\n", 0, "1"},
		"all but a prefix, one port":    {"-A PREROUTING ! -d 10.0.0.0/8 -p tcp -m tcp --dport 80 -j REDIRECT\n", 80, "1"},
		"all but ours":                  {"-A PREROUTING ! -d 169.254.0.0/16 -p tcp -m tcp --dport 80 -j REDIRECT\n", 80, ""},
		"range":                         {"-A PREROUTING -m iprange --dst-range 169.254.210.200-169.254.210.220 -j DNAT --to-destination 10.0.0.2\n", 0, "1"},
		"set":                           {"-A PREROUTING -m set --match-set mine dst,dst -j DNAT --to-destination 10.0.0.2\n", 0, "1"},
		"not in the set":                {"-A PREROUTING -m set --match-set others dst -j DNAT --to-destination 10.0.0.2\n", 0, ""},
		"a set that cannot be read":     {"-A PREROUTING -m set --match-set unknown dst -j DNAT --to-destination 10.0.0.2\n", 0, ""},
		"every packet to the port":      {"-A PREROUTING -p tcp -m multiport --dports 22,79:81 -j REDIRECT --to-ports 3128\n", 80, "1"},
		"every packet to another port":  {"-A PREROUTING -p tcp -m tcp --dport 81 -j REDIRECT --to-ports 3128\n", 80, ""},
		"perhaps every packet":          {"-A PREROUTING -m addrtype --dst-type LOCAL -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2\n", 80, ""},
		"accepted before":               {"-A PREROUTING -d 169.254.0.0/16 -j ACCEPT\n-A PREROUTING -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.2\n", 0, ""},
		"accepted before, of one port":  {"-A PREROUTING -d 169.254.0.0/16 -p tcp --dport 81 -j ACCEPT\n-A PREROUTING -d 169.254.210.210/32 -p tcp -j DNAT --to-destination 10.0.0.2\n", 0, "2"},
		"a transparent proxy":           {"-A PREROUTING -d 169.254.0.0/16 -p tcp -j TPROXY --on-port 3128\n", 0, "1"},
		"a proxy of marked packets":     {"-A PREROUTING -p tcp -m mark --mark 0x3d0200 -j TPROXY --on-port 3128\n", 80, ""},
		"a match":                       {"-A PREROUTING -d 169.254.210.210/32 -j MARK --set-mark 1\n", 0, ""},
		"our chain":                     {":MIP-x - [0:0]\n-A PREROUTING -d 169.254.210.210/32 -j MIP-x\n-A MIP-x -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.2\n", 0, ""},
		"a chain that nothing jumps to": {":OLD - [0:0]\n-A OLD -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.2\n", 0, ""},
		"externalIPs of kube-proxy": {":KUBE-SERVICES - [0:0]\n:KUBE-EXT-A - [0:0]\n:KUBE-SVC-A - [0:0]\n:KUBE-SEP-A - [0:0]\n:KUBE-SEP-B - [0:0]\n" +
			"-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-A\n" +
			"-A KUBE-SERVICES -d 169.254.210.210/32 -p tcp -m comment --comment \"default/echo external IP\" -m tcp --dport 80 -j KUBE-EXT-A\n-A KUBE-EXT-A -j KUBE-SVC-A\n" +
			"-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n-A KUBE-SVC-A -j KUBE-SEP-B\n-A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.0.0.1:80\n-A KUBE-SEP-B -p tcp -j DNAT --to-destination 10.0.0.2:80\n", 0, "3"},
		"hostPort": {":CNI-HOSTPORT-DNAT - [0:0]\n:CNI-DN-1 - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT\n-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 80 -j CNI-DN-1\n" +
			"-A CNI-DN-1 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:80\n", 80, ""},
		"goto": {":A - [0:0]\n-A PREROUTING -d 169.254.210.210/32 -g A\n-A PREROUTING -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.1\n-A A -s 192.0.2.1/32 -j MARK\n", 0, ""},
	} {
		p := Packet{Destination: netip.AddrPortFrom(netip.MustParseAddr("169.254.210.210"), test.port), Source: netip.MustParseAddr("10.0.0.9")}
		if test.port != 0 {
			p.Protocol = "tcp"
		}
		var want []string
		n := 0
		for line := range strings.Lines(test.rules) {
			if strings.HasPrefix(line, "-A") {
				if n++; strings.Contains(test.want, strconv.Itoa(n)) {
					want = append(want, strings.TrimSpace(line))
				}
			}
		}
		table := ParseIPTables(":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"+test.rules, sets)
		got := table.Translating(p, func(chain string) bool { return strings.HasPrefix(chain, "MIP-") })
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestBeforeTranslation: what keeps a pod's packet from the rules that translate it.
func TestBeforeTranslation(t *testing.T) {
	packet := Packet{In: "cni0", Source: netip.MustParseAddr("10.244.1.9"), Destination: netip.MustParseAddrPort("169.254.210.210:8080"), Protocol: "tcp"}
	for name, test := range map[string]builtIn{
		"empty":                     {":PREROUTING ACCEPT [0:0]\n", Accept, ""},
		"link-local drop":           {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 169.254.0.0/16 -j DROP\n", Drop, "the rule -A PREROUTING -d 169.254.0.0/16 -j DROP"},
		"link-local from elsewhere": {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 169.254.0.0/16 -i eth0 -j DROP\n", Accept, ""},
		"notrack":                   {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 169.254.210.210/32 -j NOTRACK\n", Drop, "the rule -A PREROUTING -d 169.254.210.210/32 -j NOTRACK"},
		"CT --notrack":              {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j CT --notrack\n", Drop, "the rule -A PREROUTING -p tcp -j CT --notrack"},
		"CT --zone":                 {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -j CT --zone-orig 7\n", Accept, ""},
		"notrack of others":         {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 169.254.20.10/32 -p udp -m udp --dport 53 -j CT --notrack\n", Accept, ""},
		"rpfilter":                  {":PREROUTING ACCEPT [0:0]\n-A PREROUTING -m rpfilter --invert -j DROP\n", Unknown, "the rule -A PREROUTING -m rpfilter --invert -j DROP"},
	} {
		test.check(t, name, "PREROUTING", packet)
	}
}

func FuzzForward(f *testing.F) {
	f.Add(":FORWARD DROP [0:0]\n:A - [0:0]\n-A FORWARD -g A\n-A A -j A\n-A A -j B ! -s")
	f.Fuzz(func(_ *testing.T, rules string) {
		t := ParseIPTables(rules, nil)
		t.BuiltIn("FORWARD", Packet{})
		t.Translating(Packet{}, func(string) bool { return false })
	})
}

func FuzzNFTables(f *testing.F) {
	f.Add([]byte(`{"nftables": [{"chain": {"family": "ip", "table": "t", "name": "c", "type": "nat", "hook": "prerouting"}},
		{"rule": {"family": "ip", "table": "t", "chain": "c", "handle": 1, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": {"set": ["10.0.0.1"]}}}, {"goto": {"target": "c"}}]}}]}`))
	f.Fuzz(func(_ *testing.T, printed []byte) {
		if t, err := ParseNFTables(printed); err == nil {
			nothing := func(_, _, _ string) bool { return false }
			t.Translating(Packet{Destination: netip.MustParseAddrPort("10.0.0.1:80")}, 0, nothing)
			t.Stopping(Packet{Destination: netip.MustParseAddrPort("10.0.0.1:80")}, Hook{Name: "forward", Before: 1}, nothing)
		}
	})
}
