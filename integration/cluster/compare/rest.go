package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

// agentPattern finds the processes of agents by their command lines.
const agentPattern = "^magic-ip-agent run|^/usr/local/bin/magic-ip-agent run"

// rest is what a node costs while nothing happens.
type rest struct {
	during time.Duration
	// cpu is the time that processes of one node took: those of the chart's pod, and kube-proxy, which serves all
	// Services.
	agent, installer, proxy time.Duration
	// polls are lists of the pods of one namespace and watches those that are going on, of the whole cluster: nobody
	// else asks for these.
	polls, watches int
}

// atRest measures a node with a target and without traffic.
func (w *world) atRest(ctx context.Context, n *whole.Node, during time.Duration) (rest, error) {
	if _, err := w.place(ctx, n, target{hostPort: true}); err != nil {
		return rest{}, err
	}
	sleep(ctx, 3*time.Second) // for what that has left to do
	before, err := w.consumed(ctx, n)
	if err != nil {
		return rest{}, err
	}
	sleep(ctx, during)
	after, err := w.consumed(ctx, n)
	if err != nil {
		return rest{}, err
	}
	r := rest{
		during: during, agent: after.agent - before.agent, installer: after.installer - before.installer, proxy: after.proxy - before.proxy,
		polls: after.polls - before.polls, watches: after.watches,
	}
	w.log("at rest on %s for %v: agent %v, installer %v, kube-proxy %v; %d lists and %d watches of the pods of a namespace",
		n.Name, r.during, r.agent, r.installer, r.proxy, r.polls, r.watches)
	return r, nil
}

// consumed is what a node has cost so far.
func (w *world) consumed(ctx context.Context, n *whole.Node) (r rest, err error) {
	for _, process := range []struct {
		pattern string
		took    *time.Duration
	}{
		{agentPattern, &r.agent},
		{"^magic-ip-agent install|^/usr/local/bin/magic-ip-agent install", &r.installer},
		{"kube-proxy --", &r.proxy},
	} {
		pids, errPID := n.Exec(ctx, "pgrep", "-f", process.pattern)
		if errPID != nil {
			return r, fmt.Errorf("%s: %w", process.pattern, errPID)
		}
		for pid := range strings.FieldsSeq(pids) {
			took, errStat := cpuOf(n, pid)
			err = errors.Join(err, errStat)
			*process.took += took
		}
	}
	metrics, errMetrics := w.Admin.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	r.polls, r.watches = parseMetrics(string(metrics))
	return r, errors.Join(err, errMetrics)
}

// cpuOf is the processor time of a process of a node: fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms.
func cpuOf(n *whole.Node, pid string) (time.Duration, error) {
	stat, err := n.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	_, fields, _ := strings.Cut(string(stat), ") ") // the name may contain spaces
	values := strings.Fields(fields)
	if len(values) < 13 {
		return 0, fmt.Errorf("/proc/%s/stat: %q", pid, stat)
	}
	user, errUser := strconv.Atoi(values[11])
	system, errSystem := strconv.Atoi(values[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(errUser, errSystem)
}

// parseMetrics counts, in the API server's metrics, lists and watches of the pods of one namespace.
func parseMetrics(text string) (lists, watches int) {
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		series, value, _ := strings.Cut(lines.Text(), "} ")
		name, labels, _ := strings.Cut(series, "{")
		number, err := strconv.ParseFloat(value, 64)
		if err != nil || !strings.Contains(labels, `resource="pods"`) || !strings.Contains(labels, `scope="namespace"`) {
			continue
		}
		switch {
		case name == "apiserver_longrunning_requests" && strings.Contains(labels, `verb="WATCH"`):
			watches += int(number)
		case name == "apiserver_request_total" && strings.Contains(labels, `verb="LIST"`):
			lists += int(number)
		}
	}
	return lists, watches
}
