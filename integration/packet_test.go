package integration

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// question is who asks whom, and what is to happen.
type question struct {
	row   string
	from  string // a network namespace
	magic int
	port  uint16
	want  string
}

// askAll puts all questions in both families, a few at a time.
func (w *world) askAll(questions []question) {
	w.t.Helper()
	var group sync.WaitGroup
	atOnce := make(chan struct{}, 8)
	for _, q := range questions {
		for _, six := range []bool{false, true} {
			atOnce <- struct{}{}
			group.Go(func() {
				defer func() { <-atOnce }()
				w.note(q.row, six, w.want(q.from, netip.AddrPortFrom(magicAt(q.magic, six).Addr(), q.port), q.want))
			})
		}
	}
	group.Wait()
}

// TestPackets is the table of docs/concepts.md, "Packets": who, to where, and what happens, on every kind of network.
func TestPackets(t *testing.T) {
	onEveryNetwork(t, func(t *testing.T, backend, kind string) { testPackets(t, newWorld(t, backend, kind)) })
}

func testPackets(t *testing.T, w *world) {
	client := w.addClient()
	elsewhere := w.otherKind()
	w.addPod(elsewhere, lab.Pod{Name: "elsewhere", Namespace: "elsewhere"})
	w.beyond(plain, excluding, withoutUs, passing)
	nic := w.secondNIC()
	if nic != nil && !errors.As(nic, new(cannot)) {
		t.Fatal(nic)
	}
	link := map[string]string{"bridge": "cni1"}[w.kind]
	if link == "" {
		link = hostInterface(t, w.Node, client.NetNS).Name
	}
	w.start(configOf(agentName,
		entry(plain, ""), entry(excluding, "excludeTarget: true"), entry(withoutUs, "hostClients: false"), entry(passing, "noEndpoint: pass"),
		entry(exactly, "hostInterface: "+link), entry(prefixed, "hostInterface: "+map[string]string{"bridge": "cni+", "ptp": "veth+", "cali": "cali+"}[w.kind]),
		entry(listed, "hostInterface: 'not-there,"+link+"'")))
	attached := w.addTarget("echo")
	echo := w.echo("echo")

	const served, masqueraded = "answered by echo, seen as client", "answered by echo, seen as node"
	questions := []question{
		{podServed, "client", plain, port, served},
		{podOtherPort, "client", plain, port + 1, "refused"},
		{hairpin, "echo", plain, port, masqueraded},
		{hairpinLeft, "echo", excluding, port, "answered by impostor, seen as echo"},
		{hairpinOthers, "client", excluding, port, served},
		{hostServed, lab.Host, plain, port, masqueraded},
		{hostServed, lab.Host, excluding, port, masqueraded},
		{hostOtherPort, lab.Host, plain, port + 1, "refused"},
		{hostLeft, lab.Host, withoutUs, port, "answered by impostor, seen as node"},
		{hostLeftPods, "client", withoutUs, port, served},
		{uplinkDropped, lab.Uplink, plain, port, "silence"},
		{uplinkDropped, lab.Uplink, plain, port + 1, "silence"},
		{uplinkDropped, lab.Uplink, withoutUs, port, "silence"},
		{uplinkDropped, lab.Uplink, passing, port, "silence"},
		{nonePass, "client", passing, port, served}, // while there is one
	}
	for row, n := range map[string]int{interfaceOne: exactly, interfaceAny: prefixed, interfaceList: listed} {
		questions = append(questions, question{row, "client", n, port, served}, question{row, "elsewhere", n, port, "refused"},
			question{row, lab.Uplink, n, port, "silence"}, question{row, lab.Host, n, port, masqueraded})
	}
	withNIC := func(row string, questions ...question) []question {
		if nic != nil {
			w.noteBoth(row, nic)
			return nil
		}
		return questions
	}
	questions = append(questions, withNIC(nicDropped, question{nicDropped, "lan", plain, port, "silence"}, question{nicDropped, "lan", exactly, port, "silence"})...)
	w.askAll(questions)
	bothFamilies(func(six bool) {
		w.note(uplinkDropped, six, w.want(lab.Uplink, netip.AddrPortFrom(family(attached.IPs, six), port), "answered by echo"))
		w.note(podPing, six, errors.Join(w.ping("client", magic(six).Addr()), w.ping(lab.Host, magic(six).Addr())))
	})

	if err := echo.Close(); err != nil {
		t.Fatal(err)
	}
	w.delTarget("echo")
	w.awaitEndpoint("")
	questions = []question{
		{nonePod, "client", plain, port, "refused"},
		{nonePod, "client", plain, port + 1, "refused"},
		{nonePod, "client", excluding, port, "refused"},
		{noneHost, lab.Host, plain, port, "refused"},
		{noneHost, lab.Host, plain, port + 1, "refused"},
		{hostLeft, lab.Host, withoutUs, port, "answered by impostor, seen as node"},
		{noneUplink, lab.Uplink, plain, port, "silence"},
		{noneUplink, lab.Uplink, passing, port, "silence"},
		{nonePass, "client", passing, port, "answered by impostor, seen as client"},
		{nonePass, lab.Host, passing, port, "answered by impostor, seen as node"},
	}
	for row, n := range map[string]int{interfaceOne: exactly, interfaceAny: prefixed, interfaceList: listed} {
		questions = append(questions, question{row, "client", n, port, "refused"}, question{row, "elsewhere", n, port, "refused"}, question{row, lab.Uplink, n, port, "silence"})
	}
	w.askAll(append(questions, withNIC(noneUplink, question{noneUplink, "lan", plain, port, "silence"}, question{noneUplink, "lan", passing, port, "silence"})...))
}

