package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan of the addresses: the node is 192.0.2.2 and 2001:db8::2, the network beyond its uplink is .1 and
// ::1, what is beyond that 198.51.100.0/24 and 2001:db8:2::/64, the network of a second NIC 203.0.113.0/24
// and 2001:db8:3::/64. Pods are 10.244.x.0/24 and fd00:10:244:x::/64. Magic IPs are 169.254.210.n and
// fd00:a9fe:d2d2::n, where n is one of these, and on port 8080.
const (
	agentName = "default.magic-ip"
	port      = 8080

	plain      = 210
	excluding  = 211 // excludeTarget: true
	withoutUs  = 212 // hostClients: false
	passing    = 213 // noEndpoint: pass
	holding    = 214 // noEndpoint: hold
	exactly    = 215 // hostInterface: a name
	prefixed   = 216 // hostInterface: a prefix
	listed     = 217 // hostInterface: several
	unassigned = 218
	briefly    = 219 // noEndpoint: hold, for a short time
)

// magicAt is a magic IP with its port; magic is the one without any settings.
func magicAt(n int, six bool) netip.AddrPort {
	if six {
		return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("fd00:a9fe:d2d2::%d", n)), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{169, 254, 210, byte(n)}), port)
}

func magic(six bool) netip.AddrPort { return magicAt(plain, six) }

// backends are the ways to bring rules into the kernel that every packet test runs on.
func backends() []string { return []string{"nftables", "iptables-nft", "iptables-legacy"} }

// network is a way to attach pods.
type network struct {
	file string // of the conflist; none where the pods are attached as Calico does
	name string // of the network in the conflist
	edit func(string) string
}

func networkOf(kind string) network {
	switch kind {
	case "bridge":
		return network{file: "30-dual-stack.conflist", name: "dual-stack"}
	case "ptp":
		return network{file: "20-ptp.conflist", name: "ptp", edit: func(conf string) string {
			conf = strings.Replace(conf, `[{"subnet": "10.244.2.0/24"}]`, `[{"subnet": "10.244.2.0/24"}], [{"subnet": "fd00:10:244:2::/64"}]`, 1)
			return strings.Replace(conf, `{"dst": "0.0.0.0/0"}`, `{"dst": "0.0.0.0/0"}, {"dst": "::/0"}`, 1)
		}}
	}
	return network{}
}

// config is an agent configuration: the plain magic IP of both families, TCP and UDP.
func config() []byte { return configOf(agentName, entry(plain, "")) }

func configOf(name string, entries ...string) []byte {
	return []byte("name: " + name + "\npollInterval: 1s\nmagicIPs:\n" + strings.Join(entries, ""))
}

// entry is a magic IP in both families. settings are those that differ from the usual ones, in YAML.
func entry(n int, settings string) string {
	return entryOf(n, false, settings) + entryOf(n, true, settings)
}

func entryOf(n int, six bool, settings string) string {
	text := fmt.Sprintf("- {ipAddress: %q, namespace: default", magicAt(n, six).Addr())
	for key, usual := range map[string]string{
		"selector": "app=echo", "ports": fmt.Sprintf("[{port: %d}, {port: %[1]d, protocol: udp}]", port),
	} {
		if !strings.Contains(settings, key+":") {
			text += fmt.Sprintf(", %s: %s", key, usual)
		}
	}
	if settings != "" {
		text += ", " + settings
	}
	return text + "}\n"
}

// world is a node with an agent, a network of a kind, and helpers that wait for the agent to have acted.
type world struct {
	*lab.Node
	t             *testing.T
	backend, kind string
	flags         []string // of the agent
	agent         *lab.Agent

	mu    sync.Mutex
	names map[netip.Addr]string // of those that an answer may say it has seen
}

// newWorld makes a node on which no agent runs yet. What the kernel's limits on ICMP errors do to clients
// is not what is tested here: they are off.
func newWorld(t *testing.T, backend, kind string) *world {
	t.Helper()
	w := &world{Node: newNode(t), t: t, backend: backend, kind: kind, names: map[netip.Addr]string{}}
	for _, kind := range []string{"bridge", "ptp"} {
		on := networkOf(kind)
		data := string(conflist(t, on.file))
		if on.edit != nil {
			data = on.edit(data)
		}
		addConf(t, w.Node, on.file, []byte(data))
	}
	if err := w.AllICMPErrors(); err != nil {
		t.Fatal(err)
	}
	backend, variant, isIPTables := strings.Cut(backend, "-")
	w.flags = []string{"--backend", backend, "--log-level", "debug"}
	if isIPTables {
		// This is how kubelet tells others which of the two kinds of tables it uses.
		for _, tool := range []string{"iptables-", "ip6tables-"} {
			if _, err := w.Run(t.Context(), tool+variant, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT"); err != nil {
				results.lack(w.backend, cannot(err.Error()))
				t.Skipf("named in the matrix: %v", err)
			}
		}
	}
	return w
}

