package quote

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

func TestTerminal(t *testing.T) {
	for text, want := range map[string]string{
		"":                                  "",
		`default/echo-1 é 日 "a\b"`:          `default/echo-1 é 日 "a\b"`,
		"a\x1b]0;title\x07b":                `a\x1b]0;title\ab`,
		"a\nagent other: running\r\t":       `a\nagent other: running\r\t`,
		"csi\u009b31m":                      `csi\u009b31m`,
		"rtl\u202ekcab \u2066x":             `rtl\u202ekcab \u2066x`,
		"zero\u200bwidth\ufeff":             `zero\u200bwidth\ufeff`,
		"line\u2028separator":               `line\u2028separator`,
		"bad \xff\xc2":                      `bad \xff\xc2`,
		"replaced \ufffd":                   "replaced \ufffd",
		"nul\x00del\x7f private \U000f0000": `nul\x00del\x7f private \U000f0000`,
	} {
		if got := Terminal(text); got != want {
			t.Errorf("Terminal(%q) = %q, want %q", text, got, want)
		}
	}
}

func FuzzTerminal(f *testing.F) {
	f.Add("a\x1b[31m\n")
	f.Fuzz(func(t *testing.T, text string) {
		if got := Terminal(text); strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("Terminal(%q) = %q", text, got)
		}
	})
}

func TestJSON(t *testing.T) {
	for _, text := range []string{"a\u009b31m\x7f", "\u202e", "\U000f0000", "plain é\n\x1b"} {
		data, err := json.MarshalIndent(map[string]string{"text": text}, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		quoted := JSON(data)
		if hidden(strings.ReplaceAll(string(quoted), "\n", "")) {
			t.Errorf("JSON(%q) = %q", data, quoted)
		}
		var back map[string]string
		if err := json.Unmarshal(quoted, &back); err != nil || back["text"] != text {
			t.Errorf("JSON(%q) reads as %q, %v", data, back, err)
		}
	}
}

func TestShell(t *testing.T) {
	for _, args := range [][]string{
		{"a", "--b=c/d", ""}, {"$(touch /tmp/x)", "`id`", "a;b", "a\\b", `"`, "'", "!x", "*", "~", "#"}, {"é", "a b\tc\nd", "\x1b[31m", "'\\\n", "\xff\x01"},
	} {
		// printf repeats its format for each argument.
		command := Shell(append([]string{"printf", "%s\\0"}, args...)...)
		if hidden(command) {
			t.Errorf("%q does not print", command)
		}
		out, err := exec.Command("bash", "-c", command).Output()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.Join(args, "\x00")+"\x00", string(out)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", command, diff)
		}
	}
}

func TestFields(t *testing.T) {
	line := `-A PREROUTING -d 169.254.210.210/32 -m comment --comment "a \"b\" \\ \' $(id)" --empty "" -j DNAT --to-destination 10.0.0.1:1`
	want := []string{"-A", "PREROUTING", "-d", "169.254.210.210/32", "-m", "comment", "--comment", `a "b" \ ' $(id)`, "--empty", "", "-j", "DNAT", "--to-destination", "10.0.0.1:1"}
	if diff := cmp.Diff(want, Fields(line+"\n")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
