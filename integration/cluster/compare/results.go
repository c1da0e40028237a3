package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The tables of raw data, one file each. The first column is the part that has measured a line; the program in integration/plots
// reads them.
const (
	partsTable  = "parts"
	runsTable   = "runs"
	absentTable = "absent"
	pathTable   = "path"
	restTable   = "rest"
)

func columns() map[string][]string {
	return map[string][]string{
		partsTable: {"part", "date", "kubernetes", "nodes", "machine", "load_at_start", "load_at_end"},
		runsTable: {"part", "case", "peer", "client", "run", "node", "sent", "failed", "unserved", "blamed", "cut", "stalled", "elsewhere",
			"gap_ms", "excess_ms", "alone_ms", "ruled_ms", "witness_ms", "lacks"},
		absentTable: {"part", "peer", "client", "node", "per_second", "sent", "refused", "answered", "timed_out", "other", "p50_ms", "p99_ms"},
		pathTable:   {"part", "peer", "node", "rounds", "connection_us", "connection_ratio", "request_us", "request_ratio", "datagram_us", "datagram_ratio"},
		restTable:   {"part", "node", "seconds", "agent_ms", "installer_ms", "kube_proxy_ms", "pod_lists", "pod_watches"},
	}
}

// results are lines of the tables.
type results map[string][][]string

func (r *results) add(table string, line ...any) {
	if *r == nil {
		*r = results{}
	}
	var texts []string
	for _, value := range line {
		switch v := value.(type) {
		case float64:
			texts = append(texts, strconv.FormatFloat(math.Round(v*1000)/1000, 'f', -1, 64))
		default:
			texts = append(texts, fmt.Sprint(v))
		}
	}
	(*r)[table] = append((*r)[table], texts)
}

func (r *results) join(other results) {
	for table, lines := range other {
		if *r == nil {
			*r = results{}
		}
		(*r)[table] = append((*r)[table], lines...)
	}
}

// addRuns has a line for each client of each run, and one for those that a peer cannot have.
func (r *results) addRuns(part string, peers []peer, kinds []lab.Kind, runs []measured) {
	for i, m := range runs {
		for _, p := range peers {
			for _, kind := range kinds {
				line := []any{part, m.update.name, p, kind, i + 1, m.node.Name}
				if why := p.lacks(kind, m.update.target.surge); why != "" {
					if i == 0 {
						r.add(runsTable, append(line, "", "", "", "", "", "", "", "", "", "", "", "", why)...)
					}
					continue
				}
				c := m.costs[p][kind]
				var excess any = inMilliseconds(c.excess)
				if c.excess == never {
					excess = "never"
				}
				r.add(runsTable, append(line, c.sent, c.failed, c.unserved, len(c.blamed), c.cut, c.stalled, c.elsewhere,
					inMilliseconds(c.gap), excess, inMilliseconds(m.alone[kind]), inMilliseconds(m.ruled), inMilliseconds(m.witness), "")...)
			}
		}
	}
}

func (r *results) addAbsences(part string, all []absence) {
	for _, a := range all {
		var p50, p99 any = "", ""
		if len(a.refused) > 0 {
			p50, p99 = inMilliseconds(quantile(a.refused, 0.5)), inMilliseconds(quantile(a.refused, 0.99))
		}
		r.add(absentTable, part, a.by, a.kind, a.node.Name, a.rate, a.sent, len(a.refused), a.answered, a.timedOut, a.other, p50, p99)
	}
}

func (r *results) addPaths(part string, n *whole.Node, paths map[peer]lab.Path, rounds int) {
	for p, path := range paths {
		line := []any{part, p, n.Name, rounds}
		for _, e := range []lab.Exchange{path.Connection, path.Request, path.Datagram} {
			if e.Took == 0 {
				line = append(line, "", "")
			} else {
				line = append(line, float64(e.Took)/float64(time.Microsecond), e.Ratio)
			}
		}
		r.add(pathTable, line...)
	}
}

func (r *results) addRest(n *whole.Node, rest rest) {
	r.add(restTable, "rest", n.Name, rest.during.Seconds(), inMilliseconds(rest.agent), inMilliseconds(rest.installer), inMilliseconds(rest.proxy), rest.polls, rest.watches)
}

// save writes the lines of a part in place of those that the files have of it.
func (r results) save(dir, part string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for table, header := range columns() {
		name := filepath.Join(dir, table+".csv")
		lines, err := readTable(name)
		if err != nil {
			return err
		}
		if len(lines) > 0 && !slices.Equal(lines[0], header) {
			return fmt.Errorf("%s has the columns %q, and not %q: remove it", name, lines[0], header)
		}
		lines = slices.DeleteFunc(lines, func(line []string) bool { return line[0] == part || line[0] == header[0] })
		// In the order of the parts, so that a part that is measured again changes its own lines alone.
		lines = append(lines, r[table]...)
		order := map[string]int{}
		for i, p := range parts() {
			order[p.name] = i
		}
		slices.SortStableFunc(lines, func(a, b []string) int { return order[a[0]] - order[b[0]] })
		if err := writeTable(name, slices.Insert(lines, 0, header)); err != nil {
			return err
		}
	}
	return nil
}

func readTable(name string) ([][]string, error) {
	file, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	lines, err := csv.NewReader(file).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return lines, nil
}

// writeTable writes by a rename: a reader sees all of it or none.
func writeTable(name string, lines [][]string) error {
	file, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name))
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }()
	writer := csv.NewWriter(file)
	if err := errors.Join(writer.WriteAll(lines), file.Chmod(0o644), file.Close()); err != nil {
		return err
	}
	return os.Rename(file.Name(), name)
}

// saved are the parts that the files have.
func saved(dir string) (map[string]bool, error) {
	lines, err := readTable(filepath.Join(dir, partsTable+".csv"))
	has := map[string]bool{}
	for _, line := range lines[min(1, len(lines)):] {
		has[line[0]] = true
	}
	return has, err
}

func inMilliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile is the smallest value that at least this part of all does not exceed.
func quantile(values []time.Duration, part float64) time.Duration {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(0, int(math.Ceil(part*float64(len(sorted))))-1)]
}
