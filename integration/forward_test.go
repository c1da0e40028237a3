package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestPorts: everything is keyed by address, protocol and port.
func TestPorts(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		addConf(t, w.Node, "30-dual-stack.conflist", []byte(strings.Replace(string(conflist(t, "30-dual-stack.conflist")),
			`"app=echo"`, `"app in (echo, other)"`, 1)))
		w.addClient()
		w.start(configOf(agentName,
			entry(plain, "ports: [{port: 8080}, {port: 81, targetPort: 8081}, {port: 82, targetPort: 8082}, {port: 82, targetPort: 8081, protocol: udp}, {port: 84, targetPort: 8080}]"),
			entry(plain, "selector: app=other, ports: [{port: 84, targetPort: 8080, protocol: udp}]")))
		w.addPod("bridge", target("echo"))
		w.addPod("bridge", lab.Pod{Name: "other", Labels: map[string]string{"app": "other"}})
		w.await("to have all endpoints", func(a *runtimedir.Status) bool {
			for _, m := range a.MagicIPs {
				if len(m.Endpoints) != 1 {
					return false
				}
			}
			return true
		})
		for _, pod := range []string{"echo", "other"} {
			for _, port := range []int{8080, 8081, 8082} {
				w.echoAt(pod, fmt.Sprintf("%s-%d", pod, port), fmt.Sprintf(":%d", port))
			}
		}
		for _, six := range []bool{false, true} {
			for _, q := range []struct {
				row  string
				kind lab.Kind
				port uint16
				want string
			}{
				{manyPorts, lab.NewConnection, 8080, "answered by echo-8080, seen as client"},
				{manyPorts, lab.NewConnection, 81, "answered by echo-8081, seen as client"},
				{manyPorts, lab.NewConnection, 82, "answered by echo-8082, seen as client"},
				{manyPorts, lab.NewConnection, 83, "refused"},
				{manyPorts, lab.NewConnection, 8081, "refused"},
				{twoProtocols, lab.NewConnection, 82, "answered by echo-8082, seen as client"},
				{twoProtocols, lab.UDP, 82, "answered by echo-8081, seen as client"},
				{twoProtocols, lab.UDP, 8080, "refused"},
				{twoPods, lab.NewConnection, 84, "answered by echo-8080, seen as client"},
				{twoPods, lab.UDP, 84, "answered by other-8080, seen as client"},
			} {
				var err error
				if got := w.fate("client", q.kind, netip.AddrPortFrom(magic(six).Addr(), q.port)); got != q.want {
					err = fmt.Errorf("%s to port %d: got %q, want %q", q.kind, q.port, got, q.want)
				}
				w.note(q.row, six, err)
			}
		}
	})
}

// TestSpread counts the connections that each of three targets gets.
func TestSpread(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", configOf(agentName, entry(plain, "distribution: random")))
		w.addClient()
		targets := []string{"a", "b", "c"}
		for _, name := range targets {
			w.addPod("bridge", target(name))
			w.echo(name)
		}
		w.await("to have all endpoints", func(a *runtimedir.Status) bool {
			return len(a.MagicIPs[0].Endpoints) == len(targets) && len(a.MagicIPs[2].Endpoints) == len(targets)
		})
		for _, six := range []bool{false, true} {
			const connections, clients = 600, 6
			var mu sync.Mutex
			var failed error
			counts := map[string]float64{}
			var group sync.WaitGroup
			for range clients {
				group.Go(func() {
					for range connections / clients {
						answer, err := w.Ask(t.Context(), lab.Client{Kind: lab.NewConnection, From: "client", To: magic(six)})
						mu.Lock()
						counts[answer.Server]++
						failed = errors.Join(failed, err)
						mu.Unlock()
					}
				})
			}
			group.Wait()
			// Chi-squared with two degrees of freedom: 27.6 is exceeded by chance once in a million.
			chiSquared, expected := 0.0, float64(connections)/float64(len(targets))
			for _, name := range targets {
				chiSquared += (counts[name] - expected) * (counts[name] - expected) / expected
			}
			if failed == nil && chiSquared > 27.6 {
				failed = fmt.Errorf("connections by target: %v, chi-squared %.1f", counts, chiSquared)
			}
			w.note(evenSpread, six, failed)
		}
	})
}

// TestSCTP talks SCTP between sockets where the kernel has them, else by hand.
func TestSCTP(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", configOf(agentName, entry(plain, "ports: [{port: 8080, protocol: sctp}]")))
		w.addClient()
		w.addTarget("echo")
		for _, six := range []bool{false, true} {
			a, err := w.associate("client", "echo", magic(six))
			a.Close()
			w.note(sctpSocket, six, err)
			if err != nil {
				err = w.initiate("client", "echo", magic(six), true)
			}
			w.note(sctpInit, six, err)
			w.note(sctpInit, six, w.initiate("client", "echo", netip.AddrPortFrom(magic(six).Addr(), port+1), false))
		}
	})
}

