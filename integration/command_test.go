package integration

import (
	"cmp"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// agentBinary is the path of the agent that is tested.
func agentBinary() string { return cmp.Or(os.Getenv("MAGIC_IP_AGENT"), "../bin/magic-ip-agent") }

// TestNeedsRoot: where a user may not do what a command does, its message begins with that, and doctor's report too.
func TestNeedsRoot(t *testing.T) {
	t.Parallel()
	const nobody = 65534
	program, err := os.ReadFile(agentBinary())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "magic-ip-user") // t.TempDir is root's alone
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	agent, config, runtime := filepath.Join(dir, "magic-ip-agent"), filepath.Join(dir, "config.yaml"), filepath.Join(dir, "run")
	for path, data := range map[string][]byte{
		agent: program, filepath.Join(dir, "magic-ip-address"): program,
		config: []byte("name: default.a\nmagicIPs: [{ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}]\n"),
	} {
		if err := os.WriteFile(path, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	lock, err := runtimedir.New(runtime).Agent("default.a").Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	for command, want := range map[string]string{
		"run --no-api --config " + config: "magic-ip-agent: run needs root, or CAP_NET_ADMIN",
		"status":                          "magic-ip-agent: this needs root, and runs as user 65534: ",
		"ask --name default.a":            "magic-ip-agent: this needs root, and runs as user 65534: ",
		"uninstall --name default.a":      "magic-ip-agent: this needs root, and runs as user 65534: ",
		"install --config " + config + " --plugin " + agent: "magic-ip-agent: this needs root, and runs as user 65534: ",
		"doctor": "--    rights: this runs as user 65534, and files and rules are root's\n      → run this as root\n",
	} {
		run := exec.CommandContext(t.Context(), agent, append(strings.Fields(command), "--runtime-dir", runtime)...)
		run.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := run.CombinedOutput()
		if err == nil || !strings.HasPrefix(string(out), want) {
			t.Errorf("%s: %v, want output that begins with %q:\n%s", command, err, want, out)
		}
		if strings.Contains(string(out), "FAIL") && strings.HasPrefix(command, "doctor") {
			t.Errorf("what cannot be seen has failed:\n%s", out)
		}
	}
}
