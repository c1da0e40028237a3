package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
