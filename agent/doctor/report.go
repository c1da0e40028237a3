package doctor

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// Level is how bad a finding is.
type Level string

// The levels.
const (
	OK     Level = "ok"
	Hidden Level = "hidden" // it cannot be seen from here: neither good nor bad
	Warn   Level = "warn"
	Fail   Level = "fail"
)

// mark is how a table shows the level.
func (l Level) mark() string {
	switch l {
	case Hidden:
		return "--"
	case Fail:
		return "FAIL"
	}
	return string(l)
}

// Finding is the result of one check.
type Finding struct {
	Level Level  `json:"level"`
	Check string `json:"check"`
	Text  string `json:"text"`
	// Next is what to do; empty where there is nothing to do.
	Next string `json:"next,omitempty"`
}

// ReportVersion is the format of Report as JSON.
const ReportVersion = 1

// Report is the result of all checks, in the order in which one may be the cause of another.
type Report struct {
	Version int `json:"version"`
	// ExaminedAt is when the checks began (RFC 3339).
	ExaminedAt time.Time `json:"examinedAt"`
	// DoctorVersion is the version of the command.
	DoctorVersion string    `json:"doctorVersion"`
	Findings      []Finding `json:"findings"`
	Verdict       Verdict   `json:"verdict"`
}

// Verdict is what all findings come to.
type Verdict struct {
	// Level is the worst of the findings, but hidden where nothing failed and a check could not look.
	Level Level  `json:"level"`
	Text  string `json:"text"`
	// ExitCode is that of the command: 0 nothing failed, 1 a check failed, 3 nothing failed and a check could not look.
	ExitCode int `json:"exitCode"`
}

// Exit codes. ExitUsage is for a command line that is wrong.
const (
	ExitOK     = 0
	ExitFailed = 1
	ExitUsage  = 2
	ExitHidden = 3
)

// judge fills in the verdict: the first finding of the worst level is the cause, since what it breaks comes after it.
func (r *Report) judge() {
	first := func(level Level) (Finding, bool) {
		i := slices.IndexFunc(r.Findings, func(f Finding) bool { return f.Level == level })
		if i < 0 {
			return Finding{}, false
		}
		return r.Findings[i], true
	}
	warning, warned := first(Warn)
	unseen, hidden := first(Hidden)
	remark := ""
	if warned {
		remark = fmt.Sprintf("; first warning: %s: %s", warning.Check, warning.Text)
	}
	if failed, ok := first(Fail); ok {
		r.Verdict = Verdict{Fail, failed.Check + ": " + failed.Text, ExitFailed}
	} else if hidden {
		r.Verdict = Verdict{Hidden, fmt.Sprintf("nothing failed, but not all could be looked at: %s: %s%s", unseen.Check, unseen.Text, remark), ExitHidden}
	} else if warned {
		r.Verdict = Verdict{Warn, "nothing failed" + remark, ExitOK}
	} else {
		r.Verdict = Verdict{OK, "nothing failed", ExitOK}
	}
}

// counted is how many of something, in words that fit the number.
func counted(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// WriteTable prints the report for people, the levels with colours if wanted. Nothing that the checks have read reaches the
// terminal unquoted.
func (r *Report) WriteTable(w io.Writer, colours bool) error {
	var out strings.Builder
	mark := func(level Level, format string) string {
		colour := map[Level]quote.Colour{OK: quote.Green, Warn: quote.Yellow, Fail: quote.Red, Hidden: quote.Faint}[level]
		return colour.Paint(colours, fmt.Sprintf(format, level.mark()))
	}
	count := map[Level]int{}
	for _, f := range r.Findings {
		count[f.Level]++
		fmt.Fprintf(&out, "%s  %s: %s\n", mark(f.Level, "%-4s"), quote.Terminal(f.Check), quote.Terminal(f.Text))
		if f.Next != "" {
			fmt.Fprintf(&out, "      → %s\n", quote.Terminal(f.Next))
		}
	}
	fmt.Fprintf(&out, "%d ok, %s, %d failed, %d not visible from here\n", count[OK], counted(count[Warn], "warning"), count[Fail], count[Hidden])
	fmt.Fprintf(&out, "Verdict: %s: %s\n", mark(r.Verdict.Level, "%s"), quote.Terminal(r.Verdict.Text))
	_, err := io.WriteString(w, out.String())
	return err
}

// WriteJSON prints the report for programs.
func (r *Report) WriteJSON(w io.Writer) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	_, err = w.Write(quote.JSON(append(data, '\n')))
	return err
}
