package integration

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
)

// row is a case that every backend has to pass for both families, on each of these networks.
type row struct {
	name string
	on   []string
}

var (
	onBridge     = []string{"bridge"}
	onEveryKind  = []string{"bridge", "ptp", "cali"}
	onBridgePtp  = []string{"bridge", "ptp"}
	matrixFamily = []string{"v4", "v6"}
)

// The cases, in the order of the printed matrix: who, what is special, and what has to happen. "Served"
// is over TCP and UDP, "source kept" is that the target sees the client's own address.
const (
	podServed     = "pod: served, source kept"
	podOtherPort  = "pod, other port: refused"
	podPing       = "pod and host process, ping: refused"
	hairpin       = "target itself: served, masqueraded"
	hairpinLeft   = "target itself, excludeTarget: left alone"
	hairpinOthers = "pod, excludeTarget: served, source kept"
	hostServed    = "host process or hostNetwork pod: served"
	hostOtherPort = "host process, other port: refused"
	hostLeft      = "host process, hostClients false: left alone"
	hostLeftPods  = "pod, hostClients false: served, source kept"
	uplinkDropped = "uplink: dropped; the pod's own address is not"
	nicDropped    = "second NIC without default route: dropped"
	interfaceOne  = "hostInterface NAME: others refused, uplink dropped"
	interfaceAny  = "hostInterface PREFIX+: others refused, uplink dropped"
	interfaceList = "hostInterface LIST: others refused, uplink dropped"
	nonePod       = "no endpoint, pod: refused"
	noneHost      = "no endpoint, host process: refused"
	noneUplink    = "no endpoint, uplink and second NIC: dropped"
	nonePass      = "no endpoint, pass: left alone"
	noneHold      = "no endpoint, hold: waits for the next one"
	noneHoldOver  = "no endpoint, hold: refused after holdFor"
	manyPorts     = "several ports, each to its targetPort"
	twoProtocols  = "TCP and UDP of one port, each to its targetPort"
	twoPods       = "TCP and UDP of one port, each to its pod"
	evenSpread    = "distribution random: even over 3 targets"
	sctpInit      = "SCTP, crafted INIT: served, other port refused"
	sctpSocket    = "SCTP, association between sockets: served"
	sctpStays     = "SCTP association: stays while its sandbox stands"
	awayUplink    = "uplink without its default route: dropped"
	strayDefault  = "pod's link with a default route: served"
	otherNetworks = "link to another network, any default route: dropped"
	linksOfOthers = "second network's bridge, VPN, record of the uplink: dropped"
	sameBridge    = "bridge-nf-call 0, pod of that bridge: masqueraded"
	otherNetwork  = "bridge-nf-call 0, pod elsewhere: source kept"
	gatewayBeside = "gateway by a veth that is plugged into the bridge: served"
	isolatedPorts = "isolated ports, bridge-nf-call 0: served"
	filteredAgain = "bridge-nf-call 1 again: source kept; status tells"
	beforeAgent   = "flow from before the agent: ended, then served"
	leftover      = "DNAT rule of another tool: does not take packets"
	agentDead     = "agent killed: rules stay"
	replaced      = "target replaced under load: nothing fails after"
	streamStays   = "TCP stream: stays while its sandbox stands"
	streamReset   = "TCP stream: reset within 1 s of its sandbox's end"
	halfClosed    = "TCP, half-closed by its client: reset likewise"
	udpMoves      = "UDP flow: moves at once to the newer target"
	othersFlows   = "flows of another service to the pod: untouched"
	restarts      = "agent stopped, killed, started: nothing is lost"
	whileAway     = "changes while the agent was away: caught up with"
	goneRoute     = "agent dead, endpoint's route gone: refused, stays in"
	guardedOthers = "translated to a magic IP by another tool: stays in"
	passedOthers  = "pass, exempt: another tool's, beside what is guarded"
	rulesFlushed  = "agent dead, rules flushed: refused, stays in"
	boundHost     = "host process bound to the uplink: stays in"
	lateReply     = "reply to a client that is gone: stays in"
	outOfWindow   = "segment out of the window: connection lives"
	strictTCP     = "nf_conntrack_tcp_loose 0: reset at its sandbox's end"
	switchedOff   = "bridge-nf-call becomes 0: standing flows end"
	newVeth       = "agent dead, new pod: served (iptables: dropped)"
	oddNames      = "links whose names mean something in rules: no harm"
	holdAlone     = "agent dead, hold: refused after holdFor (iptables: not)"
	twoAgents     = "second agent comes, goes, restarts: nothing is lost"
)

