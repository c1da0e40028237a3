package runtimedir_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestCompare: frontends are in order of address, then of protocol, then of port.
func TestCompare(t *testing.T) {
	t.Parallel()
	var want []runtimedir.Frontend
	for _, address := range []string{"169.254.210.9", "169.254.210.10", "fd00::1"} {
		for _, protocol := range []runtimedir.Protocol{runtimedir.SCTP, runtimedir.TCP, runtimedir.UDP} {
			for _, port := range []uint16{80, 443} {
				want = append(want, runtimedir.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: port})
			}
		}
	}
	got := slices.Clone(want)
	slices.Reverse(got)
	slices.SortFunc(got, runtimedir.Frontend.Compare)
	if diff := cmp.Diff(want, got, options()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
