//go:build e2e

package release_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// snapshot is everything that a release could leave behind.
type snapshot struct {
	Nodes   map[string]nodeSnapshot
	Objects []string // of the API: kind, namespace, name
}

type nodeSnapshot struct {
	Conflists map[string]string // by file name, to the byte
	Plugins   []string
	Runtime   []string // the files in the runtime directory; kubelet leaves the directories that it mounted
	Rules     []string // of nftables, one table each, without counters
	Routes    string   // of agents
	IPTables  []string // rules and chains of iptables and iptables-legacy
}

// counters is what changes with each packet, and with each moment.
var counters = regexp.MustCompile(`(?m)^#.*\n|\[\d+:\d+\]`)

// ofIPTables is a table of iptables-nft.
var ofIPTables = regexp.MustCompile(`^\s*table ip6? (filter|nat|mangle|raw|security) {`)

func takeSnapshot(ctx context.Context, cluster *whole.Cluster) (s snapshot, err error) {
	if s.Nodes, err = takeNodeSnapshots(ctx, cluster); err != nil {
		return s, err
	}
	kinds, err := cluster.Kubectl(ctx, "api-resources", "--verbs=list", "--output=name")
	if err != nil {
		return s, err
	}
	listed := slices.DeleteFunc(strings.Fields(kinds), func(kind string) bool {
		// What happened, who leads, and how the nodes are: always different.
		return strings.HasPrefix(kind, "events") || strings.HasPrefix(kind, "leases.") || kind == "componentstatuses"
	})
	objects, err := cluster.Kubectl(ctx, "get", strings.Join(listed, ","), "--all-namespaces", "--no-headers",
		"--output=custom-columns=KIND:.kind,NAMESPACE:.metadata.namespace,NAME:.metadata.name")
	s.Objects = strings.Split(strings.TrimSpace(objects), "\n")
	slices.Sort(s.Objects)
	return s, err
}

func takeNodeSnapshots(ctx context.Context, cluster *whole.Cluster) (all map[string]nodeSnapshot, err error) {
	all = map[string]nodeSnapshot{}
	for _, n := range cluster.Nodes {
		if all[n.Name], err = takeNodeSnapshot(ctx, n); err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return all, nil
}

func takeNodeSnapshot(ctx context.Context, n *whole.Node) (s nodeSnapshot, err error) {
	s.Conflists = map[string]string{}
	files, err := os.ReadDir(n.Path(whole.CNIConfDir))
	if err != nil {
		return s, err
	}
	for _, file := range files {
		data, err := n.ReadFile(filepath.Join(whole.CNIConfDir, file.Name()))
		if err != nil {
			return s, err
		}
		s.Conflists[file.Name()] = string(data)
	}
	plugins, err := os.ReadDir(n.Path(whole.CNIBinDir))
	if err != nil {
		return s, err
	}
	for _, plugin := range plugins {
		// It stays behind, inert; see inert.
		if plugin.Name() != filepath.Base(pluginFile) {
			s.Plugins = append(s.Plugins, plugin.Name())
		}
	}
	if s.Runtime, err = runtimeFiles(n); err != nil {
		return s, err
	}
	if s.Routes, err = n.Exec(ctx, "sh", "-ec", "ip -4 route show table local proto 109; ip -6 route show table local proto 109"); err != nil {
		return s, err
	}
	rules, err := n.Exec(ctx, "nft", "--stateless", "list", "ruleset")
	if err != nil {
		return s, err
	}
	// The order of chains in a table of iptables-nft is that in which kubelet and kube-proxy came to it; iptables-save has its rules.
	s.Rules = slices.DeleteFunc(strings.SplitAfter(counters.ReplaceAllString(rules, ""), "\n}\n"), ofIPTables.MatchString)
	slices.Sort(s.Rules)
	for _, save := range []string{"iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		printed, err := n.Exec(ctx, save)
		if err != nil {
			return s, err
		}
		for line := range strings.Lines(counters.ReplaceAllString(printed, "")) {
			// Not the tables and their built-in chains, which are there from when somebody has looked for them.
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":") && strings.HasSuffix(line, "-") {
				s.IPTables = append(s.IPTables, save+" "+line)
			}
		}
	}
	slices.Sort(s.IPTables)
	return s, nil
}

// runtimeFiles are the files in the runtime directory of a node.
func runtimeFiles(n *whole.Node) (files []string, err error) {
	err = filepath.WalkDir(n.Path(runtimeDir), func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err == nil && !entry.IsDir():
			files = append(files, strings.TrimPrefix(path, n.Path(runtimeDir)))
		}
		return err
	})
	return files, err
}

// pristine waits until the cluster is as it was before the first release.
func (w *world) pristine() {
	w.Helper()
	w.asBefore(20*time.Second, func(ctx context.Context) (string, error) {
		now, err := takeSnapshot(ctx, w.cluster.Cluster)
		return differences(w.cluster.pristine, now), err
	})
}

// nodesPristine is pristine where targets of the test are still there: what they are in the API does not count.
func (w *world) nodesPristine() {
	w.Helper()
	w.asBefore(10*time.Second, func(ctx context.Context) (string, error) {
		now, err := takeNodeSnapshots(ctx, w.cluster.Cluster)
		return differences(w.cluster.pristine.Nodes, now), err
	})
}

func (w *world) asBefore(limit time.Duration, difference func(context.Context) (string, error)) {
	w.Helper()
	err := lab.Eventually(w.within(limit), func() error {
		diff, err := difference(w.ctx)
		if err == nil && diff != "" {
			err = fmt.Errorf("something is left:\n%s", diff)
		}
		return err
	})
	if err != nil {
		w.Error(err)
	}
}

// differences are the values that differ, one each line, and nothing of those that do not: a snapshot is long.
func differences(before, now any) string {
	var r reporter
	cmp.Equal(before, now, cmp.Reporter(&r))
	return strings.Join(r.lines, "\n")
}

type reporter struct {
	path  cmp.Path
	lines []string
}

func (r *reporter) PushStep(step cmp.PathStep) { r.path = append(r.path, step) }
func (r *reporter) PopStep()                   { r.path = r.path[:len(r.path)-1] }

func (r *reporter) Report(result cmp.Result) {
	if !result.Equal() {
		before, now := r.path.Last().Values()
		r.lines = append(r.lines, fmt.Sprintf("%#v: before %+v, now %+v", r.path, before, now))
	}
}
