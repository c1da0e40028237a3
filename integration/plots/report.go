package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// report writes the page.
func report(out io.Writer, d data) {
	fmt.Fprint(out, head)
	machines(out, d)
	summary(out, d)
	verdicts(out, d)
	for _, c := range cases(d) {
		section(out, d, c)
	}
	taken(out, d)
	absences(out, d)
	dataPaths(out, d)
	atRest(out, d)
}

const head = `# Comparison with other ways to a node's own pod

<!-- Written by ` + "`make report`" + ` from data/*.csv. Do not edit. -->

` + "`make compare`" + ` measures and ` + "`make report`" + ` writes this page and its charts from the [raw data](data). The clients of all peers run at the same time,
beside each other, against the same pods; each asks 200 times a second, and 100 times where seven peers are beside each other:

| client | | timeout |
|---|---|---|
| new connection | HTTP, a connection for each request | 1 s |
| keep-alive | HTTP, all requests on one connection, one after the other | 2 s |
| gRPC stream | one call with a stream in both directions, a message after the other; it connects again every 5 ms, and not by gRPC's default after 1 s | 2 s |
| connected UDP | one socket, which hears of refusals | 1 s |
| unconnected UDP | one socket that sends to the address | 1 s |

The peers:

| peer | |
|---|---|
| magic IP (nftables), (iptables) | two releases of the chart on the same nodes, one for each backend |
| Service (internalTrafficPolicy: Local), (PreferSameNode) | by kube-proxy with nftables. The second is the field ` + "`trafficDistribution`" + `; another node has a pod for it all the time |
| hostPort (portmap) | the node's address (` + "`status.hostIP`" + `) and a port of the pod there, by the CNI plugin portmap |
| Unix socket (hostPath) | a socket in a directory of the node. A new server takes its path over by a rename |
| 5 s poller (imitation) | imitates kube-magic-ip-address 0.1: it lists pods by the API every 5 s and keeps one DNAT rule of iptables |
| Cilium Local Redirect Policy, Cilium Service (Local) | on a node with Cilium, kube-proxy replaced; the second is a Service with ` + "`" + `internalTrafficPolicy: Local` + "`" + ` |
| the pod alone | for how long no process listened, by the servers' own journals: no network can do better |

- **gap**: the longest time without an answer.
- **excess**: from the new process listening to its first answer: what the network adds, and the time until the client asks the next time. *never*: not within the 5 to 6 s that were watched. With a surge the old
  server is there meanwhile, so it is not shown.
- **lost**: requests that failed although they were sent while a process of the node listened. What the old process took with it when it died is counted apart, [below](#what-the-old-process-took-with-it).

A cell has the median of the runs and the worst of them. p99 of so few runs is the worst. A witness asks a pod that nothing happens to: where it waits for 20 ms or
longer, the machine has no time for anybody, and the run is marked. † is the worst of the marked runs, where it is worse than that of the others. No run is left out.

`

func machines(out io.Writer, d data) {
	fmt.Fprint(out, "| measured | on | nodes | load average before and after | parts |\n|---|---|---|---|---|\n")
	type key struct{ date, machine, nodes string }
	var order []key
	names, loads := map[key][]string{}, map[key][]float64{}
	for _, p := range d.parts {
		k := key{p["date"], p["machine"], "Kubernetes " + p["kubernetes"] + ": " + p["nodes"]}
		if !slices.Contains(order, k) {
			order = append(order, k)
		}
		names[k] = append(names[k], p["part"])
		loads[k] = append(loads[k], p.number("load_at_start"), p.number("load_at_end"))
	}
	for _, k := range order {
		fmt.Fprintf(out, "| %s | %s | %s | %s to %s | %s |\n", k.date, k.machine, k.nodes, figure(slices.Min(loads[k])), figure(slices.Max(loads[k])), strings.Join(names[k], ", "))
	}
	if most := slices.MaxFunc(d.parts, func(a, b line) int { return cmp.Compare(a.number("load_at_end"), b.number("load_at_end")) }); most.number("load_at_end") > busy {
		fmt.Fprintf(out, "\n**The processors had no time to spare** (load average up to %s on 2 cores; clients, servers and control plane share them). Times are longer than on a "+
			"larger machine, for all peers; what the rows are good for is the comparison within a run.\n", most["load_at_end"])
	}
	fmt.Fprintln(out)
}

// busy is the load average that the clusters and the clients themselves do not reach.
const busy = 8

