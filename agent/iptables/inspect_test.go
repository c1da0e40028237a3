package iptables

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// known is what status has of the input of a plan.
func known(in plan.Input) plan.Plan {
	k := plan.Input{PodInterfaces: in.PodInterfaces, Uplinks: in.Uplinks, HostAddresses: in.HostAddresses}
	for _, s := range in.Services {
		s.ExcludeTarget = false
		k.Services = append(k.Services, s)
	}
	return plan.Build(k)
}

// TestInspect: nothing differs where nothing does, whatever is not known, and each chain that is emptied is named.
func TestInspect(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		for name, in := range cases() {
			p, k := plan.Build(in), known(in)
			backend := newTestIPTables(t, suffix, testAgent)
			mustSync(t, backend, &p)
			if differs, err := Inspect(t.Context(), testAgent, &k); err != nil || len(differs) > 0 {
				t.Errorf("%s: %q, error %v", name, differs, err)
			}
			var want []string
			for _, table := range []string{"mangle", "filter", "nat"} {
				listings, err := backend.families[0].list(t.Context(), table)
				if err != nil {
					t.Fatal(err)
				}
				for _, c := range listings[table].chains {
					if len(c.rules) > 0 {
						want = append(want, fmt.Sprintf("iptables%s table %s: chain %s has no rules", suffix, table, c.name))
						nodetest.Run(t, "iptables"+suffix, "-t", table, "-F", c.name)
					}
				}
			}
			differs, err := Inspect(t.Context(), testAgent, &k)
			differs = slices.DeleteFunc(differs, func(d string) bool { return strings.Contains(d, " no rule leads ") })
			if diff := cmp.Diff(want, differs); err != nil || diff != "" {
				t.Errorf("%s: error %v (-want +got):\n%s", name, err, diff)
			}
			if err := backend.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestTaken: a rule of others before ours is named where it takes the packets, by doctor and by the agent that waits before it moves its jumps again.
func TestTaken(t *testing.T) {
	for name, tt := range map[string]struct {
		table, rules string // what another program puts before ours, as input of iptables-restore
		want         string
	}{
		"accept":              {"nat", "-I PREROUTING -d 169.254.0.0/16 -j ACCEPT", "-A PREROUTING -d 169.254.0.0/16 -j ACCEPT"},
		"in a chain":          {"nat", ":OTHER -\n-A OTHER -d 169.254.0.0/16 -p tcp -j DNAT --to-destination 10.9.9.9\n-I PREROUTING -j OTHER", "-A PREROUTING -j OTHER"},
		"drop":                {"mangle", "-I PREROUTING -d 169.254.210.210 -j DROP", "-A PREROUTING -d 169.254.210.210/32 -j DROP"},
		"processes":           {"nat", "-I OUTPUT -d 169.254.0.0/16 -j ACCEPT", "-A OUTPUT -d 169.254.0.0/16 -j ACCEPT"},
		"other packets":       {"nat", "-I PREROUTING -d 10.0.0.0/8 -j ACCEPT", ""},
		"some packets":        {"nat", "-I PREROUTING -m mark --mark 0x1 -j ACCEPT", ""},
		"a mark":              {"nat", "-I PREROUTING -j MARK --set-mark 1", ""},
		"an empty chain":      {"nat", ":OTHER -\n-I PREROUTING -j OTHER", ""},
		"another agent":       {"nat", ":MIP-0a-dnat -\n-A MIP-0a-dnat -j ACCEPT\n-I PREROUTING -j MIP-0a-dnat", ""},
		"Services":            {"nat", ":KUBE-SERVICES -\n:KUBE-NODEPORTS -\n-A KUBE-SERVICES -d 10.96.0.1 -p tcp --dport 443 -j ACCEPT\n-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n-A KUBE-NODEPORTS -p tcp --dport 30080 -j ACCEPT\n-I PREROUTING -j KUBE-SERVICES", ""},
		"forward of Services": {"filter", ":KUBE-FORWARD -\n-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-I FORWARD -j KUBE-FORWARD", ""},
	} {
		t.Run(name, func(t *testing.T) {
			inIPTablesNamespace(t)
			nodetest.Run(t, "iptables-nft", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
			p := plan.Build(cases()["one"])
			k := known(cases()["one"])
			backend := newTestIPTables(t, "-nft", testAgent)
			mustSync(t, backend, &p)
			for _, hook := range []string{"PREROUTING", "OUTPUT", "FORWARD"} {
				backend.families[0].moved[tt.table+" "+hook] = time.Now()
			}
			nodetest.Run(t, "sh", "-ec", "printf '%b\\n' '*"+tt.table+"' '"+tt.rules+"' COMMIT | iptables-nft-restore --noflush")
			inspected, errInspect := Inspect(t.Context(), testAgent, &k)
			verified, errVerify := backend.Verify(t.Context())
			if tt.want == "" {
				if len(inspected)+len(verified) > 0 || errInspect != nil || errVerify != nil {
					t.Errorf("inspect %q, %v; verify %q, %v; want nothing", inspected, errInspect, verified, errVerify)
				}
				return
			}
			want := fmt.Sprintf("iptables-nft table %s: a rule of others before ours takes packets to magic IPs: %s", tt.table, tt.want)
			if errInspect != nil || len(inspected) != 1 || inspected[0] != want {
				t.Errorf("inspect %q, %v; want %q", inspected, errInspect, want)
			}
			if len(verified) > 0 || errVerify == nil || !strings.HasPrefix(errVerify.Error(), want) {
				t.Errorf("verify %q, %v; want %q", verified, errVerify, want)
			}
			clear(backend.families[0].moved)
			if differs, err := backend.Verify(t.Context()); err != nil || len(differs) != 1 {
				t.Errorf("verify after a minute: %q, %v; want a difference", differs, err)
			}
			mustSync(t, backend, &p)
			wantIntact(t, backend)
			if differs, err := Inspect(t.Context(), testAgent, &k); err != nil || len(differs) > 0 {
				t.Errorf("inspect after a minute: %q, %v", differs, err)
			}
		})
	}
}
