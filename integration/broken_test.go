package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// brokenNode is a healthy node on which one thing is broken: an agent with the plain magic IPs, their pod "echo" whose process
// listens, and the plugin in the only conflist.
type brokenNode struct {
	name    string
	network string // bridge (the default), ptp or calico
	config  []byte // of the agent; the usual one where nil
	pods    string // of the Kubernetes API; without it where empty
	entry   string // selectors of the entry, in JSON; the usual ones where empty
	breaks  func(w *world)
	silent  bool // the pod's process has ended
	without bool // the pod is no endpoint

	status  string   // words that status has; empty where it cannot know
	level   string   // of doctor's verdict
	verdict string   // words of the verdict: the cause
	probe   string   // words of a line of the probe; empty where there is none of importance
	flags   []string // of doctor, beside the usual
}

func script(text string) func(*world) { return func(w *world) { w.run(text) } }

// sysctls sets them in the node, and the links that come and go meanwhile take nothing back.
func sysctls(keys ...string) func(*world) {
	return func(w *world) {
		for _, key := range keys {
			name, value, _ := strings.Cut(key, "=")
			if err := w.Sysctl(lab.Host, strings.ReplaceAll(name, "LINK", w.linkOf("echo")), value); err != nil {
				w.t.Fatal(err)
			}
		}
	}
}

// withoutRoutes is the usual configuration of an agent that makes no local routes.
func withoutRoutes() []byte { return []byte("dataPlane: netfilter\n" + string(config())) }

const (
	conflistFile = "/run/cni/net.d/30-dual-stack.conflist"
	stateFile    = lab.RuntimeDir + "/plugin/state.json"
)

