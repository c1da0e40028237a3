package plugin

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// selector is a label selector in the text form of the Kubernetes API ("app=echo,tier in (a,b),!legacy"). It takes what
// k8s.io/apimachinery/pkg/labels takes and decides as it does, which a fuzz test sees to. The library itself is not linked:
// the regular expressions that it compiles before main begins cost a fifth of what this process may take.
type selector []requirement

type requirement struct {
	key      string
	operator string // "exists", "!", "=", "!=", "in", "notin", ">" or "<"
	values   []string
}

// matches reports whether labels meet all requirements.
func (s selector) matches(labels map[string]string) bool {
	for _, r := range s {
		value, exists := labels[r.key]
		if !r.meets(value, exists) {
			return false
		}
	}
	return true
}

// keys are the label keys that s asks for.
func (s selector) keys() map[string]bool {
	keys := map[string]bool{}
	for _, r := range s {
		keys[r.key] = true
	}
	return keys
}

func (r requirement) meets(value string, exists bool) bool {
	switch r.operator {
	case "exists":
		return exists
	case "!":
		return !exists
	case "!=", "notin":
		return !exists || !slices.Contains(r.values, value)
	case ">", "<":
		number, err := strconv.ParseInt(value, 10, 64)
		limit, _ := strconv.ParseInt(r.values[0], 10, 64) // parseSelector has seen that it is one
		return exists && err == nil && (r.operator == ">" && number > limit || r.operator == "<" && number < limit)
	default:
		return exists && slices.Contains(r.values, value)
	}
}

// parseSelector returns an error that says what was found and what was expected.
func parseSelector(text string) (selector, error) {
	var s selector
	tokens := selectorTokens(text)
	for len(tokens) > 0 {
		r, rest, err := parseRequirement(tokens)
		if err != nil {
			return nil, err
		}
		s = append(s, r)
		switch {
		case len(rest) == 0:
			return s, nil
		case rest[0] != ",":
			return nil, unexpected(rest, "a comma or the end")
		case len(rest) == 1:
			return nil, unexpected(nil, "a label key after the comma")
		}
		tokens = rest[1:]
	}
	return s, nil
}

func parseRequirement(tokens []string) (r requirement, rest []string, err error) {
	if tokens[0] == "!" {
		r.operator, tokens = "!", tokens[1:]
	}
	if len(tokens) == 0 || isOperator(tokens[0]) {
		return r, nil, unexpected(tokens, "a label key")
	}
	r.key, tokens = tokens[0], tokens[1:]
	if !isLabelKey(r.key) {
		return r, nil, fmt.Errorf("%q is not a label key", r.key)
	}
	if r.operator == "!" {
		return r, tokens, nil
	}
	if len(tokens) == 0 || tokens[0] == "," {
		r.operator = "exists"
		return r, tokens, nil
	}
	switch operator := tokens[0]; operator {
	case "==":
		r.operator = "="
	case "=", "!=", ">", "<", "in", "notin":
		r.operator = operator
	default:
		return r, nil, unexpected(tokens, "one of =, ==, !=, in, notin, > and <")
	}
	tokens = tokens[1:]
	if r.operator == "in" || r.operator == "notin" {
		r.values, tokens, err = parseValues(tokens)
	} else {
		r.values, tokens, err = parseValue(tokens)
	}
	if err != nil {
		return r, nil, err
	}
	for _, value := range r.values {
		if !isLabelValue(value) {
			return r, nil, fmt.Errorf("%q is not a label value", value)
		}
		if _, err := strconv.ParseInt(value, 10, 64); err != nil && (r.operator == ">" || r.operator == "<") {
			return r, nil, fmt.Errorf("%q is not an integer, which %s needs", value, r.operator)
		}
	}
	return r, tokens, nil
}

// parseValue parses the value behind =, which may be empty.
func parseValue(tokens []string) (values, rest []string, err error) {
	switch {
	case len(tokens) == 0 || tokens[0] == ",":
		return []string{""}, tokens, nil
	case isOperator(tokens[0]):
		return nil, nil, unexpected(tokens, "a label value")
	}
	return tokens[:1], tokens[1:], nil
}

// parseValues parses "(a,b)". Between commas and parentheses there may be nothing: the empty value.
func parseValues(tokens []string) (values, rest []string, err error) {
	if len(tokens) == 0 || tokens[0] != "(" {
		return nil, nil, unexpected(tokens, "(")
	}
	value := ""
	for i, token := range tokens[1:] {
		switch {
		case token == ")":
			return append(values, value), tokens[i+2:], nil
		case token == ",":
			values, value = append(values, value), ""
		case value != "" || isOperator(token):
			return nil, nil, unexpected(tokens[i+1:], "a comma, ) or a label value")
		default:
			value = token
		}
	}
	return nil, nil, unexpected(nil, ")")
}

func unexpected(tokens []string, expected string) error {
	if len(tokens) == 0 {
		return fmt.Errorf("it ends where %s is expected", expected)
	}
	return fmt.Errorf("found %q where %s is expected", tokens[0], expected)
}

const operatorCharacters = "=!(),><"

// isOperator reports whether a token is made of operator characters; the words in and notin may also be keys and values.
func isOperator(token string) bool { return strings.ContainsAny(token, operatorCharacters) }

// selectorTokens splits text into words and operators. What no operator begins with is a token too.
func selectorTokens(text string) (tokens []string) {
	for text != "" {
		length := strings.IndexAny(text, operatorCharacters+" \t\r\n")
		switch {
		case length < 0:
			length = len(text)
		case length > 0: // a word
		case strings.HasPrefix(text, "==") || strings.HasPrefix(text, "!="):
			length = 2
		case strings.ContainsRune(operatorCharacters, rune(text[0])):
			length = 1
		default: // a blank
			text = text[1:]
			continue
		}
		tokens, text = append(tokens, text[:length]), text[length:]
	}
	return tokens
}

// isLabelKey reports whether key is a name, with or without a DNS subdomain and a slash before it.
func isLabelKey(key string) bool {
	prefix, name, prefixed := strings.Cut(key, "/")
	if !prefixed {
		return key != "" && isLabelValue(key)
	}
	if prefix == "" || len(prefix) > 253 {
		return false
	}
	for label := range strings.SplitSeq(prefix, ".") {
		if label == "" || !consistsOf(label, "-") || strings.ToLower(label) != label {
			return false
		}
	}
	return name != "" && isLabelValue(name)
}

// isLabelValue reports whether value is empty, or at most 63 letters, digits, and in between also -, _ and dots.
func isLabelValue(value string) bool {
	return value == "" || len(value) <= 63 && consistsOf(value, "-_.")
}

// consistsOf reports whether text is made of ASCII letters, digits, and the characters of inside, which neither begin nor
// end it.
func consistsOf(text, inside string) bool {
	for i := range len(text) {
		switch c := text[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && i < len(text)-1 && strings.IndexByte(inside, c) >= 0:
		default:
			return false
		}
	}
	return true
}
