package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The addresses of the model: pods are 10.244.3.0/24 and fd00:10:244:3::/64; the magic IPs that a client asks
// are those of the packet tests and are always configured; others (169.254.210.220 to .223, fd00:a9fe:d2d2::20)
// come and go; the marker is 198.51.100.1.
const (
	markerIP   = "198.51.100.1"
	modelPods  = 5
	otherPort  = 8081 // of every server, besides port
	configFile = "/run/model/agent.yaml"
	traceTime  = "15:04:05.000 "
)

// TestModel does to a node whatever may happen to it, in random order: pods come and go, addresses and UIDs
// are used again, the configuration changes, rules are damaged, the agent is killed, the state file is lost,
// sandboxes vanish without a DEL. Again and again it lets the agent settle, and then the kernel must hold what
// follows from the records and the configuration, as worked out here without the agent's code, and a client
// must meet just that. A client that never stops asking is never left in silence, and never reaches the
// impostor who owns the magic IPs on the network beyond, but for what begins while somebody has taken the
// rules away.
//
// MODEL_SEED=random, or a number, and MODEL_EVENTS make another run, or a longer one. The usual one is the same each time.
func TestModel(t *testing.T) {
	t.Parallel()
	seed, events := uint64(20260101), 10000
	switch text := os.Getenv("MODEL_SEED"); text {
	case "":
	case "random":
		seed = uint64(time.Now().UnixNano())
	default:
		seed = number(t, text)
	}
	t.Logf("seed %d", seed)
	if text := os.Getenv("MODEL_EVENTS"); text != "" {
		events = int(number(t, text))
	}
	m := newModel(t, seed)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat: MODEL_SEED=%d MODEL_EVENTS=%d go test -run TestModel ./integration\nthe last events:\n%s",
				seed, events, strings.Join(m.trace[max(0, len(m.trace)-200):], "\n"))
		}
	})
	m.settle()
	settles := 0
	for done := 0; done < events; settles++ {
		batch := min(1+m.random.IntN(250), events-done)
		for range batch {
			m.event()
		}
		done += batch
		m.settle()
		if m.random.IntN(15) == 0 {
			m.silentStateFile()
		}
	}
	m.stop()
	t.Logf("%d events (%v), %d settles", events, m.count, settles)
}

