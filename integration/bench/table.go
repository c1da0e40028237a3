package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// table is what a part has measured, with the notes that belong to it.
type table struct {
	title string
	unit  string // of median and p99
	base  string // what the ratios are to; empty where there are none
	rows  []row
	notes []string
}

// row is one thing that was measured.
type row struct {
	what   string
	values sample
	ratios sample // to the base, turn by turn; nil where there are none
	target target
}

// target is an upper limit of one figure of a row. The zero target is none.
type target struct {
	figure figure
	limit  float64
}

type figure string

const (
	ratioMedian figure = "ratio"
	valueP99    figure = "p99"
)

// missed is also true of a figure that is not a number.
func (r row) missed() bool {
	switch r.target.figure {
	case ratioMedian:
		return !(r.ratios.median() <= r.target.limit)
	case valueP99:
		return !(r.values.p99() <= r.target.limit)
	}
	return false
}

func (r row) cells() []string {
	cells := []string{r.what, strconv.Itoa(len(r.values)), format(r.values.median()), format(r.values.p99()), "", "", "", ""}
	if r.ratios != nil {
		cells[4], cells[5] = fmt.Sprintf("%.3f", r.ratios.median()), fmt.Sprintf("%.3f", r.ratios.p99())
	}
	if r.target.figure != "" {
		cells[6], cells[7] = fmt.Sprintf("%s ≤ %v", r.target.figure, r.target.limit), "met"
		if r.missed() {
			cells[7] = "MISSED"
		}
	}
	return cells
}

// format gives three significant digits to small values and never an exponent.
func format(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func (t table) missed() int {
	missed := 0
	for _, r := range t.rows {
		if r.missed() {
			missed++
		}
	}
	return missed
}

// print writes the table as Markdown that can be read as it stands.
func (t table) print(w io.Writer) error {
	header := []string{t.title, "n", "median " + t.unit, "p99 " + t.unit, "ratio to " + t.base, "its p99", "target", ""}
	lines := [][]string{header}
	for _, r := range t.rows {
		lines = append(lines, r.cells())
	}
	if t.base == "" {
		for i, line := range lines {
			lines[i] = slices.Delete(line, 4, 6)
		}
	}
	widths := make([]int, len(lines[0]))
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], 2, utf8.RuneCountInString(cell))
		}
	}
	rule := make([]string, len(widths))
	for i, width := range widths {
		rule[i] = strings.Repeat("-", width-1) + ":"
		if i == 0 || i >= len(widths)-2 {
			rule[i] = strings.Repeat("-", width)
		}
	}
	var text strings.Builder
	text.WriteByte('\n')
	for _, line := range slices.Insert(lines, 1, rule) {
		for i, cell := range line {
			pad := strings.Repeat(" ", max(0, widths[i]-utf8.RuneCountInString(cell)))
			if i == 0 || i >= len(widths)-2 {
				cell += pad
			} else {
				cell = pad + cell
			}
			text.WriteString("| " + cell + " ")
		}
		text.WriteString("|\n")
	}
	for i, note := range t.notes {
		if i == 0 {
			text.WriteByte('\n')
		}
		text.WriteString("- " + note + "\n")
	}
	_, err := io.WriteString(w, text.String())
	return err
}