var rows = []row{
	{podServed, onEveryKind}, {podOtherPort, onEveryKind}, {podPing, onEveryKind},
	{hairpin, onEveryKind}, {hairpinLeft, onEveryKind}, {hairpinOthers, onEveryKind},
	{hostServed, onEveryKind}, {hostOtherPort, onEveryKind}, {hostLeft, onEveryKind}, {hostLeftPods, onEveryKind},
	{uplinkDropped, onEveryKind}, {nicDropped, onEveryKind},
	{interfaceOne, onEveryKind}, {interfaceAny, onEveryKind}, {interfaceList, onEveryKind},
	{nonePod, onEveryKind}, {noneHost, onEveryKind}, {noneUplink, onEveryKind}, {nonePass, onEveryKind},
	{noneHold, onBridge}, {noneHoldOver, onBridge},
	{manyPorts, onBridge}, {twoProtocols, onBridge}, {twoPods, onBridge}, {evenSpread, onBridge},
	{sctpInit, onBridge}, {sctpSocket, onBridge}, {sctpStays, onBridge},
	{awayUplink, onBridge}, {strayDefault, onBridge}, {otherNetworks, onBridge},
	{linksOfOthers, onBridge}, {sameBridge, onBridge}, {otherNetwork, onBridge}, {filteredAgain, onBridge}, {gatewayBeside, onBridge}, {isolatedPorts, onBridge},
	{beforeAgent, onBridge}, {leftover, onBridge}, {agentDead, onBridge}, {replaced, onBridgePtp},
	{streamStays, onBridge}, {streamReset, onBridge}, {halfClosed, onBridge}, {udpMoves, onBridge}, {othersFlows, onBridge},
	{goneRoute, onEveryKind}, {guardedOthers, onEveryKind}, {passedOthers, onEveryKind}, {rulesFlushed, onEveryKind}, {boundHost, onEveryKind}, {lateReply, onBridge},
	{outOfWindow, onEveryKind}, {strictTCP, onBridge}, {switchedOff, onBridge},
	{newVeth, []string{"ptp", "cali"}}, {oddNames, []string{"ptp"}}, {holdAlone, onBridge},
	{restarts, onBridge}, {whileAway, onBridge}, {twoAgents, onBridge},
}

// cannot is an error: this kernel lacks something that a case needs.
type cannot string

func (c cannot) Error() string { return string(c) }

const noSCTP cannot = "this kernel has no SCTP sockets (CONFIG_IP_SCTP)"

// mayLack is what kernels may lack without failing the tests. Before this list grows, look for another way
// to put the case to the test.
var mayLack = []cannot{noSCTP}

// matrix collects what became of each case.
type matrix struct {
	mu       sync.Mutex
	outcomes map[cell]error // nil: passed
}

type cell struct{ row, network, backend, family string }

var results = matrix{outcomes: map[cell]error{}}

// note adds an outcome; of several for one cell, the worst counts.
func (m *matrix) note(c cell, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.ContainsFunc(rows, func(r row) bool { return r.name == c.row && slices.Contains(r.on, c.network) }) {
		err = fmt.Errorf("not a row of the matrix: %+v", c)
	}
	if before := m.outcomes[c]; before == nil || errors.As(before, new(cannot)) && err != nil {
		m.outcomes[c] = err
	}
}

// lack notes that this kernel has no such backend.
func (m *matrix) lack(backend string, reason cannot) {
	for _, r := range rows {
		for _, network := range r.on {
			for _, family := range matrixFamily {
				m.note(cell{r.name, network, backend, family}, reason)
			}
		}
	}
}

// of reports whether a row was tried on a backend, and what went wrong.
func (m *matrix) of(row, backend string) (tried bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c, outcome := range m.outcomes {
		if c.row == row && c.backend == backend {
			tried = true
			err = errors.Join(err, outcome)
		}
	}
	return tried, err
}