// serving is a new world with an agent that is ready and has no target.
func serving(t *testing.T, backend, kind string, conf []byte) *world {
	t.Helper()
	w := newWorld(t, backend, kind)
	w.start(conf)
	return w
}

// start starts the agent and waits until it runs.
func (w *world) start(conf []byte) {
	w.t.Helper()
	w.agent = w.startAs(agentName, conf)
}

func (w *world) startAs(name string, conf []byte) *lab.Agent {
	w.t.Helper()
	before := time.Now()
	agent, err := w.StartAgent(conf, w.flags...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("log of agent %s:\n%s", name, agent.Log())
		}
	})
	running := w.awaitOf(name, "to run", func(a *runtimedir.Status) bool { return a.StartedAt.After(before) && !a.LastSync.IsZero() })
	if used := running.Backend + " " + running.BackendNote; !strings.HasPrefix(used, "nftables") && !strings.Contains(used, w.backend+" ") || !strings.HasPrefix(w.backend, running.Backend) {
		w.t.Fatalf("the agent uses %s, want %s", used, w.backend)
	}
	return agent
}

// run runs a shell script in the node.
func (w *world) run(script string) string {
	w.t.Helper()
	out, err := w.Run(w.t.Context(), "sh", "-ec", script)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func patience(t *testing.T) context.Context {
	ctx, cancel := lab.Patience(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// await waits until what the agent has published is as wanted: it publishes after it has acted.
func (w *world) await(what string, wanted func(*runtimedir.Status) bool) *runtimedir.Status {
	w.t.Helper()
	return w.awaitOf(agentName, what, wanted)
}

func (w *world) awaitOf(name, what string, wanted func(*runtimedir.Status) bool) *runtimedir.Status {
	w.t.Helper()
	var agent *runtimedir.Status
	err := lab.Eventually(patience(w.t), func() (err error) {
		if agent, err = runtimedir.New(w.Path(lab.RuntimeDir)).Agent(name).ReadStatus(); err != nil {
			return err
		}
		if !wanted(agent) {
			return fmt.Errorf("the agent has published %+v", agent)
		}
		return nil
	})
	if err != nil {
		w.t.Fatalf("waiting for the agent %s: %v", what, err)
	}
	return agent
}

// awaitEndpoint waits until every magic IP of the agent has this endpoint; none where pod is empty.
func (w *world) awaitEndpoint(pod string) {
	w.t.Helper()
	w.await("to have endpoint "+pod, func(a *runtimedir.Status) bool { return hasEndpoint(a, pod) })
}

func hasEndpoint(a *runtimedir.Status, pod string) bool {
	for _, m := range a.MagicIPs {
		if pod == "" && len(m.Endpoints) > 0 || pod != "" && (len(m.Endpoints) != 1 || m.Endpoints[0].Pod != "default/"+pod) {
			return false
		}
	}
	return true
}

func target(name string) lab.Pod {
	return lab.Pod{Name: name, Labels: map[string]string{"app": "echo"}}
}

// addPod attaches a pod to a network of a kind.
func (w *world) addPod(kind string, pod lab.Pod) lab.Attached {
	w.t.Helper()
	var attached lab.Attached
	if on := networkOf(kind); on.file != "" {
		attached = add(w.t, w.Node, on.name, pod)
	} else {
		var err error
		if attached, err = w.AddRouted(w.t.Context(), w.routedConfig(), pod); err != nil {
			w.t.Fatal(err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ip := range attached.IPs {
		w.names[ip] = pod.Name
	}
	return attached
}

func (w *world) routedConfig() map[string]any {
	var config map[string]any
	if err := json.Unmarshal(pluginConfig(w.t, "10-bridge.conflist", map[string]any{"name": "calico"}), &config); err != nil {
		w.t.Fatal(err)
	}
	return config
}

// delTarget takes a target away, sandbox and all.
func (w *world) delTarget(name string) {
	w.t.Helper()
	if on := networkOf(w.kind); on.file != "" {
		del(w.t, w.Node, on.name, target(name))
	} else if err := w.DelRouted(w.t.Context(), w.routedConfig(), target(name)); err != nil {
		w.t.Fatal(err)
	}
}

// addTarget attaches a target and waits until it is the endpoint; its process is yet to listen.
func (w *world) addTarget(name string) lab.Attached {
	w.t.Helper()
	attached := w.addPod(w.kind, target(name))
	w.awaitEndpoint(name)
	return attached
}

// addClient attaches a pod of a namespace that nobody selects.
func (w *world) addClient() lab.Attached {
	w.t.Helper()
	return w.addPod(w.kind, lab.Pod{Name: "client", Namespace: "elsewhere"})
}

// listen has a pod listen on the port, without an answer.
func (w *world) listen(pod string) net.Listener {
	w.t.Helper()
	server, err := w.Listen(pod, "tcp", fmt.Sprintf(":%d", port))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = server.Close() })
	return server
}

func (w *world) echo(name string) *lab.Echo {
	w.t.Helper()
	return w.echoAt(name, name, fmt.Sprintf(":%d", port))
}

func (w *world) echoAt(namespace, name, address string) *lab.Echo {
	w.t.Helper()
	echo, err := w.StartEchoAt(namespace, name, address)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = echo.Close() })
	return echo
}

// makeNetNS begins scripts that make network namespaces, in which nothing waits for duplicate address detection.
const makeNetNS = `netns() {
	ip netns add $1
	ip -n $1 link set lo up
	echo 0 | ip netns exec $1 tee /proc/sys/net/ipv6/conf/default/accept_dad
}`

// beyond puts an impostor with these magic IPs on the far side of the network beyond the uplink. It is what a
// packet reaches that the node leaves alone. The uplink's own packets to a magic IP go to the node.
func (w *world) beyond(magicIPs ...int) {
	w.t.Helper()
	w.run(makeNetNS + `
		netns beyond
		ip link add beyond netns uplink type veth peer name eth0 netns beyond
		for side in "uplink beyond 1" "beyond eth0 2"; do
			set -- $side
			ip -n $1 link set $2 up
			ip -n $1 address add 198.51.100.$3/24 dev $2
			ip -n $1 address add 2001:db8:2::$3/64 dev $2 nodad
		done
		for family in -4 -6; do
			case $family in -4) magic=169.254.210.0/24 near=198.51.100.1 far=198.51.100.2;; *) magic=fd00:a9fe:d2d2::/64 near=2001:db8:2::1 far=2001:db8:2::2;; esac
			ip $family -n beyond route add default via $near
			ip $family -n uplink route add $magic via $far table 100
			ip $family -n uplink rule add iif eth0 table 100
		done`)
	for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := w.Sysctl(lab.Uplink, key, "1"); err != nil {
			w.t.Fatal(err)
		}
	}
	for _, n := range magicIPs {
		for _, six := range []bool{false, true} {
			if _, err := w.Run(w.t.Context(), "ip", "-n", "beyond", "address", "add", magicAt(n, six).Addr().String(), "dev", "lo", "nodad"); err != nil {
				w.t.Fatal(err)
			}
			w.echoAt("beyond", "impostor", magicAt(n, six).String())
		}
	}
}

// secondNIC gives the node an interface eth1 that carries no default route, and makes the network namespace
// "lan" at its other end, which routes everything to the node. Its kind must not be one that pods have.
func (w *world) secondNIC() error {
	_, err := w.Run(w.t.Context(), "sh", "-ec", makeNetNS+`
		netns lan
		ip link add wire netns lan type veth peer name eriw netns lan
		ip -n lan link add link wire name eth0 type macvlan mode bridge
		ip -n lan link add link wire name eth1 type macvlan mode bridge
		ip -n lan link set eth1 netns 1
		ip -n lan link set wire up
		ip -n lan link set eriw up
		ip -n lan link set eth0 up
		ip link set eth1 up
		ip address add 203.0.113.1/24 dev eth1
		ip address add 2001:db8:3::1/64 dev eth1 nodad
		ip -n lan address add 203.0.113.2/24 dev eth0
		ip -n lan address add 2001:db8:3::2/64 dev eth0 nodad
		ip -n lan route add default via 203.0.113.1
		ip -n lan route add default via 2001:db8:3::1`)
	if err != nil && strings.Contains(err.Error(), "Unknown device type") {
		return cannot("this kernel has no macvlan, which plays a second NIC (CONFIG_MACVLAN)")
	}
	return err
}

// note is for the matrix; an error fails the test as well.
func (w *world) note(row string, six bool, err error) {
	w.t.Helper()
	if err != nil && !errors.As(err, new(cannot)) {
		w.t.Errorf("%s (%s, %s, %s): %v", row, w.backend, w.kind, familyName(six), err)
	}
	results.note(cell{row, w.kind, w.backend, familyName(six)}, err)
}

func familyName(six bool) string { return matrixFamily[map[bool]int{false: 0, true: 1}[six]] }

// noteBoth is note for what is not one family's.
func (w *world) noteBoth(row string, err error) {
	w.t.Helper()
	w.note(row, false, err)
	w.note(row, true, err)
}

// family picks the address of one family.
func family(ips []netip.Addr, six bool) netip.Addr {
	for _, ip := range ips {
		if ip.Is6() == six {
			return ip
		}
	}
	return netip.Addr{}
}

// answerTime is how long an answer or a rejection is waited for.
const answerTime = atOnce + 200*time.Millisecond

// fate asks once, and words what happened: "answered by X, seen as Y", "refused" or "silence".
func (w *world) fate(from string, kind lab.Kind, to netip.AddrPort) string {
	return w.fateOfRequest(lab.Client{Kind: kind, From: from, To: to, Timeout: answerTime})
}

func (w *world) fateOfRequest(client lab.Client) string {
	start := time.Now()
	answer, err := w.Ask(w.t.Context(), client)
	if err == nil {
		return "answered by " + answer.Server + ", seen as " + w.nameOf(answer.Client.Addr())
	}
	return fateOf(err, lab.WorkingTime(start, time.Now()))
}

// fateOfConnect asks by a new connection. Where it is refused by an ICMP error, which does not end a connect by IPv6 (seen on Linux 6.18),
// the next SYN's does, a second later.
func (w *world) fateOfConnect(from string, to netip.AddrPort, byICMP bool) string {
	client := lab.Client{Kind: lab.NewConnection, From: from, To: to, Timeout: answerTime}
	if !byICMP || !to.Addr().Is6() {
		return w.fateOfRequest(client)
	}
	client.Timeout = 3 * time.Second
	fate, _, _ := strings.Cut(w.fateOfRequest(client), " after ")
	return fate
}

// atOnce is before a client would send its SYN again, which is after a second. More than that is a machine's own: locks of the
// kernel that namespaces share keep no task from its processor, and the witness does not see them.
const atOnce = 700 * time.Millisecond

// fateOf words an error that came after so much working time.
func fateOf(err error, took time.Duration) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ECONNRESET):
		if took > atOnce {
			return fmt.Sprintf("refused after %v", took)
		}
		return "refused"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "silence"
	}
	return err.Error()
}

