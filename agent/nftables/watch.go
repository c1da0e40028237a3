package nftables

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// keepWatching subscribes, and calls changed whenever anybody has changed a table called name, of any family, until ctx ends, with the
// name of the process where the kernel says it. It calls it after each subscription too, since what changed before went unseen, and after
// lost events. An error does not end it: it is reported, and the next subscription follows.
func keepWatching(ctx context.Context, subscribe func() (*netlink.Conn, error), name string, changed func(process string), report func(error)) {
	const retry = time.Second
	for {
		conn, err := subscribe()
		if err == nil {
			err = watchTable(ctx, conn, name, changed)
		}
		if ctx.Err() != nil {
			return
		}
		report(fmt.Errorf("nftables events: %w", err))
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry):
		}
	}
}

// subscribe opens a socket for the events of nftables (nfnetlink group NFNLGRP_NFTABLES) in the network namespace of the calling thread.
func subscribe() (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// watchTable returns when ctx has ended or the connection, which it closes, has failed.
//
// It reads the events itself: google/nftables does not say which table the elements of an event belong to.
func watchTable(ctx context.Context, conn *netlink.Conn, name string, changed func(process string)) error {
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	changed("")
	ours := false // a change of the transaction under way is of our table
	for {
		messages, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed("")
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return err
		}
		for _, message := range messages {
			switch {
			case message.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(message.Data) < sizeofNfgenmsg:
			case message.Header.Type&0xff != unix.NFT_MSG_NEWGEN:
				ours = ours || tableOf(message.Data) == name
			case ours: // the end of a transaction
				changed(processOf(message.Data))
				ours = false
			}
		}
	}
}

// tableOf is the table that an nftables message is about: in all of them attribute 1 holds its name
// (NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE).
func tableOf(data []byte) (table string) {
	_ = attributesOf(data[sizeofNfgenmsg:], func(kind uint16, value []byte) {
		if kind == unix.NFTA_TABLE_NAME {
			table = cString(value)
		}
	})
	return table
}

// processOf is the process that made a transaction (NFT_MSG_NEWGEN).
func processOf(data []byte) (process string) {
	_ = attributesOf(data[sizeofNfgenmsg:], func(kind uint16, value []byte) {
		if kind == unix.NFTA_GEN_PROC_NAME {
			process = cString(value)
		}
	})
	return process
}
