//go:build e2e

package release_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDefaultLimits: with 1,000 magic IPs the containers stay within the limits that the chart sets by default.
func TestDefaultLimits(t *testing.T) {
	w := newWorld(t)
	var values strings.Builder
	values.WriteString("minReadySeconds: 0\nconfig:\n  selector: app=apm-server\n  magicIPs:\n")
	for i := range 1000 {
		fmt.Fprintf(&values, "    - {ipAddress: 10.200.%d.%d, selector: app=apm-server, ports: [{port: 9200}]}\n", i/250, i%250+1)
	}
	file := filepath.Join(t.TempDir(), "values.yaml")
	w.must(os.WriteFile(file, []byte(values.String()), 0o600))
	w.targets(system)
	w.releases = append(w.releases, apm)
	w.helm("upgrade", name, chart, "--install", "--namespace", system, "--values", file)
	w.rolledOut(apm)
	w.servedBy(magic, system)
	w.lap("1,000 magic IPs")
	for _, n := range w.cluster.Nodes {
		w.removePod(system, w.podOn(n, system, servers).Name)
	}
	w.targetsReady(system)
	w.servedBy(magic, system)
	w.lap("their endpoint changed")
	for _, n := range w.cluster.Nodes {
		pod := w.podOn(n, system, daemonSet)
		for _, status := range pod.Status.ContainerStatuses {
			if status.RestartCount > 0 {
				t.Errorf("%s of %s was restarted %d times: %+v", status.Name, pod.Name, status.RestartCount, status.LastTerminationState)
			}
			peak := w.processField(w.pidOf(n, pod, status.Name), n, "VmHWM")
			figures.add("1,000 magic IPs, most memory of the %s on %s: %s", status.Name, n.Name, peak)
		}
	}
}
