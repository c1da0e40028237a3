//go:build e2e

package whole_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

// snapshot is what a cluster must leave as it was: the machine's links, rules and settings, and the folders that
// nodes have of their own.
func snapshot() (map[string]string, error) {
	seen := map[string]string{}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	for _, link := range links {
		seen["link "+link.Attrs().Name] = link.Type()
	}
	rules, err := exec.Command("nft", "list", "ruleset").Output()
	if err != nil {
		return nil, fmt.Errorf("nft list ruleset: %w", err)
	}
	seen["rules"] = string(rules)
	for _, setting := range []string{"kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory", "net/ipv4/ip_forward", "net/netfilter/nf_conntrack_max"} {
		value, err := os.ReadFile("/proc/sys/" + setting)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		seen[setting] = strings.TrimSpace(string(value))
	}
	for _, dir := range []string{whole.CNIConfDir, whole.CNIBinDir, whole.ManifestDir, "/etc/magic-ip-address", "/run/magic-ip-address", "/var/lib/kubelet", "/var/lib/containerd"} {
		entries, err := os.ReadDir(dir)
		seen[dir] = fmt.Sprintf("%d entries, there: %t", len(entries), err == nil)
	}
	return seen, nil
}

// leftAlone is an error where something has changed since, or where cgroups of this cluster are left.
func leftAlone(before map[string]string, c *whole.Cluster) error {
	after, err := snapshot()
	if err != nil {
		return err
	}
	if diff := cmp.Diff(before, after); diff != "" {
		err = fmt.Errorf("the machine is not as it was (-before +after):\n%s", diff)
	}
	left, errGlob := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(filepath.Dir(c.Kubeconfig)))
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("cgroups are left: %q", left))
	}
	return errors.Join(err, errGlob)
}
