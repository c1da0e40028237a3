package nftables

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// TestFailedSubscription: what fails is reported, and tried again for as long as ctx lasts.
func TestFailedSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		reported := 0
		keepWatching(ctx,
			func() (*netlink.Conn, error) { return nil, unix.EMFILE },
			"magic-ip-a",
			func(string) { t.Error("a change is reported without a subscription") },
			func(err error) {
				if !errors.Is(err, unix.EMFILE) {
					t.Errorf("reported: %v", err)
				}
				if reported++; reported == 3 {
					cancel()
				}
			})
		if reported != 3 {
			t.Errorf("reported %d times", reported)
		}
	})
}

// TestFailedConnection: after a connection has failed, the next one reports what may have changed meanwhile.
func TestFailedConnection(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	ctx, cancel := context.WithCancel(t.Context())
	subscriptions, changes := 0, 0
	var reported []error
	keepWatching(ctx,
		func() (*netlink.Conn, error) {
			conn, err := subscribe()
			if subscriptions++; err == nil && subscriptions == 1 {
				err = conn.Close()
			}
			return conn, err
		},
		"magic-ip-a",
		func(string) {
			if changes++; changes == 2 {
				cancel()
			}
		},
		func(err error) { reported = append(reported, err) })
	if subscriptions != 2 || changes != 2 || len(reported) != 1 {
		t.Errorf("%d subscriptions, %d changes, reported %v; want two of each, and one error", subscriptions, changes, reported)
	}
}
