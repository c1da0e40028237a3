package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestLinksOfOthers: hosts that reach the node, and its pods, by links that look like pods' in one respect or another do not
// reach a magic IP. Addresses: 198.51.100.0/24 and 2001:db8:2::/64 the bridge, 10.8.0.0/24 and fd00:8::/64 the VPN.
func TestLinksOfOthers(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := newWorld(t, backend, "bridge")
		// A bridge with a port that leads to another network, a VXLAN, and one that leads to a container.
		w.run(makeNetNS + `
			netns storage
			netns container
			ip link add under type veth peer name under netns storage
			ip link set under up
			ip address add 10.99.0.1/30 dev under
			ip -n storage link set under up
			ip -n storage address add 10.99.0.2/30 dev under
			ip link add vx0 type vxlan id 7 dstport 4789 local 10.99.0.1 remote 10.99.0.2
			ip -n storage link add vx0 type vxlan id 7 dstport 4789 local 10.99.0.2 remote 10.99.0.1
			ip link add br1 type bridge
			ip link set vx0 master br1
			ip link add beside type veth peer name eth0 netns container
			ip link set beside master br1
			for link in br1 vx0 beside; do ip link set $link up; done
			ip -n storage link set vx0 up
			ip -n container link set eth0 up
			ip address add 198.51.100.1/24 dev br1
			ip address add 2001:db8:2::1/64 dev br1 nodad
			ip -n storage address add 198.51.100.2/24 dev vx0
			ip -n storage address add 2001:db8:2::2/64 dev vx0 nodad
			ip -n container address add 198.51.100.3/24 dev eth0
			ip -n container address add 2001:db8:2::3/64 dev eth0 nodad
			for name in storage container; do
				ip -n $name route add default via 198.51.100.1
				ip -n $name route add default via 2001:db8:2::1
			done
			netns vpn`)
		w.tunnel("vpn0", "vpn")
		w.run(`
			ip link set vpn0 up
			ip address add 10.8.0.1/24 dev vpn0
			ip address add fd00:8::1/64 dev vpn0 nodad
			ip -n vpn link set tun0 up
			ip -n vpn address add 10.8.0.2/24 dev tun0
			ip -n vpn address add fd00:8::2/64 dev tun0 nodad
			ip -n vpn route add default via 10.8.0.1
			ip -n vpn route add default via fd00:8::1`)
		// A record that names the uplink, as the plugin of before made of Azure CNI's result, and one whose address is of
		// the bridge's network.
		_, err := runtimedir.New(w.Path(lab.RuntimeDir)).Update(time.Minute, nil,
			runtimedir.Attachment{ContainerID: "azure", IfName: "eth0", Namespace: "default", Name: "azure", Labels: map[string]string{"app": "other"},
				IPs: []netip.Addr{netip.MustParseAddr("10.244.1.7")}, HostInterface: "eth0", AddedAt: time.Now()},
			runtimedir.Attachment{ContainerID: "beside", IfName: "eth0", Namespace: "default", Name: "beside", Labels: map[string]string{"app": "other"},
				IPs: []netip.Addr{netip.MustParseAddr("198.51.100.3"), netip.MustParseAddr("2001:db8:2::3")}, HostInterface: "beside", AddedAt: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		w.addClient()
		w.start(config())
		pod := w.addTarget("echo")
		w.echo("echo")
		bothFamilies(func(six bool) {
			own := netip.AddrPortFrom(family(pod.IPs, six), port)
			for _, host := range []string{"storage", "container", "vpn", lab.Uplink} {
				if err := w.want(host, own, "answered by echo"); err != nil {
					t.Errorf("the pod's own address: %v", err)
				}
				w.note(linksOfOthers, six, w.want(host, magic(six), "silence"))
			}
			w.note(linksOfOthers, six, w.want("client", magic(six), "answered by echo, seen as client"))
		})
		status, err := w.RunAgent(t.Context(), "status", "--runtime-dir", lab.RuntimeDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"eth0 veth uplink a default route goes by it", "br1 bridge other more than pods may come in by its port vx0", "vpn0 tun other a tun, such as a VPN's", "cni1 bridge served all of its ports are pods'"} {
			if !strings.Contains(strings.Join(strings.Fields(status), " "), want) {
				t.Errorf("%q is missing in the status:\n%s", want, status)
			}
		}
	})
}

// tunnel connects the node's tun link called name with the link tun0 of a network namespace, as a VPN does.
func (w *world) tunnel(name, namespace string) {
	w.t.Helper()
	var ends []*os.File
	for _, end := range []struct{ namespace, name string }{{lab.Host, name}, {namespace, "tun0"}} {
		err := w.In(end.namespace, func() error {
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
			if err != nil {
				return err
			}
			request, err := unix.NewIfreq(end.name)
			if err != nil {
				return err
			}
			request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
				return errors.Join(err, unix.Close(fd))
			}
			ends = append(ends, os.NewFile(uintptr(fd), end.name))
			return nil
		})
		if err != nil {
			w.t.Fatal(fmt.Errorf("tunnel %s: %w", end.name, err))
		}
	}
	for i, end := range ends {
		w.t.Cleanup(func() { _ = end.Close() })
		go func() {
			packet := make([]byte, 65536)
			for {
				size, err := end.Read(packet)
				if err != nil {
					return
				}
				_, _ = ends[1-i].Write(packet[:size]) // fails while that link is down
			}
		}()
	}
}
