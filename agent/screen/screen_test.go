package screen

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/screen/screentest"
)

func frame(rows ...Row) Frame {
	return Frame{Text: "plain\n", Tables: []Table{{
		Above: []Line{{Label: "agent a", Text: "running", Colour: quote.Green}}, Columns: []string{"MAGIC IP", "ENDPOINT", "AGE"}, Rows: rows,
		Below: []Line{{Text: "below"}},
	}}}
}

func row(key, endpoint, age string) Row {
	return Row{Key: key, State: endpoint, Cells: []string{key, endpoint, age}}
}

// shown is what a terminal of this size shows after drawing; escapes other than those that clear are kept.
func shown(drawn string) string {
	return strings.NewReplacer("\x1b[H", "", "\x1b[K\r\n", "\n", "\x1b[J", "").Replace(drawn)
}

// TestDraw: rows are marked for ten seconds after a change of what counts, changes are listed, and everything fits the terminal.
func TestDraw(t *testing.T) {
	at := func(second int) time.Time { return time.Date(2026, 1, 31, 12, 0, second, 0, time.UTC) }
	s := screen{title: "title"}
	s.draw(frame(row("ip:80", "none: reject", "3s"), row("ip:81", "10.0.0.1:81", "3s")), nil, at(0), 80, 24)
	drawn := s.draw(frame(row("ip:80", "10.0.0.2:80", "0s"), row("ip:82", "\x1b[2J", "0s")), nil, at(5), 80, 24)
	const want = `12:00:05   title

agent a: running
  MAGIC IP  ENDPOINT     AGE
* ip:80     10.0.0.2:80  0s
* ip:82     \x1b[2J      0s
below

changes since 12:00:00
  12:00:05  ip:81  10.0.0.1:81 → not there
  12:00:05  ip:82  not there → \x1b[2J
  12:00:05  ip:80  none: reject → 10.0.0.2:80
`
	if diff := cmp.Diff(want, shown(drawn)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if again := shown(s.draw(frame(row("ip:80", "10.0.0.2:80", "9s"), row("ip:82", "\x1b[2J", "9s")), nil, at(14), 80, 24)); strings.Count(again, "\n* ") != 2 {
		t.Errorf("no marks nine seconds later:\n%s", again)
	}
	late := shown(s.draw(frame(row("ip:80", "10.0.0.2:80", "10s"), row("ip:82", "\x1b[2J", "10s")), errors.New("no \x1b answer"), at(15), 80, 24))
	if strings.Contains(late, "\n* ") || !strings.Contains(late, "\nnot up to date: no \\x1b answer\n") {
		t.Errorf("ten seconds later, with an error:\n%s", late)
	}
	small := strings.Split(shown(s.draw(frame(row("ip:80", "10.0.0.2:80", "10s"), row("ip:82", "x", "10s")), nil, at(16), 20, 6)), "\n")
	if len(small) != 6 || small[4] != "… 9 more lines: mak…" || small[3] != "  MAGIC IP  ENDPOIN…" {
		t.Errorf("a small terminal shows %q", small)
	}
	s.colours = true
	if coloured := s.draw(frame(row("ip:80", "another", "0s")), nil, at(30), 80, 24); !strings.Contains(coloured, "agent a: \x1b[32mrunning\x1b[0m\x1b[K") || !strings.Contains(coloured, "\x1b[33m* ip:80     another   0s\x1b[0m\x1b[K") {
		t.Errorf("with colours: %q", coloured)
	}
	for i := range 2 * mostChanges {
		s.draw(frame(row("ip:80", fmt.Sprint(i), "0s")), nil, at(31), 80, 99)
	}
	if len(s.changes) != mostChanges || !strings.HasSuffix(s.changes[0], " → 19") {
		t.Errorf("%d changes are listed, the last one first: %q", len(s.changes), s.changes)
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Minute: "0s", 0: "0s", 1400 * time.Millisecond: "1s", 59 * time.Second: "59s", time.Minute: "1m0s", time.Hour - time.Second: "59m59s",
		time.Hour: "1h0m", 23*time.Hour + 59*time.Minute: "23h59m", 24 * time.Hour: "1d0h", 400*24*time.Hour + 5*time.Hour: "400d5h",
	} {
		if got := Age(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
}

// TestWatch: a terminal is drawn on; what is none, or can show nothing but text, gets the same text each time. The first error is
// returned, and a later one shown.
func TestWatch(t *testing.T) {
	looks := func(stop func()) func(context.Context) (Frame, error) {
		looked := 0
		return func(context.Context) (Frame, error) {
			switch looked++; looked {
			case 1:
				return frame(row("ip:80", "first", "0s")), nil
			case 2:
				return Frame{}, errors.New("broken")
			case 3:
				return frame(row("ip:80", "second", "0s")), nil
			}
			stop()
			return Frame{}, nil
		}
	}
	for name, test := range map[string]struct {
		env  map[string]string
		want []string // in this order
		not  string
	}{
		"a terminal": {nil, []string{
			"\x1b[?25l\x1b[2J\x1b[H", "title   every 1ms, Ctrl-C ends", "agent a: \x1b[32mrunning\x1b[0m", "not up to date: \x1b[31mbroken",
			"* ip:80     second", "ip:80  first → second", "\x1b[J\x1b[?25h",
		}, "plain"},
		"no colours":  {map[string]string{"NO_COLOR": "1"}, []string{"\x1b[?25l", "agent a: running\x1b[K", "first → second"}, "\x1b[3"},
		"a dumb one":  {map[string]string{"TERM": "dumb"}, []string{"plain\r\n\r\nerror: broken\r\n\r\nplain\r\n\r\n"}, "\x1b"},
		"no terminal": {nil, []string{"plain\n\nerror: broken\n\nplain\n\n"}, "\x1b"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TERM", "xterm")
			t.Setenv("NO_COLOR", "")
			for key, value := range test.env {
				t.Setenv(key, value)
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var out string
			if name == "no terminal" {
				var buffer strings.Builder
				if err := Watch(ctx, &buffer, "title", time.Millisecond, looks(stop)); err != nil {
					t.Fatal(err)
				}
				out = buffer.String()
			} else {
				out = screentest.Terminal(t, 80, 24, func(string) {}, func(terminal *os.File) {
					if err := Watch(ctx, terminal, "title", time.Millisecond, looks(stop)); err != nil {
						t.Error(err)
					}
				})
			}
			rest := out
			for _, want := range test.want {
				_, after, found := strings.Cut(rest, want)
				if !found {
					t.Fatalf("no %q in the rest of\n%q", want, out)
				}
				rest = after
			}
			if strings.Contains(out, test.not) {
				t.Errorf("there is %q in\n%q", test.not, out)
			}
		})
	}
	broken := errors.New("broken")
	var buffer strings.Builder
	err := Watch(t.Context(), &buffer, "title", time.Hour, func(context.Context) (Frame, error) { return Frame{}, broken })
	if !errors.Is(err, broken) || buffer.Len() > 0 {
		t.Errorf("%v, and it printed %q", err, &buffer)
	}
}
