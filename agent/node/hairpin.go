package node

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SetHairpin lets a bridge port, by its ifindex, send frames back where they came from, so that a pod reaches itself
// through a magic IP; or no more. A link that is gone, or has left its bridge, is not an error.
func (Kernel) SetHairpin(port int, on bool) error {
	err := netlink.LinkSetHairpin(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: port}}, on)
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("hairpin mode of link %d: %w", port, err)
	}
	return nil
}
