package docs

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestSecurityTable: every row of the table of SECURITY.md that denies something is attacked, and every attack has a row there. That the tests
// exist that it names, TestTestsExist sees.
func TestSecurityTable(t *testing.T) {
	t.Parallel()
	attacks := 0
	attacked := map[string]bool{}
	for _, file := range []string{"../attack_test.go", "../cluster/attack_test.go"} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`\{by: "([^"]+)"`).FindAllStringSubmatch(string(source), -1) {
			attacks++
			attacked[match[1]] = true
		}
	}
	if attacks < 40 {
		t.Errorf("there are %d attacks", attacks)
	}
	_, table, _ := strings.Cut(open(t, "SECURITY.md").text, "| who | can | cannot | tried besides by |\n|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := map[string]bool{}
	who := regexp.MustCompile(`\*\*([^*]+)\*\*`)
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		name := who.FindStringSubmatch(line)
		if len(cells) != 4 || name == nil {
			t.Fatalf("not a row: %s", line)
		}
		by := strings.ReplaceAll(name[1], "`", "")
		rows[by] = true
		if strings.TrimSpace(cells[2]) != "" && !attacked[by] {
			t.Errorf("no attack by: %s", by)
		}
	}
	for by := range attacked {
		if !rows[by] {
			t.Errorf("SECURITY.md has no row for %q", by)
		}
	}
}
