// Package screen shows a table again and again: on a terminal it draws one screen anew, with a mark before the rows that have
// changed and with the last changes below; elsewhere it prints the table each time.
package screen

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// Frame is what is shown at a moment. Its texts may be anybody's: the screen quotes them.
type Frame struct {
	Tables []Table
	// Text is the same for a reader that is no terminal. It is printed as it is.
	Text string
}

// Table is a table, with lines above and below it.
type Table struct {
	Above   []Line
	Columns []string
	Rows    []Row
	Below   []Line
}

// Line is a line of text.
type Line struct {
	// Label stands before the text, with a colon; none where empty.
	Label, Text string
	// Colour is that of the text.
	Colour quote.Colour
}

// Paint is the line as a terminal gets it, in its colour if wanted.
func (l Line) Paint(colours bool) string { return l.paint(colours, math.MaxInt) }

// paint is Paint, for a terminal of a width.
func (l Line) paint(colours bool, width int) string {
	label, text := "", cut(quote.Terminal(l.Text), width)
	if l.Label != "" {
		label = cut(quote.Terminal(l.Label)+": ", width)
		text = cut(quote.Terminal(l.Text), width-utf8.RuneCountInString(label))
	}
	return label + l.Colour.Paint(colours, text)
}

// Row is a row of a table.
type Row struct {
	// Key says what the row is about; it is the same in each frame.
	Key   string
	Cells []string
	// State is what a change of is marked and listed: not all cells are, such as an age.
	State string
}

const (
	// marked is for how long a row that has changed is marked.
	marked = 10 * time.Second
	// mostChanges is how many of the last changes are listed.
	mostChanges = 10
)

