package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// ruleTarget is for the p99 of all changes, in ms.
const ruleTarget = 20

// processorTarget is for what a change costs the agent, in ms.
const processorTarget = 3

// change is one change of the records that moves the endpoint.
type change struct {
	what     string
	records  []runtimedir.Attachment
	endpoint netip.Addr // afterwards; invalid: none
	element  element    // what the kernel then says
	took     sample     // ms until then
	done     sample     // ms until the agent has published it
}

// measureRules takes the endpoint through its life again and again: it comes, a newer one takes over, it
// comes back, it goes.
func measureRules(ctx context.Context, count rounds) (measured []table, err error) {
	node, err := newNode(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	changes, err := lifeOfAnEndpoint(ctx, node)
	if err != nil {
		return nil, err
	}
	agent, notifications, err := startAgent(ctx, node)
	if err != nil {
		return nil, err
	}
	defer notifications.close()
	settled, err := watchPublished(node)
	if err != nil {
		return nil, err
	}
	defer func() { _ = settled.watcher.Close() }()

	// The first cycle is not counted: the agent still has to do with its start.
	var before time.Duration
	for cycle := range count.rules + 1 {
		if cycle == 1 {
			if before, err = processorTime(ctx, node); err != nil {
				return nil, err
			}
		}
		for _, c := range changes {
			if cycle == 1 {
				c.took, c.done = nil, nil
			}
			if err := c.measure(ctx, node, notifications, settled); err != nil {
				return nil, fmt.Errorf("%s: %w\nthe agent's log:\n%s", c.what, err, agent.Log())
			}
		}
	}

	used, err := processorTime(ctx, node)
	if err != nil {
		return nil, err
	}
	var perChange sample
	perChange.add((used-before)/time.Duration(count.rules*len(changes)), time.Millisecond)
	buckets, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_buckets")
	if err != nil {
		return nil, err
	}

	t := table{title: "from the record to the rule in the kernel", unit: "ms", notes: []string{
		"Begins before the new state file is written to its temporary name, so a little before the rename; ends when the kernel's own " +
			"notification (NFNLGRP_NFTABLES, sent after the commit) of the element with the endpoint's address arrives. Nothing is polled.",
		fmt.Sprintf("The static agent with --no-api on a bridge, %d other records, bridge-nf-call-iptables=1. "+
			"One transaction each. The agent is done when nft has ended, stale flows are deleted and the endpoint is published; "+
			"the next change waits for that, as one in the middle of it would.", otherRecords),
		fmt.Sprintf("A dump of the connection table walks all of its %s buckets, however few flows there are. Their number is the machine's and not a "+
			"network namespace's (nf_conntrack_buckets), so it is not varied.", strings.TrimSpace(string(buckets))),
	}}
	all := row{what: "all changes", target: target{valueP99, ruleTarget}}
	done := row{what: "all changes, until the agent is done"}
	for _, c := range changes {
		all.values, done.values = append(all.values, c.took...), append(done.values, c.done...)
	}
	t.rows = []row{all}
	for _, c := range changes {
		t.rows = append(t.rows, row{what: c.what, values: c.took})
	}
	t.rows = append(t.rows, done, row{what: "processor time of the agent, mean of a change", values: perChange, target: target{valueP99, processorTarget}})
	return []table{t}, nil
}

// lifeOfAnEndpoint attaches two pods, of which the second is newer, and returns the changes in which a node
// would see them come and go.
func lifeOfAnEndpoint(ctx context.Context, node *lab.Node) ([]*change, error) {
	var pods []runtimedir.Attachment
	for i, name := range []string{"a", "b"} {
		// The pods are attached in a namespace without a selector: their records are the bench's to write.
		attached, err := node.Add(ctx, "bridge", lab.Pod{Name: name, Namespace: "other"})
		if err != nil {
			return nil, err
		}
		link, err := hostInterface(attached)
		if err != nil {
			return nil, err
		}
		pods = append(pods, runtimedir.Attachment{
			ContainerID: attached.ContainerID, IfName: "eth0", Network: "bridge", Namespace: "default", Name: name, UID: uid(1000 + i),
			Labels: map[string]string{"app": "echo"}, IPs: attached.IPs, HostInterface: link, Netns: "/run/netns/" + name,
			AddedAt: time.Now().UTC().Add(time.Duration(i) * time.Second),
		})
	}
	none := neighbours(otherRecords)
	a, both := append(slices.Clone(none), pods[0]), append(slices.Clone(none), pods...)
	ipA, ipB := pods[0].IPs[0], pods[1].IPs[0]
	return []*change{
		{what: "ADD of the first endpoint", records: a, endpoint: ipA, element: element{added: true, address: ipA}},
		{what: "ADD of a newer one, which takes over", records: both, endpoint: ipB, element: element{added: true, address: ipB}},
		{what: "DEL of the newer one", records: a, endpoint: ipA, element: element{added: true, address: ipA}},
		{what: "DEL of the last one", records: none, element: element{added: false, address: ipA}},
	}, setRecords(node.Path(lab.RuntimeDir), none)
}

func (c *change) measure(ctx context.Context, node *lab.Node, notifications *notifications, settled *settled) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("nothing of it came about"))
	defer cancel()
	dir := node.Path(lab.RuntimeDir)
	gone, err := recorded(dir)
	if err != nil {
		return err
	}
	begun := time.Now()
	if _, err := runtimedir.New(dir).Update(time.Second, gone, c.records...); err != nil {
		return err
	}
	arrived, err := notifications.await(ctx, c.element, begun)
	if err != nil {
		return err
	}
	c.took.add(arrived.Sub(begun), time.Millisecond)
	if err := settled.await(ctx, c.endpoint); err != nil {
		return err
	}
	c.done.add(time.Since(begun), time.Millisecond)
	return nil
}
