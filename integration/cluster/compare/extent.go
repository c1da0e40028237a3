package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// extent is how much is measured.
type extent struct {
	runs      int    // of each update on a node
	everyNode bool   // on each node, else on one after the other
	only      string // updates with this in their names, and nothing else; empty: all
	rest      time.Duration
	rounds    int // of the data path
}

// report is all that was measured.
type report struct {
	updates  []update
	runs     [][]measured // of each update
	absences []absence
	rests    []rest
	paths    []map[way]lab.Path
}

// measure measures.
func (w *world) measure(ctx context.Context, e extent) (r report, err error) {
	nodes := func(i int) []*whole.Node {
		if e.everyNode {
			return w.Nodes
		}
		return w.Nodes[i%len(w.Nodes) : i%len(w.Nodes)+1]
	}
	for _, n := range nodes(0) {
		if e.only != "" {
			break
		}
		// First: no pod has been replaced yet that connections by the Service may still be sent to.
		paths, err := w.path(ctx, n, e.rounds)
		if err != nil {
			return r, err
		}
		r.paths = append(r.paths, paths)
	}
	for i, u := range updates() {
		if !strings.Contains(u.name, e.only) {
			continue
		}
		var all []measured
		for _, n := range nodes(i) {
			runs, err := w.runs(ctx, n, u, e.runs)
			if err != nil {
				return r, err
			}
			all = append(all, runs...)
		}
		r.updates, r.runs = append(r.updates, u), append(r.runs, all)
	}
	if e.only != "" {
		return r, nil
	}
	for _, n := range nodes(1) {
		rest, err := w.atRest(ctx, n, e.rest)
		if err != nil {
			return r, err
		}
		r.rests = append(r.rests, rest)
	}
	for _, n := range nodes(0) {
		absences, err := w.absent(ctx, n)
		if err != nil {
			return r, err
		}
		r.absences = append(r.absences, absences...)
	}
	return r, nil
}

// rows are those of the table, for a cluster of so many nodes.
func (r report) rows(nodes int) (rows []row) {
	for i, u := range r.updates {
		rows = append(rows, rowsOf(u, r.runs[i])...)
		if u.first {
			rows = append(rows, ruledRow(u, r.runs[i]))
		}
	}
	if len(r.absences) > 0 {
		rows = append(rows, absentRows(r.absences)...)
		rows = append(rows, restRows(r.rests, nodes)...)
		rows = append(rows, pathRow(r.paths))
	}
	return rows
}

// nodeInfos are what the nodes run, by what they say themselves.
func (w *world) nodeInfos(ctx context.Context) (infos []string, err error) {
	nodes, err := w.Admin.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, node := range nodes.Items {
		infos = append(infos, strings.ReplaceAll(node.Status.NodeInfo.ContainerRuntimeVersion, "://", " "))
	}
	return infos, nil
}

// processor names the machine's, and its kernel.
func processor() string {
	model := runtime.GOARCH // not every architecture names its model
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		release = []byte("?")
	}
	return fmt.Sprintf("%s, %d cores, Linux %s", model, runtime.NumCPU(), strings.TrimSpace(string(release)))
}

func loadAverage() string {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(data), " ")
	return first
}
