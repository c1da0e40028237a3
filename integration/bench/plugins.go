package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// call is a plugin as a runtime calls it.
type call struct {
	what      string
	path      string
	namespace string // of the pod
	others    int    // records of other pods in the state file
	config    []byte
	env       []string
	add, del  sample // ms
	limit     float64
}

// measurePlugins calls all plugins in turn, for a pod that is really there: tuning enters its sandbox.
func measurePlugins(ctx context.Context, count rounds) (measured []table, err error) {
	node, err := newNode(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	pod := lab.Pod{Name: "client", Namespace: "other"} // not recorded by this ADD
	attached, err := node.Add(ctx, "bridge", pod)
	if err != nil {
		return nil, err
	}
	for _, others := range []int{fewRecords, otherRecords} {
		lock, err := playAgent(node, others)
		if err != nil {
			return nil, err
		}
		defer func() { _ = lock.Close() }()
	}
	calls, err := pluginCalls(attached)
	if err != nil {
		return nil, err
	}
	if err := insideNode(node, func() error { return takeTurns(ctx, calls, count.plugin) }); err != nil {
		return nil, err
	}

	upstream, err := buildinfo.ReadFile(calls[0].path)
	if err != nil {
		return nil, err
	}
	t := table{title: "plugin, whole process", unit: "ms", base: "tuning", notes: []string{
		fmt.Sprintf("%d rounds; each executes all five in a new random order, first ADD, then DEL, with environment and standard input as a "+
			"runtime does. A ratio is within a round.", count.plugin),
		"tuning: the plugin of " + upstream.Main.Path + " " + upstream.Main.Version + " with no setting to make, built with the same flags; it enters the pod's network namespace. " +
			"echo: a program of the standard library that decodes its input and prints prevResult (integration/bench/echo).",
		fmt.Sprintf("not selected: no selector names the namespace of the pod; %d other pods are recorded. recorded: one does, and nobody knows the "+
			"labels of the pod. Beside the state file there is a live agent's, with the labels of as many pods as are recorded.", otherRecords),
	}}
	for _, command := range []string{"ADD", "DEL"} {
		for i, c := range calls {
			values, base := c.add, calls[0].add
			if command == "DEL" {
				values, base = c.del, calls[0].del
			}
			r := row{what: command + " " + c.what, values: values}
			if i > 0 {
				r.ratios = values.ratios(base)
			}
			if c.limit > 0 {
				r.target = target{ratioMedian, c.limit}
			}
			t.rows = append(t.rows, r)
		}
	}
	return []table{t}, nil
}

// runtimeDir is where so many other pods are recorded.
func runtimeDir(others int) string { return fmt.Sprintf("%s-%d", lab.RuntimeDir, others) }

// playAgent leaves what a live agent leaves for the plugin to read. An agent itself would react to each
// record, beside whichever plugin is measured next.
func playAgent(node *lab.Node, others int) (lock *runtimedir.Lock, err error) {
	dir := node.Path(runtimeDir(others))
	records := neighbours(others)
	if err := setRecords(dir, records); err != nil {
		return nil, err
	}
	if lock, err = runtimedir.New(dir).Agent(agentName).Lock(); err != nil {
		return nil, err
	}
	var pods runtimedir.Pods
	for _, record := range records {
		id := runtimedir.PodID{Namespace: record.Namespace, Name: record.Name, UID: record.UID}
		pods.Labels = append(pods.Labels, runtimedir.PodLabels{PodID: id, Labels: record.Labels})
	}
	agent := runtimedir.New(dir).Agent(agentName)
	_, err = agent.WritePods(pods)
	return lock, errors.Join(err, agent.WriteStatus(runtimedir.Status{PollInterval: "5s"}))
}

// fewRecords is for a node whose selected namespaces have few pods.
const fewRecords = 10

// pluginCalls begins with the one that the others are compared to.
func pluginCalls(attached lab.Attached) ([]*call, error) {
	const ours = "magic-ip-address"
	calls := []*call{
		{what: "tuning", path: "cni/tuning", namespace: "other"},
		{what: "echo", path: "echo", namespace: "other"},
		{what: ours + ", not selected", path: ours, namespace: "other", others: otherRecords, limit: 1.0},
		{what: fmt.Sprintf("%s, recorded beside %d", ours, fewRecords), path: ours, namespace: "default", others: fewRecords, limit: 1.3},
		{what: fmt.Sprintf("%s, recorded beside %d", ours, otherRecords), path: ours, namespace: "default", others: otherRecords, limit: 1.3},
	}
	for i, c := range calls {
		config := map[string]any{"cniVersion": "1.1.0", "name": "bridge", "type": c.path, "prevResult": json.RawMessage(attached.Result)}
		if c.path == ours {
			config["runtimeDir"] = runtimeDir(c.others)
			config["capabilities"] = map[string]bool{"labels": true}
			config["selectors"] = map[string]any{agentName: []any{map[string]string{"namespace": "default", "selector": "app=echo"}}}
		}
		var err error
		if c.config, err = json.Marshal(config); err != nil {
			return nil, err
		}
		if c.path, err = binary(c.path); err != nil {
			return nil, err
		}
		id := fmt.Sprintf("%064x", 1000+i)
		c.env = append(os.Environ(), "CNI_CONTAINERID="+id, "CNI_NETNS=/run/netns/"+attached.NetNS, "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin",
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+c.namespace+";K8S_POD_NAME=pod;K8S_POD_INFRA_CONTAINER_ID="+id+";K8S_POD_UID="+uid(1000+i))
	}
	return calls, nil
}

// takeTurns measures. The first round is not counted: it is there to see that the plugins do what they are
// measured for, and it warms the page cache.
func takeTurns(ctx context.Context, calls []*call, rounds int) error {
	random := rand.New(rand.NewPCG(1, 2))
	for round := range rounds + 1 {
		for _, command := range []string{"ADD", "DEL"} {
			for _, i := range random.Perm(len(calls)) {
				took, err := calls[i].execute(ctx, command)
				if err != nil {
					return err
				}
				switch {
				case round == 0:
				case command == "ADD":
					calls[i].add.add(took, time.Millisecond)
				default:
					calls[i].del.add(took, time.Millisecond)
				}
			}
			if round == 0 {
				if err := recordedIs(command == "ADD"); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// execute returns the time from before the process was made to the end of its output and itself.
func (c *call) execute(ctx context.Context, command string) (time.Duration, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.path)
	cmd.Env = slices.Concat(c.env, []string{"CNI_COMMAND=" + command})
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(c.config), &stdout, &stderr
	started := time.Now()
	err := cmd.Run()
	took := time.Since(started)
	if err != nil {
		return 0, fmt.Errorf("%s %s: %w: %s%s", command, c.what, err, &stdout, &stderr)
	}
	if command == "ADD" && !json.Valid(stdout.Bytes()) {
		return 0, fmt.Errorf("%s %s: printed no result: %s%s", command, c.what, &stdout, &stderr)
	}
	return took, nil
}

// recordedIs checks that one more pod is recorded in each place, or none.
func recordedIs(wanted bool) error {
	for _, others := range []int{fewRecords, otherRecords} {
		file, err := runtimedir.New(runtimeDir(others)).ReadState()
		if err != nil {
			return err
		}
		if more := len(file.Attachments) - others; more != 0 && !wanted || more != 1 && wanted {
			return fmt.Errorf("%d pods in %s besides the %d that were there: the plugin does not do what is measured",
				more, runtimedir.New(runtimeDir(others)).StatePath(), others)
		}
	}
	return nil
}

// insideNode runs f on a thread that is in the namespaces of the node, as a runtime is: what f executes or
// opens is there, without a program in between that enters first.
func insideNode(node *lab.Node, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine, for it cannot come back.
		runtime.LockOSThread()
		done <- node.In(lab.Host, func() error {
			// The threads of a process share their root and working directory, which setns(2) would move.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			// The process namespace is for what f executes: plugins look themselves up in /proc.
			processes, err := os.Open(node.Path("/proc/1/ns/pid"))
			if err != nil {
				return err
			}
			defer func() { _ = processes.Close() }()
			mounts, err := os.Open(node.Path("/proc/1/ns/mnt"))
			if err != nil {
				return err
			}
			defer func() { _ = mounts.Close() }()
			if err := errors.Join(
				unix.Setns(int(processes.Fd()), unix.CLONE_NEWPID),
				unix.Setns(int(mounts.Fd()), unix.CLONE_NEWNS),
			); err != nil {
				return fmt.Errorf("entering the node: %w", err)
			}
			return f()
		})
	}()
	return <-done
}
