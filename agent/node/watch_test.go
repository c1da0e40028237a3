package node_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// watched is a watch in the test's network namespace. It calls changed by sending to changes.
type watched struct {
	t          *testing.T
	connection *netlink.Conn
	changes    chan bool
	cancel     func()
	ended      chan error
}

func watch(t *testing.T) *watched {
	t.Helper()
	connection, err := node.Subscribe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w := &watched{t: t, connection: connection, changes: make(chan bool), cancel: cancel, ended: make(chan error, 1)}
	go func() {
		w.ended <- node.WatchOn(ctx, connection, func(localRoutes bool) {
			select {
			case w.changes <- localRoutes:
			case <-ctx.Done():
			}
		})
	}()
	return w
}

// next waits for a call of changed, and returns what it says of local routes.
func (w *watched) next() (localRoutes bool) {
	w.t.Helper()
	select {
	case localRoutes = <-w.changes:
	case err := <-w.ended:
		w.t.Fatalf("the watch ended with %v", err)
	case <-lab.After(w.t, time.Minute):
		w.t.Fatal("a change is not reported")
	}
	return localRoutes
}

// stop ends the watch.
func (w *watched) stop() {
	w.t.Helper()
	w.cancel()
	if err := <-w.ended; err != nil {
		w.t.Errorf("the watch ended with %v", err)
	}
	if err := w.connection.JoinGroup(unix.RTNLGRP_LINK); err == nil {
		w.t.Error("the socket is still open")
	}
}

// TestEvents: which of the kernel's events are reported.
func TestEvents(t *testing.T) {
	for _, test := range []struct {
		before, change string
		kind           netlink.HeaderType
		matters        bool
		localRoutes    bool
	}{
		{"", "link add if0 type ifb", unix.RTM_NEWLINK, true, false},
		{"", "link set br0 name br1", unix.RTM_NEWLINK, true, false},
		{"", "link delete port", unix.RTM_DELLINK, true, false},
		{"", "addr add 192.0.2.9/32 dev br0", unix.RTM_NEWADDR, true, false},
		{"", "-6 addr add 2001:db8::9/64 dev br0 nodad", unix.RTM_NEWADDR, true, false},
		{"", "addr del 192.0.2.2/24 dev br0", unix.RTM_DELADDR, true, true},
		{"", "route add default dev br0", unix.RTM_NEWROUTE, true, false},
		{"", "route add 128.0.0.0/1 via 192.0.2.1", unix.RTM_NEWROUTE, true, false},
		{"", "route add default via 192.0.2.1 table 7", unix.RTM_NEWROUTE, true, false},
		{"", "route add default nexthop via 192.0.2.1 nexthop via 192.0.2.3", unix.RTM_NEWROUTE, true, false},
		{"", "-6 route add default dev br0", unix.RTM_NEWROUTE, true, false},
		{"route add default via 192.0.2.1", "route delete default", unix.RTM_DELROUTE, true, false},
		{"", "route add 10.244.1.5 dev br0", unix.RTM_NEWROUTE, true, false},
		{"-6 addr add fe80::9/64 dev br0 nodad", "-6 addr del fe80::9/64 dev br0", unix.RTM_DELADDR, true, false},
		{"", "route add local 169.254.210.210 dev lo table local proto 109", unix.RTM_NEWROUTE, true, true},
		{"route add local 169.254.210.210 dev lo table local proto 109", "route del local 169.254.210.210 dev lo table local", unix.RTM_DELROUTE, true, true},
		{"", "nexthop add id 5 via 192.0.2.1 dev br0", unix.RTM_NEWNEXTHOP, true, false},
		// A node may learn these by the thousand.
		{"", "route add 203.0.113.0/24 via 192.0.2.1", unix.RTM_NEWROUTE, false, false},
		{"", "route add 198.51.100.0/24 nexthop via 192.0.2.1 nexthop via 192.0.2.3", unix.RTM_NEWROUTE, false, false},
		{"", "-6 route add unreachable 2001:db8::/32", unix.RTM_NEWROUTE, false, false},
		{"", "route add local 203.0.113.1 dev br0 table local", unix.RTM_NEWROUTE, false, false},
	} {
		t.Run(test.change, func(t *testing.T) {
			nodetest.Namespace(t, `
				link add br0 type bridge
				link set br0 addrgenmode none
				link add port type ifb
				link set port addrgenmode none
				link set port master br0
				link set port up
				link set br0 up
				addr add 192.0.2.2/24 dev br0
			`+test.before)
			connection, err := node.Subscribe()
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = connection.Close() }()
			nodetest.IP(t, test.change+"\nlink add last type ifb")
			seen, matters, localRoutes := false, false, false
			if err := connection.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			for last := false; !last || !seen; { // the kernel reports IPv6 addresses a little later
				messages, err := connection.Receive()
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range messages {
					if m.Header.Type == test.kind {
						seen, matters, localRoutes = true, matters || node.Matters(m), localRoutes || node.OfLocalRoutes(m)
					}
					last = last || m.Header.Type == unix.RTM_NEWLINK && bytes.Contains(m.Data, []byte("last\x00"))
				}
			}
			if matters != test.matters || localRoutes != test.localRoutes {
				t.Errorf("matters: %v, want %v; may be of local routes: %v, want %v", matters, test.matters, localRoutes, test.localRoutes)
			}
		})
	}
}

// TestLostEvents: while changed is busy, more happens than the socket's buffer holds. The watch goes on, and what was lost
// is read again.
func TestLostEvents(t *testing.T) {
	nodetest.Namespace(t, "link add if0 type ifb")
	w := watch(t)
	if err := w.connection.SetReadBuffer(1); err != nil { // the kernel's minimum is more
		t.Fatal(err)
	}
	w.next()
	nodetest.IP(t, strings.Repeat("link set if0 up\nlink set if0 down\n", 30)+"link add lost0 type ifb")
	if drops := dropsOf(t, w.connection.PID()); drops == "0" {
		t.Fatal("no event was dropped")
	}
	w.next() // for the first of these events
	w.next()
	if s, err := (node.Kernel{}).Snapshot(); err != nil || !strings.Contains(fmt.Sprint(s.Links), " lost0 ") {
		t.Errorf("links %v, error %v", s.Links, err)
	}
	w.stop()
}

// dropsOf is how many messages the kernel could not deliver to a netlink socket (/proc/net/netlink).
func dropsOf(t *testing.T, port uint32) string {
	t.Helper()
	for line := range strings.Lines(nodetest.Run(t, "cat", "/proc/net/netlink")) {
		// sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
		if fields := strings.Fields(line); len(fields) == 10 && fields[1] == "0" && fields[2] == fmt.Sprint(port) {
			return fields[8]
		}
	}
	t.Fatalf("no netlink socket has the port %d", port)
	return ""
}

// TestFailedSubscription: what fails is reported, and tried again for as long as ctx lasts.
func TestFailedSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		reported := 0
		err := node.KeepWatching(ctx,
			func() (*netlink.Conn, error) { return nil, unix.EMFILE },
			func(bool) { t.Error("a change is reported without a subscription") },
			func(err error) {
				if !errors.Is(err, unix.EMFILE) {
					t.Errorf("reported: %v", err)
				}
				if reported++; reported == 3 {
					cancel()
				}
			})
		if err != nil || reported != 3 {
			t.Errorf("reported %d times, then %v", reported, err)
		}
	})
}
