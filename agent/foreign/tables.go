package foreign

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
)

// kernelTables are the family and the name of each table that the kernel has for nftables (linux/netfilter/nf_tables.h).
func kernelTables() (tables [][2]string, err error) {
	if !nftables.Supported() {
		return nil, nil
	}
	request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, err
	}
	families := map[byte]string{unix.NFPROTO_INET: "inet", unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_ARP: "arp", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev"}
	for _, message := range messages {
		if len(message) < nl.SizeofNfgenmsg {
			return nil, errors.New("a message of the kernel is cut short")
		}
		attributes, err := nl.ParseRouteAttr(message[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, fmt.Errorf("a message of the kernel: %w", err)
		}
		for _, a := range attributes {
			if a.Attr.Type == unix.NFTA_TABLE_NAME {
				tables = append(tables, [2]string{families[message[0]], string(bytes.TrimRight(a.Value, "\x00"))})
			}
		}
	}
	return tables, nil
}
