package main

import (
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// line is one of a table, by its columns.
type line map[string]string

func (l line) number(column string) float64 {
	switch l[column] {
	case "":
		return math.NaN()
	case "never":
		return math.Inf(1)
	}
	v, err := strconv.ParseFloat(l[column], 64)
	if err != nil {
		panic(fmt.Sprintf("column %s: %v", column, err)) // readData has looked at it
	}
	return v
}

// data are the tables that integration/cluster/compare writes.
type data struct {
	parts, runs, absent, path, rest []line
}

func readData(dir string) (d data, err error) {
	for name, table := range map[string]*[]line{"parts": &d.parts, "runs": &d.runs, "absent": &d.absent, "path": &d.path, "rest": &d.rest} {
		if *table, err = readTable(filepath.Join(dir, name+".csv")); err != nil {
			return d, err
		}
	}
	return d, nil
}

// texts are the columns that are no numbers.
var texts = map[string]bool{ //nolint:gochecknoglobals // a table
	"part": true, "date": true, "kubernetes": true, "nodes": true, "machine": true, "case": true, "peer": true, "client": true, "node": true, "lacks": true,
}

func readTable(name string) ([]line, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	rows, err := csv.NewReader(file).ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("%s is empty: it must begin with a line of column names", name)
	}
	var lines []line
	for _, row := range rows[1:] {
		l := line{}
		for i, column := range rows[0] {
			l[column] = row[i]
			if _, err := strconv.ParseFloat(row[i], 64); err != nil && !texts[column] && row[i] != "" && row[i] != "never" {
				return nil, fmt.Errorf("%s: %s: %w", name, column, err)
			}
		}
		lines = append(lines, l)
	}
	return lines, nil
}

func where(lines []line, wanted line) (found []line) {
	for _, l := range lines {
		if matches(l, wanted) {
			found = append(found, l)
		}
	}
	return found
}

func matches(l, wanted line) bool {
	for column, value := range wanted {
		if l[column] != value {
			return false
		}
	}
	return true
}

// distinct are the values of a column, in the order in which they come.
func distinct(lines []line, column string) (values []string) {
	for _, l := range lines {
		if !slices.Contains(values, l[column]) {
			values = append(values, l[column])
		}
	}
	return values
}

func numbers(lines []line, column string) (all []float64) {
	for _, l := range lines {
		all = append(all, l.number(column))
	}
	return all
}

// stall is the wait of the witness, in milliseconds, from which on a run is marked: the machine had no time for anybody.
const stall = 20

func disturbed(l line) bool { return l.number("witness_ms") >= stall }

// lost are the requests of a run that failed while a process listened, what the old process took with it apart.
func lost(l line) float64 { return l.number("blamed") }

// spread is the median of the runs, and the least and the most of those that no stall has disturbed; disturbed is the most of the others.
type spread struct {
	runs                         int
	median, least, most, stalled float64 // NaN: there is none
}

func spreadOf(runs []line, figure func(line) float64) spread {
	s := spread{runs: len(runs), median: math.NaN(), least: math.NaN(), most: math.NaN(), stalled: math.NaN()}
	var all []float64
	for _, l := range runs {
		v := figure(l)
		all = append(all, v)
		if disturbed(l) {
			s.stalled = larger(s.stalled, v)
			continue
		}
		s.most = larger(s.most, v)
		if math.IsNaN(s.least) || v < s.least {
			s.least = v
		}
	}
	if len(all) > 0 {
		slices.Sort(all)
		s.median = all[(len(all)-1)/2]
	}
	return s
}

func larger(a, b float64) float64 {
	if math.IsNaN(a) || b > a {
		return b
	}
	return a
}

func of(column string) func(line) float64 { return func(l line) float64 { return l.number(column) } }
