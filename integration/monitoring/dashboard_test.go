package monitoring

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// dashboard returns the queries of the dashboard, with what Grafana puts into them.
func dashboard(t *testing.T) (queries []string) {
	t.Helper()
	data, err := os.ReadFile(files + "dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, panel := range dashboard.Panels {
		if len(panel.Targets) == 0 || panel.Title == "" || seen[panel.ID] {
			t.Errorf("panel %d, %q, has %d queries", panel.ID, panel.Title, len(panel.Targets))
		}
		seen[panel.ID] = true
		for _, target := range panel.Targets {
			queries = append(queries, strings.NewReplacer("$__rate_interval", "5m", "$job", ".*").Replace(target.Expr))
		}
	}
	return queries
}
