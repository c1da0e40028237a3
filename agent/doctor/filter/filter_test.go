package filter

import (
	"net/netip"
	"testing"
)

func TestForward(t *testing.T) {
	packet := Packet{In: "cni0", Out: "cni0", Source: netip.MustParseAddr("10.244.1.9"), Destination: netip.MustParseAddrPort("10.244.1.3:8080"), Protocol: "tcp"}
	for name, test := range map[string]struct {
		rules   string
		verdict Verdict
		by      string
	}{
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
		if verdict, by := Forward(test.rules, packet); verdict != test.verdict || by != test.by {
			t.Errorf("%s: %d by %q, want %d by %q", name, verdict, by, test.verdict, test.by)
		}
	}
}

func FuzzForward(f *testing.F) {
	f.Add(":FORWARD DROP [0:0]\n:A - [0:0]\n-A FORWARD -g A\n-A A -j A\n-A A -j B ! -s")
	f.Fuzz(func(_ *testing.T, rules string) { Forward(rules, Packet{}) })
}
