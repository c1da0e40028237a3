//go:build dataplane

package dataplane_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func flannelSettings() (all []setting) {
	for _, filtered := range []bool{true, false} {
		for _, vxlan := range []bool{true, false} {
			s := setting{
				name: "host-gw", flannel: &whole.Flannel{VXLAN: vxlan, Unfiltered: !filtered}, source: filtered,
				reason: "Cilium is not on this node", doctor: "ok data plane no eBPF program sees the packets of pods before netfilter",
			}
			if vxlan {
				s.name = "vxlan"
			}
			if !filtered {
				s.name += "-unfiltered"
			}
			all = append(all, s)
		}
	}
	return all
}

// TestFlannel: the agent runs all the time, on two nodes with flannel.
func TestFlannel(t *testing.T) {
	for _, s := range flannelSettings() {
		t.Run(s.name, func(t *testing.T) {
			w := newWorld(t, flannelNodes)
			began := time.Now()
			w.must(s.set(w.ctx))
			w.follows(s)
			w.between(s)
			w.traffic(s)
			w.rollout()
			w.faults(s)
			w.problems(s)
			compat.Record(t, s.row(), w.observed)
			t.Logf("all of it: %v", time.Since(began).Round(100*time.Millisecond))
		})
	}
}

// between: pods of one node are answered by pods of the other, which is flannel's work, and by the tunnel where there is one.
func (w *world) between(s setting) {
	w.Helper()
	far := echoPod(clients, "far", nil)
	far.Spec.NodeName = cluster.Nodes[1].Name
	far = w.create(far)
	near := w.pod(clients, "near", nil)
	to := netip.AddrPortFrom(netip.MustParseAddr(far.Status.PodIP), port)
	w.eventually("pods of one node reach those of the other", func() error {
		_, err := w.ask(lab.NewConnection, w.netns(near), to)
		return err
	})
	if route := w.exec("ip route get " + far.Status.PodIP); strings.Contains(route, "dev flannel.1") != s.flannel.VXLAN {
		w.Errorf("the way to the other node's pods is %s", route)
	}
}

// problems wants doctor to report none, but that the magic IP without a target has none, and that servers do not see the client's address
// where frames do not pass netfilter.
func (w *world) problems(s setting) {
	w.Helper()
	found := w.agent("doctor")
	for line := range strings.Lines(found) {
		level, check, _ := strings.Cut(strings.TrimSpace(line), " ")
		check = strings.TrimSpace(check)
		expected := strings.HasPrefix(check, "magic IP "+unserved.Addr().String()+":") || !s.source && strings.Contains(check, "do not pass netfilter")
		if level == "FAIL" || level == "warn" && !expected {
			w.Errorf("doctor says: %s", line)
		}
	}
	if !s.source && !strings.Contains(found, "frames of cni0 do not pass netfilter") {
		w.Errorf("doctor does not say that frames of cni0 do not pass netfilter:\n%s", found)
	}
}
