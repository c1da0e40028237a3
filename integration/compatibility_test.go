package integration

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestCompatibility observes what becomes of magic IPs on the networks that need no product: rows of docs/compatibility.md.
func TestCompatibility(t *testing.T) {
	for _, network := range []struct{ row, kind, option, filtered string }{
		{"bridge", "bridge", "", "1"}, {"bridge-unfiltered", "bridge", "", "0"}, {"ptp", "ptp", "", "1"}, {"calico", "cali", "", "1"},
		{"bridge-isolated", "bridge", "portIsolation", "1"}, {"bridge-isolated-unfiltered", "bridge", "portIsolation", "0"},
	} {
		t.Run(network.row, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "nftables", network.kind)
			for _, tables := range []string{"iptables", "ip6tables"} {
				if err := w.Sysctl(lab.Host, "bridge/bridge-nf-call-"+tables, network.filtered); err != nil {
					t.Fatal(err)
				}
			}
			if network.option != "" {
				w.run(`sed -i 's/"type": "bridge",/&"` + network.option + `": true,/' ` + conflistFile)
			}
			w.addClient()
			w.beyond(plain)
			w.start(config())
			w.awaitDetour(agentName, notCilium, 2, false)
			var got compat.Observed
			observed := func(when string, do func() bool) {
				heard := w.heard("client", func() {
					if do() && when != compat.Traffic {
						got.Refused = append(got.Refused, when)
					}
				})
				if !heard {
					got.StaysIn = append(got.StaysIn, when)
				}
			}
			observed(compat.NoEndpoint, func() bool { return w.all("refused", "client", lab.Host) })
			w.addTarget("echo")
			w.echo("echo")
			observed(compat.Traffic, func() bool {
				for namespace, who := range map[string]string{"client": compat.Pod, lab.Host: compat.Process, "echo": compat.Itself} {
					if w.all("answered by echo", namespace) {
						got.Served = append(got.Served, who)
					}
				}
				for seen, whose := range map[string]string{"client": compat.Client, "node": compat.Node} {
					if w.all("answered by echo, seen as "+seen, "client") {
						got.Seen = whose
					}
				}
				return true
			})
			w.agent.Kill()
			observed(compat.AgentKilled, func() bool { return !w.all("answered by echo", "client", lab.Host) })
			w.flush()
			observed(compat.RulesFlushed, func() bool { return w.all("refused", "client", lab.Host) })
			compat.Record(t, network.row, got)
		})
	}
}

// all reports whether what all of these send to the plain magic IP, by TCP and UDP and both families, has this fate.
func (w *world) all(fate string, from ...string) bool {
	for _, namespace := range from {
		for _, six := range []bool{false, true} {
			if err := w.want(namespace, magic(six), fate); err != nil {
				w.t.Logf("not all is %s: %v", fate, err)
				return false
			}
		}
	}
	return true
}

// heard reports whether anything about a magic IP has come to the network of the node meanwhile, ARP included. A client's datagram
// for the host beyond the network shows that what leaves is heard.
func (w *world) heard(client string, do func()) bool {
	w.t.Helper()
	arrived := w.sniff(lab.Uplink)
	do()
	mark := func() {
		err := w.In(client, func() error {
			conn, err := net.Dial("udp", "198.51.100.2:9")
			if err != nil {
				return err
			}
			_, err = conn.Write([]byte(marker))
			return errors.Join(err, conn.Close())
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	four, six := magic(false).Addr().As4(), magic(true).Addr().As16()
	ours := func(packet []byte) bool {
		return bytes.Contains(packet, four[:]) || bytes.Contains(packet, six[:])
	}
	found, err := arrived.until(w.t, mark, "the datagram", func(packet []byte) bool { return ours(packet) || strings.Contains(string(packet), marker) })
	if err != nil {
		w.t.Fatal(err)
	}
	return ours(found)
}
