package integration

import (
	"strings"
	"testing"
)

// TestProbe: on a healthy node of each kind, packets of doctor come through, and nothing of it stays.
func TestProbe(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		for _, kind := range []string{"bridge", "ptp", "calico"} {
			t.Run(kind, func(t *testing.T) {
				w := serving(t, backend, kind, config())
				w.addTarget("echo")
				w.echo("echo")
				links := w.run("ip -brief link; ip route; ip -6 route; ip neigh")
				place := map[string]string{"bridge": "bridge cni1", "ptp": "a veth", "calico": "a veth"}[kind]
				w.finds("ok", "probe", "from a namespace of its own on "+place+": 4 answered")
				w.finds("ok", "endpoints", "2 listen (TCP); 2 of UDP")
				if out, _ := w.doctor("--from-pod", "default/echo"); !strings.Contains(out, "ok    probe: from pod default/echo: 4 answered") {
					t.Errorf("from the target itself:\n%s", out)
				}
				if out, _ := w.doctor("--netns", "/run/netns/echo"); !strings.Contains(out, "ok    probe: from /run/netns/echo: 4 answered") {
					t.Errorf("by the path:\n%s", out)
				}
				if after := w.run("ip -brief link; ip route; ip -6 route; ip neigh"); strings.Contains(after, "mipdoc") || strings.Count(after, "\n") < strings.Count(links, "\n") {
					t.Errorf("before:\n%s\nafter:\n%s", links, after)
				}
				if flows := w.run("conntrack -L 2>/dev/null | grep -c -e 198.18. -e 10.244.3.254 || true"); strings.TrimSpace(flows) != "0" {
					t.Errorf("%s connections of the probe are left", flows)
				}
			})
		}
	})
}
