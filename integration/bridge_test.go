package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestUnfilteredBridge switches off that the frames of bridges pass netfilter, and on again. Replies from pod
// to pod would not be translated back then, if the source address were kept.
func TestUnfilteredBridge(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient()
		w.addPod("ptp", lab.Pod{Name: "elsewhere", Namespace: "elsewhere"})
		filter := func(value string) error {
			return errors.Join(w.Sysctl(lab.Host, "bridge/bridge-nf-call-iptables", value), w.Sysctl(lab.Host, "bridge/bridge-nf-call-ip6tables", value))
		}
		if err := filter("1"); errors.Is(err, fs.ErrNotExist) {
			t.Fatal("br_netfilter is not loaded: modprobe br_netfilter")
		} else if err != nil {
			t.Fatal(err)
		}
		w.start(configOf(agentName, entry(plain, fmt.Sprintf("ports: [{port: %d}, {port: %[1]d, protocol: udp}, {port: %d}]", port, streams))))
		w.addTarget("echo")
		w.echo("echo")
		w.serveStreams("echo")
		ask := func(row, from, want string) {
			t.Helper()
			bothFamilies(func(six bool) { w.note(row, six, w.want(from, magic(six), want)) })
		}
		ask(filteredAgain, "client", "answered by echo, seen as client")

		// Flows of clients on the bridge and elsewhere, which are there when it is switched off.
		type standing struct {
			stream *stream
			probe  *lab.Probe
		}
		flows := map[string]map[bool]standing{}
		for _, from := range []string{"client", "elsewhere", lab.Host} {
			flows[from] = map[bool]standing{}
			for _, six := range []bool{false, true} {
				f := standing{
					stream: w.startStream(from, netip.AddrPortFrom(magic(six).Addr(), streams)),
					probe:  w.StartProbe(lab.Client{Kind: lab.UDP, From: from, To: magic(six), Timeout: 200 * time.Millisecond}, 5*time.Millisecond),
				}
				defer f.probe.Stop()
				if _, err := f.probe.Await(patience(t), lab.AnsweredBy("echo")); err != nil {
					t.Fatal(err)
				}
				if err := f.stream.flows(t); err != nil {
					t.Fatal(err)
				}
				flows[from][six] = f
			}
		}
		if err := filter("0"); err != nil {
			t.Fatal(err)
		}
		since := time.Now()
		const note = "bridge cni1: its frames do not pass netfilter (net.bridge.bridge-nf-call-iptables, net.bridge.bridge-nf-call-ip6tables is 0"
		noted := func(a *runtimedir.Status) bool { return strings.Contains(strings.Join(a.Notes, "\n"), note) }
		w.await("to notice", noted)
		for from, byFamily := range flows {
			for six, f := range byFamily {
				_, err := f.probe.Await(patience(t), func(o lab.Outcome) bool { return o.Err == nil && o.Sent.After(since.Add(time.Second)) })
				if from == "client" {
					err = errors.Join(err, f.stream.isReset(t))
				} else {
					err = errors.Join(err, f.stream.flows(t))
				}
				if err != nil {
					err = fmt.Errorf("%q: %w", from, err)
				}
				w.note(switchedOff, six, err)
			}
		}
		ask(sameBridge, "client", "answered by echo, seen as node")
		ask(sameBridge, "echo", "answered by echo, seen as node")
		ask(otherNetwork, "elsewhere", "answered by echo, seen as elsewhere")
		status, err := w.RunAgent(t.Context(), "status", "--runtime-dir", lab.RuntimeDir)
		if err == nil && !strings.Contains(status, "note: "+note) {
			err = fmt.Errorf("status does not tell of the bridge:\n%s", status)
		}
		w.noteBoth(filteredAgain, err)

		if err := filter("1"); err != nil {
			t.Fatal(err)
		}
		w.await("to notice", func(a *runtimedir.Status) bool { return !noted(a) })
		ask(filteredAgain, "client", "answered by echo, seen as client")
		ask(filteredAgain, "elsewhere", "answered by echo, seen as elsewhere")
	})
}

