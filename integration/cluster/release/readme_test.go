//go:build e2e

package release_test

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

// TestReadme: README.md's commands, as they stand there, end in a served request. Its registry is stood in for by the name of the image.
func TestReadme(t *testing.T) {
	w := newWorld(t)
	commands := t.TempDir()
	w.must(w.cluster.WriteCommands(commands))
	readme, err := os.ReadFile("README.md")
	w.must(err)
	var install string
	var verify []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(readme), -1) {
		switch {
		case strings.HasPrefix(block[1], "helm upgrade"):
			install = block[1]
		case strings.HasPrefix(block[1], "helm test"):
			verify = strings.Split(strings.TrimSpace(block[1]), "\n")
		}
	}
	if install == "" || len(verify) != 3 {
		t.Fatalf("README.md has no block that installs, or not three commands that verify: %q, %q", install, verify)
	}
	pushed := regexp.MustCompile(`IMAGE=(\S+:(\S+))`).FindSubmatch(readme)
	if pushed == nil {
		t.Fatal("README.md does not say what image it pushes")
	}
	for _, n := range w.cluster.Nodes {
		w.must(n.TagImage(w.ctx, image+":"+string(pushed[2]), string(pushed[1])))
	}
	w.must(w.cluster.Apply(w.ctx, whole.DaemonSet(servers, system, `serve, --tcp, ":8200"`)))
	w.Cleanup(func() { w.removeTargets(system) })
	w.targetsReady(system)
	shell := func(script string) (string, error) {
		cmd := exec.CommandContext(w.ctx, "sh", "-e", "-c", script)
		cmd.Env = append(os.Environ(), "PATH="+commands+string(os.PathListSeparator)+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	w.releases = append(w.releases, apm)
	if out, err := shell(install); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	w.rolledOut(apm)
	w.servedBy(magic, system)
	for i, want := range []string{"Phase: *Succeeded", "169.254.210.210:9200 +tcp +kube-system +app=apm-server +10.244", "Verdict: "} {
		out, err := shell(verify[i])
		if i == 2 && err != nil && strings.Contains(out, "exit code 3") {
			err = nil // in the container doctor does not see all
		}
		if err == nil && !regexp.MustCompile(want).MatchString(out) {
			err = fmt.Errorf("no %q", want)
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", verify[i], err, out)
		}
	}
}
