package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// ownAddress is what the data paths of the peers are compared with.
const ownAddress peer = "the pod's own address"

// path measures how much longer exchanges take than by the pod's own address.
func (w *world) path(ctx context.Context, n *whole.Node, rounds int) (map[peer]lab.Path, error) {
	name, err := w.place(ctx, n, target{hostPort: true})
	if err != nil {
		return nil, err
	}
	if err := w.answered(ctx, n, update{}, name); err != nil {
		return nil, err
	}
	if err := forgetFlows(ctx, n); err != nil { // of those who asked too early
		return nil, err
	}
	pods, err := w.podsOf(ctx, n)
	if err != nil {
		return nil, err
	}
	own, err := addressOf(&pods[0])
	if err != nil {
		return nil, err
	}
	namespace, err := w.clientNetNS(ctx, n)
	if err != nil {
		return nil, err
	}
	of := map[string]peer{own.String(): ownAddress}
	args := []string{"/run/in-cgroup", "nsenter", "--net=" + namespace, w.program("echo"), "path", "--rounds", strconv.Itoa(rounds), own.String()}
	for _, p := range w.peers {
		address := p.address(n, lab.NewConnection)
		of[address] = p
		args = append(args, address)
	}
	printed, err := n.Exec(ctx, "sh", args...)
	if err != nil {
		return nil, err
	}
	paths := map[peer]lab.Path{}
	for in := json.NewDecoder(strings.NewReader(printed)); ; {
		var p lab.Path
		if err := in.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		paths[of[p.To]] = p
		w.log("data path on %s by %s: connections %v (%.3f), requests %v (%.3f), datagrams %v (%.3f)", n.Name, of[p.To],
			p.Connection.Took, p.Connection.Ratio, p.Request.Took, p.Request.Ratio, p.Datagram.Took, p.Datagram.Ratio)
	}
	if len(paths) != len(of) {
		return nil, fmt.Errorf("data path on %s: %s", n.Name, printed)
	}
	return paths, nil
}
