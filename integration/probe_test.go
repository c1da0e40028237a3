package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
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

// TestProbeIsKilled: what doctor has made goes with its process, and what has stayed of an earlier run is removed.
func TestProbeIsKilled(t *testing.T) {
	w := serving(t, "nftables", "calico", config())
	w.addTarget("echo") // nothing listens there, and a filter keeps it from saying so: the probe waits
	w.run(`ip netns exec echo nft 'add table inet w; add chain inet w c { type filter hook output priority 0; tcp flags rst drop; }'`)
	doctor, err := w.StartCommand("doctor", "--runtime-dir", lab.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	ours := func() string {
		return w.run("ip -brief link | grep -o '^mipdoc[0-9a-f]*' || true; ip route | grep 198.1 || true")
	}
	await := func(what string, wanted func(string) bool) {
		t.Helper()
		err := lab.Eventually(patience(t), func() error {
			if got := ours(); !wanted(got) {
				return fmt.Errorf("%q", got)
			}
			return nil
		})
		if err != nil {
			t.Fatalf("waiting for %s: %v", what, err)
		}
	}
	await("the probe's link", func(s string) bool { return strings.Contains(s, "mipdoc") && strings.Contains(s, "198.1") })
	doctor.Kill()
	await("all of it to be gone", func(s string) bool { return s == "" })

	w.run(`for link in "mipdoc00000001 1" "mipdoc00000002 999999999"; do set -- $link
		ip link add $1 type veth peer name peer-$2
		ip link set $1 alias "magic-ip-agent doctor until boot+$2"
	done; ip link add mipdoc3 type dummy 2>/dev/null || ip link add mipdoc3 type bridge`)
	w.doctor()
	if got := strings.Fields(ours()); !slices.Equal(got, []string{"mipdoc00000002", "mipdoc3"}) {
		t.Errorf("there is now %q: a link of a run that has ended goes, one that is at work and one of others stay", got)
	}
}

// TestProbeWithoutRights says what it lacks, and is no failure.
func TestProbeWithoutRights(t *testing.T) {
	w := serving(t, "nftables", "bridge", config())
	w.addTarget("echo")
	w.echo("echo")
	agent := w.run("readlink /proc/[0-9]*/exe | grep -m1 /magic-ip-agent")
	for capability, want := range map[string]string{
		"sys_admin": "--    probe: packets cannot be sent from a pod's place: network namespaces cannot be entered without CAP_SYS_ADMIN",
		"net_raw":   "ok    probe: from a namespace of its own on bridge cni1: 4 answered",
	} {
		out := w.run("setpriv --bounding-set -" + capability + " --inh-caps -all " + strings.TrimSpace(agent) + " doctor --cni-conf-dir /nowhere --cni-bin-dir /nowhere || [ $? = 3 ]")
		if !strings.Contains(out, want) || !strings.Contains(out, "ok    probe: from a process of the node: 4 answered") {
			t.Errorf("without %s:\n%s", capability, out)
		}
	}
}
