package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// withoutRoutes is the magic IP of a second agent on the node, which makes no local route for it.
const (
	withoutRoutes      = "169.254.210.212"
	withoutRoutesAgent = "default.without-routes"
)

const withoutRoutesConfig = `
name: ` + withoutRoutesAgent + `
dataPlane: netfilter
magicIPs:
  - ipAddress: ` + withoutRoutes + `
    namespace: default
    selector: app=echo
    ports:
      - {port: 9200, protocol: tcp} # serverPort
      - {port: 9200, protocol: udp}
`

// measureRoutes compares a magic IP with a local route with one that has none, on a node without Cilium: from a pod, whose packets
// are translated before they are routed, and from a process of the node, whose packets are routed first.
func measureRoutes(ctx context.Context, count rounds) (measured []table, err error) {
	node, err := newNode(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	own, err := podsOnABridge(ctx, node)
	if err != nil {
		return nil, err
	}
	if err := startWithoutRoutes(ctx, node, own); err != nil {
		return nil, err
	}
	processors, err := allowedProcessors()
	if err != nil {
		return nil, err
	}
	client, server := processors[0], processors[min(1, len(processors)-1)]
	for _, from := range []struct{ what, namespace string }{{"a pod", "client"}, {"a process of the node", lab.Host}} {
		t := table{title: "local routes, from " + from.what, unit: "µs", base: "without a local route"}
		if t.rows, err = routesFrom(ctx, node, from.namespace, own.Port(), client, server, count.path); err != nil {
			return nil, fmt.Errorf("%s: %w", t.title, err)
		}
		measured = append(measured, t)
	}
	measured[len(measured)-1].notes = []string{
		fmt.Sprintf("%d rounds of one block for each magic IP, as in \"pod to pod\". Two agents run on the node: with dataPlane auto, and with netfilter, which "+
			"makes no local routes. What rules cost is the same for both.", count.path),
	}
	return measured, nil
}

// routesFrom measures from this network namespace.
func routesFrom(ctx context.Context, node *lab.Node, namespace string, port uint16, client, server, rounds int) (rows []row, err error) {
	servers, err := startServers(node, "server", server)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, servers.close()) }()
	err = node.In(namespace, func() error {
		return onProcessor(client, func() error {
			for _, kind := range trafficKinds() {
				without := &lane{what: "without a local route", server: netip.AddrPortFrom(netip.MustParseAddr(withoutRoutes), port)}
				with := &lane{what: "with a local route", server: netip.AddrPortFrom(netip.MustParseAddr(magicIP), port)}
				if err := kind.takeTurns(ctx, rounds, without, with); err != nil {
					return fmt.Errorf("%s: %w", kind.what, err)
				}
				rows = append(rows, row{what: kind.what + ", " + without.what, values: without.took},
					row{what: kind.what + ", " + with.what, values: with.took, ratios: with.blocks.ratios(without.blocks)})
			}
			return nil
		})
	})
	return rows, err
}

// startWithoutRoutes starts the second agent, and waits until its magic IP leads to the server, and until the first agent alone has
// made a local route.
func startWithoutRoutes(ctx context.Context, node *lab.Node, server netip.AddrPort) error {
	if _, err := node.StartAgent([]byte(withoutRoutesConfig)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return lab.Eventually(ctx, func() error {
		for agent, routes := range map[string]int{agentName: 1, withoutRoutesAgent: 0} {
			status, err := runtimedir.New(node.Path(lab.RuntimeDir)).Agent(agent).ReadStatus()
			if err != nil {
				return err
			}
			for _, m := range status.MagicIPs {
				if len(m.Endpoints) != 1 || m.Endpoints[0].Address != server {
					return fmt.Errorf("agent %s has published %+v", agent, m)
				}
			}
			if len(status.MagicIPs) == 0 || len(status.DataPlane.LocalRoutes) != routes {
				return fmt.Errorf("agent %s has the magic IPs %v and the local routes %v", agent, status.MagicIPs, status.DataPlane.LocalRoutes)
			}
		}
		return nil
	})
}
