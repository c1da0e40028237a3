package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// cniDirs are the flags by which doctor finds the CNI files of a node.
var cniDirs = []string{"--cni-conf-dir", "/run/cni/net.d", "--cni-bin-dir", "/run/cni/bin"}

// doctor returns what doctor prints, and whether a check failed.
func (w *world) doctor(flags ...string) (out string, failed bool) {
	w.t.Helper()
	out, err := w.RunAgent(w.t.Context(), append([]string{"doctor", "--runtime-dir", lab.RuntimeDir}, append(cniDirs, flags...)...)...)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1 && exit.ExitCode() != 3) {
		w.t.Errorf("doctor: %v", err)
	}
	return out, exit != nil && exit.ExitCode() == 1
}

// finds says that doctor has a line of this level with these words, and how it then ends.
func (w *world) finds(level string, words ...string) string {
	w.t.Helper()
	out, failed := w.doctor()
	found := ""
	for block := range strings.SplitSeq(strings.ReplaceAll(out, "\n      → ", " → "), "\n") {
		if !strings.HasPrefix(block, level) {
			continue
		}
		has := true
		for _, word := range words {
			has = has && strings.Contains(block, word)
		}
		if has {
			found = block
		}
	}
	if found == "" {
		w.t.Errorf("no line %q with %q:\n%s", level, words, out)
	}
	if wantFailed := strings.Contains("\n"+out, "\nFAIL "); failed != wantFailed || level == "FAIL" && !failed {
		w.t.Errorf("exit status: failed is %t:\n%s", failed, out)
	}
	return found
}

// healthy says that doctor finds nothing that has failed.
func (w *world) healthy() {
	w.t.Helper()
	if out, failed := w.doctor(); failed || strings.Contains(out, "\nFAIL") {
		w.t.Errorf("a healthy node (failed %t):\n%s", failed, out)
	}
}

// TestDoctor breaks one thing after the other, and sees that doctor names it and says what to do.
func TestDoctor(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.run("mkdir -p /run/cni/bin; echo plugin >/run/cni/bin/magic-ip-address; chmod 755 /run/cni/bin/magic-ip-address")
		w.finds("FAIL", "runtime directory", "start the agent")
		w.start(config())
		w.finds("warn", "169.254.210.210:8080/tcp", "has no endpoint for app=echo in default (new connections: reject): no pod of namespace default is known")
		w.addTarget("echo")
		w.awaitEndpoint("echo")
		w.finds("FAIL", "endpoints", "(pod default/echo) refuses connections: nothing listens")
		w.finds("FAIL", "probe", "refused the SYN", "probably because of endpoints")
		w.echo("echo")
		w.healthy()
		w.finds("ok", "rules", "are in the kernel")
		w.finds("ok", "backend", "uses "+strings.Split(backend, "-")[0])
		w.finds("ok", "conflist", "has the selectors of agent default.magic-ip")

		w.doctorOfFiles()
		w.doctorOfCNI()
		w.doctorOfNetwork()
		w.doctorOfRules(backend)
		w.healthy()
	})
}

// TestDoctorOfHostNetwork: an endpoint at the node's own address has other rules than one of a pod's network.
func TestDoctorOfHostNetwork(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.podAPI(`{"metadata": {"namespace": "default", "name": "host", "uid": "uid-default-host", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": "echo"}},
			"spec": {"nodeName": "node", "hostNetwork": true, "containers": [{"name": "c"}]},
			"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}], "hostIPs": [{"ip": "192.0.2.2"}, {"ip": "2001:db8::2"}], "podIPs": [{"ip": "192.0.2.2"}, {"ip": "2001:db8::2"}]}},` + echoInAPI)
		w.start(config())
		w.addPod("bridge", target("echo")) // not ready
		w.awaitEndpoint("host")
		for _, address := range []string{"192.0.2.2", "[2001:db8::2]"} { // on all of them, datagrams would be answered from that of cni1
			w.echoAt(lab.Host, "host", fmt.Sprintf("%s:%d", address, port))
		}
		w.finds("ok", "rules", "are in the kernel")
		w.finds("ok", "probe", "from a namespace of its own on bridge cni1: 4 answered")
		w.healthy()
	})
}

