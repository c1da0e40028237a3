package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The plan of the addresses: nodes are 192.0.2.2 and 2001:db8::2, the network beyond is .1 and ::1, pods
// are 10.244.x.0/24 and fd00:10:244:x::/64, the magic IPs 169.254.210.210 and fd00:a9fe:d2d2::1, port 8080.
const (
	agentName = "default.magic-ip"
	magic4    = "169.254.210.210"
	magic6    = "fd00:a9fe:d2d2::1"
	port      = 8080
)

// backends are the ways to bring rules into the kernel that every packet test runs on. See useBackend.
func backends() []string { return []string{"nftables", "iptables-nft", "iptables-legacy"} }

// network is a way to attach pods.
type network struct {
	name, file string
	edit       func(string) string
}

func podNetworks() []network {
	return []network{
		{name: "bridge", file: "30-dual-stack.conflist"},
		{name: "ptp", file: "20-ptp.conflist", edit: func(conf string) string {
			conf = strings.Replace(conf, `[{"subnet": "10.244.2.0/24"}]`, `[{"subnet": "10.244.2.0/24"}], [{"subnet": "fd00:10:244:2::/64"}]`, 1)
			return strings.Replace(conf, `{"dst": "0.0.0.0/0"}`, `{"dst": "0.0.0.0/0"}, {"dst": "::/0"}`, 1)
		}},
	}
}

// config is an agent configuration with both magic IPs, TCP and UDP.
func config() []byte {
	text := "name: " + agentName + "\npollInterval: 1s\nmagicIPs:\n"
	for _, address := range []string{magic4, magic6} {
		text += fmt.Sprintf("- {ipAddress: %q, namespace: default, selector: app=echo, ports: [{port: %d}, {port: %d, protocol: udp}]}\n", address, port, port)
	}
	return []byte(text)
}

// world is a node with an agent, a network, and helpers that wait for the agent to have acted.
type world struct {
	*lab.Node
	t       *testing.T
	network string
	agent   *lab.Agent
}

// newWorld makes a node on which the agent is ready and no target runs.
func newWorld(t *testing.T, backend string, on network, conf []byte) *world {
	t.Helper()
	w := &world{Node: newNode(t), t: t}
	data := string(conflist(t, on.file))
	if on.edit != nil {
		data = on.edit(data)
	}
	addConf(t, w.Node, on.file, []byte(data))
	w.network = map[string]string{"10-bridge.conflist": "bridge", "20-ptp.conflist": "ptp", "30-dual-stack.conflist": "dual-stack"}[on.file]
	w.start(conf, "--backend", w.useBackend(backend))
	return w
}

// useBackend is the value of --backend. The agent takes the variant of iptables that kubelet uses, which
// it tells by a chain that kubelet makes.
func (w *world) useBackend(backend string) string {
	w.t.Helper()
	if !strings.HasPrefix(backend, "iptables-") {
		return backend
	}
	const hint = "KUBE-IPTABLES-HINT"
	script := fmt.Sprintf("%[1]s -t mangle -S %[2]s 2>/dev/null || %[1]s -t mangle -N %[2]s", backend, hint)
	if _, err := w.Run(w.t.Context(), "sh", "-c", script); err != nil {
		w.t.Fatal(err)
	}
	return "iptables"
}

