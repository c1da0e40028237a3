package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityTable: every test that SECURITY.md names exists, and every row of its table names one, or gives everything away.
func TestSecurityTable(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err = filepath.WalkDir("..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, match := range declared.FindAllStringSubmatch(string(source), -1) {
			tests[match[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(Test\\w+)`")
	for _, match := range named.FindAllStringSubmatch(string(text), -1) {
		if !tests[match[1]] {
			t.Errorf("SECURITY.md names %s, which does not exist", match[1])
		}
	}
	_, table, _ := strings.Cut(string(text), "| who | can | cannot | tried by |\n|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		rows++
		if len(cells) != 4 || strings.TrimSpace(cells[2]) != "" && !named.MatchString(cells[3]) {
			t.Errorf("what cannot be done is not tried: %s", line)
		}
	}
	if rows < 13 {
		t.Errorf("the table has %d rows", rows)
	}
}
