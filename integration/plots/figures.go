package main

import (
	"math"
	"slices"
)

// The peers, as the data name them, and the limits that they are drawn beside.
const (
	magicNFTables = "magic IP (nftables)"
	magicIPTables = "magic IP (iptables)"
	serviceLocal  = "Service (internalTrafficPolicy: Local)"
	serviceSame   = "Service (PreferSameNode)"
	hostPort      = "hostPort (portmap)"
	unixSocket    = "Unix socket (hostPath)"
	poller        = "5 s poller (imitation)"
	ciliumLRP     = "Cilium Local Redirect Policy"
	ciliumService = "Cilium Service (Local)"
	podAlone      = "the pod alone"
	ownAddress    = "the pod's own address"
)

// clientNames are what people call the kinds of client, in the order of the tables.
func clientNames() [][2]string {
	return [][2]string{
		{"new-connection", "new connection"}, {"keep-alive", "keep-alive"}, {"grpc-stream", "gRPC stream"}, {"udp", "connected UDP"}, {"udp-sendto", "unconnected UDP"},
	}
}

func shortClients() (names []string) {
	for _, c := range clientNames() {
		names = append(names, c[1])
	}
	return names
}

// casePart is a case of a part: what one chart and one table are of.
type casePart struct{ part, name string }

func cases(d data) (all []casePart) {
	for _, l := range d.runs {
		if c := (casePart{l["part"], l["case"]}); !slices.Contains(all, c) {
			all = append(all, c)
		}
	}
	return all
}

func (c casePart) runs(d data) []line { return where(d.runs, line{"part": c.part, "case": c.name}) }

// bench is a chart of a figure of a case: a group of bars for each client.
func (c casePart) bench(d data, file, title, axis string, figure func(line) float64) chart {
	out := chart{file: file, title: title, axis: axis, groups: shortClients()}
	runs := c.runs(d)
	for _, peer := range distinct(runs, "peer") {
		s := series{peer: peer}
		for _, client := range clientNames() {
			s.bars = append(s.bars, barOf(where(runs, line{"peer": peer, "client": client[0], "lacks": ""}), figure))
		}
		out.series = append(out.series, s)
	}
	return out
}

func barOf(runs []line, figure func(line) float64) bar {
	s := spreadOf(runs, figure)
	b := bar{s.median, s.least, s.most}
	if !math.IsNaN(s.stalled) { // whiskers are of all runs: the table says which were disturbed
		b.high = larger(b.high, s.stalled)
		for _, l := range runs {
			if v := figure(l); math.IsNaN(b.low) || v < b.low {
				b.low = v
			}
		}
	}
	return b
}

// alone is the time in which no process listened, by the journals of the servers.
func (c casePart) alone(d data) series {
	s := series{peer: podAlone}
	for _, client := range clientNames() {
		runs := where(c.runs(d), line{"client": client[0], "lacks": ""})
		if peers := distinct(runs, "peer"); len(peers) > 0 {
			runs = where(runs, line{"peer": peers[0]})
		}
		s.bars = append(s.bars, barOf(runs, of("alone_ms")))
	}
	return s
}

// charts are those that the data have something for.
func charts(d data) (all []chart) {
	gap, excess := of("gap_ms"), of("excess_ms")
	for _, c := range cases(d) {
		name := fileName(c)
		gaps := c.bench(d, name+"-gap.svg", "Longest time without an answer: "+c.title(), "ms", gap)
		if slices.Contains([]string{"rolling", "force", "api", "down", "load", "cilium-b", "cilium-ble"}, c.part) && c.name != "first pod" {
			gaps.series = append([]series{c.alone(d)}, gaps.series...)
		}
		all = append(all, gaps)
		if c.part == "rolling" || c.name == "rolling update" {
			delays := c.bench(d, name+"-excess.svg", "New process listens until its first answer: "+c.title(), "ms, logarithmic", excess)
			delays.logarithmic, delays.floor = true, 0.1
			cdf := chart{
				file: name + "-cdf.svg", title: "New process listens until its first answer, all clients: " + c.name, axis: "ms, logarithmic",
				curves: map[string][]float64{}, floor: 0.1,
			}
			for _, peer := range distinct(c.runs(d), "peer") {
				values := numbers(where(c.runs(d), line{"peer": peer, "lacks": ""}), "excess_ms")
				slices.Sort(values)
				cdf.curves[peer], cdf.order = values, append(cdf.order, peer)
			}
			all = append(all, delays, cdf)
		}
	}
	for _, part := range distinct(d.path, "part") {
		all = append(all, paths(d, part))
	}
	return all
}

func fileName(c casePart) string {
	name := c.part
	if name == "cilium-b" || name == "cilium-ble" {
		name += "-" + map[string]string{
			"rolling update": "rolling", "maxSurge 1, stops at once": "surge", "maxSurge 1, drains 1.5 s": "surge-drain", "force delete": "force", "first pod": "first",
		}[c.name]
	}
	return name
}

// paths is the chart of the data path: how much longer exchanges take than by the pod's own address.
func paths(d data, part string) chart {
	c := chart{file: "path-" + part + ".svg", title: "Time of an exchange, as a multiple of that by the pod's own address", axis: "×", groups: []string{"connection", "request", "datagram"}}
	if part == "path" {
		c.file = "path.svg"
	} else {
		c.title += " (" + settingName(part) + ")"
	}
	for _, peer := range distinct(where(d.path, line{"part": part}), "peer") {
		s := series{peer: peer}
		for _, column := range []string{"connection_ratio", "request_ratio", "datagram_ratio"} {
			values := numbers(where(d.path, line{"part": part, "peer": peer}), column)
			slices.Sort(values)
			b := bar{values[(len(values)-1)/2], values[0], values[len(values)-1]}
			s.bars = append(s.bars, b)
		}
		c.series = append(c.series, s)
	}
	return c
}
