package probe

import (
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// TestSitesAtOnce: what is made on a bridge at the same time has addresses of its own, and these can be had again later.
func TestSitesAtOnce(t *testing.T) {
	nodetest.Namespace(t, `
		link add cni0 type bridge
		addr add 10.244.0.1/24 dev cni0
		link set cni0 up`)
	newSite := func() *Site {
		t.Helper()
		site, err := NewSite("cni0", nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = site.Close() })
		return site
	}
	first, second := newSite(), newSite()
	if first.Addresses[0] == second.Addresses[0] {
		t.Errorf("both have %s", first.Addresses[0])
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if third := newSite(); third.Addresses[0] != first.Addresses[0] {
		t.Errorf("%s is not used again, but %s", first.Addresses[0], third.Addresses[0])
	}
}
