package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// loads are clients in the client pod of a node, by all peers, and the witness beside them, who sends datagrams to the address of a
// pod that nothing happens to: where it waits, the machine stands still.
type loads struct {
	of      map[peer][]*lab.Process
	witness *lab.Process
}

// startLoads starts them; processes for each peer, so that what one suffers is not another's.
func (w *world) startLoads(ctx context.Context, n *whole.Node, of map[peer][]lab.Kind, flags ...string) (*loads, error) {
	namespace, err := w.clientNetNS(ctx, n)
	if err != nil {
		return nil, err
	}
	witness, err := w.witnessOf(ctx, n)
	if err != nil {
		return nil, err
	}
	// In the node's cgroups: Cilium looks at those of a process to know whether it is of the node.
	start := func(program string, args ...string) (*lab.Process, error) {
		return n.Lab().Start("sh", append([]string{"/run/in-cgroup", "nsenter", "--net=" + namespace, w.program(program), "load", "--for", "1h"}, args...)...)
	}
	if w.every > 0 && len(flags) == 0 {
		flags = []string{"--every", w.every.String()}
	}
	l := &loads{of: map[peer][]*lab.Process{}}
	if l.witness, err = start("echo", "--lines", fmt.Sprintf("%s=%v", lab.UDP, witness)); err != nil {
		return nil, err
	}
	for p, kinds := range of {
		// A late answer is not a lost one: datagrams have as long as requests.
		args := append([]string{"--lines", "--datagram-timeout", "1s"}, flags...)
		for _, kind := range kinds {
			if kind != grpcStream {
				args = append(args, fmt.Sprintf("%s=%s", kind, p.address(n, kind)))
			}
		}
		process, err := start("echo", args...)
		if err != nil {
			return nil, err
		}
		l.of[p] = append(l.of[p], process)
		if slices.Contains(kinds, grpcStream) {
			if process, err = start("stream", append(slices.Clone(flags), p.address(n, grpcStream))...); err != nil {
				return nil, err
			}
			l.of[p] = append(l.of[p], process)
		}
	}
	return l, nil
}

// stop ends the clients and returns what became of their requests, and of those of the witness.
func (l *loads) stop(ctx context.Context) (outcomes map[peer]map[lab.Kind]lab.Outcomes, witness lab.Outcomes, err error) {
	// All at once: none goes on while another prints.
	stopped := make(chan error)
	all := []*lab.Process{l.witness}
	for _, processes := range l.of {
		all = append(all, processes...)
	}
	for _, process := range all {
		go func() { stopped <- process.Stop(ctx) }()
	}
	for range all {
		err = errors.Join(err, <-stopped)
	}
	if err != nil {
		return nil, nil, err
	}
	read := func(process *lab.Process) (byKind map[lab.Kind]lab.Outcomes) {
		byTarget, errRead := lab.ReadRequests(strings.NewReader(process.Log()))
		err = errors.Join(err, errRead)
		byKind = map[lab.Kind]lab.Outcomes{}
		for target, outcomes := range byTarget {
			byKind[target.Kind] = outcomes
		}
		return byKind
	}
	outcomes = map[peer]map[lab.Kind]lab.Outcomes{}
	for p, processes := range l.of {
		outcomes[p] = map[lab.Kind]lab.Outcomes{}
		for _, process := range processes {
			for kind, o := range read(process) {
				outcomes[p][kind] = o
			}
		}
	}
	return outcomes, read(l.witness)[lab.UDP], err
}