// nameOf is who has an address: a pod by its name, or "node".
func (w *world) nameOf(address netip.Addr) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if name, known := w.names[address]; known {
		return name
	}
	if w.names == nil {
		w.names = map[netip.Addr]string{}
	}
	_ = w.In(lab.Host, func() error {
		all, err := net.InterfaceAddrs()
		for _, a := range all {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && w.names[prefix.Addr()] == "" {
				w.names[prefix.Addr()] = "node"
			}
		}
		return err
	})
	if name, known := w.names[address]; known {
		return name
	}
	return address.String()
}

// want asks by TCP and by UDP, and says what is not as expected: a fate, or the beginning of one.
func (w *world) want(from string, to netip.AddrPort, expected string) error {
	var err error
	for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
		// Silence is waited for by the clock: a busy machine answers late, not more often.
		client := lab.Client{Kind: kind, From: from, To: to, Timeout: answerTime}
		if expected == "silence" {
			client.Timeout, client.ByClock = 500*time.Millisecond, true
		}
		if wrong := want(w.fateOfRequest(client), expected); wrong != nil {
			err = errors.Join(err, fmt.Errorf("%q, %s to %s: %w", from, kind, to, wrong))
		}
	}
	return err
}

// want compares a fate, of which "answered by X" may be all that is wanted.
func want(got, want string) error {
	if got == want || strings.HasPrefix(want, "answered") && strings.HasPrefix(got, want) {
		return nil
	}
	return fmt.Errorf("got %q, want %q", got, want)
}