func number(t *testing.T, text string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// model is a node and what should be on it.
type model struct {
	*world
	random  *rand.Rand
	client  lab.Attached
	pods    []*modelPod
	records []runtimedir.Attachment // in the order of their ADDs, as they are in the state file
	magic   []modelMagicIP

	generation int // of the configuration
	settles    int
	serial     int // of containers
	damaged    time.Time
	fixed      map[string][]string // the rules that are the same whatever is configured
	exposed    []span              // when rules were missing, which is nobody's fault but the one's who took them
	probes     []*modelProbe
	trace      []string
	count      map[string]int
}

type span struct{ from, to time.Time }

// modelPod is a sandbox with a server in it, which is there whatever is recorded of it.
type modelPod struct {
	lab.Pod
	ips    []netip.Addr
	link   string
	broken bool // its link is gone
	echoes []*lab.Echo
}

type modelMagicIP struct {
	address      netip.Addr
	namespace    string
	selector     string
	targetPort   uint16
	protocols    []string
	random       bool
	noEndpoint   string
	hostClients  bool
	exclude      bool
	configured   bool
	alwaysProbed bool
}

func (m modelMagicIP) String() string {
	return fmt.Sprintf("%s configured=%t %s %q to %d by %v random=%t %s host=%t exclude=%t",
		m.address, m.configured, m.namespace, m.selector, m.targetPort, m.protocols, m.random, m.noEndpoint, m.hostClients, m.exclude)
}

// modelProbe is a client that asks all the time.
type modelProbe struct {
	*lab.Probe
	lab.Client
}

// selectors and what they mean.
var modelSelectors = map[string]func(labels map[string]string) bool{
	"app=a":         func(l map[string]string) bool { return l["app"] == "a" },
	"app=b":         func(l map[string]string) bool { return l["app"] == "b" },
	"app in (a, b)": func(l map[string]string) bool { return l["app"] == "a" || l["app"] == "b" },
	"app,tier!=x":   func(l map[string]string) bool { return l["app"] != "" && l["tier"] != "x" },
}

// modelRecorded selects the pods that the plugin records. It names every label of modelSelectors: the plugin keeps no others.
const modelRecorded = "app,tier!=none"

// The magic IPs that are probed without a pause: those of magic().
const modelMagic4, modelMagic6 = "169.254.210.210", "fd00:a9fe:d2d2::210"

var (
	modelPrefix  = regexp.MustCompile(`map\[match:map\[left:map\[(payload:map\[field:[sd]addr protocol:ip6?\]|ct:map\[dir:original key:ip6? daddr\])\] op:== right:map\[prefix:map\[addr:\S+ len:\d+\]\]\]\] `)
	modelAddress = regexp.MustCompile(`right:(@(host-)?addresses|` + modelMagic6 + `)`)
)

func newModel(t *testing.T, seed uint64) *model {
	m := &model{random: rand.New(rand.NewPCG(seed, 0)), count: map[string]int{}}
	m.world = &world{Node: newNode(t), t: t, backend: "nftables", kind: "bridge", names: map[netip.Addr]string{}}
	// The real plugin is for the same pods as the configurations below.
	conf := strings.Replace(string(conflist(t, "30-dual-stack.conflist")), `"namespace": "default", "selector": "app=echo"`, `"namespace": "*", "selector": "`+modelRecorded+`"`, 1)
	addConf(t, m.Node, "30-dual-stack.conflist", []byte(conf))
	if err := m.AllICMPErrors(); err != nil {
		t.Fatal(err)
	}
	m.impostor()
	m.client = add(t, m.Node, "dual-stack", lab.Pod{Name: "client"}) // without labels, so unrecorded
	for i := range modelPods {
		pod := &modelPod{Pod: lab.Pod{Name: fmt.Sprintf("pod-%d", i)}}
		m.pods = append(m.pods, pod)
		m.attach(pod)
	}
	for _, address := range []string{modelMagic4, modelMagic6, "169.254.210.220", "169.254.210.221", "169.254.210.222", "169.254.210.223", "fd00:a9fe:d2d2::20"} {
		m.magic = append(m.magic, modelMagicIP{address: netip.MustParseAddr(address), alwaysProbed: address == modelMagic4 || address == modelMagic6})
		m.reconfigure(&m.magic[len(m.magic)-1])
	}
	for _, magic := range m.magic {
		m.note("config", "%s", magic)
	}
	m.writeConfig()
	m.startAgent()
	for _, six := range []bool{false, true} {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			client := lab.Client{Kind: kind, From: "client", To: magic(six), Timeout: 3 * time.Second}
			if kind == lab.UDP {
				client.Timeout = 100 * time.Millisecond // a datagram on its way to a sandbox that vanishes is lost
			}
			m.probes = append(m.probes, &modelProbe{m.StartProbe(client, 20*time.Millisecond), client})
		}
	}
	return m
}

// impostor owns the magic IPs that are probed on the network beyond the node.
func (m *model) impostor() {
	for _, address := range []string{modelMagic4 + "/32", modelMagic6 + "/128"} {
		if _, err := m.Run(m.t.Context(), "ip", "-n", "uplink", "address", "add", address, "dev", "lo", "nodad"); err != nil {
			m.t.Fatal(err)
		}
	}
	for _, six := range []bool{false, true} {
		echo, err := m.StartEchoAt(lab.Uplink, "impostor", magic(six).String())
		if err != nil {
			m.t.Fatal(err)
		}
		m.t.Cleanup(func() { _ = echo.Close() })
	}
}

func (m *model) startAgent() {
	m.t.Helper()
	before := time.Now()
	agent, err := m.StartAgent(nil, "--config", configFile, "--log-level", "debug")
	if err != nil {
		m.t.Fatal(err)
	}
	previous := m.agent
	m.agent = agent
	if previous == nil {
		m.t.Cleanup(func() {
			if m.t.Failed() {
				log := m.agent.Log()
				m.t.Logf("log of the agent:\n%s", log[max(0, len(log)-20000):])
			}
		})
	}
	m.await("to run", func(a *runtimedir.Status) bool { return a.StartedAt.After(before) && !a.LastSync.IsZero() })
}

func (m *model) note(kind, format string, args ...any) {
	m.count[kind]++
	m.trace = append(m.trace, time.Now().Format(traceTime)+kind+" "+fmt.Sprintf(format, args...))
}