// summary is one table of all peers and cases: what clients lost, and for how long they waited.
func summary(out io.Writer, d data) {
	var shown []casePart
	for _, c := range cases(d) {
		if !strings.HasPrefix(c.part, "cilium") {
			shown = append(shown, c)
		}
	}
	if len(shown) == 0 {
		return
	}
	fmt.Fprint(out, "## All peers and cases\n\nRequests lost of all clients of a peer in a run, median; and the longest gap of new connections, median, in ms.\n\n|")
	var peers []string
	for _, l := range d.runs {
		if !strings.HasPrefix(l["part"], "cilium") && !slices.Contains(peers, l["peer"]) {
			peers = append(peers, l["peer"])
		}
	}
	for _, p := range peers {
		fmt.Fprintf(out, " | %s", p)
	}
	fmt.Fprintf(out, " | the pod alone |\n|%s\n", strings.Repeat("---|", len(peers)+2))
	for _, c := range shown {
		fmt.Fprintf(out, "| %s (%s) |", c.name, countOf(c.count(d)))
		for _, p := range peers {
			runs := where(c.runs(d), line{"peer": p})
			has := where(runs, line{"lacks": ""})
			if len(has) == 0 {
				fmt.Fprintf(out, " – %s |", runs[0]["lacks"])
				continue
			}
			gap := spreadOf(where(has, line{"client": "new-connection"}), of("gap_ms"))
			fmt.Fprintf(out, " %s; %s |", figure(median(perRun(has, lost))), figure(gap.median))
		}
		fmt.Fprintf(out, " 0; %s |\n", figure(c.alone(d).bars[0].median))
	}
	fmt.Fprintln(out)
}

// perRun adds a figure of the clients of a peer in each run.
func perRun(lines []line, of func(line) float64) (sums []float64) {
	runs := map[string]float64{}
	for _, l := range lines {
		runs[l["node"]+" "+l["run"]] += of(l)
	}
	for _, sum := range runs {
		sums = append(sums, sum)
	}
	return sums
}

func (c casePart) count(d data) int {
	return len(perRun(where(c.runs(d), line{"lacks": ""}), func(line) float64 { return 0 }))
}

// verdicts are the limits of a magic IP. Of times the median has to be within, of lost requests each run.
func verdicts(out io.Writer, d data) {
	fmt.Fprint(out, "## The limits of a magic IP\n\nOf excess the median of all runs has to be within its limit, of lost requests each run.\n\n| case | peer | limit | | verdict |\n|---|---|---|---|---|\n")
	for _, c := range cases(d) {
		for _, p := range []string{magicNFTables, magicIPTables} {
			runs := where(c.runs(d), line{"peer": p, "lacks": ""})
			if len(runs) == 0 || c.part == "load" || c.part == "down" {
				continue
			}
			row := func(limit, measured string, met bool) {
				verdict := "met"
				if !met {
					verdict = "**missed**"
				}
				fmt.Fprintf(out, "| %s | %s | %s | %s | %s |\n", c.title(), p, limit, measured, verdict)
			}
			worst := slices.Max(perRun(runs, lost))
			row("0 lost", fmt.Sprintf("%s in the worst of %s", figure(worst), countOf(c.count(d))), worst == 0)
			if c.surge() || c.part == "api" {
				continue
			}
			most, by := math.Inf(-1), clientNames()[0]
			for _, client := range clientNames() {
				if m := spreadOf(where(runs, line{"client": client[0]}), of("excess_ms")).median; m > most {
					most, by = m, client
				}
			}
			measured := fmt.Sprintf("%s ms (%s)", figure(most), by[1])
			// What has no network in between shows how much of it is the machine's.
			if beside := where(c.runs(d), line{"peer": unixSocket, "client": by[0], "lacks": ""}); len(beside) > 0 {
				measured += ", Unix socket " + figure(spreadOf(beside, of("excess_ms")).median)
			}
			row("excess ≤ 10 ms", measured, most <= 10)
			if c.name == "first pod" && p == magicNFTables {
				least := slices.Min(numbers(runs, "ruled_ms"))
				row("rule before the process", fmt.Sprintf("%s ms before, at the least", figure(least)), least > 0)
			}
		}
	}
	fmt.Fprintln(out)
}

func countOf(runs int) string {
	if runs == 1 {
		return "1 run"
	}
	return fmt.Sprintf("%d runs", runs)
}

func (c casePart) surge() bool { return strings.HasPrefix(c.name, "maxSurge") }

// settingName is what people call a part with a setting of Cilium; empty for others.
func settingName(part string) string {
	return map[string]string{"cilium-b": "Cilium, BPF host routing", "cilium-ble": "Cilium, legacy host routing, endpoint routes"}[part]
}