func (w *world) doctorOfFiles() {
	w.t.Helper()
	w.run("cp " + lab.RuntimeDir + "/plugin/state.json /run/kept; echo '{' >" + lab.RuntimeDir + "/plugin/state.json")
	w.finds("FAIL", "state file", "is corrupt")
	w.await("to notice", func(a *runtimedir.Status) bool { return strings.Contains(a.LastError, "corrupt") })
	w.finds("FAIL", "agent default.magic-ip", "reports: ", "state file")
	w.run("mv /run/kept " + lab.RuntimeDir + "/plugin/state.json")
	w.await("to recover", func(a *runtimedir.Status) bool { return a.LastError == "" })

	w.run("echo time=$(date -u +%Y-%m-%dT%H:%M:%SZ) level=WARN msg=something >>" + lab.RuntimeDir + "/plugin/plugin.log")
	w.finds("warn", "plugin.log", "msg=something")
	w.run("echo time=2001-01-01T00:00:00Z level=WARN msg=old >" + lab.RuntimeDir + "/plugin/plugin.log")
	w.finds("ok", "plugin.log", "no warnings for a day")

	other := w.startAs("other.agent", configOf("other.agent", entryOf(plain, false, "")))
	w.finds("FAIL", "magic IP 169.254.210.210:8080/udp", "not served by agent other.agent", "claimed by agent default.magic-ip")
	other.Kill()
	w.run("rm -r " + lab.RuntimeDir + "/agents/other.agent")

	install := lab.RuntimeDir + "/install/" + agentName
	w.run("mkdir -p -m 700 " + install + "; echo '{\"version\": 1, \"conflist\": \"10.conflist\", \"lastError\": \"read-only file system\"}' >" + install + "/record.json")
	w.finds("FAIL", "installer default.magic-ip", "read-only file system")
	w.run("rm -r " + install)
}

func (w *world) doctorOfCNI() {
	w.t.Helper()
	const first = "/run/cni/net.d/20-ptp.conflist"
	edit := func(from, to string) (back func()) {
		w.t.Helper()
		before, err := os.ReadFile(w.Path(first))
		if err != nil {
			w.t.Fatal(err)
		}
		after := strings.Replace(string(before), from, to, 1)
		if after == string(before) {
			w.t.Fatalf("%s does not contain %s", first, from)
		}
		addConf(w.t, w.Node, "20-ptp.conflist", []byte(after))
		return func() { addConf(w.t, w.Node, "20-ptp.conflist", before) }
	}
	back := edit(`"magic-ip-address"`, `"something-else"`)
	w.finds("FAIL", first, "has no entry of type magic-ip-address")
	w.finds("warn", "30-dual-stack.conflist", "but the runtime loads 20-ptp.conflist")
	back()
	back = edit(`"app=echo"`, `"app=other"`)
	w.finds("FAIL", first, "lack default app=echo", `it should be {"default.magic-ip":[{"namespace":"default","selector":"app=echo"}]}`)
	back()
	back = edit(`"default.magic-ip"`, `"another.agent"`)
	w.finds("FAIL", first, `no key "default.magic-ip"`)
	back()
	back = edit(lab.RuntimeDir, "/run/elsewhere")
	w.finds("FAIL", first, "runtimeDir is /run/elsewhere")
	back()
	addConf(w.t, w.Node, "00-empty.conf", nil)
	w.finds("FAIL", "00-empty.conf is empty", "containerd starts no pod")
	w.run("rm /run/cni/net.d/00-empty.conf; chmod 644 /run/cni/bin/magic-ip-address")
	w.finds("FAIL", "plugin binary", "cannot be executed")
	w.run("chmod 755 /run/cni/bin/magic-ip-address")
	// The binary is that of the agent that runs.
	unprivileged := "setpriv --bounding-set -net_admin --inh-caps -all $(readlink /proc/[0-9]*/exe | grep -m1 /magic-ip-agent) doctor "
	if out := w.run(unprivileged + strings.Join(cniDirs, " ") + " || [ $? = 3 ]"); !strings.Contains(out, "cannot be looked at without CAP_NET_ADMIN") {
		w.t.Errorf("without rights:\n%s", out)
	}
	if out, failed := w.doctor("--cni-conf-dir", "/nowhere", "--cni-bin-dir", "/nowhere"); failed || strings.Count(out, "not visible from here") < 3 {
		w.t.Errorf("without CNI folders (failed %t):\n%s", failed, out)
	}
}