// ping says what is wrong unless an echo request is refused.
func (w *world) ping(from string, to netip.Addr) error {
	// An echo request without data, identifier 1, sequence number 1; IPv6 has the kernel fill in the checksum.
	network, request := "ip4:icmp", []byte{8, 0, 0, 0, 0, 1, 0, 1}
	binary.BigEndian.PutUint16(request[2:], ^uint16(0x0800+1+1))
	if to.Is6() {
		network, request = "ip6:ipv6-icmp", []byte{128, 0, 0, 0, 0, 1, 0, 1}
	}
	conn, err := w.Dial(from)(w.t.Context(), network, to.String())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	start := time.Now()
	limit, cancel := lab.Patience(w.t.Context(), 500*time.Millisecond)
	defer cancel()
	context.AfterFunc(limit, func() { _ = conn.SetDeadline(time.Now()) })
	if _, err := conn.Write(request); errors.Is(err, syscall.EPERM) {
		return nil // what the output hook refuses is an error to who sends it
	} else if err != nil {
		return err
	}
	if _, _, err = conn.(*net.IPConn).ReadFrom(make([]byte, 1500)); err == nil {
		return fmt.Errorf("ping to %s was answered", to)
	}
	if got := fateOf(err, lab.WorkingTime(start, time.Now())); got != "refused" {
		return fmt.Errorf("ping to %s: got %q, want refused", to, got)
	}
	return nil
}

// TestLeftoverTranslation: a rule like that of the bash tool, left behind, does not take packets from us.
func TestLeftoverTranslation(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.addClient()
		theirs := w.addPod("ptp", lab.Pod{Name: "theirs", Namespace: "elsewhere"})
		w.echo("theirs")
		for _, six := range []bool{false, true} {
			tool := w.iptables(six)
			for _, chain := range []string{"PREROUTING", "OUTPUT"} {
				for _, protocol := range []string{"tcp", "udp"} {
					w.run(fmt.Sprintf("%s -t nat -A %s -d %s -p %s -j DNAT --to-destination %s", tool, chain, magic(six).Addr(), protocol, family(theirs.IPs, six)))
				}
			}
		}
		ask := func(want string) {
			t.Helper()
			bothFamilies(func(six bool) {
				w.note(leftover, six, errors.Join(w.want("client", magic(six), want), w.want(lab.Host, magic(six), want)))
			})
		}
		ask("answered by theirs")
		w.start(config())
		ask("refused")
		w.addTarget("echo")
		w.echo("echo")
		ask("answered by echo")
	})
}