// TestGatewayBesideTheBridge plugs the node into the bridge by a veth, as the bridge plugin does with its option vlan: the
// address of the gateway is on the veth, and IP packets of the pods come in by it.
func TestGatewayBesideTheBridge(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient()
		w.addPod("ptp", lab.Pod{Name: "elsewhere", Namespace: "elsewhere"})
		w.start(config())
		w.addTarget("echo")
		w.echo("echo")
		w.run(`
			ip link add gateway type veth peer name plug
			ip link set plug master cni1
			ip link set plug up
			ip link set gateway up
			echo 1 >/proc/sys/net/ipv4/conf/cni1/arp_ignore # with its option vlan the bridge itself is not in the pods' VLAN
			for family in -4 -6; do
				address=$(ip $family -o address show dev cni1 scope global | awk '{ print $4 }')
				ip $family address delete $address dev cni1
				ip $family address add $address dev gateway $(test $family = -4 || echo nodad)
			done
			ip -n client neigh flush all
			ip -n echo neigh flush all`)
		ask := func(row, from, want string) {
			t.Helper()
			bothFamilies(func(six bool) { w.note(row, six, w.want(from, magic(six), want)) })
		}
		filter := func(value, note string) {
			t.Helper()
			if err := errors.Join(w.Sysctl(lab.Host, "bridge/bridge-nf-call-iptables", value), w.Sysctl(lab.Host, "bridge/bridge-nf-call-ip6tables", value)); err != nil {
				t.Fatal(err)
			}
			w.await("to note "+note, func(a *runtimedir.Status) bool { return strings.Contains(strings.Join(a.Notes, "\n"), note) })
		}
		filter("1", "bridge cni1: its pods do not reach magic IPs")
		filter("0", "bridge gateway: its frames do not pass netfilter")
		ask(gatewayBeside, "client", "answered by echo, seen as node")
		ask(gatewayBeside, "echo", "answered by echo, seen as node")
		ask(gatewayBeside, "elsewhere", "answered by echo, seen as elsewhere")
		ask(gatewayBeside, lab.Uplink, "silence")
		w.leavesBridgesUnfiltered("pass it twice, the second time by gateway")
	})
}

// TestIsolatedPorts isolates the ports of the bridge from each other, as the bridge plugin does with its option portIsolation. A
// frame that br_netfilter has translated stays a frame, from port to port; what the node's network stack routes does not.
func TestIsolatedPorts(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient()
		w.start(config())
		w.addTarget("echo")
		w.echo("echo")
		w.run("for port in /sys/class/net/cni1/brif/*; do echo 1 >$port/isolated; done")
		const note = "bridge cni1: pods behind isolated ports"
		noted := func(a *runtimedir.Status) bool { return strings.Contains(strings.Join(a.Notes, "\n"), note) }
		w.await("to note isolated ports", noted)
		bothFamilies(func(six bool) {
			if err := errors.Join(w.want("client", magic(six), "silence"), w.want(lab.Host, magic(six), "answered by echo, seen as node")); err != nil {
				t.Errorf("frames pass netfilter: %v", err)
			}
		})
		if err := errors.Join(w.Sysctl(lab.Host, "bridge/bridge-nf-call-iptables", "0"), w.Sysctl(lab.Host, "bridge/bridge-nf-call-ip6tables", "0")); err != nil {
			t.Fatal(err)
		}
		w.await("to note them no more", func(a *runtimedir.Status) bool { return !noted(a) })
		for _, from := range []string{"client", "echo", lab.Host} {
			bothFamilies(func(six bool) { w.note(isolatedPorts, six, w.want(from, magic(six), "answered by echo, seen as node")) })
		}
		w.leavesBridgesUnfiltered("behind isolated ports")
	})
}

// leavesBridgesUnfiltered says that doctor does not advise to have frames of bridges pass netfilter, and why.
func (w *world) leavesBridgesUnfiltered(why string) {
	w.t.Helper()
	w.finds("warn", "bridges", "frames of cni1 do not pass netfilter", why)
	if out, _ := w.doctor(); strings.Contains(out, "iptables=1") {
		w.t.Errorf("this breaks pods:\n%s", out)
	}
}
