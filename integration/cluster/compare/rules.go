package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// ruleLog is what the kernel has told of new elements in the agent's sets and maps.
type ruleLog struct {
	socket *nl.NetlinkSocket
	ended  chan struct{}

	mu       sync.Mutex
	elements []element
	stopped  bool
	err      error
}

type element struct {
	at   time.Time
	data []byte
}

// watchRules hears the kernel's own events in a node until it is closed.
func watchRules(n *whole.Node) (*ruleLog, error) {
	l := &ruleLog{ended: make(chan struct{})}
	err := n.Lab().In(lab.Host, func() (err error) {
		l.socket, err = nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("events of nftables on %s: %w", n.Name, err)
	}
	if err := l.socket.SetReceiveTimeout(&unix.Timeval{Usec: 100_000}); err != nil {
		return nil, err
	}
	go l.hear()
	return l, nil
}

func (l *ruleLog) hear() {
	defer close(l.ended)
	for {
		messages, _, err := l.socket.Receive()
		at := time.Now()
		l.mu.Lock()
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			l.err = err
		}
		for _, message := range messages {
			if message.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM && bytes.Contains(message.Data, []byte("magic-ip-"+agentName)) {
				l.elements = append(l.elements, element{at, message.Data})
			}
		}
		end := l.stopped || l.err != nil
		l.mu.Unlock()
		if end {
			return
		}
	}
}

func (l *ruleLog) close() {
	l.mu.Lock()
	l.stopped = true
	l.mu.Unlock()
	<-l.ended
	l.socket.Close()
}

// first is when an address was in an element for the first time after that.
func (l *ruleLog) first(address netip.Addr, after time.Time) (time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.elements {
		if e.at.After(after) && bytes.Contains(e.data, address.AsSlice()) {
			return e.at, nil
		}
	}
	return time.Time{}, errors.Join(l.err, fmt.Errorf("%v has not been in the rules", address))
}
