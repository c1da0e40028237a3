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

// path measures how much longer exchanges take than by the pod's own address.
func (w *world) path(ctx context.Context, n *whole.Node, rounds int) (map[way]lab.Path, error) {
	name, err := w.place(ctx, n, target{})
	if err != nil {
		return nil, err
	}
	if err := w.answered(ctx, n, name); err != nil {
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
	printed, err := n.Exec(ctx, "nsenter", "--net="+namespace, w.echo(), "path", "--rounds", strconv.Itoa(rounds),
		own.String(), byService.address().String(), byMagicIP.address().String())
	if err != nil {
		return nil, err
	}
	paths := map[way]lab.Path{}
	for in := json.NewDecoder(strings.NewReader(printed)); ; {
		var p lab.Path
		if err := in.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		for _, by := range []way{byService, byMagicIP} {
			if p.To == by.address() {
				paths[by] = p
				w.log("data path on %s by %s, against the pod's own address: connections %.3f, requests %.3f, datagrams %.3f", n.Name, by, p.Connection, p.Request, p.Datagram)
			}
		}
	}
	if len(paths) != 2 {
		return nil, fmt.Errorf("data path on %s: %s", n.Name, printed)
	}
	return paths, nil
}

func pathRow(all []map[way]lab.Path) row {
	ratios := map[way][3][]float64{}
	for _, paths := range all {
		for by, p := range paths {
			r := ratios[by]
			for i, ratio := range []float64{p.Connection, p.Request, p.Datagram} {
				r[i] = append(r[i], ratio)
			}
			ratios[by] = r
		}
	}
	text := func(by way) string {
		var texts []string
		for _, values := range ratios[by] {
			texts = append(texts, fmt.Sprintf("%.3f", median(values)))
		}
		return strings.Join(texts, " / ")
	}
	return row{name: "data path", figure: "connections / requests / datagrams, × own address", service: text(byService), magic: text(byMagicIP)}
}
