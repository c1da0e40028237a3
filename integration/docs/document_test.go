// Package docs tests the documents: what they link to exists, what they tell people to type works, the configurations in them
// are valid, and what is written by a program is what the program writes today. With -update it writes that.
package docs

import (
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the generated parts of the documents")

const (
	root  = "../.."
	agent = root + "/bin/magic-ip-agent"
	chart = root + "/charts/magic-ip-address"
)

// document is a Markdown file.
type document struct {
	path string // below root
	text string
}

func open(t *testing.T, path string) document {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return document{path, string(text)}
}

// documents are all that people read.
func documents(t *testing.T) (all []document) {
	t.Helper()
	paths, err := filepath.Glob(root + "/docs/*.md")
	if err != nil || len(paths) < 10 {
		t.Fatalf("%d documents: %v", len(paths), err)
	}
	examples, err := filepath.Glob(root + "/examples/*/README.md")
	if err != nil || len(examples) < 7 {
		t.Fatalf("%d examples: %v", len(examples), err)
	}
	paths = append(paths, examples...)
	paths = append(paths, "README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "cni-conf/README.md", "charts/magic-ip-address/README.md")
	for _, path := range paths {
		all = append(all, open(t, strings.TrimPrefix(path, root+"/")))
	}
	return all
}

// block is what is between two fences.
type block struct {
	document
	line int    // of the first fence, from 1
	info string // behind it: a language, and a word for these tests
	text string
}

func (d document) blocks(t *testing.T) (all []block) {
	t.Helper()
	var current *block
	for i, line := range strings.Split(d.text, "\n") {
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && current == nil:
			current = &block{document: d, line: i + 1, info: info}
		case fence:
			all = append(all, *current)
			current = nil
		case current != nil:
			current.text += line + "\n"
		}
	}
	if current != nil {
		t.Errorf("%s:%d: the block has no end", d.path, current.line)
	}
	return all
}

// prose is the document without blocks and code, line by line.
func (d document) prose() []string {
	code, inBlock := regexp.MustCompile("`[^`]*`"), false
	lines := strings.Split(d.text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, "```") {
			inBlock = !inBlock
			line = ""
		}
		if inBlock || strings.HasPrefix(line, "    ") && i > 0 && lines[i-1] == "" {
			line = ""
		}
		lines[i] = line
	}
	return strings.Split(code.ReplaceAllStringFunc(strings.Join(lines, "\n"), func(s string) string {
		return strings.Map(func(r rune) rune {
			if r == '\n' {
				return r
			}
			return 'x'
		}, s)
	}), "\n")
}

// anchors are those that GitHub gives the headings.
func (d document) anchors() map[string]bool {
	anchors := map[string]bool{}
	inBlock := false
	for line := range strings.Lines(d.text) {
		if strings.HasPrefix(line, "```") {
			inBlock = !inBlock
		}
		heading := strings.TrimLeft(line, "#")
		if inBlock || heading == line || !strings.HasPrefix(heading, " ") {
			continue
		}
		heading = regexp.MustCompile(`\[([^]]*)\]\([^)]*\)`).ReplaceAllString(strings.TrimSpace(heading), "$1")
		heading = regexp.MustCompile(`[^\p{L}\p{N}_ -]`).ReplaceAllString(strings.ToLower(heading), "")
		anchors[strings.ReplaceAll(heading, " ", "-")] = true
	}
	return anchors
}