// TestNothingLeaks puts an impostor with the magic IP on the network beyond the node: without an agent
// a client reaches it by the default route; with one it never does, agent alive or dead.
func TestNothingLeaks(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		w.beyond(plain)
		w.addClient()
		ask := func(row, prefix string) {
			t.Helper()
			bothFamilies(func(six bool) {
				for _, from := range []string{"client", lab.Host} {
					w.note(row, six, w.want(from, magic(six), prefix))
				}
			})
		}
		ask(beforeAgent, "answered by impostor")
		// These flows are known to the kernel as flows to the impostor. They must not go on.
		probes := map[*lab.Probe]bool{}
		for _, six := range []bool{false, true} {
			for _, kind := range []lab.Kind{lab.KeepAlive, lab.UDP} {
				probe := w.StartProbe(lab.Client{Kind: kind, From: "client", To: magic(six), Timeout: time.Second}, 5*time.Millisecond)
				defer probe.Stop()
				probes[probe] = six
				if _, err := probe.Await(patience(t), lab.AnsweredBy("impostor")); err != nil {
					t.Fatal(err)
				}
			}
		}
		awaitAll := func(wanted func(lab.Outcome) bool) {
			for probe, six := range probes {
				if _, err := probe.Await(patience(t), wanted); err != nil {
					outcomes := probe.Outcomes()
					w.note(beforeAgent, six, fmt.Errorf("%w; last outcome %+v", err, outcomes[len(outcomes)-1]))
				}
			}
		}
		w.start(config())
		ask(beforeAgent, "refused")
		awaitAll(lab.Unanswered)
		w.addTarget("echo")
		w.echo("echo")
		ask(beforeAgent, "answered by echo")
		awaitAll(lab.AnsweredBy("echo"))
		w.agent.Kill()
		ask(agentDead, "answered by echo")
	})
}

// TestUplinkChanges moves default routes: away from the uplink, to the link of a pod that is a gateway, to a link that
// connects the node with another network. All three are veths whose other end is in another network namespace.
func TestUplinkChanges(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		const pair = makeNetNS + `
			pair() { # NAME LENGTH4 LENGTH6 GATEWAY4 POD4 GATEWAY6 POD6
				netns $1
				ip link add $1 type veth peer name eth0 netns $1
				ip link set $1 up
				ip -n $1 link set eth0 up
				ip address add $4/$2 dev $1
				ip address add $6/$3 dev $1 nodad
				ip -n $1 address add $5/$2 dev eth0
				ip -n $1 address add $7/$3 dev eth0 nodad
				ip -n $1 route add default via $4 dev eth0 onlink
				ip -n $1 route add default via $6 dev eth0 onlink
			}
			routed() { # NAME NUMBER
				pair $1 32 128 10.22.0.1 10.22.1.$2 fd00:22::1 fd00:22:1::$2
				ip route add 10.22.1.$2 dev $1
				ip route add fd00:22:1::$2 dev $1
			}
			`
		w.run(pair + `
			routed gateway 254
			pair other 24 64 203.0.113.1 203.0.113.2 2001:db8:3::1 2001:db8:3::2`)
		w.addTarget("echo")
		w.echo("echo")
		// seen waits until the agent has taken in what was changed before: a pod's new link is served.
		links := 0
		seen := func(six bool) {
			links++
			name := fmt.Sprint("pod", links)
			w.run(pair + fmt.Sprintf("routed %s %d", name, links))
			if err := lab.Eventually(patience(t), func() error { return w.want(name, magic(six), "answered by echo") }); err != nil {
				t.Fatal(err)
			}
		}
		for _, six := range []bool{false, true} {
			uplink, gateway, other, flag := lab.UplinkIPv4, "10.22.1.254", "203.0.113.2", "-4"
			if six {
				uplink, gateway, other, flag = lab.UplinkIPv6, "fd00:22:1::254", "2001:db8:3::2", "-6"
			}
			for _, change := range []string{
				"true",
				"ip route add default via " + gateway + " dev gateway onlink table 77",
				"ip route add default via " + other + " table 78",
				"ip route replace default via " + other,
				"ip route replace default via " + gateway + " dev gateway onlink",
				"ip " + flag + " route delete default",
				"ip route add default via " + uplink,
			} {
				w.run(change)
				seen(six)
				for _, q := range []struct{ row, from, want string }{
					{awayUplink, lab.Uplink, "silence"}, {otherNetworks, "other", "silence"}, {strayDefault, "gateway", "answered by echo"},
				} {
					if err := w.want(q.from, magic(six), q.want); err != nil {
						w.note(q.row, six, fmt.Errorf("after %q: %w", change, err))
					}
				}
			}
			for _, row := range []string{awayUplink, otherNetworks, strayDefault} {
				w.note(row, six, nil)
			}
		}
		if restarted := strings.Count(w.agent.Log(), "starting"); restarted != 1 {
			t.Errorf("the agent has started %d times", restarted)
		}
	})
}