func (w *world) start(conf []byte, flags ...string) {
	w.t.Helper()
	before := time.Now()
	agent, err := w.StartAgent(conf, append(flags, "--log-level", "debug")...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent = agent
	w.t.Cleanup(func() {
		if w.t.Failed() {
			w.t.Logf("log of the agent:\n%s", agent.Log())
		}
	})
	w.await("to run", func(a *published.Agent) bool { return a.StartedAt.After(before) && !a.LastSync.IsZero() })
}

func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// await waits until what the agent has published is as wanted: it publishes after it has acted.
func (w *world) await(what string, wanted func(*published.Agent) bool) *published.Agent {
	w.t.Helper()
	var agent *published.Agent
	err := lab.Eventually(patience(w.t), func() (err error) {
		if agent, err = published.Read(w.Path(lab.RuntimeDir), agentName); err != nil {
			return err
		}
		if !wanted(agent) {
			return fmt.Errorf("the agent has published %+v", agent)
		}
		return nil
	})
	if err != nil {
		w.t.Fatalf("waiting for the agent %s: %v\n%s", what, err, w.agent.Log())
	}
	return agent
}

func (w *world) awaitEndpoint(pod string) {
	w.t.Helper()
	w.await("to have endpoint "+pod, func(a *published.Agent) bool {
		for _, m := range a.MagicIPs {
			if pod == "" && len(m.Endpoints) > 0 || pod != "" && (len(m.Endpoints) != 1 || m.Endpoints[0].Pod != "default/"+pod) {
				return false
			}
		}
		return true
	})
}

func target(name string) lab.Pod {
	return lab.Pod{Name: name, Labels: map[string]string{"app": "echo"}}
}

// addTarget attaches a target and waits until it is the endpoint; its process is yet to listen.
func (w *world) addTarget(name string) lab.Attached {
	w.t.Helper()
	attached := add(w.t, w.Node, w.network, target(name))
	w.awaitEndpoint(name)
	return attached
}

// addClient attaches a pod of a namespace that nobody selects.
func (w *world) addClient() lab.Attached {
	w.t.Helper()
	return add(w.t, w.Node, w.network, lab.Pod{Name: "client", Namespace: "elsewhere"})
}

func (w *world) echo(name string) *lab.Echo {
	w.t.Helper()
	echo, err := w.StartEcho(name, name, port)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = echo.Close() })
	return echo
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

func magic(six bool) netip.AddrPort {
	if six {
		return netip.AddrPortFrom(netip.MustParseAddr(magic6), port)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(magic4), port)
}

// fate asks once, and words what happened: "answered by X, seen as Y", "refused" or "silence". seen names
// the addresses. A refusal within 50 ms is "refused", a later one says how late.
func (w *world) fate(from string, kind lab.Kind, to netip.AddrPort, seen map[netip.Addr]string) string {
	w.t.Helper()
	start := time.Now()
	answer, err := w.Ask(w.t.Context(), lab.Client{Kind: kind, From: from, To: to, Timeout: 500 * time.Millisecond})
	took := time.Since(start)
	switch {
	case err == nil:
		name, known := seen[answer.Client.Addr()]
		if !known {
			name = answer.Client.Addr().String()
		}
		return "answered by " + answer.Server + ", seen as " + name
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EPERM), errors.Is(err, syscall.ECONNRESET):
		if took > 50*time.Millisecond {
			return fmt.Sprintf("refused after %v", took)
		}
		return "refused"
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return "silence"
	}
	return err.Error()
}

// TestPackets is the table of README, "Packets": who, to where, and what happens.
func TestPackets(t *testing.T) {
	// The row says what TCP and UDP clients of both families meet.
	rows := []struct {
		from    string // a pod, lab.Host or lab.Uplink
		port    uint16
		with    string // a target that listens
		without string // no target
	}{
		{"client", port, "answered by echo, seen as client", "refused"},
		{"client", port + 1, "refused", "refused"},
		{"echo", port, "answered by echo, seen as node", "-"},
		{lab.Host, port, "answered by echo, seen as node", "refused"},
		{lab.Host, port + 1, "refused", "refused"},
		{lab.Uplink, port, "silence", "silence"},
		{lab.Uplink, port + 1, "silence", "silence"},
	}
	for _, backend := range backends() {
		for _, on := range podNetworks() {
			t.Run(backend+"/"+on.name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, backend, on, config())
				client, attached := w.addClient(), w.addTarget("echo")
				echo := w.echo("echo")
				seen := map[netip.Addr]string{}
				for _, ip := range client.IPs {
					seen[ip] = "client"
				}
				for _, ip := range attached.IPs {
					seen[ip] = "echo"
				}
				for _, ip := range nodeAddresses(t, w.Node) {
					seen[ip] = "node"
				}
				check := func(want func(i int) string) {
					for i, row := range rows {
						for _, six := range []bool{false, true} {
							for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
								if want(i) == "-" {
									continue
								}
								to := netip.AddrPortFrom(magic(six).Addr(), row.port)
								if got := w.fate(row.from, kind, to, seen); got != want(i) {
									t.Errorf("%q, %s to %s: got %q, want %q", row.from, kind, to, got, want(i))
								}
							}
						}
					}
				}
				check(func(i int) string { return rows[i].with })
				// The uplink host does reach the node, and through it the pods: only the magic IP is closed to it.
				for _, six := range []bool{false, true} {
					to := netip.AddrPortFrom(family(attached.IPs, six), port)
					if got := w.fate(lab.Uplink, lab.NewConnection, to, nil); !strings.HasPrefix(got, "answered by echo") {
						t.Errorf("uplink to the pod's own address %s: %s", to, got)
					}
				}
				if err := echo.Close(); err != nil {
					t.Fatal(err)
				}
				del(t, w.Node, w.network, target("echo"))
				w.awaitEndpoint("")
				check(func(i int) string { return rows[i].without })
			})
		}
	}
}

