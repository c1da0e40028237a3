package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// cilium makes the node look as if Cilium was on it, with the link that it always has and the file that its agent writes. What comes
// from pods still passes netfilter: with Cilium itself, see integration/cluster/dataplane.
func (w *world) cilium(legacyHostRouting, endpointRoutes bool) {
	w.t.Helper()
	w.run("[ -e /sys/class/net/cilium_host ] || ip link show cilium_host >/dev/null 2>&1 || ip link add cilium_net type veth peer name cilium_host; mkdir -p /run/cilium/state")
	file := fmt.Sprintf(`{"UnsafeDaemonConfigOption": {"EnableHostLegacyRouting": %t}, "EnableEndpointRoutes": %t, "EnableBPFMasquerade": true, "EnableIPv4": true, "EnableIPv6": true,
		"EnableIPv4Masquerade": true, "EnableIPv6Masquerade": true}`, legacyHostRouting, endpointRoutes)
	if err := w.WriteFile("/run/cilium/state/agent-runtime-config.json", []byte(file)); err != nil {
		w.t.Fatal(err)
	}
}

// What the agent says of the data plane.
const (
	notCilium             = "Cilium is not on this node"
	bpfRouting            = "Cilium with BPF host routing"
	bpfRoutingEndpoint    = "Cilium with BPF host routing and endpoint routes"
	legacyRouting         = "Cilium with legacy host routing, without endpoint routes"
	legacyRoutingEndpoint = "Cilium with legacy host routing and endpoint routes"
)

// awaitDetour waits until the agent says this of the data plane, has local routes for so many addresses, and masquerades, or not.
func (w *world) awaitDetour(name, reason string, routes int, masquerade bool) {
	w.t.Helper()
	w.awaitOf(name, fmt.Sprintf("to have %d local routes", routes), func(a *runtimedir.Status) bool {
		return strings.HasSuffix(a.DataPlane.Reason, reason) && len(a.DataPlane.LocalRoutes) == routes && len(a.DataPlane.Masquerade) > 0 == masquerade && a.LastError == ""
	})
}

// localRoutes are the addresses that have a route of an agent's, and the sources of these.
func (w *world) localRoutes() string {
	w.t.Helper()
	var routes []string
	for line := range strings.Lines(w.run("ip -4 route show table local proto 109; ip -6 route show table local proto 109")) {
		fields := strings.Fields(line)
		for i, field := range fields {
			if field == "src" {
				routes = append(routes, fields[1]+" from "+fields[i+1])
			}
		}
	}
	return strings.Join(routes, ", ")
}

// TestDetour: with Cilium's file on the node, magic IPs are addresses of the node and flows of pods are masqueraded; all of it follows
// the file, is repaired, and goes with the agent.
func TestDetour(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) { testDetour(t, newWorld(t, backend, kind)) })
}