func (c casePart) title() string {
	if setting := settingName(c.part); setting != "" {
		return c.name + " (" + setting + ")"
	}
	return c.name
}

// about is what else is to be known of a case.
func (c casePart) about() string {
	switch {
	case c.part == "down":
		return " Agents, kube-proxy and the poller are stopped (SIGSTOP) a second before the update, and go on 3 s after the new process listens. Excess is from then on. " +
			"portmap and sockets need no process of the node."
	case c.part == "api":
		return " The API server hangs (SIGSTOP). The first process of the pod's sandbox is killed; kubelet makes another sandbox with another address. The API server goes on 3 s after the " +
			"new process listens, and excess is from then on: 0 where the peer did not need the API."
	case c.part == "load":
		return " As many processes as there are cores take all the time that they get, at the same priority, until 3 s after the new process listens. Most of these runs are marked."
	case c.name == "maxSurge 1, stops at once, answers take 30 ms":
		return " The server takes 30 ms for each answer, so that the old one still owes some when its clients are moved, and when it stops."
	case c.name == "first pod":
		return " Nothing runs on the node before; gaps begin with the clients."
	}
	return ""
}

func section(out io.Writer, d data, c casePart) {
	runs := c.runs(d)
	marked := 0.0
	for _, m := range perRun(where(runs, line{"lacks": ""}), func(l line) float64 {
		if disturbed(l) {
			return 1
		}
		return 0
	}) {
		marked += math.Min(m, 1)
	}
	fmt.Fprintf(out, "## %s\n\n%s, marked: %s.%s\n\n", upper(c.title()), upper(countOf(c.count(d))), figure(marked), c.about())
	fmt.Fprintf(out, "![%s: the longest time without an answer](%s-gap.svg)\n\n", c.title(), fileName(c))
	fmt.Fprintf(out, "| | | %s |\n|---|---|%s\n", strings.Join(shortClients(), " | "), strings.Repeat("---|", len(clientNames())))
	figures := []struct {
		name   string
		figure func(line) float64
	}{{"gap, ms", of("gap_ms")}, {"excess, ms", of("excess_ms")}, {"lost", lost}, {"answered by another node", of("elsewhere")}}
	for _, peer := range distinct(runs, "peer") {
		name := peer
		ofPeer := where(runs, line{"peer": peer})
		if has := where(ofPeer, line{"lacks": ""}); len(has) == 0 {
			fmt.Fprintf(out, "| %s | – %s | | | | | |\n", peer, ofPeer[0]["lacks"])
			continue
		}
		for _, f := range figures {
			if f.name == "excess, ms" && c.surge() || f.name == "answered by another node" && peer != serviceSame {
				continue
			}
			fmt.Fprintf(out, "| %s | %s |", name, f.name)
			name = ""
			for _, client := range clientNames() {
				ofClient := where(ofPeer, line{"client": client[0]})
				switch {
				case len(ofClient) == 0:
					fmt.Fprint(out, " |")
				case ofClient[0]["lacks"] != "":
					fmt.Fprintf(out, " – %s |", ofClient[0]["lacks"])
				default:
					fmt.Fprintf(out, " %s |", spreadOf(ofClient, f.figure))
				}
			}
			fmt.Fprintln(out)
		}
	}
	if alone := c.alone(d); !c.surge() && c.name != "first pod" {
		fmt.Fprintf(out, "| the pod alone | no process, ms |")
		for _, b := range alone.bars {
			fmt.Fprintf(out, " %s / %s |", figure(b.median), figure(b.high))
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintln(out)
	if c.name == "rolling update" {
		fmt.Fprintf(out, "![%[1]s: from the new process listening to its first answer](%[2]s-excess.svg)\n\n![%[1]s: the same as a distribution, all clients together](%[2]s-cdf.svg)\n\n", c.title(), fileName(c))
	}
}

func upper(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// String is a cell.
func (s spread) String() string {
	text := figure(s.median)
	if !math.IsNaN(s.most) {
		text += " / " + figure(s.most)
	}
	if !math.IsNaN(s.stalled) && (math.IsNaN(s.most) || s.stalled > s.most) {
		text += " / " + figure(s.stalled) + "†"
	}
	return text
}

// taken counts what failed for reasons that no peer can help.
func taken(out io.Writer, d data) {
	fmt.Fprint(out, `## What the old process took with it

Requests of all runs and clients of a case that failed and are not counted as lost:

- *taken*: the old process had the request when it stopped, and so nobody answers it. A connection says so; of a datagram it is taken for granted where it was sent in the last 10 ms
  (and the time that an answer takes) before the socket was closed.
- *during a stall*: the witness waited at that time too.
- *unserved*: sent while no process listened.

`)
	fmt.Fprint(out, "| case | peer | sent | taken | during a stall | unserved |\n|---|---|---|---|---|---|\n")
	for _, c := range cases(d) {
		name := c.title()
		for _, peer := range distinct(c.runs(d), "peer") {
			runs := where(c.runs(d), line{"peer": peer, "lacks": ""})
			if len(runs) == 0 {
				continue
			}
			fmt.Fprintf(out, "| %s | %s |", name, peer)
			name = ""
			for _, column := range []string{"sent", "cut", "stalled", "unserved"} {
				sum := 0.0
				for _, v := range numbers(runs, column) {
					sum += v
				}
				fmt.Fprintf(out, " %s |", figure(sum))
			}
			fmt.Fprintln(out)
		}
	}
	fmt.Fprintln(out)
}

func absences(out io.Writer, d data) {
	if len(d.absent) == 0 {
		return
	}
	fmt.Fprint(out, "## No pod on this node, one on another\n\n| peer | client | requests a second | refused | time until refused, p50 / p99, ms | answered by another node | no route | timed out |\n|---|---|---|---|---|---|---|---|\n")
	for _, l := range d.absent {
		where := ""
		if setting := settingName(l["part"]); setting != "" {
			where = " (" + setting + ")"
		}
		took := "–"
		if l["refused"] != "0" {
			took = figure(l.number("p50_ms")) + " / " + figure(l.number("p99_ms"))
		}
		rest := l.number("sent") - l.number("refused") - l.number("answered") - l.number("other")
		fmt.Fprintf(out, "| %s%s | %s, %s | %s | %s of %s | %s | %s | %s | %s |\n", l["peer"], where, l["client"], l["node"], figure(l.number("per_second")), l["refused"], l["sent"], took, l["answered"], l["other"], figure(rest))
	}
	fmt.Fprint(out, "\nOf datagrams as many are refused as the kernel lets ICMP errors go. Requests that still waited at the end count as timed out. *No route*: connect fails at once with that error (or another one that is no refusal).\n\n")
}

func dataPaths(out io.Writer, d data) {
	for _, part := range distinct(d.path, "part") {
		name, file := "Data path", "path.svg"
		if part != "path" {
			name, file = "Data path ("+settingName(part)+")", "path-"+part+".svg"
		}
		lines := where(d.path, line{"part": part})
		fmt.Fprintf(out, "## %s\n\nMedians of %s rounds, of blocks in random order beside each other, on %d nodes: 20 connections, 100 requests on one connection, 100 datagrams on one socket, in µs each, and as a multiple of the pod's own address.\n\n![%s](%s)\n\n| | connection | request | datagram |\n|---|---|---|---|\n",
			name, lines[0]["rounds"], len(distinct(lines, "node")), name, file)
		for _, peer := range distinct(lines, "peer") {
			fmt.Fprintf(out, "| %s |", peer)
			for _, exchange := range []string{"connection", "request", "datagram"} {
				of := where(lines, line{"peer": peer})
				took, ratio := median(numbers(of, exchange+"_us")), median(numbers(of, exchange+"_ratio"))
				if math.IsNaN(ratio) {
					fmt.Fprint(out, " – a stream socket takes no datagrams |")
					continue
				}
				fmt.Fprintf(out, " %s (%.3f ×) |", figure(took), ratio)
			}
			fmt.Fprintln(out)
		}
		fmt.Fprintln(out)
	}
}

func atRest(out io.Writer, d data) {
	if len(d.rest) == 0 {
		return
	}
	fmt.Fprint(out, "## At rest\n\nA node with a target and without traffic.\n\n| node | CPU a minute: agent / installer / kube-proxy, ms | lists of pods | watches of pods, of the whole cluster |\n|---|---|---|---|\n")
	for _, l := range d.rest {
		minutes := l.number("seconds") / 60
		fmt.Fprintf(out, "| %s | %s / %s / %s | %s | %s |\n", l["node"], figure(l.number("agent_ms")/minutes), figure(l.number("installer_ms")/minutes),
			figure(l.number("kube_proxy_ms")/minutes), l["pod_lists"], l["pod_watches"])
	}
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)/2]
}

// figure is a number as short as it may be.
func figure(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "never"
	case math.IsNaN(v):
		return "–"
	case v == math.Trunc(v) || v >= 10:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2g", v)
}
