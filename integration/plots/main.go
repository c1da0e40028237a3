// Command plots makes the report of a comparison from its raw data: `make report`. It measures nothing, and the same data make the same
// report. It is a module of its own, so that the library that draws is none of the project's.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() { os.Exit(run()) }

func run() int {
	dir := flag.String("dir", "../../docs/benchmarks", "`DIRECTORY` of the report; the data are in its folder data")
	flag.Parse()
	d, err := readData(filepath.Join(*dir, "data"))
	if err == nil {
		err = write(*dir, d)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "plots:", err)
		return 1
	}
	return 0
}

// write writes the charts and the report.
func write(dir string, d data) error {
	var all []error
	files := map[string][]byte{}
	for _, c := range charts(d) {
		drawn, err := c.draw()
		if err != nil {
			return fmt.Errorf("%s: %w", c.file, err)
		}
		files[c.file] = drawn
	}
	var text bytes.Buffer
	report(&text, d)
	files["compare.md"] = text.Bytes()
	for name, content := range files {
		all = append(all, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
	return errors.Join(all...)
}
