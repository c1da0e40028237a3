package main

import (
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// story prints what the demo tells, in colour where a person watches (see no-color.org).
type story struct {
	out      *os.File
	colour   bool
	chapters int
	bad      int // outcomes
}

func newStory(out *os.File) *story {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &story{out: out, colour: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

// SGR parameters of ECMA-48.
const (
	bold  = "1"
	faint = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (s *story) paint(colour, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// chapter begins a numbered one.
func (s *story) chapter(title string) {
	s.chapters++
	fmt.Fprintf(s.out, "\n%s\n", s.paint(bold, fmt.Sprintf("%d. %s", s.chapters, title)))
}

// tell prints a line of the narrative.
func (s *story) tell(format string, args ...any) {
	fmt.Fprintf(s.out, "   "+format+"\n", args...)
}

// command prints what is run or asked.
func (s *story) command(format string, args ...any) {
	fmt.Fprintf(s.out, "   %s\n", s.paint(cyan, "$ "+fmt.Sprintf(format, args...)))
}

// show prints a file or a command's output.
func (s *story) show(text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintf(s.out, "   %s\n", s.paint(faint, strings.ReplaceAll(strings.TrimRight(line, "\n"), "\t", "    ")))
	}
}

// outcome prints what came of something: good where it is as it should be.
func (s *story) outcome(good bool, format string, args ...any) {
	mark := s.paint(green, "✓")
	if !good {
		mark = s.paint(red, "✗")
		s.bad++
	}
	fmt.Fprintf(s.out, "   %s %s\n", mark, fmt.Sprintf(format, args...))
}

// table prints rows in columns; the first row is the heading.
func (s *story) table(rows ...[]string) {
	var text strings.Builder
	w := tabwriter.NewWriter(&text, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		_, _ = fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	_ = w.Flush() // into memory
	heading, rest, _ := strings.Cut(text.String(), "\n")
	fmt.Fprintf(s.out, "\n   %s\n", s.paint(bold, heading))
	for line := range strings.Lines(rest) {
		fmt.Fprintf(s.out, "   %s", line)
	}
	fmt.Fprintln(s.out)
}

// ms words a duration, in microseconds where it is less than a millisecond.
func ms(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < 10*time.Millisecond && d%time.Millisecond != 0:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%d ms", d.Milliseconds())
}
