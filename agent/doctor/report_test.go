package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func reportOf(findings ...Finding) *Report {
	r := &Report{Version: ReportVersion, ExaminedAt: time.Unix(0, 0).UTC(), DoctorVersion: "test", Findings: findings}
	r.judge()
	return r
}

func TestVerdict(t *testing.T) {
	ok, hidden := Finding{Level: OK, Check: "a", Text: "fine"}, Finding{Level: Hidden, Check: "b", Text: "not visible"}
	warn, fail := Finding{Level: Warn, Check: "c", Text: "careful"}, Finding{Level: Fail, Check: "d", Text: "broken"}
	later := Finding{Level: Fail, Check: "e", Text: "a consequence"}
	for _, test := range []struct {
		findings []Finding
		code     int
		verdict  string
	}{
		{[]Finding{ok}, 0, "Verdict: ok: nothing failed"},
		{[]Finding{ok, warn}, 0, "Verdict: warn: nothing failed; first warning: c: careful"},
		{[]Finding{ok, hidden}, 3, "Verdict: --: nothing failed, but not all could be looked at: b: not visible"},
		{[]Finding{warn, hidden}, 3, "Verdict: --: nothing failed, but not all could be looked at: b: not visible; first warning: c: careful"},
		{[]Finding{hidden, warn, fail, later}, 1, "Verdict: FAIL: d: broken"},
	} {
		r := reportOf(test.findings...)
		var out bytes.Buffer
		if err := r.WriteTable(&out, false); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
		if last := lines[len(lines)-1]; last != test.verdict || r.Verdict.ExitCode != test.code {
			t.Errorf("%v: %q, %d; want %q, %d", test.findings, last, r.Verdict.ExitCode, test.verdict, test.code)
		}
	}
}

// Colours are added to the levels, and to nothing else.
func TestColours(t *testing.T) {
	r := reportOf(Finding{Level: OK, Check: "a", Text: "fine"}, Finding{Level: Warn, Check: "b", Text: "careful"}, Finding{Level: Hidden, Check: "c", Text: "dark"}, Finding{Level: Fail, Check: "d", Text: "broken"})
	var plain, coloured bytes.Buffer
	if err := errors.Join(r.WriteTable(&plain, false), r.WriteTable(&coloured, true)); err != nil {
		t.Fatal(err)
	}
	sequence := regexp.MustCompile("\x1b\\[[0-9]+m")
	if n := len(sequence.FindAllString(coloured.String(), -1)); n != 10 || sequence.ReplaceAllString(coloured.String(), "") != plain.String() {
		t.Errorf("%d sequences in\n%q\nplain:\n%s", n, &coloured, &plain)
	}
	if !strings.Contains(plain.String(), "\n1 ok, 1 warning, 1 failed, 1 not visible from here\n") {
		t.Errorf("numbers of one:\n%s", &plain)
	}
}

// What a pod, another agent or a rule is called does not reach the terminal.
func TestReportIsQuoted(t *testing.T) {
	const evil = "\x1b[2J\u009b1m\nok    agent: fine \u202e"
	r := reportOf(Finding{Level: Fail, Check: evil, Text: evil, Next: evil})
	var table, data bytes.Buffer
	if err := r.WriteTable(&table, false); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteJSON(&data); err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{table.String(), data.String()} {
		if strings.ContainsAny(out, "\x1b\u009b\u202e") {
			t.Errorf("%q", out)
		}
	}
	if lines := strings.Count(table.String(), "\n"); lines != 4 {
		t.Errorf("%d lines:\n%s", lines, &table)
	}
	var back Report
	if err := json.Unmarshal(data.Bytes(), &back); err != nil || back.Findings[0].Text != evil {
		t.Errorf("read back: %+v, %v", back, err)
	}
}

// docs/operations.md has a table of the keys of the JSON output.
func TestReportIsDocumented(t *testing.T) {
	document, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(document), "\n`doctor -o json`")
	section, _, _ = strings.Cut(section, "\n#")
	if !found {
		t.Fatal("docs/operations.md has no paragraph on `doctor -o json`")
	}
	var documented []string
	for _, match := range regexp.MustCompile("(?m)^\\| `([a-zA-Z.\\[\\]]+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, match[1])
	}
	written := keys(reflect.TypeFor[Report](), "")
	slices.Sort(documented)
	slices.Sort(written)
	if !slices.Equal(documented, written) {
		t.Errorf("documented %q\nwritten    %q", documented, written)
	}
}

func keys(t reflect.Type, prefix string) (all []string) {
	for field := range t.Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		name = prefix + name
		switch {
		case field.Type.Kind() == reflect.Slice:
			all = append(all, keys(field.Type.Elem(), name+"[].")...)
		case field.Type.Kind() == reflect.Struct && field.Type != reflect.TypeFor[time.Time]():
			all = append(all, keys(field.Type, name+".")...)
		default:
			all = append(all, name)
		}
	}
	return all
}