// print writes the matrix ("-" where a case was not run), and returns what must not be: cases that were not run, and those that
// cannot be although kernels are not known to lack what they need.
func (m *matrix) print(w io.Writer) (faults []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var head, families []string
	for _, backend := range backends() {
		for _, family := range matrixFamily {
			head, families = append(head, backend), append(families, family)
			backend = ""
		}
	}
	fmt.Fprintf(table, "\t%s\n\t%s\n", strings.Join(head, "\t"), strings.Join(families, "\t"))
	var footnotes []string
	for _, r := range rows {
		var cells []string
		for _, backend := range backends() {
			for _, family := range matrixFamily {
				var words, failed []string
				say := func(word string) {
					if !slices.Contains(words, word) {
						words = append(words, word)
					}
				}
				for _, network := range r.on {
					err, ran := m.outcomes[cell{r.name, network, backend, family}]
					var lacking cannot
					switch {
					case !ran:
						say("-")
						faults = append(faults, fmt.Sprintf("not run: %s (%s, %s, %s)", r.name, network, backend, family))
					case err == nil:
						say("ok")
					case errors.As(err, &lacking):
						say("cannot")
						if note := r.name + ": " + lacking.Error(); !slices.Contains(footnotes, note) {
							footnotes = append(footnotes, note)
						}
						if !slices.Contains(mayLack, lacking) {
							faults = append(faults, fmt.Sprintf("cannot, and is not on the list of what kernels may lack: %s (%s, %s, %s): %s", r.name, network, backend, family, lacking))
						}
					default:
						failed = append(failed, network)
					}
				}
				if len(failed) > 0 {
					words = []string{"FAIL"}
					if len(failed) < len(r.on) {
						words = append(words, failed...)
					}
				}
				cells = append(cells, strings.Join(words, " "))
			}
		}
		fmt.Fprintf(table, "%s\t%s\n", r.name, strings.Join(cells, "\t"))
	}
	_ = table.Flush()
	for _, note := range footnotes {
		fmt.Fprintf(w, "cannot: %s\n", note)
	}
	return faults
}

// TestMain prints the matrix, and what became of the attacks, after the tests. A run of some of the tests may leave cases out.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == lockAll {
		fmt.Fprintln(os.Stderr, lockEverything(os.Args[2:]))
		os.Exit(1)
	}
	code := m.Run()
	whole := flag.Lookup("test.list").Value.String() == ""
	for _, filter := range []string{"test.run", "test.skip"} {
		whole = whole && flag.Lookup(filter).Value.String() == ""
	}
	var faults []string
	if len(results.outcomes) > 0 || whole {
		faults = results.print(os.Stdout)
	}
	if len(attackOutcomes.m) > 0 || whole {
		faults = append(faults, printAttacks(os.Stdout)...)
	}
	if whole && len(faults) > 0 {
		fmt.Println("FAIL: " + strings.Join(faults, "\nFAIL: "))
		code = max(code, 1)
	}
	os.Exit(code)
}

// TestMatrixFaults: what was not run, and what a kernel lacks that none is known to lack, fails the tests.
func TestMatrixFaults(t *testing.T) {
	m := matrix{outcomes: map[cell]error{}}
	pass := func(backend string, outcome error) {
		for _, r := range rows {
			for _, network := range r.on {
				for _, family := range matrixFamily {
					m.note(cell{r.name, network, backend, family}, outcome)
				}
			}
		}
	}
	cells := 0
	for _, r := range rows {
		cells += len(r.on) * len(matrixFamily)
	}
	pass("nftables", nil)
	pass("iptables-nft", noSCTP)
	if faults := m.print(io.Discard); len(faults) != cells || !strings.HasPrefix(faults[0], "not run: ") {
		t.Errorf("%d faults, want the %d cases of iptables-legacy: %v", len(faults), cells, faults[0])
	}
	m.lack("iptables-legacy", "no such table")
	if faults := m.print(io.Discard); len(faults) != cells || !strings.Contains(faults[0], "no such table") {
		t.Errorf("%d faults, want %d that name what is lacking: %v", len(faults), cells, faults)
	}
	pass("iptables-legacy", errors.New("a failure"))
	if faults := m.print(io.Discard); len(faults) != 0 {
		t.Errorf("failures, which the tests have named, are faults: %v", faults)
	}
}
