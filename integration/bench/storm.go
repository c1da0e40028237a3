package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const (
	stormPods = 250 // a full node
	// stormAtOnce is how many sandboxes a runtime makes side by side: kubelet starts no more than 10 pods of one look at once on
	// a machine of this size.
	stormAtOnce = 10
)

// storm is what one start of all pods took.
type storm struct {
	pods, rules sample // ms, from the first ADD to the last result and to the last rule
	behind      sample // ms, from a pod's result to its rule; negative where the rule was there first
	agent       sample // ms of processor time
}

// measureStorm measures a node on which all pods start at once, as after a reboot: each is the only target of a magic IP of
// its own, which is the most that a pod can ask of the agent.
func measureStorm(ctx context.Context, count rounds) ([]table, error) {
	var s storm
	for range count.storms {
		if err := s.once(ctx); err != nil {
			return nil, err
		}
	}
	t := table{title: fmt.Sprintf("%d pods of a node start at once", stormPods), unit: "ms", rows: []row{
		row2("first ADD until the last pod's result", s.pods),
		row2("first ADD until the last pod's rule", s.rules),
		row2("a pod's result until its rule", s.behind),
		row2("processor time of the agent", s.agent),
	}, notes: []string{
		fmt.Sprintf("%d times on a new node: pods with a network namespace, bridge, host-local and the plugin, executed by cnitool, %d side by side; each pod is the only "+
			"target of one of %d magic IPs. Negative: the rule was there before cnitool had printed the result.", count.storms, stormAtOnce, stormPods),
	}}
	return []table{t}, nil
}

// once is one storm on a node of its own.
func (s *storm) once(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Minute, errors.New("it takes more than five minutes"))
	defer cancel()
	node, err := newNode(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	conflist, err := lab.Conflist("10-bridge.conflist")
	if err == nil {
		err = node.AddConf("10-bridge.conflist", bytes.Replace(conflist, []byte("app=echo"), []byte("app"), 1))
	}
	if err != nil {
		return err
	}
	notified, err := subscribe(node)
	if err != nil {
		return err
	}
	defer notified.close()
	magicIPs, last := stormConfig()
	begun := time.Now()
	if _, err := node.StartAgent(magicIPs, "--log-level", "warn"); err != nil {
		return err
	}
	if _, err := notified.await(ctx, element{added: true, address: last}, begun); err != nil {
		return err
	}
	before, err := processorTime(ctx, node)
	if err != nil {
		return err
	}

	var mu sync.Mutex
	results := map[netip.Addr]time.Time{}
	begun = time.Now()
	pods, running := errgroup.WithContext(ctx)
	pods.SetLimit(stormAtOnce)
	for i := range stormPods {
		pods.Go(func() error {
			name := fmt.Sprintf("pod%d", i)
			attached, err := node.Add(running, "bridge", lab.Pod{Name: name, Labels: map[string]string{"app": fmt.Sprintf("s%d", i)}})
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			results[attached.IPs[0]] = time.Now()
			return nil
		})
	}
	if err := pods.Wait(); err != nil {
		return err
	}
	s.pods.add(time.Since(begun), time.Millisecond)
	var lastRule time.Time
	for len(results) > 0 {
		select {
		case <-time.After(patience):
			return fmt.Errorf("%d pods have no rule", len(results))
		case got := <-notified.arrived:
			if got.err != nil {
				return fmt.Errorf("notifications of nftables: %w", got.err)
			}
			for address, result := range results {
				if got.added && bytes.Contains(got.content, address.AsSlice()) {
					s.behind.add(got.at.Sub(result), time.Millisecond)
					lastRule = got.at
					delete(results, address)
				}
			}
		}
	}
	s.rules.add(lastRule.Sub(begun), time.Millisecond)
	after, err := processorTime(ctx, node)
	s.agent.add(after-before, time.Millisecond)
	return err
}

// stormConfig gives each pod a magic IP, and returns the last of these.
func stormConfig() (config []byte, last netip.Addr) {
	var text bytes.Buffer
	fmt.Fprintf(&text, "name: %s\npollInterval: 1h\nmagicIPs:\n", agentName)
	address := netip.MustParseAddr(firstOfMany)
	for i := range stormPods {
		last = address
		fmt.Fprintf(&text, "- {ipAddress: %s, namespace: default, selector: app=s%d, ports: [{port: %d}]}\n", address, i, serverPort)
		address = address.Next()
	}
	return text.Bytes(), last
}

// processorTime is what the agent of the node has used so far.
func processorTime(ctx context.Context, node *lab.Node) (time.Duration, error) {
	printed, err := node.Run(ctx, "sh", "-c", `for p in /proc/[0-9]*; do [ "$(cat $p/comm)" = magic-ip-agent ] && cat $p/stat; done; true`)
	if err != nil {
		return 0, err
	}
	// The second field is the name in parentheses; utime and stime are the 14th and 15th, in hundredths of a second (proc_pid_stat(5)).
	_, rest, _ := strings.Cut(printed, ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, errors.New("the agent is not running")
	}
	user, err := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err, err2)
}