func (w *world) doctorOfNetwork() {
	w.t.Helper()
	w.doctorOfCilium()

	filter := func(value string) {
		for _, key := range []string{"bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"} {
			if err := w.Sysctl(lab.Host, key, value); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	filter("0")
	w.finds("warn", "bridges", "frames of cni1", "br_netfilter")
	w.finds("ok", "rules of others") // the agent's own are none, with the rules that such a bridge takes either
	filter("1")
	w.finds("ok", "bridges")

	pod := w.pod4("echo")
	w.run("ip route add " + pod + "/32 dev eth0")
	w.finds("ok", "rp_filter")
	if err := w.Sysctl(lab.Host, "ipv4/conf/cni1/rp_filter", "1"); err != nil {
		w.t.Fatal(err)
	}
	w.finds("FAIL", "rp_filter", "strict on cni1", "default/echo", pod)
	w.run("ip route delete " + pod + "/32 dev eth0")
	w.finds("ok", "rp_filter", "strict for 1")

	// The agent's local routes are routes too.
	w.run("ip route delete default")
	if err := w.want(lab.Host, magic(false), "answered by echo"); err != nil {
		w.t.Error(err)
	}
	w.finds("ok", "route")
	w.freeze()
	w.run("ip -4 route flush table local proto 109")
	w.finds("warn", "no route to 169.254.210.210", "ENETUNREACH")
	w.run("ip route add 169.254.210.210 dev cni1") // as doctor says
	if err := w.want(lab.Host, magic(false), "answered by echo"); err != nil {
		w.t.Error(err)
	}
	w.finds("ok", "route")
	w.run("ip route delete 169.254.210.210; ip route add default via " + lab.UplinkIPv4)
	if err := w.agent.Thaw(); err != nil {
		w.t.Fatal(err)
	}

	w.run(w.iptables(false) + " -t nat -A PREROUTING -d 169.254.210.210/32 -p tcp -j DNAT --to-destination 10.0.0.1:1")
	found := w.finds("warn", "another program translates a magic IP too", "-j DNAT", w.iptables(false)+" -t nat -D PREROUTING")
	_, command, _ := strings.Cut(found, " → ")
	w.run(command)
	w.run("nft add table ip theirs; nft 'add chain ip theirs c { type nat hook prerouting priority -100; }'; nft add rule ip theirs c ip daddr 169.254.210.210 dnat to 10.0.0.1")
	found = w.finds("warn", "another program translates a magic IP too", "nft delete rule ip theirs c handle ")
	_, command, _ = strings.Cut(found, " → ")
	w.run(command)
	w.finds("ok", "rules of others")
	w.run("nft delete table ip theirs")
}

// TestDoctorBeforeTheFirstPod: a link that comes with the first pod is not missing on a node without one.
func TestDoctorBeforeTheFirstPod(t *testing.T) {
	w := newWorld(t, backends()[0], "cali")
	w.start(configOf(agentName, entry(plain, "hostInterface: cali+")))
	const words = "hostInterface of 169.254.210.210:8080/tcp is cali+, and the node has no such link"
	w.finds("--", "links", words, "look again when there is a pod on the node")
	w.addTarget("echo")
	w.echo("echo")
	w.finds("ok", "links", "with hostInterface cali+, clients are served by cali")
	if err := w.agent.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start(configOf(agentName, entry(plain, "hostInterface: cni9")))
	w.finds("FAIL", "links", "is cni9, and the node has no such link")
}

// doctorOfCilium: each of its settings has a sentence of its own, and what it costs.
func (w *world) doctorOfCilium() {
	w.t.Helper()
	const check = "data plane"
	w.run("ip link add cilium_net type veth peer name cilium_host")
	w.finds("--", check, "Cilium is on this node, and its settings cannot be read", "it is not known whether replies to pods bypass the rules")
	const noticed = "Cilium is on this node, and its settings cannot be read"
	w.await("to notice, and to log it", func(a *runtimedir.Status) bool {
		return strings.Contains(strings.Join(a.Notes, "\n"), noticed) && strings.Contains(w.agent.Log(), noticed)
	})
	w.cilium(false, false)
	w.awaitDetour(agentName, bpfRouting, 2, true)
	w.finds("warn", check, "Cilium with BPF host routing: local routes bring packets of pods to the rules", "egress policies see the magic IP", "endpointRoutes.enabled=true")
	w.finds("ok", "local routes", "are in the kernel (2)")
	w.freeze()
	w.run("ip -4 route flush table local proto 109")
	w.finds("FAIL", "local routes", "has made one for 169.254.210.210, and it is gone", "find out what removes them")
	if err := w.agent.Thaw(); err != nil {
		w.t.Fatal(err)
	}
	w.cilium(true, false)
	w.awaitDetour(agentName, legacyRouting, 2, true)
	w.finds("warn", check, "Cilium with legacy host routing, without endpoint routes: masquerade brings replies to pods back to the rules", "endpointRoutes.enabled=true")
	w.cilium(true, true)
	w.awaitDetour(agentName, legacyRoutingEndpoint, 2, false)
	w.finds("ok", check, "Cilium with legacy host routing and endpoint routes: packets of pods pass the rules both ways")
	w.run("ip link delete cilium_net; rm /run/cilium/state/*")
	w.awaitDetour(agentName, notCilium, 2, false)
	w.freeze()
	w.run("ip -4 route flush table local proto 109")
	w.finds("FAIL", "local routes", "nothing but the rules keeps packets to it on the node")
	if err := w.agent.Thaw(); err != nil {
		w.t.Fatal(err)
	}
	w.finds("ok", check, "no eBPF program sees the packets of pods before netfilter")
}

// doctorOfRules has the agent not run, so that nobody mends them.
func (w *world) doctorOfRules(backend string) {
	w.t.Helper()
	w.agent.Kill()
	w.finds("FAIL", "agent default.magic-ip", "not running")
	w.finds("ok", "rules", "are in the kernel")
	_, variant, isIPTables := strings.Cut(backend, "-")
	type breach struct{ by, words string }
	var breaches []breach
	if isIPTables {
		tool := "iptables-" + variant
		breaches = []breach{
			{tool + "-save -t nat | sed '/--to-destination/d' | " + tool + "-restore", "no rule leads 169.254.210.210:8080/tcp to "},
			{tool + " -t mangle -F PREROUTING", "0 jumps from PREROUTING"},
		}
	} else {
		table := "ip magic-ip-" + agentName
		breaches = []breach{
			{"nft flush map " + table + " destinations", "missing from destinations"},
			{"nft flush chain " + table + " nat-prerouting", "chain nat-prerouting has 0 rules instead of 1"},
			{"nft delete table " + table, "is missing"},
		}
	}
	for _, breach := range breaches {
		w.run(breach.by)
		w.finds("FAIL", "rules", breach.words, "start the agent")
	}
	w.start(config())
	w.awaitEndpoint("echo")
	w.finds("ok", "rules", fmt.Sprintf("those of agent %s are in the kernel", agentName))
}

// pod4 is a pod's IPv4 address.
func (w *world) pod4(name string) string {
	w.t.Helper()
	for _, word := range strings.Fields(w.run("ip -n " + name + " -4 -o address show dev eth0")) {
		if address, _, ok := strings.Cut(word, "/"); ok {
			return address
		}
	}
	w.t.Fatalf("pod %s has no IPv4 address", name)
	return ""
}
