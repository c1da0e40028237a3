// Package quote writes text of others, such as names in the files of other agents or the rules of other programs, so that
// neither a terminal nor a shell executes it.
package quote

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Terminal replaces what does not print (control characters of both sets, line breaks, invalid UTF-8, characters that change the
// direction of text) by its escape in Go's notation, such as \x1b. Everything else stays as it is.
func Terminal(text string) string {
	if !hidden(text) {
		return text
	}
	var out strings.Builder
	for i, r := range text {
		switch _, size := utf8.DecodeRuneInString(text[i:]); {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&out, `\x%02x`, text[i])
		case strconv.IsPrint(r):
			out.WriteRune(r)
		default:
			escaped := strconv.QuoteRune(r)
			out.WriteString(escaped[1 : len(escaped)-1])
		}
	}
	return out.String()
}

// Lines is Terminal for text of several lines, such as a list of errors: line breaks stay.
func Lines(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = Terminal(line)
	}
	return strings.Join(lines, "\n")
}

// hidden reports whether text has anything that does not print.
func hidden(text string) bool {
	return !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) })
}

// JSON escapes in a JSON text what encoding/json leaves alone although it does not print, such as the control characters
// from U+0080 on. Line breaks and tabs between values stay.
func JSON(data []byte) []byte {
	out := make([]byte, 0, len(data))
	for _, r := range string(data) {
		switch {
		case r == '\n' || r == '\t' || strconv.IsPrint(r):
			out = utf8.AppendRune(out, r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
	}
	return out
}

// Shell writes a command that a POSIX shell runs with exactly these arguments. Arguments that do not print are written as
// $'…', which bash, ksh, zsh and busybox know; a shell that does not know it runs nothing else.
func Shell(args ...string) string {
	words := make([]string, len(args))
	for i, arg := range args {
		words[i] = word(arg)
	}
	return strings.Join(words, " ")
}

func word(arg string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=./:,@%"
	switch {
	case arg == "":
		return "''"
	case strings.Trim(arg, plain) == "":
		return arg
	case !hidden(arg):
		return "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	var out strings.Builder
	out.WriteString("$'")
	for _, b := range []byte(arg) {
		if b < ' ' || b > '~' || b == '\'' || b == '\\' {
			fmt.Fprintf(&out, `\%03o`, b)
		} else {
			out.WriteByte(b)
		}
	}
	out.WriteString("'")
	return out.String()
}

// Fields splits a line of iptables-save into the arguments that it was made of: words in double quotes, in which a backslash
// stands before a quote, an apostrophe or a backslash (xtables_save_string in libxtables).
func Fields(line string) []string {
	var fields []string
	var field strings.Builder
	inside, quoted := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case quoted && c == '\\' && i+1 < len(line):
			i++
			field.WriteByte(line[i])
		case c == '"':
			quoted, inside = !quoted, true
		case !quoted && (c == ' ' || c == '\t' || c == '\n'):
			if inside {
				fields = append(fields, field.String())
			}
			field.Reset()
			inside = false
		default:
			field.WriteByte(c)
			inside = true
		}
	}
	if inside {
		fields = append(fields, field.String())
	}
	return fields
}
