//go:build dataplane

package dataplane_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// settings are the rows of docs/cilium.md.
func settings() []setting {
	kubeProxy := whole.Cilium{LegacyHostRouting: true}
	bpf := whole.Cilium{KubeProxyReplacement: true, BPFMasquerade: true}
	legacy := bpf
	legacy.LegacyHostRouting = true
	endpointRoutes := func(c whole.Cilium) whole.Cilium { c.EndpointRoutes = true; return c }
	vxlan := func(c whole.Cilium) whole.Cilium { c.VXLAN = true; return c }
	const (
		egress = "; egress policies see the magic IP, so they have to allow it"
		price  = ". The price: servers see an address of the node instead of the client's"
		both   = "local routes bring packets of pods to the rules, and masquerade their replies" + egress + price
		reply  = "masquerade brings replies to pods back to the rules" + egress + price
		none   = "packets of pods pass the rules both ways" + egress
	)
	all := []setting{
		{name: "b", cilium: bpf, masquerade: true, reason: "Cilium with BPF host routing", doctor: "warn data plane " + both, short: true},
		{name: "be", cilium: endpointRoutes(bpf), masquerade: true, reason: "Cilium with BPF host routing and endpoint routes", doctor: "warn data plane " + both, short: true},
		{name: "bl", cilium: legacy, masquerade: true, reason: "Cilium with legacy host routing, without endpoint routes", doctor: "warn data plane " + reply, short: true},
		{name: "ble", cilium: endpointRoutes(legacy), source: true, reason: "Cilium with legacy host routing and endpoint routes", doctor: "ok data plane " + none},
		{name: "a", cilium: kubeProxy, reason: "Cilium with legacy host routing, without endpoint routes, with masquerade by iptables", doctor: "warn data plane " + none + price + ": Cilium itself masquerades"},
		{name: "ae", cilium: endpointRoutes(kubeProxy), source: true, reason: "Cilium with legacy host routing and endpoint routes", doctor: "ok data plane " + none},
	}
	for _, s := range all {
		s.name, s.cilium, s.short = s.name+" vxlan", vxlan(s.cilium), false
		all = append(all, s)
	}
	exclusive := all[0]
	exclusive.name, exclusive.cilium.CNIExclusive, exclusive.short = "b exclusive", true, false
	iptables := all[0]
	iptables.name, iptables.backend, iptables.short = "b iptables", "iptables", false
	return append(all, exclusive, iptables)
}

// TestSettings: the agent runs all the time, and follows.
func TestSettings(t *testing.T) {
	for _, s := range settings() {
		if testing.Short() && !s.short {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			w := newWorld(t, ciliumNode)
			if s.backend != "" {
				w.must(release(w.ctx, "backend="+s.backend))
				w.Cleanup(func() { w.must(release(w.ctx)) })
			}
			began := time.Now()
			started := w.status().StartedAt
			w.must(s.set(w.ctx))
			w.follows(s)
			if again := w.status().StartedAt; !again.Equal(started) {
				t.Errorf("the agent was started again, at %v", again)
			}
			t.Logf("Cilium is set and the agent has followed after %v", time.Since(began).Round(100*time.Millisecond))
			w.traffic(s)
			w.rollout()
			w.faults(s)
			w.advice()
			compat.Record(t, s.row(), w.observed)
			if sockets := w.exec("find /run/cilium/state -type s"); sockets != "" {
				t.Errorf("sockets in the directory that is mounted into the agent: %s", sockets)
			}
			t.Logf("all of it: %v", time.Since(began).Round(100*time.Millisecond))
		})
	}
}

// TestNodeWithoutCilium: on the other node of the cluster nothing is different.
func TestNodeWithoutCilium(t *testing.T) {
	w := newWorld(t, ciliumNode)
	other := cluster.Nodes[1]
	status, err := runtimedir.New(other.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
	w.must(err)
	if d := status.DataPlane; d.Name != "netfilter" || d.Reason != "Cilium is not on this node" || len(d.LocalRoutes) != 2 || len(d.Masquerade) > 0 || status.LastError != "" {
		t.Errorf("the agent says %+v, error %q", d, status.LastError)
	}
	out, err := other.Exec(w.ctx, "nft", "list", "chain", "ip", "magic-ip-"+agentName, "masquerade-replies")
	w.must(err)
	if strings.Contains(out, "fib saddr") {
		t.Errorf("the node has\n%s", out)
	}
}

// TestNetfilterByForce is what happens without local routes, and what the sniffer hears then: doctor says it, and what to set.
func TestNetfilterByForce(t *testing.T) {
	if testing.Short() {
		return // it is of `make e2e-cilium`
	}
	w := newWorld(t, ciliumNode)
	w.must(node.SetCilium(w.ctx, settings()[0].cilium))
	w.must(release(w.ctx, "config.dataPlane=netfilter"))
	w.Cleanup(func() { w.must(release(w.ctx)) })
	client := w.pod(clients, "client", nil)
	w.pod("default", "echo", echoLabels)
	w.awaitEndpoint("echo")
	w.routes(false)
	found := w.agent("doctor")
	if want := "dataPlane is netfilter; Cilium with BPF host routing: packets of pods to magic IPs bypass the rules and leave the node"; !strings.Contains(found, want) {
		t.Errorf("doctor does not say %q:\n%s", want, found)
	}
	sniffer := listen(t)
	answer, err := node.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: w.netns(client), To: magic, Timeout: 500 * time.Millisecond, ByClock: true})
	if err == nil {
		t.Errorf("a pod is answered by %s", answer.Server)
	}
	sniffer.end(t, "without local routes")
	if len(sniffer.heard) == 0 {
		t.Error("nothing has left the node, or the sniffer does not hear it")
	}
}

// TestUninstall: helm uninstall takes the local routes out with the rules.
func TestUninstall(t *testing.T) {
	w := newWorld(t, ciliumNode)
	w.must(node.SetCilium(w.ctx, settings()[0].cilium))
	w.routes(true)
	_, err := cluster.Helm(w.ctx, "uninstall", "mip", "--namespace", "kube-system")
	w.must(err)
	w.Cleanup(func() { w.must(release(w.ctx)) })
	w.eventually("nothing is left", func() error {
		left := w.exec(`set -e; ip route show table local proto 109; tables=$(nft list tables); echo "$tables" | grep magic-ip || true`)
		if left != "" {
			return fmt.Errorf("the node has\n%s", left)
		}
		return nil
	})
}
