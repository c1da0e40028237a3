package docs

import (
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestPictures: each is well formed, says what it shows to those who cannot see it, and is shown.
func TestPictures(t *testing.T) {
	paths, err := filepath.Glob(root + "/docs/images/*")
	if err != nil || len(paths) < 4 {
		t.Fatalf("%d pictures: %v", len(paths), err)
	}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var picture struct {
			Title string `xml:"title"`
			Desc  string `xml:"desc"`
		}
		if err := xml.Unmarshal(data, &picture); err != nil || picture.Title == "" || picture.Desc == "" {
			t.Errorf("%s: title %q, description %q, %v", path, picture.Title, picture.Desc, err)
		}
		shown := false
		for _, d := range documents(t) {
			shown = shown || strings.Contains(d.text, "images/"+filepath.Base(path)+")")
		}
		if !shown {
			t.Errorf("no document shows %s", path)
		}
	}
}

// TestRolloutPicture: docs/images/rollout.svg has the figures of the table in docs/benchmarks.md.
func TestRolloutPicture(t *testing.T) {
	const path = "docs/images/rollout.svg"
	want := drawRollout(t, open(t, "docs/benchmarks.md").text)
	if bars := strings.Count(want, "height=\"12\" fill") - 2; bars != 12 { // beside the legend's
		t.Errorf("%d bars are drawn, and there are 12 figures:\n%s", bars, want)
	}
	if *update {
		document{path: path}.save(t, want)
	}
	if open(t, path).text != want {
		t.Errorf("%s does not have the figures of docs/benchmarks.md: run make docs", path)
	}
}

// gaps are the longest ones of a client in milliseconds.
type gaps struct{ service, magicIP int }

// drawRollout draws the longest gaps of the three kinds of clients, in a rolling update and with a surge.
func drawRollout(t *testing.T, benchmarks string) string {
	t.Helper()
	const left, scale = 250, 0.24 // of the bars, and pixels per millisecond
	clients := []string{"a connection each", "HTTP keep-alive", "UDP socket"}
	rows := regexp.MustCompile(`\| longest gap, ms[^|]*\| ([\d /]+) \| ([\d /]+) \|`).FindAllStringSubmatch(benchmarks, -1)
	updates := []string{"one pod at a time", "maxSurge: 1, the old server stops at once"}
	if len(rows) != len(updates) {
		t.Fatalf("docs/benchmarks.md has %d rows of longest gaps, and not %d", len(rows), len(updates))
	}
	var bars, words strings.Builder
	y := 84
	for i, row := range rows {
		fmt.Fprintf(&bars, "  <text x=\"20\" y=\"%d\" font-weight=\"bold\">%s</text>\n", y+4, updates[i])
		y += 14
		for j, g := range parseGaps(t, row) {
			fmt.Fprintf(&bars, "  <text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", left-12, y+19, clients[j])
			for k, bar := range []struct {
				ms     int
				colour string
			}{{g.service, "#f59e0b"}, {g.magicIP, "#2563eb"}} {
				width := float64(bar.ms) * scale
				if left+width > 840 {
					t.Fatalf("%d ms do not fit: make scale smaller", bar.ms)
				}
				fmt.Fprintf(&bars, "  <rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"12\" fill=\"%s\"/>\n", left, y+k*14, width, bar.colour)
				fmt.Fprintf(&bars, "  <text x=\"%.1f\" y=\"%d\" font-size=\"12\">%d ms</text>\n", left+width+6, y+k*14+11, bar.ms)
			}
			fmt.Fprintf(&words, " %s, %s: %d and %d ms.", updates[i], clients[j], g.service, g.magicIP)
			y += 38
		}
		y += 22
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 %[1]d" font-family="DejaVu Sans, Verdana, Arial, sans-serif" font-size="14" fill="#1f2937">
  <title>The longest gap that a client sees during an update</title>
  <desc>By a Service with internalTrafficPolicy Local, and by a magic IP.%[2]s</desc>
  <rect width="920" height="%[1]d" rx="10" fill="#ffffff"/>
  <text x="20" y="32" font-weight="bold">Longest gap that a client sees during an update</text>
  <rect x="250" y="46" width="12" height="12" fill="#f59e0b"/><text x="268" y="57">Service, internalTrafficPolicy: Local</text>
  <rect x="570" y="46" width="12" height="12" fill="#2563eb"/><text x="588" y="57">magic IP</text>
%[3]s</svg>
`, y-8, words.String(), bars.String())
}

func parseGaps(t *testing.T, row []string) (all []gaps) {
	t.Helper()
	service, magicIP := strings.Split(row[1], " / "), strings.Split(row[2], " / ")
	if len(service) != 3 || len(magicIP) != 3 {
		t.Fatalf("not three figures each: %s", row[0])
	}
	for i := range service {
		s, err := strconv.Atoi(service[i])
		if err != nil {
			t.Fatal(err)
		}
		m, err := strconv.Atoi(magicIP[i])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, gaps{s, m})
	}
	return all
}
