package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// row is a line of the table: a figure of a case, by both ways. A list of three is of the kinds of client. Of times the
// median has to be within its limit, of requests that failed each run.
type row struct {
	name, figure   string
	service, magic string
	worst          string // of magic
	limit          string
	missed         bool
}

// rowsOf are those of the runs of one update.
func rowsOf(u update, runs []measured) []row {
	of := func(by way, figure func(cost) float64) (all [3][]float64) {
		for i, kind := range kinds {
			for _, m := range runs {
				all[i] = append(all[i], figure(m.costs[by][kind]))
			}
		}
		return all
	}
	add := func(rows []row, figure string, value func(cost) float64, limit string, judged func([]float64) float64, most float64) []row {
		service, magic := of(byService, value), of(byMagicIP, value)
		r := row{name: u.name, figure: figure, service: three(service, median), magic: three(magic, median), worst: three(magic, slices.Max[[]float64]), limit: limit}
		for _, values := range magic {
			r.missed = r.missed || limit != "" && judged(values) > most
		}
		return append(rows, r)
	}
	var rows []row
	if most := inMilliseconds(u.limits.excess); most > 0 {
		excess := func(c cost) float64 {
			if c.excess == never {
				return math.Inf(1)
			}
			return inMilliseconds(c.excess)
		}
		rows = add(rows, "excess, ms", excess, fmt.Sprintf("≤ %.0f", most), median, most)
	}
	limit := ""
	if u.limits.none {
		limit = "0"
	}
	rows = add(rows, "failed", func(c cost) float64 { return float64(c.failed) }, limit, slices.Max[[]float64], 0)
	if !u.limits.none {
		rows = add(rows, "failed while a process listened", func(c cost) float64 { return float64(len(c.blamed)) }, "0", slices.Max[[]float64], 0)
	}
	rows = add(rows, "longest gap, ms", func(c cost) float64 { return inMilliseconds(c.gap) }, "", median, 0)
	return rows
}

// ruledRow is about the address in the kernel, which the Service has nothing to set against.
func ruledRow(u update, runs []measured) row {
	var all []float64
	for _, m := range runs {
		all = append(all, inMilliseconds(m.ruled))
	}
	least := slices.Min(all)
	return row{name: u.name, figure: "rule before the process, ms", service: "–", magic: figure(median(all)), worst: figure(least), limit: "> 0", missed: least <= 0}
}

// absentRows join the nodes: what is refused slowly on one of them is.
func absentRows(all []absence) (rows []row) {
	texts := map[way]map[lab.Kind][]string{byService: {}, byMagicIP: {}}
	missed := map[lab.Kind]bool{}
	for _, a := range all {
		text := fmt.Sprintf("%d of %d refused at %.0f/s", len(a.refused), a.sent, a.rate)
		if len(a.refused) > 0 {
			text += fmt.Sprintf(", p50 %s, p99 %s ms", figure(inMilliseconds(quantile(a.refused, 0.5))), figure(inMilliseconds(quantile(a.refused, 0.99))))
		}
		texts[a.by][a.kind] = append(texts[a.by][a.kind], text)
		if a.by == byMagicIP {
			missed[a.kind] = missed[a.kind] || len(a.refused) == 0 || a.kind == lab.NewConnection && (len(a.refused) < a.sent || quantile(a.refused, 0.99) >= time.Millisecond)
		}
	}
	for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
		limit := "all refused, p99 < 1 ms"
		if kind == lab.UDP {
			limit = "refused, as often as the kernel lets ICMP go"
		}
		rows = append(rows, row{
			name: "no pod here, one elsewhere", figure: string(kind), service: strings.Join(texts[byService][kind], "; "), magic: strings.Join(texts[byMagicIP][kind], "; "),
			limit: limit, missed: missed[kind],
		})
	}
	return rows
}

func restRows(all []rest, nodes int) []row {
	var agent, proxy []float64
	polls, watches := 0, 0
	for _, r := range all {
		minutes := r.during.Minutes()
		agent = append(agent, inMilliseconds(r.agent+r.installer)/minutes)
		proxy = append(proxy, inMilliseconds(r.proxy)/minutes)
		polls, watches = max(polls, r.polls), max(watches, r.watches)
	}
	const name = "at rest, a node"
	return []row{
		{name: name, figure: "CPU, ms a minute", service: figure(median(proxy)) + " (kube-proxy)", magic: figure(median(agent)) + " (agent and installer)", worst: figure(slices.Max(agent))},
		{name: name, figure: "watches of pods", service: "–", magic: fmt.Sprintf("%g", float64(watches)/float64(nodes)), limit: "1", missed: watches > nodes},
		{name: name, figure: "lists of pods", service: "–", magic: fmt.Sprint(polls), limit: "0", missed: polls > 0},
	}
}

// three lists a figure of the kinds of client.
func three(values [3][]float64, of func([]float64) float64) string {
	var texts []string
	for _, v := range values {
		texts = append(texts, figure(of(v)))
	}
	return strings.Join(texts, " / ")
}

// figure is a number as short as it may be.
func figure(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "never"
	case v == math.Trunc(v) || v >= 10:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[(len(sorted)-1)/2]
}

func inMilliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile is the smallest value that at least this part of all does not exceed.
func quantile(values []time.Duration, part float64) time.Duration {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(part*float64(len(sorted))))-1)]
}

// printTable writes Markdown that can be read as it stands.
func printTable(out io.Writer, rows []row) error {
	lines := [][]string{{"", "", "Service", "magic IP", "worst run", "limit", "verdict"}}
	last := ""
	for _, r := range rows {
		verdict := ""
		if r.limit != "" {
			verdict = "ok"
		}
		if r.missed {
			verdict = "MISSED"
		}
		name := r.name
		if name == last {
			name = ""
		}
		last = r.name
		lines = append(lines, []string{name, r.figure, r.service, r.magic, r.worst, r.limit, verdict})
	}
	widths := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], 3, utf8.RuneCountInString(cell))
		}
	}
	var rule []string
	for _, width := range widths {
		rule = append(rule, strings.Repeat("-", width))
	}
	for _, line := range slices.Insert(lines, 1, rule) {
		for i, cell := range line {
			if _, err := fmt.Fprintf(out, "| %s%s ", cell, strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))); err != nil {
				return err
			}
		}
		if _, err := fmt.Fprintln(out, "|"); err != nil {
			return err
		}
	}
	return nil
}
