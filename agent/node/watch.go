package node

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// groups are the rtnetlink multicast groups of links, addresses, routes and next hop objects.
func groups() []uint32 {
	return []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_NEXTHOP,
	}
}

// Watch calls changed after each event that may change what Snapshot returns, until ctx ends; localRoutes says whether its LocalRoutes
// may have changed. It calls it once at the start, since what changed before the subscription went unseen, and after lost events. An error does not end it: Watch
// reports the error and subscribes again.
func Watch(ctx context.Context, changed func(localRoutes bool), report func(error)) error {
	return keepWatching(ctx, subscribe, changed, report)
}

func keepWatching(ctx context.Context, subscribe func() (*netlink.Conn, error), changed func(localRoutes bool), report func(error)) error {
	const retry = time.Second
	for {
		connection, err := subscribe()
		if err == nil {
			err = watch(ctx, connection, changed)
		}
		if ctx.Err() != nil {
			return nil
		}
		report(err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
	}
}

// subscribe opens a socket in the network namespace of the calling thread.
func subscribe() (*netlink.Conn, error) {
	connection, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return nil, err
	}
	for _, group := range groups() {
		// Linux before 5.3 has no next hop objects.
		if err := connection.JoinGroup(group); err != nil && group != unix.RTNLGRP_NEXTHOP {
			return nil, errors.Join(err, connection.Close())
		}
	}
	return connection, nil
}

// watch returns when ctx has ended or the connection, which it closes, has failed.
func watch(ctx context.Context, connection *netlink.Conn, changed func(localRoutes bool)) error {
	defer func() { _ = connection.Close() }()
	defer context.AfterFunc(ctx, func() { _ = connection.SetReadDeadline(time.Unix(1, 0)) })()
	changed(true)
	for {
		messages, err := connection.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // events were lost; the subscription goes on
			changed(true)
		case err != nil:
			return err
		case slices.ContainsFunc(messages, matters):
			changed(slices.ContainsFunc(messages, ofLocalRoutes))
		}
	}
}

// matters reports whether an event may change what Classify decides. A node may learn routes to others by the thousand, by
// gateways: of these only default ones count at once, and the rest with the next poll.
func matters(message netlink.Message) bool {
	if t := message.Header.Type; t != unix.RTM_NEWROUTE && t != unix.RTM_DELROUTE || len(message.Data) < unix.SizeofRtMsg {
		return true
	}
	route := parseRoute(message.Data)
	return !route.skip && (route.ours || !route.local && (route.Default() || !route.gateway))
}

// ofLocalRoutes reports whether an event may be about a LocalRoute. An IPv6 route loses its source without an event when that address
// goes (rt6_remove_prefsrc).
func ofLocalRoutes(message netlink.Message) bool {
	data := message.Data
	switch message.Header.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(data) < unix.SizeofRtMsg || parseRoute(data).ours
	case unix.RTM_DELADDR: // links of pods have link-local ones
		return len(data) < unix.SizeofIfAddrmsg || !parseAddress(data).Prefix.Addr().IsLinkLocalUnicast()
	}
	return false
}
