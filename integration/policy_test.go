package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestPolicies: each setting of a magic IP has the same effect behind every backend. Each world has an
// impostor with the magic IP on the network beyond the node, which answers what the agent leaves alone.
func TestPolicies(t *testing.T) {
	both := []lab.Kind{lab.NewConnection, lab.UDP}
	for name, c := range map[string]struct {
		more string // configuration of the magic IPs
		run  func(w *world, want func(from string, kind lab.Kind, prefix string))
	}{
		"leftover DNAT of another tool": {run: func(w *world, want func(string, lab.Kind, string)) {
			command := w.iptables()
			server := add(w.t, w.Node, "ptp", lab.Pod{Name: "theirs"})
			w.echo("theirs")
			for _, chain := range []string{"PREROUTING", "OUTPUT"} {
				for _, protocol := range []string{"tcp", "udp"} {
					w.mustRun(command, "-t", "nat", "-A", chain, "-d", magic4, "-p", protocol, "-j", "DNAT", "--to-destination", server.IPs[0].String())
				}
			}
			for _, kind := range both {
				want("client", kind, "refused")
				want(lab.Host, kind, "refused")
			}
			w.addTarget("echo")
			w.echo("echo")
			for _, kind := range both {
				want("client", kind, "answered by echo")
				want(lab.Host, kind, "answered by echo")
			}
		}},
		"explicit host interface": {more: ", hostInterface: cni1", run: func(w *world, want func(string, lab.Kind, string)) {
			add(w.t, w.Node, "ptp", lab.Pod{Name: "elsewhere"})
			if err := lab.Eventually(patience(w.t), func() error { // a new interface is not served before the agent has seen it
				if got := w.fate("elsewhere", lab.NewConnection, magic(false), nil); got != "refused" {
					return errors.New(got)
				}
				return nil
			}); err != nil {
				w.t.Fatal(err)
			}
			for _, server := range []string{"refused", "answered by echo"} {
				for _, kind := range both {
					want("client", kind, server)
					want("elsewhere", kind, "refused")
					want(lab.Host, kind, server)
				}
				if server == "refused" {
					w.addTarget("echo")
					w.echo("echo")
				}
			}
		}},
		"hold": {more: ", noEndpoint: hold, holdFor: 3s", run: func(w *world, want func(string, lab.Kind, string)) {
			for _, kind := range both { // never had one
				want("client", kind, "refused")
			}
			w.addTarget("old")
			w.echo("old")
			want("client", lab.NewConnection, "answered by old")
			del(w.t, w.Node, w.network, target("old"))
			w.awaitEndpoint("")
			for _, kind := range both {
				want("client", kind, "silence")
			}
			want(lab.Host, lab.NewConnection, "silence")
			want(lab.Host, lab.UDP, "refused") // a datagram dropped on its way out is EPERM to its sender
			probe := w.StartProbe(lab.Client{Kind: lab.NewConnection, From: "client", To: magic(false)}, time.Minute)
			w.addTarget("new")
			w.echo("new")
			if err := lab.Eventually(patience(w.t), func() error {
				if o := probe.Outcomes(); len(o) == 0 || o[0].Err != nil {
					return fmt.Errorf("the connect from before has become %v", o)
				}
				return nil
			}); err != nil {
				w.t.Error(err)
			}
			del(w.t, w.Node, w.network, target("new"))
			w.awaitEndpoint("")
			if err := lab.Eventually(patience(w.t), func() error {
				for _, kind := range both {
					if got := w.fate("client", kind, magic(false), nil); got != "refused" {
						return fmt.Errorf("after holdFor: %s", got)
					}
				}
				return nil
			}); err != nil {
				w.t.Error(err)
			}
		}},
		"pass": {more: ", noEndpoint: pass", run: func(w *world, want func(string, lab.Kind, string)) {
			for _, kind := range both {
				want("client", kind, "answered by impostor")
				want(lab.Host, kind, "answered by impostor")
			}
			w.addTarget("echo")
			w.echo("echo")
			for _, kind := range both {
				want("client", kind, "answered by echo")
				want(lab.Host, kind, "answered by echo")
			}
		}},
		"host clients off": {more: ", hostClients: false", run: func(w *world, want func(string, lab.Kind, string)) {
			for _, kind := range both {
				want("client", kind, "refused")
				want(lab.Host, kind, "answered by impostor")
			}
			w.addTarget("echo")
			w.echo("echo")
			for _, kind := range both {
				want("client", kind, "answered by echo")
				want(lab.Host, kind, "answered by impostor")
			}
		}},
		"target excluded": {more: ", excludeTarget: true", run: func(w *world, want func(string, lab.Kind, string)) {
			w.addTarget("echo")
			w.echo("echo")
			for _, kind := range both {
				want("client", kind, "answered by echo")
				want("echo", kind, "answered by impostor")
			}
		}},
		"frames that do not pass netfilter": {run: func(w *world, want func(string, lab.Kind, string)) {
			for _, family := range []string{"iptables", "ip6tables"} {
				if err := w.Sysctl(lab.Host, "bridge/bridge-nf-call-"+family, "0"); err != nil {
					w.t.Fatal(err)
				}
			}
			w.addTarget("echo")
			w.echo("echo")
			elsewhere := add(w.t, w.Node, "ptp", lab.Pod{Name: "elsewhere"})
			if err := lab.Eventually(patience(w.t), func() error { // the sysctl is looked at with the poll
				if got := w.fate("client", lab.NewConnection, magic(false), nil); got != "answered by echo, seen as 10.244.3.1" {
					return fmt.Errorf("on the same bridge: %s", got)
				}
				return nil
			}); err != nil {
				w.t.Error(err)
			}
			want("client", lab.UDP, "answered by echo, seen as 10.244.3.1")
			want("echo", lab.NewConnection, "answered by echo, seen as 10.244.3.1")
			for _, kind := range both {
				want("elsewhere", kind, "answered by echo, seen as "+elsewhere.IPs[0].String())
			}
		}},
		"random": {more: ", distribution: random", run: func(w *world, _ func(string, lab.Kind, string)) {
			servers := map[string]int{}
			for _, name := range []string{"a", "b", "c"} {
				add(w.t, w.Node, w.network, target(name))
				w.echo(name)
			}
			if err := lab.Eventually(patience(w.t), func() error {
				for range 20 {
					servers[w.fate("client", lab.NewConnection, magic(false), nil)]++
				}
				if len(servers) < 3 {
					return fmt.Errorf("answers: %v", servers)
				}
				return nil
			}); err != nil {
				w.t.Error(err)
			}
		}},
		"ping": {run: func(w *world, _ func(string, lab.Kind, string)) {
			w.addTarget("echo")
			for _, from := range []string{"client", lab.Host} {
				args := []string{"ping", "-c", "1", "-W", "2", magic4}
				if from != lab.Host {
					args = append([]string{"ip", "netns", "exec", from}, args...)
				}
				if out, err := w.Run(w.t.Context(), args[0], args[1:]...); err == nil || strings.Contains(out, "bytes from "+magic4) {
					w.t.Errorf("ping from %q: %v %s", from, err, out)
				}
			}
		}},
	} {
		for _, backend := range backends() {
			t.Run(name+"/"+backend, func(t *testing.T) {
				t.Parallel()
				w := &world{Node: newNode(t, "20-ptp.conflist", "30-dual-stack.conflist"), t: t, network: "dual-stack"}
				w.mustRun("ip", "-n", "uplink", "addr", "add", magic4+"/32", "dev", "lo")
				impostor, err := w.StartEchoAt(lab.Uplink, "impostor", netip.AddrPortFrom(magic(false).Addr(), port).String())
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = impostor.Close() }()
				w.addClient() // before the agent: a new interface is served from when it has seen it
				w.start([]byte(strings.ReplaceAll(string(config()), "]}", "]"+c.more+"}")), "--backend", w.useBackend(backend))
				c.run(w, func(from string, kind lab.Kind, prefix string) {
					t.Helper()
					if got := w.fate(from, kind, magic(false), nil); !strings.HasPrefix(got, prefix) {
						t.Errorf("%q by %s: got %q, want %q", from, kind, got, prefix)
					}
				})
			})
		}
	}
}

// iptables is the command that edits the kind of rules that kubelet uses.
func (w *world) iptables() string {
	if _, err := w.Run(w.t.Context(), "iptables-legacy", "-t", "mangle", "-S", "KUBE-IPTABLES-HINT"); err == nil {
		return "iptables-legacy"
	}
	return "iptables-nft"
}

func (w *world) mustRun(command string, args ...string) {
	w.t.Helper()
	if _, err := w.Run(w.t.Context(), command, args...); err != nil {
		w.t.Fatal(err)
	}
}
