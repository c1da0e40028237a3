package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// nodeInfos are what the nodes run, by what they say themselves.
func (w *world) nodeInfos(ctx context.Context) (infos []string, err error) {
	nodes, err := w.Admin.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for i, node := range nodes.Items {
		info := strings.ReplaceAll(node.Status.NodeInfo.ContainerRuntimeVersion, "://", " ")
		if i == 0 && w.cilium != nil {
			version, err := exec.CommandContext(ctx, filepath.Join(w.root, "bin", "cilium", "cilium-agent"), "--version").Output()
			if err != nil {
				return nil, err
			}
			words := strings.Fields(string(version)) // cilium-agent 1.2.3 go version …
			if len(words) < 2 {
				return nil, fmt.Errorf("cilium-agent --version: %q", version)
			}
			info += " with Cilium " + words[1]
		} else {
			info += " with kube-proxy (nftables)"
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// processor names the machine's, and its kernel.
func processor() string {
	model := runtime.GOARCH // not every architecture names its model
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		release = []byte("?")
	}
	return fmt.Sprintf("%s, %d cores, Linux %s, Go %s", model, runtime.NumCPU(), strings.TrimSpace(string(release)), strings.TrimPrefix(runtime.Version(), "go"))
}

// droppedByProcessors are the packets that the processors had no room for, of whomever (net.core.netdev_max_backlog): what waits for a
// processor that has no time, from one link of the machine to the next.
func droppedByProcessors() (packets uint64, err error) {
	data, err := os.ReadFile("/proc/net/softnet_stat")
	for line := range strings.Lines(string(data)) {
		var processed, dropped uint64
		if _, err := fmt.Sscanf(line, "%x %x", &processed, &dropped); err != nil {
			return 0, fmt.Errorf("/proc/net/softnet_stat: %q: %w", line, err)
		}
		packets += dropped
	}
	return packets, err
}

func loadAverage() string {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(data), " ")
	return first
}