// event is one thing that happens.
func (m *model) event() {
	switch dice := m.random.IntN(1000); {
	case dice < 2:
		m.damage()
	case dice < 4:
		m.note("restart", "")
		m.agent.Kill()
		m.startAgent()
	case dice < 5:
		m.sandbox(m.pods[m.random.IntN(len(m.pods))])
	case dice < 40:
		changed := &m.magic[m.random.IntN(len(m.magic))]
		m.reconfigure(changed)
		m.note("config", "%s", *changed)
		m.writeConfig()
	case dice < 60:
		m.pluginDel()
	case dice < 80:
		m.pluginAdd()
	case dice < 500 || len(m.records) > 12:
		m.del()
	default:
		m.add()
	}
}

// attach makes the pod's sandbox. Nothing is recorded of it: it has no labels.
func (m *model) attach(pod *modelPod) {
	m.t.Helper()
	attached := add(m.t, m.Node, "dual-stack", pod.Pod)
	pod.ips, pod.link, pod.broken = attached.IPs, hostInterface(m.t, m.Node, pod.Name).Name, false
	for _, p := range []uint16{port, otherPort} {
		echo, err := m.StartEcho(pod.Name, pod.Name, p)
		if err != nil {
			m.t.Fatal(err)
		}
		pod.echoes = append(pod.echoes, echo)
	}
}

// sandbox takes a pod's link away without a DEL, or makes a new sandbox in its place.
func (m *model) sandbox(pod *modelPod) {
	if !pod.broken {
		m.note("vanish", "%s", pod.Name)
		pod.broken = true
		if _, err := m.Run(m.t.Context(), "ip", "link", "delete", pod.link); err != nil {
			m.t.Fatal(err)
		}
		return
	}
	m.note("return", "%s", pod.Name)
	for _, echo := range pod.echoes {
		_ = echo.Close()
	}
	pod.echoes = nil
	del(m.t, m.Node, "dual-stack", pod.Pod)
	m.attach(pod)
}

// newRecord is for a pod, whose addresses other records may have as well.
func (m *model) newRecord() runtimedir.Attachment {
	pod := m.pods[m.random.IntN(len(m.pods))]
	m.serial++
	r := runtimedir.Attachment{
		ContainerID: fmt.Sprintf("c%d", m.serial), IfName: "eth0", Network: "dual-stack",
		Namespace: pick(m.random, "default", "default", "default", "other"), Name: pod.Name, UID: fmt.Sprintf("u%d", m.serial),
		Labels: map[string]string{"app": pick(m.random, "a", "a", "b", "c")},
		IPs:    slices.Clone(pod.ips), HostInterface: pod.link,
	}
	if m.random.IntN(4) == 0 {
		r.Labels["tier"] = pick(m.random, "x", "y")
	}
	if len(m.records) > 0 && m.random.IntN(6) == 0 { // a new sandbox of the same pod
		r.UID = m.records[m.random.IntN(len(m.records))].UID
	}
	if len(m.records) > 0 && m.random.IntN(10) == 0 { // a repeated ADD
		r.ContainerID = m.records[m.random.IntN(len(m.records))].ContainerID
	}
	switch m.random.IntN(15) {
	case 0:
		r.IPs = r.IPs[:1]
	case 1:
		r.HostInterface = "vanished"
	}
	return r
}

func pick(random *rand.Rand, choices ...string) string { return choices[random.IntN(len(choices))] }

func (m *model) add() {
	r := m.newRecord()
	r.AddedAt = time.Now().UTC()
	if m.random.IntN(15) == 0 {
		r.Labels = nil // not known: without the API it is nobody's target
	}
	m.note("add", "%s %s/%s uid %s %v %v %s", r.ContainerID, r.Namespace, r.Name, r.UID, r.Labels, r.IPs, r.HostInterface)
	m.remember(r)
	m.update(r.ContainerID, r)
}

func (m *model) del() {
	id := "never-added"
	if len(m.records) > 0 && m.random.IntN(20) > 0 {
		id = m.records[m.random.IntN(len(m.records))].ContainerID
	}
	m.note("del", "%s", id)
	m.forget(id)
	m.update(id)
}

func (m *model) remember(r runtimedir.Attachment) {
	m.forget(r.ContainerID)
	m.records = append(m.records, r)
}

func (m *model) forget(id string) {
	m.records = slices.DeleteFunc(m.records, func(r runtimedir.Attachment) bool { return r.ContainerID == id })
}