// TestSCTPMoves: an association stays with its endpoint when another becomes that, and its client is answered when the sandbox is gone:
// where the magic IP is an address of the node, and where it is not.
func TestSCTPMoves(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		for _, dataPlane := range []string{"auto", "netfilter"} {
			t.Run(dataPlane, func(t *testing.T) {
				t.Parallel()
				conf := string(configOf(agentName, entry(plain, "ports: [{port: 8080, protocol: sctp}]")))
				w := serving(t, backend, "bridge", []byte("dataPlane: "+dataPlane+"\n"+conf))
				w.addClient()
				w.addTarget("old")
				associations, byHand := map[bool]association{}, map[bool]*crafted{}
				for _, six := range []bool{false, true} {
					a, err := w.associate("client", "old", magic(six))
					t.Cleanup(a.Close)
					if errors.Is(err, noSCTP) {
						byHand[six], err = w.craft("client", "old", magic(six))
					}
					if err != nil {
						t.Fatal(err)
					}
					associations[six] = a
				}
				w.addPod("bridge", target("new"))
				w.awaitEndpoint("new")
				for six, a := range associations {
					if c := byHand[six]; c != nil {
						w.note(sctpStays, six, errors.Join(c.sends(t, sctpChunkData, craftedServerTag), c.answers(t, sctpChunkData)))
					} else {
						w.note(sctpStays, six, errors.Join(a.carries(a.client, a.server), a.carries(a.server, a.client)))
					}
				}
				w.delTarget("old")
				for six, c := range byHand {
					w.note(sctpStays, six, lab.Eventually(patience(t), c.refused))
				}
			})
		}
	})
}

// TestHoldAlone: the agent dies while clients wait. nftables ends the hold, by the timeout of an element; iptables has none.
func TestHoldAlone(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient()
		w.start(configOf(agentName, entry(holding, "noEndpoint: hold, holdFor: 20s")))
		w.addTarget("old")
		w.delTarget("old")
		w.awaitEndpoint("")
		w.agent.Kill()
		bothFamilies(func(six bool) {
			err := w.want("client", magicAt(holding, six), "silence")
			if err == nil && backend == "nftables" {
				limit, cancel := lab.Patience(t.Context(), time.Minute)
				defer cancel()
				err = lab.Eventually(limit, func() error {
					return errors.Join(w.want("client", magicAt(holding, six), "refused"), w.want(lab.Host, magicAt(holding, six), "refused"))
				})
			}
			w.note(holdAlone, six, err)
		})
	})
}

// TestWithoutEndpoint: what a client meets while a target is replaced, with hold. (Refusal and pass are
// among TestPackets.)
func TestWithoutEndpoint(t *testing.T) {
	const holdFor = 2 * time.Second
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient() // before the agent: packets of a new interface are dropped until the agent has seen it
		w.start(configOf(agentName, entry(holding, "noEndpoint: hold, holdFor: 5m"), entry(briefly, "noEndpoint: hold, holdFor: "+holdFor.String())))
		clients := []string{"client", lab.Host}
		ask := func(row, want string) {
			t.Helper()
			bothFamilies(func(six bool) {
				for _, from := range clients {
					w.note(row, six, w.want(from, magicAt(holding, six), want))
				}
			})
		}
		ask(noneHold, "refused") // there never was an endpoint to wait for the next of
		w.addTarget("old")
		echo := w.echo("old")
		ask(noneHold, "answered by old")

		gone := func(name string) time.Time {
			since := time.Now()
			if err := echo.Close(); err != nil {
				t.Fatal(err)
			}
			w.delTarget(name)
			w.awaitEndpoint("")
			return since
		}
		gone("old")
		var waiting sync.WaitGroup
		for _, six := range []bool{false, true} {
			for _, from := range clients {
				waiting.Go(func() {
					answer, err := w.Ask(t.Context(), lab.Client{Kind: lab.NewConnection, From: from, To: magicAt(holding, six), Timeout: time.Minute})
					if err == nil && answer.Server != "new" {
						err = fmt.Errorf("a connect that waited was answered by %s", answer.Server)
					}
					w.note(noneHold, six, err)
				})
			}
		}
		bothFamilies(func(six bool) {
			// Datagrams that the output hook drops are errors to who sends them (EPERM).
			w.note(noneHold, six, errors.Join(w.want("client", magicAt(holding, six), "silence"),
				want(w.fate(lab.Host, lab.NewConnection, magicAt(holding, six)), "silence"),
				want(w.fate(lab.Host, lab.UDP, magicAt(holding, six)), "refused")))
		})
		w.run(makeNetNS + "\nnetns new")
		echo = w.echo("new") // before the pod is the endpoint: its own kernel would refuse
		w.addTarget("new")
		waiting.Wait()
		ask(noneHold, "answered by new")

		since := gone("new")
		bothFamilies(func(six bool) {
			err := lab.Eventually(patience(t), func() error { return w.want("client", magicAt(briefly, six), "refused") })
			if took := time.Since(since); err == nil && took < holdFor {
				err = fmt.Errorf("refused after %v, holdFor is %v", took, holdFor)
			}
			err = errors.Join(err, w.want("client", magicAt(holding, six), "silence"))
			w.note(noneHoldOver, six, err)
		})
	})
}
