package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// part is what is measured and saved by itself.
type part struct {
	name    string
	setup   string // the name of that of its cluster
	measure func(ctx context.Context, w *world, s scale) (results, error)
}

// scale is how much is measured.
type scale struct {
	runs   float64 // of each update, as a multiple of what it has by itself
	rest   time.Duration
	rounds int // of the data path
}

func setups() map[string]setup {
	// Helm's chart of Cilium sets both: see docs/cilium.md for the names.
	bpf := whole.Cilium{KubeProxyReplacement: true, BPFMasquerade: true, LocalRedirectPolicy: true}
	legacy := bpf
	legacy.LegacyHostRouting, legacy.EndpointRoutes = true, true
	onCilium := []peer{magicNFTables, ciliumLRP, ciliumService}
	return map[string]setup{
		"all": {
			peers: []peer{magicNFTables, magicIPTables, serviceLocal, serviceSame, hostPort, unixSocket, poller}, kinds: allKinds(),
			every: 10 * time.Millisecond, // 33 clients that ask twice as often leave two processors no time for the update
		},
		"two":        {peers: []peer{magicNFTables, serviceLocal}, kinds: []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP}},
		"cilium-b":   {peers: onCilium, kinds: allKinds(), cilium: &bpf},
		"cilium-ble": {peers: onCilium, kinds: allKinds(), cilium: &legacy},
	}
}

func parts() (all []part) {
	for _, u := range updates() {
		all = append(all, part{u.part, "all", func(ctx context.Context, w *world, s scale) (results, error) {
			return w.updated(ctx, u.part, u, s.times(u.runs))
		}})
	}
	all = append(all,
		part{"absent", "all", func(ctx context.Context, w *world, _ scale) (r results, err error) {
			for _, n := range w.measured() {
				absences, err := w.absent(ctx, n)
				if err != nil {
					return r, err
				}
				r.addAbsences("absent", absences)
			}
			return r, nil
		}},
		part{"path", "all", func(ctx context.Context, w *world, s scale) (results, error) { return w.paths(ctx, "path", s.rounds) }},
		part{"rest", "two", func(ctx context.Context, w *world, s scale) (r results, err error) {
			for _, n := range w.measured() {
				rest, err := w.atRest(ctx, n, s.rest)
				if err != nil {
					return r, err
				}
				r.addRest(n, rest)
			}
			return r, nil
		}})
	for _, name := range []string{"cilium-b", "cilium-ble"} {
		all = append(all, part{name, name, func(ctx context.Context, w *world, s scale) (results, error) { return w.onCilium(ctx, name, s) }})
	}
	return all
}

func (s scale) times(runs int) int { return max(1, int(float64(runs)*s.runs+0.5)) }

// updated measures an update, on each node in turn for half of the runs.
func (w *world) updated(ctx context.Context, part string, u update, times int) (r results, err error) {
	nodes := w.measured()
	for i, n := range nodes {
		share := (times + len(nodes) - 1 - i) / len(nodes)
		if share == 0 {
			continue
		}
		for _, other := range w.Nodes { // what is replaced here has a peer there
			if other == n {
				continue
			}
			if _, err := w.place(ctx, other, target{hostPort: true}); err != nil {
				return r, err
			}
		}
		runs, err := w.runs(ctx, n, u, share)
		if err != nil {
			return r, err
		}
		r.addRuns(part, w.peers, w.kinds, runs)
	}
	return r, nil
}

func (w *world) paths(ctx context.Context, part string, rounds int) (r results, err error) {
	for _, n := range w.measured() {
		paths, err := w.path(ctx, n, rounds)
		if err != nil {
			return r, err
		}
		r.addPaths(part, n, paths, rounds)
	}
	return r, nil
}

// onCilium is all that is measured on the node with Cilium.
func (w *world) onCilium(ctx context.Context, name string, s scale) (all results, err error) {
	// First: no pod has been replaced yet.
	if all, err = w.paths(ctx, name, s.rounds); err != nil {
		return all, err
	}
	for _, u := range updates() {
		switch u.part {
		case "rolling", "surge", "surge-drain", "force", "first":
			r, err := w.updated(ctx, name, u, s.times(ciliumRuns))
			if err != nil {
				return all, err
			}
			all.join(r)
		}
	}
	absences, err := w.absent(ctx, w.Nodes[0])
	all.addAbsences(name, absences)
	return all, err
}

// ciliumRuns is how often each update is measured with a setting of Cilium.
const ciliumRuns = 4

// partNames are those of all parts, for people.
func partNames() string {
	var names []string
	for _, p := range parts() {
		names = append(names, p.name)
	}
	return strings.Join(names, ",")
}

// selected are the parts of a list of names; all where empty.
func selected(names string) (chosen []part, err error) {
	if names == "" {
		return parts(), nil
	}
	for name := range strings.SplitSeq(names, ",") {
		found := false
		for _, p := range parts() {
			if p.name == name {
				chosen, found = append(chosen, p), true
			}
		}
		if !found {
			return nil, fmt.Errorf("there is no part %q; parts are %s", name, partNames())
		}
	}
	return chosen, nil
}