func brokenNodes() []brokenNode {
	return []brokenNode{
		{name: "nothing", verdict: "nothing failed", level: "ok", status: "default/echo", probe: "4 answered"},

		{name: "the target is exempt", config: configOf(agentName, entry(plain, "excludeTarget: true")), flags: []string{"--from-pod", "default/echo"},
			verdict: "nothing failed", level: "ok", status: "default/echo", probe: "from pod default/echo: 4 exempt, as excludeTarget has it"},
		{name: "the target is exempt, and others are not", config: configOf(agentName, entry(plain, "excludeTarget: true")),
			verdict: "nothing failed", level: "ok", status: "default/echo", probe: "4 answered"},

		{name: "agent dead", breaks: func(w *world) { w.agent.Kill() },
			status: "not running", level: "FAIL", verdict: "agent default.magic-ip: not running", probe: "4 answered"},
		{name: "agent frozen", breaks: func(w *world) { w.freeze() },
			status: "has not polled for", level: "FAIL", verdict: "agent default.magic-ip: has not polled for", probe: "4 answered"},
		{name: "rules flushed while the agent is frozen", breaks: func(w *world) { w.freeze(); w.run("nft delete table ip magic-ip-" + agentName) },
			status: "has not polled for", level: "FAIL", verdict: "agent default.magic-ip: has not polled for", probe: "probably because of rules: those of agent default.magic-ip are not as it says"},
		{name: "rules flushed while the agent is frozen, without local routes", config: withoutRoutes(), breaks: func(w *world) { w.freeze(); w.run("nft delete table ip magic-ip-" + agentName) },
			status: "has not polled for", level: "FAIL", verdict: "agent default.magic-ip: has not polled for", probe: "left the node untranslated by eth0"},
		{name: "rules flushed while the agent is dead", breaks: func(w *world) { w.agent.Kill(); w.run("nft flush map ip magic-ip-" + agentName + " destinations") },
			status: "not running", level: "FAIL", verdict: "agent default.magic-ip: not running", probe: "probably because of rules"},

		{name: "runtime directory of the entry is another", breaks: script("sed -i s,/run/magic-ip-address,/run/elsewhere, " + conflistFile),
			level: "FAIL", verdict: "runtimeDir is /run/elsewhere", probe: "4 answered"},
		{name: "no entry", breaks: script("sed -i s/magic-ip-address/tuning/ " + conflistFile),
			level: "FAIL", verdict: "has no entry of type magic-ip-address", probe: "4 answered"},
		{name: "the entry is first", breaks: func(w *world) { w.entryFirst() },
			level: "FAIL", verdict: "comes first", probe: "4 answered"},
		{name: "conflist that is not JSON", breaks: script("echo '{' >" + conflistFile),
			level: "FAIL", verdict: conflistFile, probe: "4 answered"},
		{name: "another conflist comes first", breaks: script("echo '{\"cniVersion\": \"1.0.0\", \"name\": \"other\", \"plugins\": [{\"type\": \"bridge\"}]}' >/run/cni/net.d/05-other.conflist"),
			level: "FAIL", verdict: "05-other.conflist, which the runtime loads, has no entry", probe: "4 answered"},
		{name: "plugin binary missing", breaks: script("rm /run/cni/bin/magic-ip-address"),
			level: "FAIL", verdict: "plugin binary: ", probe: "4 answered"},
		{name: "plugin binary not executable", breaks: script("chmod 644 /run/cni/bin/magic-ip-address"),
			level: "FAIL", verdict: "cannot be executed: mode -rw-r--r--", probe: "4 answered"},
		{name: "state file corrupt", breaks: func(w *world) { w.run("echo '{' >" + stateFile); w.awaitStatus("corrupt") },
			status: "state.json is corrupt", level: "FAIL", verdict: "state file: ", probe: "4 answered"},
		{name: "state file of a newer version", breaks: func(w *world) { w.run("echo '{\"version\": 99}' >" + stateFile); w.awaitStatus("version 99") },
			status: "version 99", level: "FAIL", verdict: "state file: ", probe: "4 answered"},
		{name: "disk full", breaks: func(w *world) { w.fillRuntimeDir() },
			level: "FAIL", verdict: "is full: pods are not recorded", probe: ""},

		{name: "ip_forward=0", network: "ptp", breaks: sysctls("ipv4/ip_forward=0"),
			level: "FAIL", verdict: "net.ipv4.ip_forward is 0", probe: "it was dropped"},
		{name: "forwarding off on the endpoint's link", network: "ptp", breaks: sysctls("ipv4/conf/LINK/forwarding=0"),
			level: "FAIL", verdict: "forwarding of IPv4 is off on veth", probe: "answered, and the answer did not leave the node for the client"},
		{name: "forwarding off on the pods' bridge", breaks: sysctls("ipv4/conf/cni1/forwarding=0"),
			level: "FAIL", verdict: "forwarding of IPv4 is off on cni1"},
		{name: "forwarding off on a link that hostInterface names", config: configOf(agentName, entry(plain, "hostInterface: 'cni1,docker0'")),
			breaks: script("ip link add docker0 type bridge; echo 0 >/proc/sys/net/ipv4/conf/docker0/forwarding"),
			level:  "FAIL", verdict: "forwarding of IPv4 is off on docker0", probe: "4 answered"},
		{name: "IPv6 forwarding off", network: "ptp", breaks: sysctls("ipv6/conf/all/forwarding=0"),
			level: "FAIL", verdict: "net.ipv6.conf.all.forwarding is 0", probe: "[fd00:a9fe:d2d2::210]:8080/tcp: the SYN came in by mipdoc"},
		{name: "FORWARD drops, iptables-nft", network: "ptp", breaks: script("iptables-nft -P FORWARD DROP"),
			level: "FAIL", verdict: "iptables-nft, table filter: a packet of a pod to endpoint 10.244.2.2:8080 is dropped by the policy of FORWARD", probe: "it was dropped"},
		{name: "FORWARD drops, iptables-legacy", breaks: script("iptables-legacy -P FORWARD DROP"),
			level: "FAIL", verdict: "iptables-legacy, table filter: a packet of a pod to endpoint 10.244.3.2:8080 is dropped by the policy of FORWARD", probe: "it was dropped"},
		{name: "FORWARD drops, nftables", breaks: script("nft 'add table inet wall; add chain inet wall forward { type filter hook forward priority 0; policy drop; }'"),
			level: "FAIL", verdict: "filters: nftables chain inet wall forward: a packet of a pod to endpoint 10.244.3.2:8080 is dropped by its policy", probe: "it was dropped"},
		{name: "another program's filter rejects", breaks: script("nft 'add table inet wall; add chain inet wall forward { type filter hook forward priority 0; }; add rule inet wall forward ip daddr 10.244.3.2 tcp dport 8080 reject with tcp reset'"),
			level: "FAIL", verdict: "filters: nftables chain inet wall forward: a packet of a pod to endpoint 10.244.3.2:8080 is dropped by its rule", probe: "probably because of filters: nftables chain inet wall forward"},
		{name: "strict rp_filter and an asymmetric route", breaks: func(w *world) {
			w.run("ip route add " + w.pod4("echo") + "/32 dev eth0")
			sysctls("ipv4/conf/cni1/rp_filter=1")(w)
		}, level: "FAIL", verdict: "rp_filter: it is strict on cni1", probe: ""},
		{name: "the endpoint's route is gone", network: "ptp", breaks: func(w *world) { w.run("ip route delete " + w.pod4("echo")) },
			level: "FAIL", verdict: "the route to 10.244.2.2:8080 (pod default/echo) goes by eth0", probe: "probably because of endpoints"},
		{name: "default route by the pods' bridge", breaks: script("ip route replace default via 10.244.3.2 dev cni1"),
			level: "warn", verdict: "the node's default route goes by cni1", probe: "4 answered"},
		{name: "conntrack full", breaks: func(w *world) { w.fillConntrack() },
			level: "FAIL", verdict: "conntrack: the connection table is full", probe: "it was dropped"},
		{name: "bridge-nf switched off while the agent is dead", breaks: func(w *world) {
			w.agent.Kill()
			sysctls("bridge/bridge-nf-call-iptables=0", "bridge/bridge-nf-call-ip6tables=0")(w)
		}, status: "not running", level: "FAIL", verdict: "agent default.magic-ip: not running", probe: "untranslated, as from 10.244.3.2:8080"},
		{name: "bridge-nf switched off", breaks: func(w *world) {
			sysctls("bridge/bridge-nf-call-iptables=0", "bridge/bridge-nf-call-ip6tables=0")(w)
			w.awaitStatus("masqueraded")
		}, status: "source address is masqueraded", level: "warn", verdict: "masqueraded", probe: "4 answered"},
		{name: "isolated ports", breaks: script("for port in /sys/class/net/cni1/brif/*; do echo 1 >$port/isolated; done"),
			status: "behind isolated ports", level: "FAIL", verdict: "bridge ports: bridge cni1: pods behind isolated ports, such as veth", probe: "it was dropped; probably because of bridge ports: bridge cni1: pods behind isolated ports"},
		{name: "another program translates the magic IP first", breaks: script("nft 'add table ip theirs; add chain ip theirs c { type nat hook prerouting priority -150; }; add rule ip theirs c ip daddr 169.254.210.210 dnat to 192.0.2.1'"),
			level: "FAIL", verdict: "probably because of rules of others: another program translates a magic IP too: nft table ip theirs, chain c", probe: "nft delete rule ip theirs c handle"},
		{name: "another program drops what goes to link-local addresses", breaks: script("nft 'add table inet wall; add chain inet wall first { type filter hook prerouting priority mangle; }; add rule inet wall first ip daddr 169.254.0.0/16 drop'"),
			status: "default/echo", level: "FAIL", verdict: "filters: nftables chain inet wall first: a packet of a pod to 169.254.210.210:8080/tcp is dropped", probe: "it was dropped; probably because of filters: nftables chain inet wall first"},
		{name: "mangle drops what goes to link-local addresses, iptables-legacy", breaks: script("iptables-legacy -t mangle -A PREROUTING -d 169.254.0.0/16 -j DROP"),
			status: "default/echo", level: "FAIL", verdict: "filters: iptables-legacy, table mangle: a packet of a pod to 169.254.210.210:8080/tcp is dropped", probe: "probably because of filters: iptables-legacy, table mangle"},
		{name: "another program keeps processes of the node from link-local addresses", breaks: script("nft 'add table inet wall; add chain inet wall out { type filter hook output priority mangle; }; add rule inet wall out ip daddr 169.254.0.0/16 drop'"),
			status: "default/echo", level: "FAIL", verdict: "filters: nftables chain inet wall out: a packet of a process of the node to 169.254.210.210:8080/tcp is dropped", probe: "from a process of the node to 169.254.210.210:8080/tcp: a process of the node sent the SYN, and nothing left the node"},
		{name: "magic IPs are not tracked, iptables-nft", breaks: script("iptables-nft -t raw -A PREROUTING -d 169.254.0.0/16 -j NOTRACK"),
			status: "default/echo", level: "FAIL", verdict: "by the rule -A PREROUTING -d 169.254.0.0/16 -j ", probe: "probably because of filters: iptables-nft, table raw"},
		{name: "magic IPs are not tracked, nftables", breaks: script("nft 'add table ip wall; add chain ip wall first { type filter hook prerouting priority raw; }; add rule ip wall first iifname cni1 notrack'"),
			status: "default/echo", level: "FAIL", verdict: "filters: nftables chain ip wall first: a packet of a pod to 169.254.210.210:8080/tcp is dropped, or kept from being tracked", probe: "probably because of filters: nftables chain ip wall first"},
		{name: "clients behind a bridge that holds a NIC", network: "ptp", breaks: func(w *world) { w.virtualMachine() }, flags: []string{"--netns", "/run/netns/vm"},
			level: "FAIL", verdict: "clients behind br0 are not served", probe: "clients behind br0 are not served"},

		{name: "data plane that bypasses netfilter", network: "ptp", breaks: script("ip link add bpfin.cali type veth peer name bpfout.cali"),
			level: "FAIL", verdict: "data plane: Calico runs in eBPF mode", probe: "a veth of its own would be attached in another way than those of pods"},

		{name: "endpoint not listening", silent: true,
			level: "FAIL", verdict: "endpoints: 10.244.3.2:8080 (pod default/echo) refuses connections", probe: "refused the SYN"},
		{name: "endpoint's pod drops what comes", breaks: script("ip netns exec echo nft 'add table inet w; add chain inet w c { type filter hook input priority 0; policy drop; ct state established accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }'"),
			level: "FAIL", verdict: "to 169.254.210.210:8080/tcp: the SYN was sent to 10.244.3.2:8080 by veth", probe: "which did not answer"},
		{name: "no pod matches", without: true, entry: `"default.magic-ip": [{"namespace": "default", "selector": "app=nobody"}]`, config: configOf(agentName, entry(plain, "selector: app=nobody")),
			status: "no pod of namespace default is known on this node", level: "warn", verdict: "no pod of namespace default is known", probe: "4 rejected for want of an endpoint"},
		{name: "no pod is ready", without: true, pods: echoInAPI, config: configOf(agentName, entry(plain, "readiness: require")),
			status: "pod default/echo is not ready", level: "warn", verdict: "pod default/echo is not ready, and readiness is require", probe: "4 rejected for want of an endpoint"},
		{name: "pod without the named port", without: true, pods: echoInAPI, config: configOf(agentName, entryOf(plain, false, "ports: [{port: 8080, targetPort: metrics}]")),
			status: "no container port named metrics", level: "warn", verdict: "pod default/echo has no container port named metrics for TCP", probe: "rejected for want of an endpoint"},
		{name: "pod in another namespace", without: true, entry: `"default.magic-ip": [{"namespace": "other", "selector": "app=echo"}, {"namespace": "default", "selector": "app=echo"}]`, config: []byte(strings.ReplaceAll(string(config()), "namespace: default", "namespace: other")),
			status: "is in another namespace than other", level: "warn", verdict: "pod default/echo is in another namespace than other", probe: "4 rejected for want of an endpoint"},
		{name: "labels that nobody tells", breaks: func(w *world) {
			w.delTarget("echo")
			w.addPod("bridge", lab.Pod{Name: "unlabelled"})
			w.awaitStatus("no labels that are known")
		},
			status: "the labels of 1 pod of namespace default on this node are not known", level: "warn", verdict: "no labels that are known", probe: "rejected for want of an endpoint"},
		{name: "only the other family", network: "ptp", breaks: func(w *world) {
			w.delTarget("echo")
			w.run("sed -i 's/, \\[{\"subnet\": \"fd00:10:244:2::\\/64\"}\\]//' /run/cni/net.d/20-ptp.conflist")
			w.addPod("ptp", target("echo"))
		}, config: configOf(agentName, entryOf(plain, true, "")),
			status: "has no IPv6 address, only 10.244.2.", level: "warn", verdict: "has no IPv6 address, only 10.244.2.", probe: ""},
		{name: "reserved address", without: true, config: configOf(agentName, strings.ReplaceAll(entryOf(plain, false, ""), "169.254.210.210", "169.254.169.254")),
			breaks: script("sed -i s/magic-ip-address/tuning/ " + conflistFile), // an installer makes no entry
			status: "169.254.169.254 belongs to the instance metadata service", level: "FAIL", verdict: "belongs to the instance metadata service"},
		{name: "address of the node", breaks: func(w *world) {
			w.run("ip address add 169.254.210.210 dev lo")
			w.awaitStatus("is an address of this node")
		},
			status: "169.254.210.210", level: "FAIL", verdict: "magic IP 169.254.210.210:8080/tcp: not served by agent default.magic-ip"},
		{name: "address claimed by another agent", entry: `"default.magic-ip": [{"namespace": "default", "selector": "app=echo"}], "other.agent": [{"namespace": "default", "selector": "app=echo"}]`, breaks: func(w *world) { w.startAs("other.agent", configOf("other.agent", entryOf(plain, false, ""))) },
			status: "is claimed by agent default.magic-ip", level: "FAIL", verdict: "not served by agent other.agent: 169.254.210.210:8080/tcp is claimed", probe: "answered"},
		{name: "hostInterface that is not there", config: configOf(agentName, entry(plain, "hostInterface: cni9")),
			level: "FAIL", verdict: "links: hostInterface of 169.254.210.210:8080/tcp is cni9, and the node has no such link", probe: "4 are for clients behind links that hostInterface names"},
		{name: "hostInterface that is another link", config: configOf(agentName, entry(plain, "hostInterface: docker0")), breaks: script("ip link add docker0 type bridge; ip link set docker0 up"),
			level: "--", verdict: "links: hostInterface of 169.254.210.210:8080/tcp is docker0: clients behind cni1, such as pod default/echo, are not served", probe: "4 are for clients behind links that hostInterface names"},
		{name: "a client behind another link than hostInterface names", config: configOf(agentName, entry(plain, "hostInterface: docker0")), breaks: script("ip link add docker0 type bridge; ip link set docker0 up"),
			flags: []string{"--from-pod", "default/echo"}, level: "FAIL", verdict: "clients behind cni1 are not served: hostInterface is docker0", probe: "the node rejected the SYN"},
		{name: "hostInterface that is a port", config: configOf(agentName, entry(plain, "hostInterface: veth+")),
			level: "FAIL", verdict: "is a port, so that IP packets come in by what it is a port of", probe: "4 are for clients behind links that hostInterface names"},
		{name: "hostInterface that is right", config: configOf(agentName, entry(plain, "hostInterface: 'cni1,cali+'")),
			level: "ok", verdict: "nothing failed", probe: "from a namespace of its own on bridge cni1: 4 answered"},
		{name: "no route in the pod", breaks: script("ip -n echo route delete default; ip -n echo -6 route delete default"), flags: []string{"--from-pod", "default/echo"},
			level: "FAIL", verdict: "the client cannot send to 169.254.210.210: network is unreachable", probe: "ip route get 169.254.210.210"},
		{name: "a route in the pod that leads nowhere", breaks: script("ip -n echo route add unreachable 169.254.0.0/16"), flags: []string{"--from-pod", "default/echo"},
			level: "FAIL", verdict: "the client cannot send to 169.254.210.210: no route to host"},
		{name: "no route on the node", config: withoutRoutes(), breaks: script("ip route delete default; ip -6 route delete default"),
			level: "warn", verdict: "this node has no route to", probe: "4 answered"},
		{name: "network namespace of the pod gone", breaks: script("umount /run/netns/echo; rm /run/netns/echo"), flags: []string{"--from-pod", "default/echo"},
			level: "FAIL", verdict: "the network namespace of pod default/echo is gone", probe: "is gone"},
	}
}

