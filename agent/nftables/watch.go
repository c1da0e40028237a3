package nftables

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watchTable calls changed whenever anybody has changed a table called name, of any family, until ctx ends (nfnetlink group
// NFNLGRP_NFTABLES), with the name of the process where the kernel says it. It calls it after lost events too.
//
// It reads the events itself: google/nftables does not say which table the elements of an event belong to.
func watchTable(ctx context.Context, name string, changed func(process string)) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("nftables events: %w", err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("nftables events: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
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
			return fmt.Errorf("nftables events: %w", err)
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
