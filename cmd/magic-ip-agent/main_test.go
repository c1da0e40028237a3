package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestVersion: both ways to ask for it have the same answer.
func TestVersion(t *testing.T) {
	var command, flag bytes.Buffer
	for args, out := range map[string]*bytes.Buffer{"version": &command, "--version": &flag} {
		root := rootCommand()
		root.SetArgs([]string{args})
		root.SetOut(out)
		if code := execute(t.Context(), root); code != 0 {
			t.Errorf("%s: exit status %d", args, code)
		}
	}
	if command.String() != flag.String() || !strings.HasPrefix(flag.String(), "magic-ip-agent devel go1.") {
		t.Errorf("version prints %q, --version %q", &command, &flag)
	}
}

// TestCompletion: a shell is told the values of flags, and the names of the agents of the node.
func TestCompletion(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	lock, err := dir.Agent("default.magic-ip").Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := dir.Agent("default.magic-ip").WriteStatus(runtimedir.Status{}); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ args, want string }{
		{"sta", "status\tShow what this node's agents serve, and whether they run\n:4\n"},
		{"run --backend ", "auto\nnftables\niptables\n:4\n"},
		{"install --runtime ", "auto\ncontainerd\ncrio\n:4\n"},
		{"doctor --output ", "table\njson\n:4\n"},
		{"ask --runtime-dir " + dir.Path() + " --name ", "default.magic-ip\n:4\n"},
		{"uninstall --runtime-dir " + dir.Path() + " --name ", "default.magic-ip\n:4\n"},
	} {
		root := rootCommand()
		var out bytes.Buffer
		root.SetArgs(append([]string{"__complete"}, strings.Split(test.args, " ")...))
		root.SetOut(&out)
		root.SetErr(io.Discard)
		if code := execute(t.Context(), root); code != 0 || out.String() != test.want {
			t.Errorf("%s: exit status %d, %q, want %q", test.args, code, &out, test.want)
		}
	}
}

// TestExamples: every command shows how it is used, with flags that it has.
func TestExamples(t *testing.T) {
	for _, command := range rootCommand().Commands() {
		if command.Name() == "version" {
			continue
		}
		if command.Example == "" {
			t.Errorf("%s has no example", command.Name())
		}
		for line := range strings.Lines(command.Example) {
			_, args, found := strings.Cut(strings.TrimSpace(line), "magic-ip-agent "+command.Name())
			if !found {
				t.Errorf("%s: not an example of it: %s", command.Name(), line)
				continue
			}
			root := rootCommand()
			root.SetArgs(append(append([]string{command.Name()}, strings.Fields(args)...), "--help")) // flags are parsed in their order
			root.SetOut(io.Discard)
			if code := execute(t.Context(), root); code != 0 {
				t.Errorf("%s: exit status %d", line, code)
			}
		}
	}
}

func TestExitStatus(t *testing.T) {
	empty := t.TempDir()
	invalid := filepath.Join(t.TempDir(), "invalid.yaml")
	if err := os.WriteFile(invalid, []byte("name: \"\\e[31m\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want int
		says string // on standard error; nothing where empty
	}{
		{[]string{"version"}, 0, ""},
		{[]string{"--version"}, 0, ""},
		{[]string{"completion", "bash"}, 0, ""},
		{[]string{"staus"}, 2, "Did you mean this?\n    status"},
		{[]string{"run"}, 1, "configuration: --config FILE is missing"},
		{[]string{"doctor", "--help"}, 0, ""},
		{[]string{"nonsense"}, 2, "unknown command"},
		{[]string{"doctor", "--nonsense"}, 2, "unknown flag"},
		{[]string{"doctor", "nonsense"}, 2, "nonsense"},
		{[]string{"doctor", "--output", "yaml"}, 2, "allowed: table, json"},
		{[]string{"doctor", "--runtime-dir", filepath.Join(empty, "nowhere")}, 1, ""},
		{[]string{"run", "--kubeconfig", "a", "--no-api"}, 2, "none of the others can be"},
		{[]string{"uninstall"}, 2, "at least one of the flags"},
		{[]string{"run", "--config", filepath.Join(empty, "nowhere")}, 1, "no such file"},
		{[]string{"run", "--config", invalid}, 1, `"\x1b[31m" is not allowed`},
	} {
		t.Run(strings.Join(test.args[:1], " "), func(t *testing.T) {
			root := rootCommand()
			var stdout, stderr bytes.Buffer
			root.SetArgs(test.args)
			root.SetOut(&stdout)
			root.SetErr(&stderr)
			if code := execute(t.Context(), root); code != test.want {
				t.Errorf("%q: exit status %d, want %d\n%s%s", test.args, code, test.want, &stdout, &stderr)
			}
			if said := stderr.String(); (said == "") != (test.says == "") || !strings.Contains(said, test.says) {
				t.Errorf("%q: says %q, want %q", test.args, said, test.says)
			}
		})
	}
}