// TestExamplesAreLinked: README leads to each example.
func TestExamplesAreLinked(t *testing.T) {
	examples, err := filepath.Glob(root + "/examples/*/README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := open(t, "README.md").text
	for _, path := range examples {
		if link := "](" + strings.TrimPrefix(path, root+"/") + ")"; !strings.Contains(readme, link) {
			t.Errorf("README.md has no link %s", link)
		}
	}
}

// TestLinks: what a link in the repository leads to exists, heading included.
func TestLinks(t *testing.T) {
	// The text of a link may go on in the next line.
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	for _, d := range documents(t) {
		for i, line := range d.prose() {
			for _, match := range link.FindAllStringSubmatch(line, -1) {
				if strings.Contains(match[1], "://") {
					continue
				}
				links++
				path, anchor, _ := strings.Cut(match[1], "#")
				target := d
				if path != "" {
					joined := filepath.Join(filepath.Dir(d.path), path)
					info, err := os.Stat(filepath.Join(root, joined))
					if err != nil {
						t.Errorf("%s:%d: %s: %v", d.path, i+1, match[1], err)
						continue
					}
					if anchor == "" || info.IsDir() {
						continue
					}
					target = open(t, joined)
				}
				if !target.anchors()[anchor] {
					t.Errorf("%s:%d: %s has no heading #%s", d.path, i+1, target.path, anchor)
				}
			}
		}
	}
	if links < 80 {
		t.Errorf("only %d links were found", links)
	}
}

// TestTables: each row has as many cells as the heading. A bar in code ends a cell too.
func TestTables(t *testing.T) {
	tables := 0
	for _, d := range documents(t) {
		inBlock, columns := false, 0
		for i, line := range strings.Split(d.text, "\n") {
			if strings.HasPrefix(line, "```") {
				inBlock = !inBlock
			}
			if inBlock || !strings.HasPrefix(line, "|") {
				columns = 0
				continue
			}
			cells := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|") - 1
			if columns == 0 {
				columns = cells
				tables++
			}
			if cells != columns || !strings.HasSuffix(line, "|") {
				t.Errorf("%s:%d: %d cells, and the heading has %d", d.path, i+1, cells, columns)
			}
		}
	}
	if tables < 40 {
		t.Errorf("only %d tables were found", tables)
	}
}

func TestREADMEIsShort(t *testing.T) {
	const most = 200
	if lines := strings.Count(open(t, "README.md").text, "\n"); lines > most {
		t.Errorf("README.md has %d lines, at most %d are allowed: move details to docs/", lines, most)
	}
}

// declared are the names of all tests.
func declared(t *testing.T) map[string]bool {
	t.Helper()
	tests := map[string]bool{}
	function := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, match := range function.FindAllStringSubmatch(string(source), -1) {
			tests[match[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tests
}

// TestTestsExist: every test and every scenario that a document names exists.
func TestTestsExist(t *testing.T) {
	tests := declared(t)
	named := 0
	for _, d := range documents(t) {
		for _, match := range regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(d.text, -1) {
			named++
			if !tests[match[1]] {
				t.Errorf("%s names %s, which does not exist", d.path, match[1])
			}
		}
		for _, match := range regexp.MustCompile("`([a-z0-9-]+\\.txtar)` of `TestScenarios`").FindAllStringSubmatch(d.text, -1) {
			if _, err := os.Stat(root + "/agent/testdata/scenarios/" + match[1]); err != nil {
				t.Errorf("%s names a scenario that does not exist: %v", d.path, err)
			}
		}
	}
	if named < 60 {
		t.Errorf("only %d names of tests were found", named)
	}
}

// TestAbsoluteSentences: what is said of all cases names the test that tries it, or the document that does.
func TestAbsoluteSentences(t *testing.T) {
	absolute := regexp.MustCompile(`(?i)\b(never|always|nothing|nobody|no \w+ can|guarantees?)\b`)
	backed := regexp.MustCompile("`Test\\w+`|SECURITY\\.md")
	quotation := regexp.MustCompile(`"[^"]*"|\*\w+\*`)
	// A paragraph, a row of a table or an item of a list.
	startsSentence := regexp.MustCompile(`^$|^\||^ *- |^\d+\. |^#`)
	for _, d := range documents(t) {
		if d.path == "SECURITY.md" || strings.HasPrefix(d.path, "charts/") {
			continue // the tests stand in its table; the chart's README is its values
		}
		prose, original := d.prose(), strings.Split(d.text, "\n")
		for begin := 0; begin < len(prose); {
			end := begin + 1
			for end < len(prose) && !startsSentence.MatchString(prose[end]) {
				end++
			}
			said := quotation.ReplaceAllString(strings.Join(prose[begin:end], "\n"), "")
			if word := absolute.FindString(said); word != "" && !backed.MatchString(strings.Join(original[begin:end], "\n")) {
				t.Errorf("%s:%d says %q and names no test:\n%s", d.path, begin+1, word, strings.Join(original[begin:end], "\n"))
			}
			begin = end
		}
	}
}

// TestNames: names that the code gives to people are those of the documents.
func TestNames(t *testing.T) {
	for _, test := range []struct {
		what, document, section, documented string // section: between this heading and the next one of its level or above
		sources, written                    string
	}{
		{"metrics", "docs/operations.md", "## Metrics", "(?m)^\\| `(magic_ip_\\w+)", "agent/metrics/metrics.go", `"(magic_ip_\w+)"`},
		{"Events", "docs/operations.md", "## Events", "`([A-Z][a-z]\\w+)`", "agent/event/event.go", `(?m)^\t(\w+) += "\w+" +// (?:Normal|Warning)`},
		{"variables", "docs/configuration.md", "## Environment", "(?m)^\\| `([A-Z_]+)` \\|", "agent/config/config.go", `(?:getenv|port)\("([A-Z_]+)"\)`},
		{"checks of doctor", "docs/troubleshooting.md", "# Troubleshooting", "\\| `([a-z][a-z_ ]+)`(?: \\||, `[a-z]+` \\||, with)", "agent/doctor/*.go", `(?:check|probeCheck)\s*:?= "([a-z][a-z_ ]+)"|"([a-z][a-z_ ]+)"`},
	} {
		t.Run(test.what, func(t *testing.T) {
			_, section, found := strings.Cut(open(t, test.document).text, test.section+"\n")
			if !found {
				t.Fatalf("%s has no %q", test.document, test.section)
			}
			if level, _, _ := strings.Cut(test.section, " "); level != "#" {
				section, _, _ = strings.Cut(section, "\n"+level+" ")
			}
			documented := matches(test.documented, section)
			var source string
			paths, _ := filepath.Glob(filepath.Join(root, test.sources))
			for _, path := range paths {
				if !strings.HasSuffix(path, "_test.go") {
					data, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					source += string(data)
				}
			}
			written := matches(test.written, source)
			if len(documented) < 4 {
				t.Errorf("found only %q in %s", documented, test.document)
			}
			for _, name := range documented {
				if !slices.Contains(written, name) {
					t.Errorf("%s names %s, and the code does not", test.document, name)
				}
			}
			if test.what == "checks of doctor" { // symptoms, and not all checks
				return
			}
			for _, name := range written {
				if !slices.Contains(documented, name) {
					t.Errorf("%s does not name %s", test.document, name)
				}
			}
		})
	}
}

// matches are the groups of all matches, each once, in order.
func matches(pattern, text string) (all []string) {
	for _, match := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
		for _, group := range match[1:] {
			if group != "" {
				all = append(all, group)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
