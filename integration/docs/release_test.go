package docs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestReleaseNotes: the notes of a release are its section of CHANGELOG.md, and a version that is not to be released has none.
func TestReleaseNotes(t *testing.T) {
	script, err := filepath.Abs(root + "/tools/release/notes")
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		changes, chart string
		want           string
		fails          string
	}{
		"dated": {changes: "# Changes\n\n## 1.2.3 (2026-01-31)\n\nNew ([Upgrading](docs/upgrading.md)).\n\n- [Other](https://example.org/)\n\n## 1.2.2 (2026-01-01)\n\nOld.\n",
			want: "New ([Upgrading](https://github.com/magic-ip-address/magic-ip-address/blob/v1.2.3/docs/upgrading.md)).\n\n- [Other](https://example.org/)\n"},
		"not released":     {changes: "## 1.2.3 (not released)\n\nNew.\n", fails: `no heading "## 1.2.3 (YYYY-MM-DD)"; found: ## 1.2.3 (not released)`},
		"missing":          {changes: "## 11.2.3 (2026-01-31)\n\nNew.\n", fails: "found: none"},
		"empty":            {changes: "## 1.2.3 (2026-01-31)\n\n## 1.2.2 (2026-01-01)\n\nOld.\n", fails: "the section of 1.2.3 in CHANGELOG.md is empty"},
		"of another chart": {changes: "## 1.2.3 (2026-01-31)\n\nNew.\n", chart: "1.2.4", fails: "version of charts/magic-ip-address/Chart.yaml is 1.2.4, and the release is 1.2.3"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if test.chart == "" {
				test.chart = "1.2.3"
			}
			for path, data := range map[string]string{
				"CHANGELOG.md":                       test.changes,
				"charts/magic-ip-address/Chart.yaml": fmt.Sprintf("version: %[1]s\nappVersion: %[1]s\n", test.chart),
			} {
				path = filepath.Join(dir, path)
				if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			command := exec.CommandContext(t.Context(), script, "1.2.3")
			command.Dir = dir
			var stderr strings.Builder
			command.Stderr = &stderr
			out, err := command.Output()
			if (err != nil) != (test.fails != "") || !strings.Contains(stderr.String(), test.fails) || string(out) != test.want {
				t.Errorf("%v, notes %q, want %q; it says %q, want %q", err, out, test.want, &stderr, test.fails)
			}
		})
	}
}

// TestWorkflows: CI is .ci/run in the image that the Dockerfile builds with, actions are pinned by digest, and what a workflow runs
// of the repository exists.
func TestWorkflows(t *testing.T) {
	paths, err := filepath.Glob(root + "/.github/workflows/*.yaml")
	if err != nil || len(paths) != 2 {
		t.Fatalf("%q: %v", paths, err)
	}
	golang := regexp.MustCompile(`(?m)^ARG GO_IMAGE=(\S+)$`).FindStringSubmatch(open(t, "Dockerfile").text)
	if ci := open(t, ".github/workflows/ci.yaml").text; golang == nil || !strings.Contains(ci, "image: "+golang[1]+"\n") || !strings.Contains(ci, "- run: .ci/run\n") {
		t.Errorf("ci.yaml does not run .ci/run in %q", golang)
	}
	makefile := open(t, "Makefile").text
	for _, path := range paths {
		text := open(t, strings.TrimPrefix(path, root+"/")).text
		for _, match := range regexp.MustCompile(`uses: (\S+)(.*)`).FindAllStringSubmatch(text, -1) {
			if !strings.HasPrefix(match[1], "./.github/") && !regexp.MustCompile(`^[\w-]+/[\w-]+@[0-9a-f]{40}$`).MatchString(match[1]) || strings.Contains(match[1], "@") && !strings.HasPrefix(match[2], " # v") {
				t.Errorf("%s: %s is not pinned by a digest with its version beside it", path, match[0])
			}
		}
		for _, target := range regexp.MustCompile(`(?m)(?:run: |^ +)make ([a-z-]+)`).FindAllStringSubmatch(text, -1) {
			if !strings.Contains(makefile, "\n"+target[1]+": ") {
				t.Errorf("%s: make has no target %s", path, target[1])
			}
		}
		for _, script := range regexp.MustCompile(`tools/release/\w+`).FindAllString(text, -1) {
			if _, err := os.Stat(filepath.Join(root, script)); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestChartMetadata: what hubs show of the chart leads to what is in the repository, and names the image that the chart asks for.
func TestChartMetadata(t *testing.T) {
	var metadata struct {
		AppVersion, Version, Home, Icon string
		Sources                         []string
		Maintainers                     []struct{ Name, URL string }
		Annotations                     map[string]string
	}
	text := open(t, "charts/magic-ip-address/Chart.yaml").text
	if err := yaml.Unmarshal([]byte(strings.ReplaceAll(text, "appVersion", "appversion")), &metadata); err != nil {
		t.Fatal(err)
	}
	const repository = "https://github.com/magic-ip-address/magic-ip-address"
	if metadata.Home != repository || len(metadata.Sources) != 1 || metadata.Sources[0] != repository || len(metadata.Maintainers) == 0 {
		t.Errorf("home %q, sources %q, maintainers %q", metadata.Home, metadata.Sources, metadata.Maintainers)
	}
	links := regexp.MustCompile(`https://(?:github|raw\.githubusercontent)\.com/magic-ip-address/magic-ip-address/(?:tree/|blob/)?main/(\S+)`).FindAllStringSubmatch(text, -1)
	if len(links) < 4 {
		t.Errorf("found the links %q", links)
	}
	for _, link := range links {
		if _, err := os.Stat(filepath.Join(root, link[1])); err != nil {
			t.Errorf("%s: %v", link[0], err)
		}
	}
	if image := "image: docker.io/magic-ip-address/magic-ip-address:" + metadata.AppVersion + "\n"; !strings.Contains(metadata.Annotations["artifacthub.io/images"], image) {
		t.Errorf("artifacthub.io/images does not have %s", image)
	}
}
