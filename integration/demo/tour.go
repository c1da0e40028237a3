package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	conflist   = "10-bridge.conflist"
	network    = "bridge" // its name inside
	agentName  = "default.magic-ip"
	table      = "magic-ip-" + agentName
	targetPort = 8080

	config = `name: default.magic-ip
magicIPs:
  - ipAddress: 169.254.210.210
    namespace: default
    selector: app=echo
    ports:
      - {port: 80, targetPort: 8080, protocol: tcp}
      - {port: 8125, targetPort: 8080, protocol: udp}
`
	interval = 5 * time.Millisecond // between the requests of a client under load
	// datagramTimeout is when a client gives a datagram up and sends the next one.
	datagramTimeout = 20 * time.Millisecond
	// containerStart is about what a runtime takes from the sandbox to the first instruction of a process.
	containerStart = 300 * time.Millisecond
)

// tour is the demo's node with the pods on it.
type tour struct {
	*story
	node  *lab.Node
	agent string // path of the program
	rules bool   // to be shown

	client netip.Addr // of the pod "client"
	target string     // name of the pod that serves
	addr   netip.Addr // its address
	echo   *lab.Echo  // its process
}

func tcp() netip.AddrPort { return netip.MustParseAddrPort("169.254.210.210:80") }
func udp() netip.AddrPort { return netip.MustParseAddrPort("169.254.210.210:8125") }

// setUp starts the agent and the client's pod on an empty node.
func (t *tour) setUp(ctx context.Context) error {
	t.chapter("A node")
	t.tell("Network, mount and process namespaces of its own, an uplink, and the network of cni-conf/%s:", conflist)
	t.tell("bridge with host-local, and chained behind it magic-ip-address. The agent's configuration:")
	t.show(config)
	list, err := lab.Conflist(conflist)
	if err != nil {
		return err
	}
	if err := t.node.AddConf(conflist, list); err != nil {
		return err
	}
	t.command("magic-ip-agent run --no-api --config agent.yaml")
	started := time.Now()
	agent, err := t.node.StartAgent([]byte(config))
	if err != nil {
		return err
	}
	if err := t.await(ctx, func() error {
		select {
		case <-agent.Exited():
			return fmt.Errorf("the agent has ended:\n%s", agent.Log())
		default:
		}
		_, err := t.node.Run(ctx, "nft", "list", "table", "ip", table)
		return err
	}); err != nil {
		return err
	}
	t.outcome(true, "rules in place %s after the start of the process; 169.254.210.210 leads nowhere yet", ms(time.Since(started)))

	client, err := t.node.Add(ctx, network, lab.Pod{Name: "client", Labels: map[string]string{"app": "client"}})
	if err != nil {
		return err
	}
	t.client = client.IPs[0]
	return nil
}

// firstTarget shows how soon an added pod is the endpoint.
func (t *tour) firstTarget(ctx context.Context) error {
	t.chapter("A target")
	t.tell("The runtime's part is played by cnitool: a network namespace, and CNI ADD with the pod's labels.")
	t.command(`CAP_ARGS='{"labels":{"app":"echo"}}' cnitool add %s /run/netns/echo-1`, network)
	if err := t.add(ctx, "echo-1"); err != nil {
		return err
	}
	took, err := t.untilEndpoint(ctx)
	if err != nil {
		return err
	}
	t.outcome(true, "pod echo-1 has %s; it was the endpoint %s after the plugin's record; its process is still to start", t.addr, ms(took))
	if err := t.listen(); err != nil {
		return err
	}
	t.tell("Now its server listens on port %d. It answers with its name and the address that it saw the request come from.", targetPort)
	return nil
}

// whoIsServed asks from all sides.
func (t *tour) whoIsServed(ctx context.Context) error {
	t.chapter("Who gets an answer")
	for _, c := range []struct {
		who       string
		namespace string
		address   string
		kind      lab.Kind
		to        netip.AddrPort
	}{
		{"a pod", "client", t.client.String(), lab.NewConnection, tcp()},
		{"a pod", "client", t.client.String(), lab.UDP, udp()},
		{"a process of the node", lab.Host, lab.NodeIPv4, lab.NewConnection, tcp()},
	} {
		t.request(c.who+" ("+c.address+")", c.kind, c.to)
		answer, err := t.node.Ask(ctx, lab.Client{Kind: c.kind, From: c.namespace, To: c.to})
		if err != nil {
			return err
		}
		kept := answer.Client.Addr().String() == c.address
		remark := "the client's own address"
		if !kept {
			remark = "not the client's: see the note in `magic-ip-agent status`"
		}
		t.outcome(kept, "%s saw %s: %s", answer.Server, answer.Client, remark)
	}

	t.tell("A host on the uplink has routed 169.254.210.210 to this node, as a hostile neighbour may:")
	direct := netip.AddrPortFrom(t.addr, targetPort)
	t.request("the host on the uplink ("+lab.UplinkIPv4+")", lab.NewConnection, direct)
	answer, err := t.node.Ask(ctx, lab.Client{Kind: lab.NewConnection, From: lab.Uplink, To: direct})
	if err != nil {
		return err
	}
	t.outcome(true, "%s saw %s: so there is a way to the pod", answer.Server, answer.Client)
	t.request("the host on the uplink", lab.NewConnection, tcp())
	const patience = time.Second
	answer, err = t.node.Ask(ctx, lab.Client{Kind: lab.NewConnection, From: lab.Uplink, To: tcp(), Timeout: patience})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		t.outcome(false, "%s saw %s: a magic IP must not be for the network", answer.Server, answer.Client)
	} else {
		t.outcome(errors.Is(err, context.DeadlineExceeded), "no answer within %s: dropped, a magic IP is for its own node alone", patience)
	}
	return nil
}

