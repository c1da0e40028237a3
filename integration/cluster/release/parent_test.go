//go:build e2e

package release_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestParent: a parent chart holds this one twice, with conditions, and switches one off and the other on.
func TestParent(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir()
	w.must(os.CopyFS(filepath.Join(dir, "charts", "magic-ip-address"), os.DirFS(chart)))
	w.must(os.WriteFile(filepath.Join(dir, "Chart.yaml"), []byte(`apiVersion: v2
name: parent
version: 1.0.0
dependencies:
  - {name: magic-ip-address, version: ">=0", condition: magic-ip-address.enabled}
  - {name: magic-ip-address, version: ">=0", alias: metrics-ip, condition: metrics-ip.enabled}
`), 0o600))
	aliased := release{system, name + ".metrics-ip"} // its agent's name
	install := func(values ...string) {
		t.Helper()
		args := []string{"upgrade", name, dir, "--install", "--namespace", system}
		for _, value := range append(values, "magic-ip-address.config.selector=app=apm-server", "magic-ip-address.minReadySeconds=0",
			"metrics-ip.config.selector=app=apm-server", "metrics-ip.minReadySeconds=0", "metrics-ip.config.ipAddress="+second.Addr().String()) {
			args = append(args, "--set", value)
		}
		w.helm(args...)
	}
	w.releases = append(w.releases, apm)
	w.targets(system)
	install("magic-ip-address.enabled=true", "metrics-ip.enabled=false")
	w.rolledOut(apm)
	w.servedBy(magic, system)

	install("magic-ip-address.enabled=true", "metrics-ip.enabled=true")
	w.rolledOut(apm)
	w.eventually("the second instance", func() error { return w.daemonSetDone(system, name+"-metrics-ip") })
	w.servedBy(magic, system)
	w.servedBy(second, system)

	install("magic-ip-address.enabled=false", "metrics-ip.enabled=true")
	w.podsGone(system, "app=magic-ip-address,release="+name)
	w.left(apm, aliased)
	w.servedBy(second, system)

	w.uninstall(apm)
	w.podsGone(system, "app=metrics-ip,release="+name)
	if listed := w.helm("list", "--namespace", system, "--short"); strings.TrimSpace(listed) != "" {
		t.Errorf("helm lists %q", listed)
	}
	w.nodesPristine()
}