func nodeAddresses(t *testing.T, node *lab.Node) []netip.Addr {
	t.Helper()
	var addresses []netip.Addr
	err := node.In(lab.Host, func() error {
		all, err := net.InterfaceAddrs()
		for _, a := range all {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil {
				return err
			}
			addresses = append(addresses, prefix.Addr())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return addresses
}

// TestNothingLeaks puts an impostor with the magic IP on the network beyond the node: without an agent
// a client reaches it by the default route; with one it never does, agent alive or dead.
func TestNothingLeaks(t *testing.T) {
	for _, backend := range backends() {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			w := &world{Node: newNode(t, "10-bridge.conflist"), t: t, network: "bridge"}
			if _, err := w.Run(t.Context(), "ip", "-n", "uplink", "addr", "add", magic4+"/32", "dev", "lo"); err != nil {
				t.Fatal(err)
			}
			impostor, err := w.StartEchoAt(lab.Uplink, "impostor", magic(false).String())
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = impostor.Close() }()
			w.addClient()
			clients := []string{"client", lab.Host}
			want := func(when, prefix string) {
				t.Helper()
				for _, from := range clients {
					for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
						got := w.fate(from, kind, magic(false), nil)
						if kind == lab.UDP && prefix == "refused" && got == "silence" {
							continue // the probe below has used up what the kernel allows of ICMP (icmp_ratelimit)
						}
						if !strings.HasPrefix(got, prefix) {
							t.Errorf("%s: %q by %s: got %q, want %q", when, from, kind, got, prefix)
						}
					}
				}
			}
			want("before the agent", "answered by impostor")
			// These flows are known to the kernel as flows to the impostor. They must not go on.
			var probes []*lab.Probe
			for _, kind := range []lab.Kind{lab.KeepAlive, lab.UDP} {
				probe := w.StartProbe(lab.Client{Kind: kind, From: "client", To: magic(false), Timeout: time.Second}, 5*time.Millisecond)
				if _, err := probe.Await(patience(t), lab.AnsweredBy("impostor")); err != nil {
					t.Fatal(err)
				}
				probes = append(probes, probe)
			}
			w.start([]byte(fmt.Sprintf("name: %s\nmagicIPs: [{ipAddress: %s, namespace: default, selector: app=echo, ports: [{port: %d}, {port: %d, protocol: udp}]}]\n",
				agentName, magic4, port, port)), "--backend", w.useBackend(backend))
			want("with the agent and no target", "refused")
			for _, probe := range probes {
				if _, err := probe.Await(patience(t), lab.Unanswered); err != nil {
					t.Errorf("a flow from before the agent goes on: %v", err)
				}
			}
			w.addTarget("echo")
			w.echo("echo")
			want("with a target", "answered by echo")
			for _, probe := range probes {
				if _, err := probe.Await(patience(t), lab.AnsweredBy("echo")); err != nil {
					outcomes := probe.Outcomes()
					t.Errorf("a client from before the agent does not reach the target: %v; last outcome %+v", err, outcomes[len(outcomes)-1])
				}
				probe.Stop()
			}
			w.agent.Kill()
			want("with the agent dead", "answered by echo")
		})
	}
}