// bothFamilies calls f for each family, at the same time.
func bothFamilies(f func(six bool)) {
	var group sync.WaitGroup
	for _, six := range []bool{false, true} {
		group.Go(func() { f(six) })
	}
	group.Wait()
}

// onEach runs a test on each backend, in parallel with others.
func onEach(t *testing.T, test func(t *testing.T, backend string)) {
	t.Parallel()
	for _, backend := range backends() {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			test(t, backend)
		})
	}
}

// onEveryNetwork is onEach, on every kind of network.
func onEveryNetwork(t *testing.T, test func(t *testing.T, backend, kind string)) {
	onEach(t, func(t *testing.T, backend string) {
		for _, kind := range onEveryKind {
			t.Run(kind, func(t *testing.T) {
				t.Parallel()
				test(t, backend, kind)
			})
		}
	})
}

// otherKind is a kind of network that is not the world's own: no link serves both.
func (w *world) otherKind() string {
	return map[string]string{"bridge": "ptp", "ptp": "bridge", "cali": "ptp"}[w.kind]
}

// iptables is the command for the rules of other tools: of the tables that the agent uses, or by way of nftables.
func (w *world) iptables(six bool) string {
	_, variant, isIPTables := strings.Cut(w.backend, "-")
	if !isIPTables {
		variant = "nft"
	}
	return map[bool]string{false: "iptables-", true: "ip6tables-"}[six] + variant
}
