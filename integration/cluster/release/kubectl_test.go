//go:build e2e

package release_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestKubectl: `kubectl magic-ip` shows all nodes, first those without an agent, and its exit status reports whether all is well.
func TestKubectl(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues()...)
	w.targets(system)
	w.servedBy(magic, system)
	out, err := w.plugin("status")
	if err != nil || !strings.HasPrefix(out, "NODE") {
		t.Fatalf("status: %v\n%s", err, out)
	}
	for _, n := range w.cluster.Nodes {
		pod := "kube-system/" + w.podOn(n, system, servers).Name
		if want := n.Name; !strings.Contains(out, "\n"+want+" ") || !strings.Contains(out, pod) {
			t.Errorf("status does not show %s and %s:\n%s", want, pod, out)
		}
	}
	out, err = w.plugin("doctor", "-o", "json")
	var report struct {
		Nodes []struct {
			Node   string
			Report struct {
				Findings []struct{ Level, Check string }
				Verdict  struct{ Level string }
			}
		}
	}
	if failed := json.Unmarshal([]byte(out), &report); err != nil || failed != nil || len(report.Nodes) != len(w.cluster.Nodes) {
		t.Fatalf("doctor: %v, %v\n%s", err, failed, out)
	}
	for _, n := range report.Nodes {
		if len(n.Report.Findings) < 10 || n.Report.Verdict.Level == "" {
			t.Errorf("doctor on %s: %+v", n.Node, n.Report)
		}
	}

	// Without an agent on node2.
	w.begin(apm, append(apmValues(), "nodeSelector.kubernetes\\.io/hostname=node1")...)
	w.eventually("node2 has no agent", func() error {
		out, err := w.plugin("status")
		lines := strings.Split(out, "\n")
		if err == nil || !strings.Contains(err.Error(), "exit status 1") || len(lines) < 3 || strings.Join(strings.Fields(lines[1]), " ") != "node2 no agent" || !strings.HasPrefix(lines[2], "node1 ") {
			return fmt.Errorf("%v\n%s", err, out) //nolint:errorlint // may be nil
		}
		return nil
	})
	w.upgrade(apm, apmValues()...) // so that node2 is cleaned up
}

// plugin runs kubectl's plugin as kubectl does, by its name in the PATH.
func (w *world) plugin(args ...string) (string, error) {
	w.Helper()
	root, err := lab.ModuleRoot()
	w.must(err)
	cmd := w.cluster.Command(w.ctx, "kubectl", append([]string{"magic-ip"}, args...)...)
	cmd.Env = append(cmd.Env, "PATH="+filepath.Join(root, "bin")+string(os.PathListSeparator)+os.Getenv("PATH"))
	out, err := cmd.Output()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return string(out), err
}
