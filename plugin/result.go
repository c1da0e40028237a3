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

// interfaces is the part of a CNI result with the addresses of each interface; it has the same format
// in all versions that the plugin implements.
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

// addresses are those of the interface ifName inside the sandbox, and those without an
// interface: Calico, for one, names the host's end only. The error names the entries that are ignored; the
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
// of the chain added them, of a kind that ends with the sandbox. Empty where the result names none.
//
// A link that is not there is skipped: where the recorded link is absent, the agent considers the sandbox gone,
// and results name links that never exist (the VPC CNI of AWS keeps data in such entries). So is one with the
// name of the interface in the sandbox: Azure CNI names the pod's end without its sandbox, and the node may have an
// uplink of this name.
func (r *interfaces) host(ifName string, look func(string) (link, bool)) (name string, index int) {
	for _, entry := range slices.Backward(r.Interfaces) {
		if entry.Sandbox != "" || entry.Name == ifName {
			continue
		}
		if link, exists := look(entry.Name); exists && slices.Contains([]string{"veth", "netkit", "tun", ""}, link.driver) {
			return entry.Name, link.index
		}
	}
	return "", 0
}

// link is a link of the node: its kernel driver, empty where the kernel does not report it, and its index, 0 likewise.
type link struct {
	driver string
	index  int
}

// lookUp asks the kernel for the link of this name, see SIOCETHTOOL and SIOCGIFINDEX in netdevice(7).
func lookUp(name string) (l link, exists bool) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return link{}, true
	}
	defer func() { _ = unix.Close(fd) }()
	request, err := unix.NewIfreq(name)
	if err != nil {
		return link{}, false // too long for a link's name
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, request); err != nil {
		return link{}, !errors.Is(err, unix.ENODEV)
	}
	l.index = int(request.Uint32())
	if info, err := unix.IoctlGetEthtoolDrvinfo(fd, name); err == nil {
		l.driver = unix.ByteSliceToString(info.Driver[:])
	}
	return l, true
}
