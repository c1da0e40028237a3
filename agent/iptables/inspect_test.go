package iptables

import (
	"fmt"
	"slices"
	"strings"
	"testing"

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
