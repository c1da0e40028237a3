package nftables

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watchTable calls changed whenever anybody has changed a table called name, of any family, until ctx ends
// (nfnetlink group NFNLGRP_NFTABLES). It calls it after lost events too.
func watchTable(ctx context.Context, name string, changed func()) error {
	socket, err := nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return fmt.Errorf("subscription to nftables events: %w", err)
	}
	defer context.AfterFunc(ctx, socket.Close)()
	for {
		messages, _, err := socket.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
			continue
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return fmt.Errorf("nftables events: %w", err)
		}
		for _, message := range messages {
			if message.Header.Type>>8 == unix.NFNL_SUBSYS_NFTABLES && tableOf(message.Data) == name {
				changed()
				break
			}
		}
	}
}

// tableOf is the table that an nftables message is about: in all of them attribute 1 holds its name
// (NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE).
func tableOf(data []byte) string {
	if len(data) < nl.SizeofNfgenmsg {
		return ""
	}
	attributes, err := nl.ParseRouteAttr(data[nl.SizeofNfgenmsg:])
	if err != nil {
		return ""
	}
	for _, attribute := range attributes {
		if attribute.Attr.Type&nl.NLA_TYPE_MASK == unix.NFTA_TABLE_NAME {
			return unix.ByteSliceToString(attribute.Value)
		}
	}
	return ""
}