// replaced is a rolling update: the process ends, its sandbox goes, a new one comes, a new process starts.
func (t *tour) replaced(ctx context.Context) error {
	t.chapter("The target is replaced while clients run")
	t.tell("Three clients in one pod, up to %d requests a second each. The server closes its sockets and ends, then CNI", time.Second/interval)
	t.tell("DEL, CNI ADD of a new pod, and after %s, about what a container start takes, its server listens.", ms(containerStart))
	return t.underLoad(ctx, "echo-2", func(ctx context.Context) error {
		if err := t.echo.Close(); err != nil {
			return err
		}
		return t.del(ctx)
	})
}

// vanished is a forced removal: nobody tells the clients.
func (t *tour) vanished(ctx context.Context) error {
	t.chapter("The target vanishes while clients run")
	t.tell("The same, but the sandbox goes while the process runs: no connection is closed, no packet tells the clients.")
	return t.underLoad(ctx, "echo-3", func(ctx context.Context) error {
		if err := t.del(ctx); err != nil {
			return err
		}
		return t.echo.Close()
	})
}

// underLoad replaces the target by a pod called next while clients run, and prints what they went through.
func (t *tour) underLoad(ctx context.Context, next string, remove func(context.Context) error) error {
	clients := []lab.Client{
		{Kind: lab.NewConnection, To: tcp(), Timeout: time.Second},
		{Kind: lab.KeepAlive, To: tcp(), Timeout: 2 * time.Second},
		{Kind: lab.UDP, To: udp(), Timeout: datagramTimeout},
	}
	probes := make([]*lab.Probe, len(clients))
	for i, c := range clients {
		c.From = "client"
		probes[i] = t.node.StartProbe(c, interval)
		defer probes[i].Stop()
	}
	answeredBy := func(name string) error {
		for i, probe := range probes {
			within, cancel := context.WithTimeout(ctx, patience)
			_, err := probe.Await(within, lab.AnsweredBy(name))
			cancel()
			if err != nil {
				return fmt.Errorf("%s client, waiting for %s: %w", clients[i].Kind, name, err)
			}
		}
		return sleep(ctx, time.Second)
	}
	if err := answeredBy(t.target); err != nil {
		return err
	}

	former, ended := t.target, time.Now()
	if err := remove(ctx); err != nil {
		return err
	}
	if err := t.add(ctx, next); err != nil {
		return err
	}
	if err := sleep(ctx, containerStart); err != nil {
		return err
	}
	if err := t.listen(); err != nil {
		return err
	}
	listening := time.Now()
	if err := answeredBy(next); err != nil {
		return err
	}

	results, widest := make([]measured, len(probes)), time.Duration(0)
	for i, probe := range probes {
		results[i] = measure(probe.Stop(), next, listening)
		widest = max(widest, results[i].gap)
	}
	rows := [][]string{{"client", "failed once " + next + " listened", "failed before", "requests", "excess", "longest gap", ""}}
	good := true
	for i, m := range results {
		rows = append(rows, []string{
			string(clients[i].Kind), strconv.Itoa(m.failedAfter), strconv.Itoa(m.failed - m.failedAfter), strconv.Itoa(m.sent), ms(m.excess),
			ms(m.gap), m.bar(widest),
		})
		good = good && m.answered && m.failedAfter == 0
	}
	t.table(rows...)
	t.tell("%c is the pods' own gap, which no network can close: %s from the end of %s to %s listening.", pods, ms(listening.Sub(ended)), former, next)
	t.tell("%c is the excess that comes on top: from %s listening to the client's first answer. In it is the client's own", excess, next)
	t.tell("pause, up to %s between two requests, and %s for a datagram that nobody can have answered.", ms(interval), ms(datagramTimeout))
	t.outcome(good, "%s", map[bool]string{
		true: "every request sent once " + next + " listened was answered", false: "requests failed although " + next + " listened",
	}[good])
	return nil
}