func testDetour(t *testing.T, w *world) {
	client := w.addClient()
	w.beyond(plain, passing)
	w.start(configOf(agentName, entry(plain, ""), entry(passing, "noEndpoint: pass"), entry(withoutUs, "hostClients: false")))
	w.awaitDetour(agentName, notCilium, 2, false)
	w.cilium(false, false)
	w.awaitDetour(agentName, bpfRouting, 4, true)
	want := func(row, from string, n int, expected string) {
		t.Helper()
		bothFamilies(func(six bool) { w.note(row, six, w.want(from, magicAt(n, six), expected)) })
	}
	all := func() string {
		var four, six string
		for _, n := range []int{plain, withoutUs} {
			four += fmt.Sprintf("%s from 192.0.2.2, ", magicAt(n, false).Addr())
			six += fmt.Sprintf("%s from 2001:db8::2, ", magicAt(n, true).Addr())
		}
		return strings.TrimSuffix(four+six, ", ")
	}
	routes := func(when, wanted string) {
		t.Helper()
		if err := lab.Eventually(patience(t), func() error {
			if got := w.localRoutes(); got != wanted {
				return fmt.Errorf("%q, want %q", got, wanted)
			}
			return nil
		}); err != nil {
			t.Errorf("%s: local routes: %v", when, err)
		}
	}

	// Without an endpoint.
	routes("without an endpoint", all())
	const refusedRow, passedRow = "local route: no endpoint", "local route: passes without an endpoint"
	want(refusedRow, "client", plain, "refused")
	want(refusedRow, lab.Host, plain, "refused")
	want(passedRow, "client", passing, "answered by impostor")
	want(passedRow, lab.Host, passing, "answered by impostor")
	const exemptRow = "local route: refused by the node where it is exempt"
	want(exemptRow, lab.Host, withoutUs, "refused")
	want(exemptRow, "client", withoutUs, "refused")

	// With one.
	w.addTarget("echo")
	w.echo("echo")
	w.awaitDetour(agentName, bpfRouting, 6, true)
	w.mu.Lock()
	w.names = map[netip.Addr]string{} // the node has addresses by now that it had not before
	for _, ip := range client.IPs {
		w.names[ip] = "client"
	}
	w.mu.Unlock()
	const servedRow = "local route: masqueraded, processes of the node are not"
	for _, n := range []int{plain, passing} {
		want(servedRow, "client", n, "answered by echo, seen as node")
		want(servedRow, "echo", n, "answered by echo, seen as node")
		want(servedRow, lab.Host, n, "answered by echo, seen as node")
	}
	want(servedRow, "client", withoutUs, "answered by echo, seen as node")
	want(exemptRow, lab.Host, withoutUs, "refused")
	bothFamilies(func(six bool) { // not from outside
		w.note("local route: the network is not served", six, w.want(lab.Uplink, magic(six), "silence"))
	})

	// Somebody removes the routes, or all rules while the agent does not run.
	const repairedRow = "local route: restored after removal"
	w.run("ip -4 route flush table local proto 109; ip -6 route flush table local proto 109")
	w.noteBoth(repairedRow, lab.Eventually(patience(t), func() error {
		if strings.Count(w.localRoutes(), "from") != 6 {
			return fmt.Errorf("local routes %q", w.localRoutes())
		}
		return nil
	}))
	want(servedRow, "client", plain, "answered by echo, seen as node")
	if err := w.agent.Freeze(); err != nil {
		t.Fatal(err)
	}
	w.flush()
	const flushedRow = "local route: rules flushed and no agent: refused, nothing leaves"
	want(flushedRow, "client", plain, "refused")
	want(flushedRow, lab.Host, plain, "refused")
	if err := w.agent.Thaw(); err != nil {
		t.Fatal(err)
	}
	w.noteBoth(repairedRow, lab.Eventually(patience(t), func() error {
		const served = "answered by echo, seen as node"
		return errors.Join(w.want("client", magic(false), served), w.want("client", magic(true), served))
	}))

	// The settings that need less are followed.
	w.cilium(true, false)
	w.awaitDetour(agentName, legacyRouting, 4, true)
	want("masquerade alone: a pod", "client", plain, "answered by echo, seen as node")
	w.cilium(true, true)
	w.awaitDetour(agentName, legacyRoutingEndpoint, 4, false)
	keptAs := "client"
	if w.kind == "bridge" { // whose frames need not pass netfilter
		keptAs = ""
	}
	want("neither: the source is kept", "client", plain, "answered by echo, seen as "+keptAs)
	w.cilium(false, true)
	w.awaitDetour(agentName, bpfRoutingEndpoint, 6, true)

	// A second agent on the same address, and the first one goes.
	const second = "second.magic-ip"
	w.startAs(second, configOf(second, entryOf(plain, false, "ports: [{port: 8081}]")))
	w.awaitDetour(second, bpfRoutingEndpoint, 1, true)
	if err := w.agent.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	uninstall := func(name string) {
		t.Helper()
		if _, err := w.RunAgent(t.Context(), "uninstall", "--name", name, "--runtime-dir", lab.RuntimeDir, "--cni-conf-dir", "/run/cni/net.d"); err != nil {
			t.Fatal(err)
		}
	}
	uninstall(agentName)
	left := fmt.Sprintf("%s from 192.0.2.2", magicAt(plain, false).Addr())
	if got := w.localRoutes(); got != left {
		t.Errorf("another agent uses the address: local routes %q, want %q", got, left)
	}
}

// flush removes all rules of the node, but for the chain that says which tables kubelet uses.
func (w *world) flush() {
	w.t.Helper()
	flush := "nft flush ruleset"
	if variant, ok := strings.CutPrefix(w.backend, "iptables-"); ok {
		flush = "for tool in iptables ip6tables; do for table in filter nat mangle raw; do $tool-" + variant + " -t $table -F; done; done"
	}
	w.run(flush)
}

// TestBackstop flushes all rules while no agent runs, on nodes without Cilium: the local routes keep packets to magic IPs on the node, but
// those that are meant for somebody beyond it.
func TestBackstop(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) { testBackstop(t, newWorld(t, backend, kind)) })
}

func testBackstop(t *testing.T, w *world) {
	w.addClient()
	w.beyond(plain, excluding, withoutUs)
	w.start(configOf(agentName, entry(plain, ""), entry(excluding, "excludeTarget: true"), entry(withoutUs, "hostClients: false")))
	w.awaitDetour(agentName, notCilium, 2, false)
	w.addTarget("echo")
	w.echo("echo")
	want := func(from string, n int, expected string) {
		t.Helper()
		bothFamilies(func(six bool) { w.note(rulesFlushed, six, w.want(from, magicAt(n, six), expected)) })
	}
	want("client", plain, "answered by echo, seen as client")
	want(lab.Host, plain, "answered by echo, seen as node")
	w.agent.Kill()
	w.flush()
	want("client", plain, "refused")
	want(lab.Host, plain, "refused")
	want("echo", plain, "refused")
	for _, n := range []int{excluding, withoutUs} { // the way out is there
		want("client", n, "answered by impostor")
		want(lab.Host, n, "answered by impostor")
	}
	w.start(configOf(agentName, entry(plain, "")))
	w.awaitEndpoint("echo")
	want("client", plain, "answered by echo, seen as client")
	if err := w.agent.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.RunAgent(t.Context(), "uninstall", "--name", agentName, "--runtime-dir", lab.RuntimeDir, "--cni-conf-dir", "/run/cni/net.d"); err != nil {
		t.Fatal(err)
	}
	if left := w.localRoutes(); left != "" {
		w.noteBoth(rulesFlushed, fmt.Errorf("after the uninstallation: local routes %q", left))
	}
	want("client", plain, "answered by impostor")
}
