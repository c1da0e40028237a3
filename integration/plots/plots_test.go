package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const published = "../../docs/benchmarks"

// TestPublished: the page and the charts are what the data make.
func TestPublished(t *testing.T) {
	t.Parallel()
	d, err := readData(filepath.Join(published, "data"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := write(dir, d); err != nil {
		t.Fatal(err)
	}
	made, err := fs.Glob(os.DirFS(dir), "*")
	if err != nil || len(made) < 2 {
		t.Fatalf("made %v, %v", made, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "compare.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range made {
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(published, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("docs/benchmarks/%s is not what the data make (%v): run make report", name, err)
		}
		if !strings.HasSuffix(name, ".svg") {
			continue
		}
		if !strings.Contains(string(text), "("+name+")") {
			t.Errorf("the page does not show %s", name)
		}
		for in := xml.NewDecoder(bytes.NewReader(want)); ; {
			if _, err := in.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
		}
	}
	old, err := fs.Glob(os.DirFS(published), "*.svg")
	for _, name := range old {
		if !slices.Contains(made, name) {
			t.Errorf("docs/benchmarks/%s is of data that are gone: remove it", name)
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func runLine(run, excess, witness, blamed string) line {
	return line{"node": "node1", "run": run, "excess_ms": excess, "witness_ms": witness, "blamed": blamed}
}

// TestSpread: no run is left out of the median, and the worst of the runs that a stall disturbed is told apart.
func TestSpread(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		runs []line
		want string
	}{
		"undisturbed":                 {[]line{runLine("1", "3", "1", "0"), runLine("2", "1", "1", "0"), runLine("3", "2", "1", "0")}, "2 / 3"},
		"a disturbed run is worse":    {[]line{runLine("1", "3", "1", "0"), runLine("2", "1", "1", "0"), runLine("3", "90", "20", "0")}, "3 / 3 / 90†"},
		"a disturbed run is no worse": {[]line{runLine("1", "3", "1", "0"), runLine("2", "1", "1", "0"), runLine("3", "2", "20", "0")}, "2 / 3"},
		"all are disturbed":           {[]line{runLine("1", "3", "25", "0")}, "3 / 3†"},
		"never":                       {[]line{runLine("1", "3", "1", "0"), runLine("2", "never", "1", "0"), runLine("3", "never", "1", "0")}, "never / never"},
	} {
		if got := spreadOf(test.runs, of("excess_ms")).String(); got != test.want {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	if got := median(perRun([]line{runLine("1", "3", "1", "3"), runLine("1", "3", "1", "4"), runLine("2", "3", "1", "9")}, lost)); got != 7 {
		t.Errorf("lost of all clients in a run: median %v, want 7", got)
	}
	if got := figure(math.Inf(1)) + figure(math.NaN()) + figure(1234.5) + " " + figure(3.14159); got != "never–1234 3.1" {
		t.Errorf("figures: %q", got)
	}
}

// TestTicks: axes are counted in whole numbers where they can be.
func TestTicks(t *testing.T) {
	for high, want := range map[float64]string{7776: "0 2500 5000 7500", 8380: "0 4000 8000", 7.8: "0 2.5 5 7.5"} {
		var labels []string
		for _, tick := range ticks(0, high) {
			if tick.Label != "" {
				labels = append(labels, tick.Label)
			}
		}
		if got := strings.Join(labels, " "); got != want {
			t.Errorf("0 to %v: %s, want %s", high, got, want)
		}
	}
}