// nobody takes the target away.
func (t *tour) nobody(ctx context.Context) error {
	t.chapter("No target")
	t.tell("The last target goes. The magic IP is refused at once, rather than sent to the default route to time out.")
	if err := t.echo.Close(); err != nil {
		return err
	}
	if err := t.del(ctx); err != nil {
		return err
	}
	if _, err := t.untilEndpoint(ctx); err != nil {
		return err
	}
	// A pod of its own: the other's share of ICMP errors has been used up in the chapters before.
	pod := lab.Pod{Name: "client-2", Labels: map[string]string{"app": "client"}}
	client, err := t.node.Add(ctx, network, pod)
	if err != nil {
		return err
	}
	for _, c := range []struct {
		kind  lab.Kind
		to    netip.AddrPort
		times int
	}{
		{lab.NewConnection, tcp(), 20},
		{lab.UDP, udp(), 3},
	} {
		var took []time.Duration
		good := true
		for range c.times {
			asked := time.Now()
			_, err := t.node.Ask(ctx, lab.Client{Kind: c.kind, From: pod.Name, To: c.to})
			took = append(took, time.Since(asked))
			if ctx.Err() != nil {
				return ctx.Err()
			}
			good = good && errors.Is(err, syscall.ECONNREFUSED)
		}
		slices.Sort(took)
		t.request("a pod ("+client.IPs[0].String()+")", c.kind, c.to)
		t.outcome(good, "connection refused, %d times in a row: %s at the median, %s at the most", c.times, ms(took[c.times/2]), ms(took[c.times-1]))
	}
	t.tell("TCP is refused by a reset, always. A datagram is refused by ICMP, which the kernel limits for each client to")
	t.tell("about one a second after the first few (sysctl net.ipv4.icmp_ratelimit): between them it is dropped.")
	return nil
}

// lookInside shows files and rules as a person would look at them.
func (t *tour) lookInside(ctx context.Context) error {
	t.chapter("What a person finds on the node")
	if err := t.add(ctx, "echo-4"); err != nil {
		return err
	}
	if _, err := t.untilEndpoint(ctx); err != nil {
		return err
	}
	t.tell("With a target again, echo-4:")
	for _, command := range [][]string{
		{t.agent, "status"},
		{"cat", runtimedir.New(lab.RuntimeDir).StatePath()},
		{"nft", "list", "table", "ip", table},
	} {
		if command[0] == "nft" && !t.rules {
			t.tell("The rules in the kernel, some 200 lines, are shown by: make demo DEMO=--rules")
			break
		}
		t.command("%s %s", filepath.Base(command[0]), strings.Join(command[1:], " "))
		out, err := t.node.Run(ctx, command[0], command[1:]...)
		if err != nil {
			return err
		}
		t.show(out)
	}
	t.tell("")
	t.tell("The node with all its namespaces ends here; nothing of it is left on this machine.")
	return nil
}

// request prints what is asked, and by whom.
func (t *tour) request(who string, kind lab.Kind, to netip.AddrPort) {
	what := "GET http://" + strings.TrimSuffix(to.String(), ":80") + "/"
	if kind == lab.UDP {
		what = "datagram to " + to.String()
	}
	fmt.Fprintf(t.out, "   %s from %s\n", t.paint(cyan, "→ "+what), who)
}

// add attaches a new target, whose process does not run yet.
func (t *tour) add(ctx context.Context, name string) error {
	attached, err := t.node.Add(ctx, network, lab.Pod{Name: name, Labels: map[string]string{"app": "echo"}})
	if err != nil {
		return err
	}
	t.target, t.addr = name, attached.IPs[0]
	return nil
}

// del takes the target's sandbox away.
func (t *tour) del(ctx context.Context) error {
	err := t.node.Del(ctx, network, lab.Pod{Name: t.target})
	t.target, t.addr = "", netip.Addr{}
	return err
}

// listen starts the target's process.
func (t *tour) listen() (err error) {
	t.echo, err = t.node.StartEcho(t.target, t.target, targetPort)
	return err
}

const patience = 10 * time.Second // with what happens soon or never

func (t *tour) await(ctx context.Context, condition func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return lab.Eventually(ctx, condition)
}

func (t *tour) published() (*runtimedir.Status, error) {
	p, err := runtimedir.New(t.node.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("the agent has published nothing")
	}
	return p, err
}

// untilEndpoint waits until the agent has loaded the present target as the endpoint, or none where there
// is none. took is from the plugin's record to the agent's file, which it writes when the rules are loaded.
func (t *tour) untilEndpoint(ctx context.Context) (took time.Duration, err error) {
	want := ""
	if t.target != "" {
		want = "default/" + t.target
	}
	err = t.await(ctx, func() error {
		p, err := t.published()
		if err != nil {
			return err
		}
		for _, m := range p.MagicIPs {
			got := ""
			if len(m.Endpoints) > 0 {
				got = m.Endpoints[0].Pod
			}
			if got != want {
				return fmt.Errorf("the endpoint of %s is %q, want %q", net.JoinHostPort(m.Address.String(), strconv.Itoa(int(m.Port))), got, want)
			}
		}
		return nil
	})
	if err != nil || want == "" {
		return 0, err
	}
	dir := t.node.Path(lab.RuntimeDir)
	info, err := os.Stat(runtimedir.New(dir).Agent(agentName).StatusPath())
	if err != nil {
		return 0, err
	}
	file, err := runtimedir.New(dir).ReadState()
	for _, record := range file.Attachments {
		if record.Name == t.target {
			return max(0, info.ModTime().Sub(record.AddedAt)), nil
		}
	}
	return 0, errors.Join(fmt.Errorf("no record of %s", t.target), err)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