// TestReplacement replaces the target under load, as a rolling update does: the old one's sandbox goes,
// a new one comes, its process listens a moment later.
func TestReplacement(t *testing.T) {
	for _, backend := range backends() {
		for _, on := range podNetworks() {
			t.Run(backend+"/"+on.name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, backend, on, config())
				w.addClient()
				w.addTarget("old")
				old := w.echo("old")
				var probes []*lab.Probe
				for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
					for _, six := range []bool{false, true} {
						probe := w.StartProbe(lab.Client{Kind: kind, From: "client", To: magic(six), Timeout: 100 * time.Millisecond}, 5*time.Millisecond)
						if _, err := probe.Await(patience(t), lab.AnsweredBy("old")); err != nil {
							t.Fatal(err)
						}
						probes = append(probes, probe)
					}
				}
				// The sandbox goes without a word to the clients: nobody sends a FIN.
				del(t, w.Node, w.network, target("old"))
				_ = old.Close()
				w.awaitEndpoint("")
				w.addTarget("new")
				w.echo("new")
				listening := time.Now()
				for i, probe := range probes {
					if _, err := probe.Await(patience(t), lab.AnsweredBy("new")); err != nil {
						t.Errorf("probe %d never reached the new target: %v", i, err)
					}
				}
				settled := time.Now()
				for i, probe := range probes {
					for _, o := range probe.Stop() {
						switch sentAfter := o.Sent.After(listening); {
						case sentAfter && o.Err != nil:
							t.Errorf("probe %d: sent %v after the new target listened: %v", i, o.Sent.Sub(listening), o.Err)
						case sentAfter && o.Took > 100*time.Millisecond:
							t.Errorf("probe %d: a request took %v after the new target listened", i, o.Took)
						case !sentAfter && o.Sent.Add(o.Took).Sub(listening) > 100*time.Millisecond:
							t.Errorf("probe %d: a request from before ended %v after the new target listened", i, o.Sent.Add(o.Took).Sub(listening))
						}
					}
				}
				t.Logf("all clients on the new target %v after it listened", settled.Sub(listening))
			})
		}
	}
}

// TestAgentRestart stops, kills and starts the agent under load: not one request is lost.
func TestAgentRestart(t *testing.T) {
	for _, backend := range backends() {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, backend, podNetworks()[0], config())
			w.addClient()
			w.addTarget("echo")
			w.echo("echo")
			var probes []*lab.Probe
			for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
				probes = append(probes, w.StartProbe(lab.Client{Kind: kind, From: "client", To: magic(false), Timeout: time.Second}, time.Millisecond))
			}
			for i := range 8 {
				if i%2 == 0 {
					if err := w.agent.Stop(patience(t)); err != nil {
						t.Fatalf("SIGTERM: %v", err)
					}
				} else {
					w.agent.Kill()
				}
				w.start(config(), "--backend", w.useBackend(backend))
			}
			for _, probe := range probes {
				outcomes := probe.Stop()
				if failed := outcomes.Failed(); len(failed) > 0 || len(outcomes) < 50 {
					t.Errorf("%d of %d requests failed, first: %+v", len(failed), len(outcomes), failed)
				}
			}
		})
	}
}

// TestRestartMeetsChanges: what happened while the agent was away is caught up with.
func TestRestartMeetsChanges(t *testing.T) {
	for _, backend := range backends() {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, backend, podNetworks()[0], config())
			w.addClient()
			w.addTarget("old")
			w.echo("old")
			probe := w.StartProbe(lab.Client{Kind: lab.KeepAlive, From: "client", To: magic(false), Timeout: 10 * time.Second}, 3*time.Millisecond)
			if _, err := probe.Await(patience(t), lab.AnsweredBy("old")); err != nil {
				t.Fatal(err)
			}
			w.agent.Kill()
			del(t, w.Node, w.network, target("old"))
			add(t, w.Node, w.network, target("new"))
			w.echo("new")
			w.start(config(), "--backend", w.useBackend(backend))
			started := time.Now()
			w.awaitEndpoint("new")
			outcome, err := probe.Await(patience(t), lab.AnsweredBy("new"))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("keep-alive client on the new target %v after the restart", outcome.Sent.Sub(started))
			probe.Stop()
			// A state file that is gone is a source that is silent: the endpoint stays.
			w.agent.Kill()
			if err := os.Remove(w.Path(lab.RuntimeDir + "/state.json")); err != nil {
				t.Fatal(err)
			}
			w.start(config(), "--backend", w.useBackend(backend))
			w.awaitEndpoint("new")
			if got := w.fate("client", lab.NewConnection, magic(false), nil); !strings.HasPrefix(got, "answered by new") {
				t.Errorf("without the state file: %s", got)
			}
		})
	}
}