// TestBrokenNodes breaks one thing on a node each, and sees that doctor's verdict names it, what status says, and where the probe
// ends.
func TestBrokenNodes(t *testing.T) {
	for _, broken := range brokenNodes() {
		t.Run(strings.ReplaceAll(broken.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			w, echo := broken.node(t)
			if broken.silent {
				_ = echo.Close()
			}
			if broken.breaks != nil {
				broken.breaks(w)
			}
			w.awaitStatus(broken.status)
			out, _ := w.doctor(broken.flags...)
			lines := strings.Split(strings.ReplaceAll(strings.TrimSpace(out), "\n      → ", " → "), "\n")
			verdict := lines[len(lines)-1]
			if !strings.HasPrefix(verdict, "Verdict: "+broken.level+": ") || !strings.Contains(verdict, broken.verdict) {
				t.Errorf("the verdict is not %s: %q:\n%s", broken.level, broken.verdict, out)
			}
			isProbe := func(line string) bool {
				return strings.Contains(line, "  probe: ") && strings.Contains(line, broken.probe)
			}
			if broken.probe != "" && !slices.ContainsFunc(lines, isProbe) {
				t.Errorf("no line of the probe has %q:\n%s", broken.probe, out)
			}
		})
	}
}

// node makes the node while it is healthy.
func (b brokenNode) node(t *testing.T) (*world, *lab.Echo) {
	t.Helper()
	kind := b.network
	if kind == "" {
		kind = "bridge"
	}
	w := newWorld(t, "nftables", kind)
	for _, other := range []string{"bridge", "ptp"} {
		if other != kind {
			w.run("rm /run/cni/net.d/" + networkOf(other).file)
		}
	}
	w.run("mkdir -p /run/cni/bin; cp /bin/true /run/cni/bin/magic-ip-address")
	conf := b.config
	if conf == nil {
		conf = config()
	}
	if b.entry != "" {
		w.run(`sed -i 's/"default.magic-ip": .*/` + b.entry + `/' /run/cni/net.d/` + networkOf(kind).file)
	}
	if b.pods != "" {
		w.podAPI(b.pods)
	}
	w.start(conf)
	w.addPod(kind, target("echo"))
	if !b.without {
		w.awaitEndpoint("echo")
	}
	return w, w.echo("echo")
}