// update changes the state file as the plugin does. Its warning is that the file was corrupt, which is so.
func (m *model) update(gone string, add ...runtimedir.Attachment) {
	m.t.Helper()
	if _, err := runtimedir.New(m.Path(lab.RuntimeDir)).Update(10*time.Second, []runtimedir.Key{{ContainerID: gone, IfName: "eth0"}}, add...); err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) writeState(data []byte) {
	m.t.Helper()
	if err := replaceFile(runtimedir.New(m.Path(lab.RuntimeDir)).StatePath(), data); err != nil {
		m.t.Fatal(err)
	}
}

func replaceFile(path string, data []byte) error {
	if err := os.WriteFile(path+".new", data, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// pluginAdd and pluginDel do it with the plugin itself.
func (m *model) pluginAdd() {
	r := m.newRecord()
	if !m.stands(r) {
		return // an ADD makes its link before
	}
	m.note("plugin-add", "%s %s/%s uid %s %v %v %s", r.ContainerID, r.Namespace, r.Name, r.UID, r.Labels, r.IPs, r.HostInterface)
	type object = map[string]any
	var ips []object
	for _, ip := range r.IPs {
		ips = append(ips, object{"address": netip.PrefixFrom(ip, ip.BitLen()-8).String(), "interface": 1})
	}
	m.plugin("ADD", r.ContainerID, object{
		"runtimeConfig": object{"labels": r.Labels},
		"prevResult": object{"cniVersion": "1.1.0", "ips": ips, "interfaces": []object{
			{"name": r.HostInterface}, {"name": "eth0", "sandbox": "/run/netns/" + r.Name},
		}},
	}, fmt.Sprintf("CNI_ARGS=K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_UID=%s;IgnoreUnknown=1", r.Namespace, r.Name, r.UID))
	m.remember(r)
}

func (m *model) pluginDel() {
	id := "never-added"
	if len(m.records) > 0 && m.random.IntN(20) > 0 {
		id = m.records[m.random.IntN(len(m.records))].ContainerID
	}
	m.note("plugin-del", "%s", id)
	m.plugin("DEL", id, nil)
	m.forget(id)
}

func (m *model) plugin(command, containerID string, more map[string]any, env ...string) {
	m.t.Helper()
	conf := map[string]any{
		"cniVersion": "1.1.0", "name": "dual-stack", "type": "magic-ip-address", "runtimeDir": lab.RuntimeDir,
		"selectors": map[string]any{agentName: []any{map[string]any{"namespace": "*", "selector": modelRecorded}}},
	}
	for key, value := range more {
		conf[key] = value
	}
	data, err := json.Marshal(conf)
	if err != nil {
		m.t.Fatal(err)
	}
	env = append(env, "CNI_COMMAND="+command, "CNI_CONTAINERID="+containerID, "CNI_IFNAME=eth0", "CNI_NETNS=/run/netns/client")
	if _, err := m.ExecPlugin(m.t.Context(), data, env...); err != nil {
		m.t.Fatal(err)
	}
}

// damage takes rules away, as other tools and people do.
func (m *model) damage() {
	table := "magic-ip-" + agentName
	command := pick(m.random,
		"flush ruleset",
		"delete table ip "+table,
		"delete table ip6 "+table,
		"flush map ip "+table+" actions",
		"flush map ip "+table+" destinations",
		"flush map ip6 "+table+" destinations",
		"flush set ip "+table+" addresses",
		"flush chain ip6 "+table+" nat-prerouting",
	)
	m.note("damage", "%s", command)
	if m.damaged.IsZero() {
		m.damaged = time.Now()
	}
	// The agent may be about to mend what came before.
	if _, err := m.Run(m.t.Context(), "nft", command); err != nil && !strings.Contains(err.Error(), "No such file or directory") {
		m.t.Fatal(err)
	}
}

func (m *model) reconfigure(magic *modelMagicIP) {
	random := m.random
	names := []string{"app=a", "app=b", "app in (a, b)", "app,tier!=x"}
	magic.configured = magic.alwaysProbed || random.IntN(3) > 0
	magic.namespace = pick(random, "default", "default", "other", "*")
	magic.selector = pick(random, names...)
	magic.targetPort = []uint16{port, otherPort}[random.IntN(2)]
	magic.random = random.IntN(3) == 0
	magic.protocols, magic.noEndpoint, magic.hostClients, magic.exclude = []string{"tcp", "udp"}, "reject", true, false
	if !magic.alwaysProbed {
		magic.protocols = [][]string{{"tcp"}, {"udp"}, {"tcp", "udp", "sctp"}}[random.IntN(3)]
		magic.noEndpoint = pick(random, "reject", "pass", "hold")
		magic.hostClients, magic.exclude = random.IntN(3) > 0, random.IntN(3) == 0
	}
}

func (m *model) writeConfig() {
	m.t.Helper()
	m.generation++
	var text strings.Builder
	fmt.Fprintf(&text, "name: %s\npollInterval: 1s\nmagicIPs:\n", agentName)
	fmt.Fprintf(&text, "- {ipAddress: %s, namespace: marker, selector: marker=here, ports: [{port: %d}]}\n", markerIP, m.generation)
	for _, magic := range m.magic {
		if !magic.configured {
			continue
		}
		distribution := map[bool]string{false: "single", true: "random"}[magic.random]
		fmt.Fprintf(&text, "- ipAddress: %q\n  namespace: %q\n  selector: %q\n  distribution: %s\n  noEndpoint: %s\n  holdFor: 1h\n  hostClients: %t\n  excludeTarget: %t\n  ports:\n",
			magic.address, magic.namespace, magic.selector, distribution, magic.noEndpoint, magic.hostClients, magic.exclude)
		for _, protocol := range magic.protocols {
			fmt.Fprintf(&text, "  - {port: %d, targetPort: %d, protocol: %s}\n", port, magic.targetPort, protocol)
		}
	}
	path := m.Path(configFile)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err = errors.Join(err, replaceFile(path, []byte(text.String()))); err != nil {
		m.t.Fatal(err)
	}
}

// targets are the records whose addresses traffic for the magic IP may go to, the best one first.
func (m *model) targets(magic modelMagicIP) []netip.Addr {
	standing := slices.DeleteFunc(slices.Clone(m.records), func(r runtimedir.Attachment) bool { return !m.stands(r) })
	var found []netip.Addr
	for i, r := range standing {
		if magic.namespace != "*" && magic.namespace != r.Namespace || !modelSelectors[magic.selector](r.Labels) {
			continue
		}
		later := standing[i+1:]
		if slices.ContainsFunc(later, func(l runtimedir.Attachment) bool {
			return l.Namespace == r.Namespace && l.Name == r.Name && l.UID == r.UID
		}) {
			continue // the pod has a newer sandbox
		}
		for _, ip := range r.IPs {
			taken := slices.ContainsFunc(later, func(l runtimedir.Attachment) bool { return slices.Contains(l.IPs, ip) })
			if ip.Is6() == magic.address.Is6() && !taken {
				found = append(found, ip)
			}
		}
	}
	slices.Reverse(found)
	if !magic.random && len(found) > 1 {
		found = found[:1]
	}
	return found
}

// stands reports whether the link to the sandbox of a record is there.
func (m *model) stands(r runtimedir.Attachment) bool {
	return slices.ContainsFunc(m.pods, func(p *modelPod) bool { return p.link == r.HostInterface && !p.broken })
}

// wanted is what the kernel should hold, by frontend.
func (m *model) wanted() map[string]string {
	wanted := map[string]string{}
	for _, magic := range m.magic {
		if !magic.configured {
			continue
		}
		targets := m.targets(magic)
		var endpoints []string
		for _, target := range targets {
			endpoints = append(endpoints, netip.AddrPortFrom(target, magic.targetPort).String())
		}
		slices.Sort(endpoints)
		action := "serve"
		if len(targets) == 0 {
			// Whether an endpoint came and went between two looks of the agent decides between the two.
			action = map[string]string{"reject": "reject", "pass": "pass", "hold": "hold or reject"}[magic.noEndpoint]
		}
		host := "accept"
		if magic.hostClients && len(targets) == 0 && magic.noEndpoint != "pass" {
			host = action
		}
		for _, protocol := range magic.protocols {
			text := fmt.Sprintf("pods: %s; host: %s; to: %s", action, host, strings.Join(endpoints, ", "))
			if magic.exclude {
				var excluded []string
				for _, target := range targets {
					excluded = append(excluded, target.String())
				}
				slices.Sort(excluded)
				text += "; but from: " + strings.Join(excluded, ", ")
			}
			if protocol == "udp" && len(targets) == 1 && !magic.random {
				text += "; in a zone"
			}
			wanted[fmt.Sprintf("%s %s %d", magic.address, protocol, port)] = text
		}
	}
	return wanted
}

// kernel is what the kernel holds, in the same words.
func (m *model) kernel() (map[string]string, error) {
	printed, err := m.Run(m.t.Context(), "nft", "--json", "list", "ruleset")
	if err != nil {
		return nil, err
	}
	rules, err := parseRuleset([]byte(printed))
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	// They are there for as long as a magic IP has a UDP port with one endpoint.
	maps.DeleteFunc(rules.fixed, func(chain string, _ []string) bool {
		_, name, _ := strings.Cut(chain, " ")
		return strings.HasPrefix(name, "zone")
	})
	for chain, lines := range rules.fixed {
		// They are there for as long as a magic IP has excludeTarget, or has not hostClients.
		lines = slices.DeleteFunc(lines, func(line string) bool {
			return strings.Contains(line, "right:@excluded") || strings.Contains(line, "right:@host-excluded")
		})
		for i, line := range lines {
			// One address is compared; of several, the prefix that they have in common before the set.
			line = modelPrefix.ReplaceAllString(line, "")
			lines[i] = modelAddress.ReplaceAllString(line, "right:(an address)")
		}
		rules.fixed[chain] = lines
	}
	if m.fixed == nil {
		m.fixed = rules.fixed
	}
	if diff := cmp.Diff(m.fixed, rules.fixed); diff != "" {
		found["other rules than at the start: "+diff] = ""
	}
	for key, verdict := range rules.maps["actions"] {
		if strings.HasPrefix(key, markerIP+" ") {
			continue
		}
		// The magic IP itself must be in the set that leads to the rules.
		address, _, _ := strings.Cut(key, " ")
		if _, there := rules.maps["addresses"][address]; !there {
			found["addresses lacks "+address] = ""
		}
		var endpoints []string
		if endpoint, there := rules.maps["destinations"][key]; there {
			ip, port, _ := strings.Cut(endpoint, " ")
			endpoints = []string{netip.AddrPortFrom(netip.MustParseAddr(ip), uint16(number(m.t, port))).String()}
		}
		if chain, there := rules.maps["spreads"][key]; there {
			endpoints = append(endpoints, rules.spread[strings.TrimPrefix(chain, "goto ")]...)
		}
		slices.Sort(endpoints)
		magic := m.magic[slices.IndexFunc(m.magic, func(magic modelMagicIP) bool { return magic.address.String() == address })]
		word := func(verdict string) string {
			action, _, _ := strings.Cut(strings.TrimPrefix(verdict, "goto "), "-")
			if magic.noEndpoint == "hold" && (action == "hold" || action == "reject") {
				return "hold or reject"
			}
			return action
		}
		text := fmt.Sprintf("pods: %s; host: %s; to: %s", word(verdict), word(rules.maps["host-actions"][key]), strings.Join(endpoints, ", "))
		var excluded []string
		for source := range rules.maps["excluded"] {
			if address, found := strings.CutSuffix(source, " "+key); found {
				excluded = append(excluded, address)
			}
		}
		if magic.exclude || len(excluded) > 0 {
			slices.Sort(excluded)
			text += "; but from: " + strings.Join(excluded, ", ")
		}
		if parts := strings.Fields(key); parts[1] == "udp" {
			if _, zoned := rules.maps["zones"][parts[0]+" "+parts[2]]; zoned {
				text += "; in a zone"
			}
		}
		found[key] = text
	}
	for key := range rules.maps["destinations"] {
		if rules.maps["actions"][key] == "" {
			found["endpoint without service "+key] = ""
		}
	}
	return found, nil
}

// parsedRuleset is what nft lists of the agent's tables of both families.
type parsedRuleset struct {
	maps   map[string]map[string]string // elements of sets and maps, by name; the parts of keys and values separated by spaces
	spread map[string][]string          // the endpoints in the chains that spread, by chain
	fixed  map[string][]string          // all other rules, by chain
}

func parseRuleset(printed []byte) (parsedRuleset, error) {
	rules := parsedRuleset{maps: map[string]map[string]string{}, spread: map[string][]string{}, fixed: map[string][]string{}}
	var document struct {
		Nftables []map[string]json.RawMessage
	}
	if err := json.Unmarshal(printed, &document); err != nil {
		return rules, err
	}
	for _, object := range document.Nftables {
		for kind, data := range object {
			var fields struct {
				Family, Name, Table, Chain string
				Elem, Expr                 []any
			}
			if kind == "metainfo" {
				continue
			}
			if err := json.Unmarshal(data, &fields); err != nil {
				return rules, fmt.Errorf("%s: %w", data, err)
			}
			if fields.Table != "magic-ip-"+agentName {
				continue
			}
			switch kind {
			case "set", "map":
				if rules.maps[fields.Name] == nil {
					rules.maps[fields.Name] = map[string]string{}
				}
				for _, element := range fields.Elem {
					if pair, isPair := element.([]any); isPair {
						rules.maps[fields.Name][words(pair[0])] = words(pair[1])
					} else {
						rules.maps[fields.Name][words(element)] = ""
					}
				}
			case "rule":
				if strings.HasPrefix(fields.Chain, "spread-") {
					rules.spread[fields.Chain] = append(rules.spread[fields.Chain], translations(fields.Expr)...)
				} else {
					chain := fields.Family + " " + fields.Chain
					rules.fixed[chain] = append(rules.fixed[chain], fmt.Sprint(fields.Expr))
				}
			}
		}
	}
	return rules, nil
}

// words flattens an expression of nft's JSON: the parts of a concatenation, or "goto" and a chain.
func words(expression any) string {
	switch e := expression.(type) {
	case map[string]any:
		for kind, argument := range e {
			switch kind {
			case "concat":
				return words(argument)
			case "elem": // with a counter
				return words(argument.(map[string]any)["val"])
			case "goto":
				return "goto " + words(argument.(map[string]any)["target"])
			default:
				return kind // accept: null
			}
		}
	case []any:
		var parts []string
		for _, part := range e {
			parts = append(parts, words(part))
		}
		return strings.Join(parts, " ")
	case float64:
		return strconv.Itoa(int(e))
	}
	return fmt.Sprint(expression)
}

// translations finds the values of the map in a rule that spreads: address and port.
func translations(expression any) []string {
	var found []string
	switch e := expression.(type) {
	case map[string]any:
		if parts, ok := e["concat"].([]any); ok && len(parts) == 2 {
			if ip, err := netip.ParseAddr(words(parts[0])); err == nil {
				return []string{netip.AddrPortFrom(ip, uint16(parts[1].(float64))).String()}
			}
		}
		for _, argument := range e {
			found = append(found, translations(argument)...)
		}
	case []any:
		for _, part := range e {
			found = append(found, translations(part)...)
		}
	}
	return found
}

// settle waits until the agent has acted on all events so far, and checks. A last record, of a target of the
// marker, tells when: its address is new, and the marker's port is the generation of the configuration.
func (m *model) settle() {
	m.t.Helper()
	m.settles++
	unique := netip.AddrFrom4([4]byte{198, 18, byte(m.settles >> 8), byte(m.settles)})
	m.update("marker", runtimedir.Attachment{
		ContainerID: "marker", IfName: "eth0", Namespace: "marker", Name: "marker", UID: "marker",
		Labels: map[string]string{"marker": "here"}, IPs: []netip.Addr{unique}, AddedAt: time.Now().UTC(),
	})
	m.await("to come to the marker", func(a *runtimedir.Status) bool {
		return slices.ContainsFunc(a.MagicIPs, func(p runtimedir.MagicIP) bool {
			return p.Address.String() == markerIP && int(p.Port) == m.generation && len(p.Endpoints) == 1 && p.Endpoints[0].Address.Addr() == unique
		})
	})
	m.note("settle", "%d", m.settles)
	m.check()
	if !m.damaged.IsZero() {
		m.exposed = append(m.exposed, span{m.damaged, time.Now()})
		m.damaged = time.Time{}
	}
}

// check compares the kernel with the model, and asks.
func (m *model) check() {
	m.t.Helper()
	wanted := m.wanted()
	err := lab.Eventually(patience(m.t), func() error {
		found, err := m.kernel()
		if diff := cmp.Diff(wanted, found); err == nil && diff != "" {
			err = errors.New(diff)
		}
		return err
	})
	if err != nil {
		m.t.Fatalf("settle %d: the kernel is not as it should be (-want +got):\n%v", m.settles, err)
	}
	for _, magic := range m.magic {
		if !magic.alwaysProbed {
			continue
		}
		var allowed []string
		for _, target := range m.targets(magic) {
			pod := m.pods[slices.IndexFunc(m.pods, func(p *modelPod) bool { return slices.Contains(p.ips, target) })]
			allowed = append(allowed, "answered by "+pod.Name)
		}
		if len(allowed) == 0 {
			allowed = []string{"refused"}
		}
		from := pick(m.random, "client", "client", lab.Host)
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			got, _, _ := strings.Cut(m.fate(from, kind, netip.AddrPortFrom(magic.address, port)), ",")
			if strings.HasPrefix(got, "refused after") {
				got = "refused" // the machine was busy
			}
			if !slices.Contains(allowed, got) {
				m.t.Errorf("settle %d: %q by %s to %s: got %q, want one of %q", m.settles, from, kind, magic.address, got, allowed)
			}
		}
		for _, probe := range m.probes {
			if probe.To.Addr() == magic.address {
				m.checkProbe(probe, allowed)
			}
		}
	}
	if m.t.Failed() {
		m.t.FailNow()
	}
}

// checkProbe: the client whose socket is older than the last change meets the same.
func (m *model) checkProbe(probe *modelProbe, allowed []string) {
	m.t.Helper()
	ctx, cancel := lab.Patience(m.t.Context(), 5*time.Second)
	defer cancel()
	_, err := probe.Await(ctx, func(o lab.Outcome) bool { return slices.Contains(allowed, outcome(o)) })
	if err != nil {
		all := probe.Outcomes()
		flows, _ := m.Run(m.t.Context(), "sh", "-c", "conntrack -L -f ipv4; conntrack -L -f ipv6")
		m.t.Errorf("settle %d: the %s client of %s: %v; the last outcome was %q, want one of %q; the flows:\n%s",
			m.settles, probe.Kind, probe.To, err, outcome(all[len(all)-1]), allowed, flows)
	}
}

func outcome(o lab.Outcome) string {
	switch {
	case o.Err == nil:
		return "answered by " + o.Server
	case errors.Is(o.Err, context.DeadlineExceeded), errors.Is(o.Err, os.ErrDeadlineExceeded):
		return "silence"
	}
	return "refused"
}

// silentStateFile takes the state file away, or spoils it, for a while in which the agent may be restarted:
// what it knew counts on.
func (m *model) silentStateFile() {
	path := runtimedir.New(m.Path(lab.RuntimeDir)).StatePath()
	data, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	if spoil := pick(m.random, "", "{", `{"version": 999}`); spoil == "" {
		m.note("silent", "the state file is lost for a while")
		if err := os.Remove(path); err != nil {
			m.t.Fatal(err)
		}
	} else {
		m.note("silent", "the state file is %q for a while", spoil)
		m.writeState([]byte(spoil))
	}
	if m.random.IntN(2) == 0 {
		m.note("restart", "without a state file")
		m.agent.Kill()
		m.startAgent()
	} else {
		m.await("to notice", func(a *runtimedir.Status) bool { return strings.Contains(a.LastError, "state") })
	}
	m.check()
	m.writeState(data)
	m.settle()
}

// around are the events within a second of a moment.
func (m *model) around(moment time.Time) []string {
	from, to := moment.Add(-time.Second).Format(traceTime), moment.Add(time.Second).Format(traceTime)
	return slices.DeleteFunc(slices.Clone(m.trace), func(line string) bool { return line < from || line > to })
}

// stop ends the probes and looks at all that they met.
func (m *model) stop() {
	m.t.Helper()
	met := map[string]int{}
	for _, probe := range m.probes {
		for _, o := range probe.Stop() {
			got := outcome(o)
			met[got]++
			end := o.Sent.Add(o.Took)
			exposed := slices.ContainsFunc(m.exposed, func(s span) bool { return o.Sent.Before(s.to) && end.After(s.from) })
			// A connection with the impostor, begun while the rules were gone, may end without a word when they are back. Seen: without
			// rules nothing is tracked; the client's port was one that it had used shortly before, and conntrack, tracking again
			// with the entry of that old connection, gave the impostor's answer another source port.
			// On a busy machine the connection begins later than the client.
			begunExposed := slices.ContainsFunc(m.exposed, func(s span) bool {
				return lab.WorkingTime(o.Sent, s.from) < 50*time.Millisecond && o.Sent.Before(s.to)
			})
			if got == "answered by impostor" && !exposed {
				m.t.Errorf("%s client of %s: answered by the impostor at %s, where nobody had touched the rules", probe.Kind, probe.To, o.Sent.Format(time.RFC3339Nano))
			}
			if got == "silence" && probe.Kind == lab.NewConnection && !begunExposed {
				m.t.Errorf("%s client of %s: no answer within %v at %s (rules damaged meanwhile: %t); around then:\n%s",
					probe.Kind, probe.To, o.Took, o.Sent.Format(time.RFC3339Nano), exposed, strings.Join(m.around(o.Sent), "\n"))
			}
		}
	}
	m.t.Logf("the clients met: %v", met)
}
