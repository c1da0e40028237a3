package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/conntrack"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// otherFlows are in the connection table of a busy node: the kernel's default limit on the machines that
// this runs on is a little more.
const otherFlows = 200000

// sweepTarget is for the p99 of a sweep that the kernel filters, in ms.
const sweepTarget = 100

// measureFlows measures the sweep after a change of endpoints, among many flows of others.
func measureFlows(ctx context.Context, count rounds) (measured []table, err error) {
	t := table{title: fmt.Sprintf("sweep among %d flows", otherFlows), unit: "ms", notes: []string{
		"The connection table is dumped through a filter of the kernel (CTA_FILTER), or whole where more has changed than filtered dumps " +
			"would pay for. For IPv6 the filter is by port, or by status for a gone pod: kernels compare IPv6 addresses the wrong way round.",
	}}
	for _, family := range []struct {
		name, magicIP, client, server, gone string
		inet                                uint8
	}{
		{"IPv4", "198.18.0.1", "10.0.0.0", "10.244.1.2", "10.244.1.3", unix.AF_INET},
		{"IPv6", "fd00:a9fe:d2d2::1", "fd00:10::", "fd00:10:244::2", "fd00:10:244::3", unix.AF_INET6},
	} {
		frontend := plan.Frontend{Address: netip.MustParseAddr(family.magicIP), Protocol: plan.TCP, Port: serverPort}
		p := plan.Build(plan.Input{Synced: true, Services: []plan.Service{
			{Frontend: frontend, Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(family.server), serverPort)}},
		}})
		many := plan.Change{}
		for i := range 17 { // one more than is filtered
			many.Removed = append(many.Removed, plan.Frontend{Address: frontend.Address, Protocol: plan.UDP, Port: uint16(1 + i)})
		}
		rows := []struct {
			what   string
			change plan.Change
			target target
		}{
			{"one endpoint changed", plan.Change{Frontends: []plan.Frontend{frontend}}, target{valueP99, sweepTarget}},
			{"one pod gone", plan.Change{Gone: []netip.Addr{netip.MustParseAddr(family.gone)}}, target{valueP99, sweepTarget}},
			{"17 magic IPs changed: the whole table", many, target{}},
		}
		node, err := lab.NewNode(ctx, lab.NodeOptions{})
		if err != nil {
			return nil, err
		}
		err = node.In(lab.Host, func() error {
			if err := addFlows(family.inet, netip.MustParseAddr(family.client), otherFlows); err != nil {
				return err
			}
			for _, r := range rows {
				var took sample
				for range count.flows {
					begun := time.Now()
					if _, err := (conntrack.Table{}).Sweep(ctx, &p, r.change); err != nil {
						return err
					}
					took.add(time.Since(begun), time.Millisecond)
				}
				t.rows = append(t.rows, row{what: family.name + ", " + r.what, values: took, target: r.target})
			}
			return nil
		})
		if err = errors.Join(err, node.Close()); err != nil {
			return nil, err
		}
	}
	return []table{t}, nil
}

// addFlows makes entries in the connection table of the network namespace of this thread, from clients from
// first on to a server that has nothing to do with magic IPs.
func addFlows(family uint8, first netip.Addr, count int) error {
	handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer handle.Close()
	server := net.ParseIP("10.96.0.10")
	if family == unix.AF_INET6 {
		server = net.ParseIP("fd00:96::10")
	}
	client := first
	for i := range count {
		if i%1000 == 0 {
			client = client.Next()
		}
		source, port := net.IP(client.AsSlice()), uint16(1024+i%1000)
		err := handle.ConntrackCreate(netlink.ConntrackTable, netlink.InetFamily(family), &netlink.ConntrackFlow{
			FamilyType: family, TimeOut: 3600,
			Forward:   netlink.IPTuple{SrcIP: source, DstIP: server, SrcPort: port, DstPort: 443, Protocol: unix.IPPROTO_TCP},
			Reverse:   netlink.IPTuple{SrcIP: server, DstIP: source, SrcPort: 443, DstPort: port, Protocol: unix.IPPROTO_TCP},
			ProtoInfo: &netlink.ProtoInfoTCP{State: nl.TCP_CONNTRACK_ESTABLISHED},
		})
		if err != nil {
			return fmt.Errorf("flow %d: %w", i, err)
		}
	}
	return nil
}