// awaitStatus waits until the status command says something.
func (w *world) awaitStatus(words string) {
	w.t.Helper()
	err := lab.Eventually(patience(w.t), func() error {
		out, err := w.RunAgent(w.t.Context(), "status", "--runtime-dir", lab.RuntimeDir)
		if strings.Contains(out, words) {
			return nil
		}
		return fmt.Errorf("status does not say %q: %w\n%s", words, err, out)
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// freeze stops the agent's process, and waits until its heartbeat is missed.
func (w *world) freeze() {
	w.t.Helper()
	if err := w.agent.Freeze(); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.agent.Kill) // a node does not end while one of its processes is stopped
	w.awaitStatus("has not polled for")
}

// linkOf is the node's end of a pod's link.
func (w *world) linkOf(pod string) string {
	w.t.Helper()
	index := strings.TrimSpace(w.run("ip netns exec " + pod + " cat /sys/class/net/eth0/iflink"))
	return strings.TrimSpace(w.run("ip -o link | sed -n 's/^" + index + ": \\([^@:]*\\).*/\\1/p'"))
}

// entryFirst moves the plugin's entry to the front of the list.
func (w *world) entryFirst() {
	w.t.Helper()
	var list map[string]any
	if err := json.Unmarshal([]byte(w.run("cat "+conflistFile)), &list); err != nil {
		w.t.Fatal(err)
	}
	plugins := list["plugins"].([]any)
	slices.Reverse(plugins)
	list["plugins"] = plugins
	data, err := json.Marshal(list)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.WriteFile(conflistFile, data); err != nil {
		w.t.Fatal(err)
	}
}

// fillRuntimeDir leaves no room in the filesystem of the runtime directory, which it bounds before.
func (w *world) fillRuntimeDir() {
	w.t.Helper()
	w.run("mount -o remount,size=16m /run; dd if=/dev/zero of=/run/filler bs=64k 2>/dev/null || true")
}

// virtualMachine makes a bridge of a NIC, as for virtual machines, and a namespace "vm" on it.
func (w *world) virtualMachine() {
	w.t.Helper()
	if err := w.secondNIC(); err != nil {
		w.t.Skip(err)
	}
	w.run(`ip link add br0 type bridge; ip link set eth1 master br0; ip link set br0 up; ip address add 203.0.113.7/24 dev br0
		ip netns add vm; ip link add vm type veth peer name eth0 netns vm; ip link set vm master br0 up
		ip -n vm link set lo up; ip -n vm link set eth0 up; ip -n vm address add 203.0.113.9/24 dev eth0; ip -n vm route add default via 203.0.113.7`)
}

// fillConntrack makes as many connections as the kernel's limit, which no namespace can lower. Assured ones stay.
func (w *world) fillConntrack() {
	w.t.Helper()
	w.run(`seq 0 $(cat /proc/sys/net/netfilter/nf_conntrack_max) | awk '{
		printf "-I -p udp -s 10.%d.%d.%d -d 192.0.2.7 --sport 1000 --dport 2000 -t 1000 -u SEEN_REPLY,ASSURED\n", 1 + int($1 / 65536), int($1 / 256) % 256, $1 % 256
	}' >/run/flows; conntrack -R /run/flows >/dev/null 2>&1 || true; rm /run/flows`)
}

// podAPI serves the pods of the node, as JSON, and nothing else of the Kubernetes API, on the node's loopback; /run/kubeconfig
// leads to it. The pods do not change.
func (w *world) podAPI(pods string) {
	w.t.Helper()
	listener, err := w.Listen(lab.Host, "tcp", "127.0.0.1:6443")
	if err != nil {
		w.t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(out http.ResponseWriter, r *http.Request) {
		out.Header().Set("Content-Type", "application/json")
		switch query := r.URL.Query(); {
		case r.URL.Path != "/api/v1/namespaces/default/pods":
			out.WriteHeader(http.StatusNotFound)
			fmt.Fprint(out, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}`)
		case query.Get("sendInitialEvents") == "true": // as API servers of before 1.32 say that they do not know it
			out.WriteHeader(http.StatusUnprocessableEntity)
			fmt.Fprint(out, `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422}`)
		case query.Get("watch") != "":
			out.WriteHeader(http.StatusOK)
			out.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			fmt.Fprintf(out, `{"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": [%s]}`, pods)
		}
	})}
	go func() { _ = server.Serve(listener) }()
	w.t.Cleanup(func() { _ = server.Close() })
	if err := w.WriteFile("/run/kubeconfig", []byte(`{"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:6443"}}],
		"contexts": [{"name": "c", "context": {"cluster": "c"}}], "current-context": "c"}`)); err != nil {
		w.t.Fatal(err)
	}
	w.flags = append(w.flags, "--kubeconfig", "/run/kubeconfig")
}

// echoInAPI is the pod "echo" as the API has it.
const echoInAPI = `{"metadata": {"namespace": "default", "name": "echo", "uid": "uid-default-echo", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"app": "echo"}},
	"spec": {"nodeName": "node", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}]},
	"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}], "podIPs": [{"ip": "10.244.3.2"}]}}`
