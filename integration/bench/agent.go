package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// patience is for what happens soon or never.
const patience = 10 * time.Second

// startAgent starts the agent and waits until its first rules are in the kernel. The caller closes the
// notifications.
func startAgent(ctx context.Context, node *lab.Node) (*lab.Agent, *notifications, error) {
	notifications, err := subscribe(node)
	if err != nil {
		return nil, nil, err
	}
	started := time.Now()
	agent, err := node.StartAgent([]byte(agentConfig))
	if err == nil {
		ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the agent does not serve"))
		defer cancel()
		if _, err = notifications.await(ctx, element{added: true, address: netip.MustParseAddr(magicIP)}, started); err != nil {
			err = fmt.Errorf("%w\nthe agent's log:\n%s", err, agent.Log())
		}
	}
	if err != nil {
		notifications.close()
		return nil, nil, err
	}
	return agent, notifications, nil
}

// settled tells when the agent has published where its magic IP leads to: then it is done with a change.
type settled struct {
	dir     string
	watcher *fsnotify.Watcher
}

func watchPublished(node *lab.Node) (*settled, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	s := &settled{dir: node.Path(lab.RuntimeDir), watcher: watcher}
	return s, watcher.Add(s.folder())
}

func (s *settled) folder() string {
	return filepath.Dir(runtimedir.New(s.dir).Agent(agentName).StatusPath())
}

func (s *settled) await(ctx context.Context, endpoint netip.Addr) error {
	return s.until(ctx, endpoint, func(magicIPs []runtimedir.MagicIP) []runtimedir.MagicIP { return magicIPs })
}

// awaitLast is await for the last magic IP alone.
func (s *settled) awaitLast(ctx context.Context, endpoint netip.Addr) error {
	return s.until(ctx, endpoint, func(magicIPs []runtimedir.MagicIP) []runtimedir.MagicIP { return magicIPs[len(magicIPs)-1:] })
}

func (s *settled) until(ctx context.Context, endpoint netip.Addr, which func([]runtimedir.MagicIP) []runtimedir.MagicIP) error {
	for {
		agent, err := runtimedir.New(s.dir).Agent(agentName).ReadStatus()
		if err != nil {
			return err
		}
		reached := !slices.ContainsFunc(which(agent.MagicIPs), func(m runtimedir.MagicIP) bool {
			if len(m.Endpoints) == 0 {
				return endpoint.IsValid()
			}
			return m.Endpoints[0].Address.Addr() != endpoint
		})
		if reached {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s was not published as the endpoint: %w", endpoint, context.Cause(ctx))
		case err := <-s.watcher.Errors:
			return fmt.Errorf("watching %s: %w", s.folder(), err)
		case <-s.watcher.Events:
		}
	}
}

// element is an element of a set or map of nftables, by the address in it.
type element struct {
	added   bool // or deleted
	address netip.Addr
}

// notifications are the kernel's, of changes to nftables in the node.
type notifications struct {
	socket  *nl.NetlinkSocket
	arrived chan notification
}

type notification struct {
	at      time.Time
	added   bool
	content []byte
	err     error
}

func subscribe(node *lab.Node) (*notifications, error) {
	n := &notifications{arrived: make(chan notification, 1<<17)}
	err := node.In(lab.Host, func() (err error) {
		if n.socket, err = nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES); err != nil {
			return err
		}
		return n.socket.SetReceiveBufferSize(64<<20, true) // thousands of elements come at once
	})
	if err != nil {
		return nil, fmt.Errorf("subscribing to nftables notifications: %w", err)
	}
	go n.receive()
	return n, nil
}

func (n *notifications) receive() {
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	defer close(n.arrived)
	for {
		messages, _, err := n.socket.Receive()
		at := time.Now()
		if err != nil {
			n.arrived <- notification{err: err}
			return
		}
		for _, message := range messages {
			switch message.Header.Type {
			case subsystem | unix.NFT_MSG_NEWSETELEM, subsystem | unix.NFT_MSG_DELSETELEM:
				added := message.Header.Type == subsystem|unix.NFT_MSG_NEWSETELEM
				n.arrived <- notification{at: at, added: added, content: message.Data}
			}
		}
	}
}

// await returns when the notification of the element arrived, which was after since.
func (n *notifications) await(ctx context.Context, wanted element, since time.Time) (time.Time, error) {
	for {
		select {
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("no notification of nftables about %s: %w", wanted.address, context.Cause(ctx))
		case got := <-n.arrived:
			if got.err != nil {
				return time.Time{}, fmt.Errorf("notifications of nftables: %w", got.err)
			}
			if got.added == wanted.added && got.at.After(since) && bytes.Contains(got.content, wanted.address.AsSlice()) {
				return got.at, nil
			}
		}
	}
}

// quiet returns once nothing has arrived for so long.
func (n *notifications) quiet(long time.Duration) {
	for {
		select {
		case <-n.arrived:
		case <-time.After(long):
			return
		}
	}
}

func (n *notifications) close() {
	n.socket.Close()
	for range n.arrived { //nolint:revive // until the receiver has ended
	}
}
