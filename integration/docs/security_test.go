package docs

import (
	"regexp"
	"strings"
	"testing"
)

// TestSecurityTable: every row of the table of SECURITY.md names a test, or gives everything away. That they exist, TestTestsExist sees.
func TestSecurityTable(t *testing.T) {
	t.Parallel()
	_, table, _ := strings.Cut(open(t, "SECURITY.md").text, "| who | can | cannot | tried by |\n|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := 0
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		rows++
		if len(cells) != 4 || strings.TrimSpace(cells[2]) != "" && !regexp.MustCompile("`Test\\w+`").MatchString(cells[3]) {
			t.Errorf("what cannot be done is not tried: %s", line)
		}
	}
	if rows < 13 {
		t.Errorf("the table has %d rows", rows)
	}
}