// TestDrift: what others do to our rules is mended within a poll, and what is theirs stays as it is.
func TestDrift(t *testing.T) {
	damages := []struct{ name, command, wantLog string }{
		{"table gone", "nft delete table ip magic-ip-" + agentName, "the whole table"},
		{"map emptied", "nft flush map ip magic-ip-" + agentName + " endpoints", "missing from endpoints"},
		{"chain flushed", "nft flush chain ip magic-ip-" + agentName + " translate", "missing rule in chain translate"},
		{"rule added", "nft insert rule ip magic-ip-" + agentName + " from-network drop", "foreign or changed rule in chain from-network"},
		{"element added", "nft add element ip magic-ip-" + agentName + " endpoints { 169.254.210.210 . tcp . 99 : 10.244.3.99 . 99 }", "foreign in endpoints"},
		{"ruleset flushed", "nft flush ruleset", "the whole table"},
	}
	w := newWorld(t, "nftables", podNetworks()[0], config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	ruleset := func() string {
		out, err := w.Run(t.Context(), "nft", "--stateless", "list", "ruleset")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, damage := range damages {
		t.Run(damage.name, func(t *testing.T) {
			before, logged := ruleset(), len(w.agent.Log())
			if _, err := w.Run(t.Context(), "nft", "add", "table", "ip", "theirs"); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Run(t.Context(), "sh", "-c", damage.command); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Run(t.Context(), "nft", "add", "table", "ip", "theirs"); err != nil {
				t.Fatal(err)
			}
			err := lab.Eventually(patience(t), func() error {
				if !strings.Contains(w.agent.Log()[logged:], damage.wantLog) {
					return fmt.Errorf("the log does not say %q", damage.wantLog)
				}
				if diff := cmp.Diff(sorted(before), sorted(strings.Replace(ruleset(), "table ip theirs {\n}\n", "", 1))); diff != "" {
					return fmt.Errorf("rules (-before +after):\n%s", diff)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			if got := w.fate("client", lab.NewConnection, magic(false), nil); !strings.HasPrefix(got, "answered by echo") {
				t.Errorf("after the repair: %s", got)
			}
			if _, err := w.Run(t.Context(), "nft", "delete", "table", "ip", "theirs"); err != nil {
				t.Error(err)
			}
		})
	}
}

// sorted makes listings comparable whose tables stand in another order.
func sorted(ruleset string) []string {
	tables := strings.SplitAfter(ruleset, "\n}\n")
	wanted := map[string]bool{}
	var out []string
	for _, table := range tables {
		if !wanted[table] {
			wanted[table] = true
			out = append(out, table)
		}
	}
	for i := range out {
		for j := i + 1; j < len(out); j++ {
			if out[j] < out[i] {
				out[i], out[j] = out[j], out[i]
			}
		}
	}
	return out
}

// TestConfigurationChange: a changed file counts without a restart, a broken one is reported and changes nothing.
func TestConfigurationChange(t *testing.T) {
	w := newWorld(t, "nftables", podNetworks()[0], config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	const file = "/run/agent-1.yaml"
	write := func(data string) {
		t.Helper()
		if err := w.WriteFile(file+".new", []byte(data)); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(w.Path(file+".new"), w.Path(file)); err != nil {
			t.Fatal(err)
		}
	}
	other := netip.MustParseAddrPort("169.254.210.211:8080")
	write(strings.ReplaceAll(string(config()), magic4, other.Addr().String()))
	w.await("to serve the new address", func(a *published.Agent) bool {
		return a.MagicIPs[0].Address == other.Addr() && len(a.MagicIPs[0].Endpoints) == 1
	})
	if got := w.fate("client", lab.NewConnection, other, nil); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("new address: %s", got)
	}
	write("name: " + agentName + "\nmagicIPs: [{ipAddress: nonsense}]\n")
	agent := w.await("to report the broken configuration", func(a *published.Agent) bool { return a.LastError != "" })
	if !strings.Contains(agent.LastError, `magicIPs[0].ipAddress: "nonsense" is not allowed`) {
		t.Errorf("lastError is %q", agent.LastError)
	}
	if got := w.fate("client", lab.NewConnection, other, nil); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("with a broken configuration: %s", got)
	}
	write(string(config()))
	w.await("to be back", func(a *published.Agent) bool { return a.LastError == "" && a.MagicIPs[0].Address.String() == magic4 })
	if got := w.fate("client", lab.NewConnection, magic(false), nil); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("back: %s", got)
	}
}

// TestUnusableAddresses: what cannot be served is refused with the reason, and the others are served.
func TestUnusableAddresses(t *testing.T) {
	conf := "name: " + agentName + "\npollInterval: 1s\nmagicIPs:\n"
	for _, address := range []string{"169.254.169.254", "192.0.2.2", "127.0.0.5", "fe80::1", "224.0.0.1", magic4, magic4} {
		conf += fmt.Sprintf("- {ipAddress: %q, namespace: default, selector: app=echo, ports: [{port: %d}]}\n", address, port)
	}
	w := newWorld(t, "nftables", podNetworks()[0], []byte(conf))
	agent := w.await("to run", func(a *published.Agent) bool { return len(a.MagicIPs) == 7 })
	for i, want := range []string{"instance metadata", "address of this node", "loopback", "link-local", "multicast", "", "claimed twice"} {
		if got := agent.MagicIPs[i].Refused; want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: refused because %q, want %q", agent.MagicIPs[i].Address, got, want)
		}
	}
	w.addClient()
	add(t, w.Node, w.network, target("echo"))
	w.await("to have an endpoint", func(a *published.Agent) bool { return len(a.MagicIPs[5].Endpoints) == 1 })
	w.echo("echo")
	if got := w.fate("client", lab.NewConnection, magic(false), nil); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("the usable one: %s", got)
	}
}

// TestTwoAgents: the older of two claims stands, a port of the other agent on the same address is left to
// it, and when the older agent's file goes the younger takes over. A second process with the same name waits.
func TestTwoAgents(t *testing.T) {
	w := newWorld(t, "nftables", podNetworks()[0], config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	younger, err := w.StartAgent([]byte(fmt.Sprintf(
		"name: default.younger\npollInterval: 1s\nmagicIPs: [{ipAddress: %s, namespace: default, selector: app=echo, ports: [{port: %d}, {port: 81, targetPort: %d}]}]\n",
		magic4, port, port)))
	if err != nil {
		t.Fatal(err)
	}
	readYounger := func(wanted func(*published.Agent) bool) {
		t.Helper()
		err := lab.Eventually(patience(t), func() error {
			agent, err := published.Read(w.Path(lab.RuntimeDir), "default.younger")
			if err == nil && !wanted(agent) {
				err = fmt.Errorf("the younger agent has published %+v", agent)
			}
			return err
		})
		if err != nil {
			t.Fatalf("%v\n%s", err, younger.Log())
		}
	}
	readYounger(func(a *published.Agent) bool {
		return strings.Contains(a.MagicIPs[0].Refused, "claimed by agent "+agentName) && a.MagicIPs[1].Refused == "" && len(a.MagicIPs[1].Endpoints) == 1
	})
	port81 := netip.AddrPortFrom(magic(false).Addr(), 81)
	err = lab.Eventually(patience(t), func() error {
		for _, to := range []netip.AddrPort{magic(false), port81} {
			for _, from := range []string{"client", lab.Host} {
				if got := w.fate(from, lab.NewConnection, to, nil); !strings.HasPrefix(got, "answered by echo") {
					return fmt.Errorf("%q to %s: %s", from, to, got)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if got := w.fate("client", lab.NewConnection, netip.AddrPortFrom(magic(false).Addr(), 82), nil); got != "refused" {
		t.Errorf("a port that nobody claims: %s", got)
	}

	standby, err := w.StartAgent(config())
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Eventually(patience(t), func() error {
		if !strings.Contains(standby.Log(), "standing by") {
			return errors.New("no word of standing by")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := w.await("to run", func(*published.Agent) bool { return true }).StartedAt
	w.agent.Kill()
	w.await("to be replaced by the standby", func(a *published.Agent) bool { return a.StartedAt.After(before) })

	standby.Kill()
	if err := os.Remove(published.Path(w.Path(lab.RuntimeDir), agentName)); err != nil {
		t.Fatal(err)
	}
	readYounger(func(a *published.Agent) bool { return a.MagicIPs[0].Refused == "" && len(a.MagicIPs[0].Endpoints) == 1 })
}
