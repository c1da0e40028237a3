package nftables

import (
	"encoding/binary"
	"errors"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NewGeneration returns a function that asks the kernel for the generation of its nftables rules
// (NFT_MSG_GETGEN): a counter per network namespace that every change by anybody moves on. While it stands
// still nobody has touched our tables, and a look at them would be wasted.
//
// The function keeps its socket: closing one waits until the kernel has freed what the last change
// removed (nft_rcv_nl_event), which takes more than 10 ms.
func NewGeneration() func() (uint32, error) {
	const subsystem = unix.NFNL_SUBSYS_NFTABLES << 8
	var sockets map[int]*nl.SocketHandle
	return func() (uint32, error) {
		if sockets == nil {
			socket, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_NETFILTER)
			if err != nil {
				return 0, err
			}
			sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: socket}}
		}
		request := nl.NewNetlinkRequest(subsystem|unix.NFT_MSG_GETGEN, 0)
		request.Sockets = sockets
		request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
		messages, err := request.Execute(unix.NETLINK_NETFILTER, subsystem|unix.NFT_MSG_NEWGEN)
		if err != nil {
			return 0, err
		}
		for _, message := range messages {
			attributes, err := nl.ParseRouteAttr(message[nl.SizeofNfgenmsg:])
			if err != nil {
				return 0, err
			}
			for _, attribute := range attributes {
				if attribute.Attr.Type == unix.NFTA_GEN_ID && len(attribute.Value) >= 4 {
					return binary.BigEndian.Uint32(attribute.Value), nil
				}
			}
		}
		return 0, errors.New("the kernel's answer to NFT_MSG_GETGEN holds no generation")
	}
}
