package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
)

// Where routed pods are: 10.244.4.0/24 and fd00:10:244:4::/64.
const (
	routedIPv4 = "10.244.4."
	routedIPv6 = "fd00:10:244:4::"
)

// attachRouted makes what Calico makes (felix, cni-plugin dataplane linux): a veth pair, addresses of full
// length, routes to them on the node, and gateways that exist on no link: 169.254.1.1, which the node
// answers ARP requests for, and the link-local address of ee:ee:ee:ee:ee:ee, which every host end has.
const attachRouted = `set -e
ip link add $LINK address ee:ee:ee:ee:ee:ee type veth peer name eth0 netns $POD
echo 1 >/proc/sys/net/ipv4/conf/$LINK/proxy_arp
echo 0 >/proc/sys/net/ipv4/neigh/$LINK/proxy_delay
ip link set $LINK up
ip -n $POD link set eth0 up
ip -n $POD address add $IPV4/32 dev eth0
ip -n $POD address add $IPV6/128 dev eth0 nodad
ip -n $POD route add 169.254.1.1 dev eth0 scope link
ip -n $POD route add default via 169.254.1.1 dev eth0
ip -n $POD route add fe80::ecee:eeff:feee:eeee dev eth0
ip -n $POD route add default via fe80::ecee:eeff:feee:eeee dev eth0
ip route add $IPV4 dev $LINK scope link
ip route add $IPV6 dev $LINK`

// AddRouted attaches a pod the way that Calico does, and then calls our plugin with config, the entry of a
// conflist, and with the result that Calico returns. The host's end is called cali<hash>.
func (n *Node) AddRouted(ctx context.Context, config map[string]any, pod Pod) (Attached, error) {
	if err := n.addNetNS(ctx, pod.netNS()); err != nil {
		return Attached{}, err
	}
	n.mu.Lock()
	n.routed++
	number := n.routed + 1
	n.mu.Unlock()
	ips := []netip.Addr{netip.MustParseAddr(fmt.Sprintf("%s%d", routedIPv4, number)), netip.MustParseAddr(fmt.Sprintf("%s%d", routedIPv6, number))}
	link := pod.routedLink()
	if _, err := n.Run(ctx, "env", "LINK="+link, "POD="+pod.netNS(), "IPV4="+ips[0].String(), "IPV6="+ips[1].String(), "sh", "-c", attachRouted); err != nil {
		return Attached{}, err
	}

	result := map[string]any{
		"cniVersion": config["cniVersion"],
		"interfaces": []any{map[string]any{"name": link}, map[string]any{"name": "eth0", "sandbox": netnsPath(pod.netNS())}},
		"ips": []any{
			map[string]any{"address": ips[0].String() + "/32", "interface": 1},
			map[string]any{"address": ips[1].String() + "/128", "interface": 1},
		},
	}
	config = maps.Clone(config)
	config["prevResult"] = result
	if pod.Labels != nil {
		config["runtimeConfig"] = map[string]any{"labels": pod.Labels}
	}
	data, err := json.Marshal(config)
	if err != nil {
		return Attached{}, err
	}
	printed, err := n.ExecPlugin(ctx, data, routedEnv(pod, "ADD")...)
	return Attached{ContainerID: pod.ContainerID(), NetNS: pod.netNS(), IPs: ips, Result: []byte(printed)}, err
}

// DelRouted calls DEL and removes the pod's network namespace, and its interfaces with it, as Del does.
// In Calico's order: the plugin's turn is before that of the one that made the interfaces.
func (n *Node) DelRouted(ctx context.Context, config map[string]any, pod Pod) error {
	data, err := json.Marshal(config)
	if err != nil {
		return err
	}
	if _, err := n.ExecPlugin(ctx, data, routedEnv(pod, "DEL")...); err != nil {
		return err
	}
	if _, err := n.Run(ctx, "ip", "link", "delete", pod.routedLink()); err != nil {
		return err
	}
	_, err = n.Run(ctx, "ip", "netns", "delete", pod.netNS())
	return err
}

// routedLink is the name of the host's end.
func (p Pod) routedLink() string { return "cali" + p.ContainerID()[len(p.ContainerID())-11:] }

func routedEnv(pod Pod, command string) []string {
	return append(pod.args(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+pod.ContainerID(), "CNI_NETNS="+netnsPath(pod.netNS()), "CNI_IFNAME=eth0")
}
