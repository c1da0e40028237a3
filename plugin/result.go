package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// interfaces is the part of a CNI result that says which interface has which addresses; it has the same shape
// in all versions that the plugin speaks.
type interfaces struct {
	Interfaces []struct {
		Name    string `json:"name"`
		Sandbox string `json:"sandbox"` // empty: the interface is the node's
	} `json:"interfaces"`
	IPs []struct {
		Interface *int   `json:"interface"` // an index of Interfaces
		Address   string `json:"address"`   // with a prefix length
	} `json:"ips"`
}

func parseInterfaces(result json.RawMessage) (*interfaces, error) {
	var parsed interfaces
	if err := json.Unmarshal(result, &parsed); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
	}
	return &parsed, nil
}

// addresses are those of the interface ifName inside the sandbox, and those that are not said to be of any
// interface: Calico, for one, names the host's end alone. The error tells which entries are not understood; the
// others count.
func (r *interfaces) addresses(ifName string) (addrs []netip.Addr, ignored error) {
	for _, ip := range r.IPs {
		if i := ip.Interface; i != nil {
			if *i < 0 || *i >= len(r.Interfaces) {
				ignored = errors.Join(ignored, fmt.Errorf("%s: there is no interface %d", ip.Address, *i))
				continue
			}
			if owner := r.Interfaces[*i]; owner.Name != ifName || owner.Sandbox == "" {
				continue
			}
		}
		prefix, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			ignored = errors.Join(ignored, err)
			continue
		}
		addrs = append(addrs, prefix.Addr().Unmap())
	}
	return addrs, ignored
}

// host is the link on the node that leads to the sandbox: the last of the node's, in the order in which the plugins
// of the chain named them, that is not made to serve many or to shape traffic. Empty where the result names none.
//
// A link that is not there is passed over: the agent takes the absence of the recorded one for the end of the
// sandbox, and results name links that never were (the VPC CNI of AWS keeps notes in such entries).
func (r *interfaces) host(driver func(string) (name string, exists bool)) string {
	for _, link := range slices.Backward(r.Interfaces) {
		if link.Sandbox != "" {
			continue
		}
		// ifb: the plugin bandwidth appends the link that it shapes with.
		if name, exists := driver(link.Name); exists && name != "bridge" && name != "ifb" {
			return link.Name
		}
	}
	return ""
}

// driver is the name of the kernel driver of a link of the node, see SIOCETHTOOL in netdevice(7), and whether there is
// such a link. The name is empty where the kernel does not tell it.
func driver(link string) (name string, exists bool) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", true
	}
	defer func() { _ = unix.Close(fd) }()
	info, err := unix.IoctlGetEthtoolDrvinfo(fd, link)
	if err != nil {
		return "", !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) // EINVAL: too long for a link's name
	}
	return unix.ByteSliceToString(info.Driver[:]), true
}
