package plan_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// TestLinks: which links rules name. eth0 is the uplink.
func TestLinks(t *testing.T) {
	for _, tt := range []struct {
		name          string
		in            plan.Input
		hostInterface []string
		want          plan.Plan
	}{
		{
			name: "a pods' link and an uplink",
			in:   plan.Input{PodInterfaces: []string{"veth1", "cni0", "cni0"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"veth9"}},
			want: plan.Plan{PodInterfaces: []string{"cni0", "veth1"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"eth0", "veth9"}},
		},
		{
			name: "nothing outweighs an uplink",
			in:   plan.Input{PodInterfaces: []string{"cni0", "eth0"}, Uplinks: []string{"eth0"}},
			want: plan.Plan{PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"eth0"}},
		},
		{
			name: "but the operator", hostInterface: []string{"eth+"},
			in:   plan.Input{PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0", "wan0"}},
			want: plan.Plan{PodInterfaces: []string{"cni0"}, Uplinks: []string{"wan0"}, UnservedPairs: []string{"eth0", "wan0"}},
		},
		{
			name: "names that mean something in rules",
			in: plan.Input{
				PodInterfaces: []string{`a"b`, "eth+", "a*", "-i", "a'b", `a\b`, "a$b", "a;b", "réseau", "cni0"}, Uplinks: []string{"eth0"},
				Bridges: []plan.Bridge{{Name: `br"0`, Unfiltered4: true}, {Name: "cni0", Unfiltered4: true}},
			},
			want: plan.Plan{
				PodInterfaces: []string{"cni0"}, Uplinks: []string{"eth0"}, UnservedPairs: []string{"eth0"},
				Bridges: []plan.Bridge{{Name: "cni0", Unfiltered4: true}}, AllBridges: []string{"cni0"},
				Unnamed: []string{"-i", "a\"b", "a$b", "a'b", "a*", "a;b", "a\\b", "br\"0", "eth+", "réseau"},
			},
		},
		{
			name: "an uplink that cannot be named",
			in:   plan.Input{PodInterfaces: []string{"cni0"}, Uplinks: []string{`eth"0`}},
			want: plan.Plan{PodInterfaces: []string{"cni0"}, Unnamed: []string{`eth"0`}, NamedOnly: true},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.in.Services = []plan.Service{{Frontend: frontend("169.254.210.210", plan.TCP), HostInterface: tt.hostInterface, WithoutEndpoint: plan.Reject}}
			got := plan.Build(tt.in)
			ignore := cmpopts.IgnoreFields(plan.Plan{}, "Rules", "Clients")
			if diff := cmp.Diff(tt.want, got, ignore, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestNameable: letters and digits of ASCII and a few signs. Those beside them in ASCII are none.
func TestNameable(t *testing.T) {
	for name, want := range map[string]bool{
		"azAZ09": true, "a.b_c-d@e~f=g": true, "0": true, "": false, "-a": false, "a-": true,
		"a`": false, "a{": false, "A[": false, "0/": false, "0:": false, "a b": false, "a*": false, "a+": false,
	} {
		if got := plan.Nameable(name); got != want {
			t.Errorf("%q can be named: %t, want %t", name, got, want)
		}
	}
}