// Watch shows what look returns every so often, until ctx ends. It returns the error of the first look; a later one is shown, and the
// table stays.
func Watch(ctx context.Context, out io.Writer, title string, every time.Duration, look func(context.Context) (Frame, error)) error {
	frame, err := look(ctx)
	if err != nil {
		return err
	}
	s := screen{title: fmt.Sprintf("%s   every %s, Ctrl-C ends", title, every), colours: Coloured(out)}
	file, drawn := terminal(out)
	if drawn {
		fmt.Fprint(out, "\x1b[?25l\x1b[2J") // no cursor, and an empty screen
		defer fmt.Fprint(out, "\x1b[?25h")  // the cursor
	}
	for {
		if drawn {
			width, height, sizeErr := term.GetSize(int(file.Fd()))
			if sizeErr != nil || width <= 0 || height <= 0 {
				width, height = 80, 24
			}
			_, err = io.WriteString(out, s.draw(frame, err, time.Now(), width, height))
		} else if err != nil {
			_, err = fmt.Fprintf(out, "error: %s\n\n", quote.Terminal(err.Error()))
		} else {
			_, err = io.WriteString(out, frame.Text+"\n")
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
		next, failed := look(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err = failed; err == nil {
			frame = next
		}
	}
}

// terminal returns out as the terminal that it is, if a screen can be drawn on it.
func terminal(out io.Writer) (*os.File, bool) {
	file, ok := out.(*os.File)
	return file, ok && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(file.Fd()))
}

// Coloured reports whether a person reads at a terminal that shows colours (see no-color.org).
func Coloured(out io.Writer) bool {
	_, ok := terminal(out)
	return ok && os.Getenv("NO_COLOR") == ""
}

// Age is a duration in the two greatest of its units, such as 3m12s or 4d7h; of a clock that is ahead it is 0s.
func Age(d time.Duration) string {
	d = max(d.Round(time.Second), 0)
	switch days := int(d.Hours()) / 24; {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, int(d.Hours())%24)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return d.String()
}

// screen is what has been drawn before.
type screen struct {
	title   string
	colours bool
	began   time.Time
	states  map[string]string // by key; nil before the first frame
	changed map[string]time.Time
	changes []string // the last ones first
}

// draw returns what a terminal of this size is sent. err is why the frame is an old one.
func (s *screen) draw(frame Frame, err error, now time.Time, width, height int) string {
	s.compare(frame, now)
	lines := []Line{{Text: now.Format(time.TimeOnly) + "   " + s.title, Colour: quote.Faint}}
	if err != nil {
		lines = append(lines, Line{Label: "not up to date", Text: err.Error(), Colour: quote.Red})
	}
	for _, table := range frame.Tables {
		lines = append(lines, Line{})
		lines = append(lines, table.Above...)
		lines = append(lines, s.rows(table, now)...)
		lines = append(lines, table.Below...)
	}
	lines = append(lines, Line{}, Line{Text: "changes since " + s.began.Format(time.TimeOnly), Colour: quote.Faint})
	if len(s.changes) == 0 {
		lines = append(lines, Line{Text: "  none", Colour: quote.Faint})
	}
	for _, change := range s.changes {
		lines = append(lines, Line{Text: "  " + change})
	}
	if more := len(lines) - height + 1; more > 0 && height > 2 { // the last line of a terminal stays empty, or it would scroll
		lines = append(lines[:height-2], Line{Text: fmt.Sprintf("… %d more lines: make the terminal higher", more+1), Colour: quote.Yellow})
	}
	var out strings.Builder
	out.WriteString("\x1b[H")
	for _, line := range lines {
		out.WriteString(line.paint(s.colours, width))
		out.WriteString("\x1b[K\r\n") // what was right of it goes
	}
	out.WriteString("\x1b[J") // what was below goes
	return out.String()
}

// compare notes which rows have changed since the last frame.
func (s *screen) compare(frame Frame, now time.Time) {
	first := s.states == nil
	if first {
		s.began, s.changed = now, map[string]time.Time{}
	}
	states := map[string]string{}
	note := func(key, was, is string) {
		if first || was == is {
			return
		}
		s.changed[key] = now
		s.changes = slices.Insert(s.changes, 0, fmt.Sprintf("%s  %s  %s → %s", now.Format(time.TimeOnly), key, was, is))
		s.changes = s.changes[:min(len(s.changes), mostChanges)]
	}
	const absent = "not there"
	for _, table := range frame.Tables {
		for _, row := range table.Rows {
			was, there := s.states[row.Key]
			if !there {
				was = absent
			}
			note(row.Key, was, row.State)
			states[row.Key] = row.State
		}
	}
	var gone []string
	for key := range s.states {
		if _, still := states[key]; !still {
			gone = append(gone, key)
		}
	}
	slices.Sort(gone)
	for _, key := range gone {
		note(key, s.states[key], absent)
	}
	s.states = states
}

// rows are the lines of a table. Its columns are as wide as what is in them; the first one is that of the marks.
func (s *screen) rows(table Table, now time.Time) []Line {
	widths := make([]int, len(table.Columns))
	texts := [][]string{table.Columns}
	for _, row := range table.Rows {
		cells := make([]string, len(row.Cells))
		for i, cell := range row.Cells {
			cells[i] = quote.Terminal(cell)
		}
		texts = append(texts, cells)
	}
	for _, cells := range texts {
		for i, cell := range cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	lines := make([]Line, len(texts))
	for n, cells := range texts {
		mark := "  "
		if n > 0 {
			if at, ok := s.changed[table.Rows[n-1].Key]; ok && now.Sub(at) < marked {
				mark, lines[n].Colour = "* ", quote.Yellow
			}
		}
		text := mark
		for i, cell := range cells {
			text += cell + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2)
		}
		lines[n].Text = strings.TrimRight(text, " ")
	}
	return lines
}

// cut shortens a text to a width.
func cut(text string, width int) string {
	runes := []rune(text)
	if len(runes) <= width {
		return text
	}
	if width <= 0 {
		return ""
	}
	return string(runes[:width-1]) + "…"
}
