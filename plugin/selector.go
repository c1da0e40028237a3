package plugin

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// selects says whether a Kubernetes label selector matches labels. The grammar is that of labels.Parse in
// k8s.io/apimachinery, to which a test compares it. That package itself would cost every ADD and DEL of the
// node 0.2 ms, a tenth of the whole, to be initialised.
//
// It does not judge which names and values are allowed: the agent has, before it asked for them.
func selects(selector string, labels map[string]string) (bool, error) {
	p := parser{tokens: tokenize(selector), labels: labels}
	all := true
	for first := true; first && len(p.tokens) > 0 || !first && p.accept(","); first = false {
		ok, err := p.requirement()
		if err != nil {
			return false, err
		}
		all = all && ok
	}
	if len(p.tokens) > 0 {
		return false, fmt.Errorf("%q: must be \",\" or the end", p.tokens[0])
	}
	return all, nil
}

const (
	blanks  = " \t\r\n"
	symbols = "=!<>(),"
)

func tokenize(s string) (tokens []string) {
	for {
		s = strings.TrimLeft(s, blanks)
		if s == "" {
			return tokens
		}
		length := strings.IndexAny(s, symbols+blanks)
		switch {
		case strings.HasPrefix(s, "==") || strings.HasPrefix(s, "!="):
			length = 2
		case length == 0:
			length = 1
		case length < 0:
			length = len(s)
		}
		tokens = append(tokens, s[:length])
		s = s[length:]
	}
}

type parser struct {
	tokens []string // what is left
	labels map[string]string
}

func (p *parser) accept(token string) bool {
	if len(p.tokens) == 0 || p.tokens[0] != token {
		return false
	}
	p.tokens = p.tokens[1:]
	return true
}

// word is empty where none comes next: as a value that is one.
func (p *parser) word() (word string) {
	if len(p.tokens) > 0 && !strings.ContainsAny(p.tokens[0][:1], symbols) {
		word, p.tokens = p.tokens[0], p.tokens[1:]
	}
	return word
}

func (p *parser) requirement() (bool, error) {
	absent := p.accept("!")
	key := p.word()
	if key == "" {
		return false, errors.New("a key is missing")
	}
	value, has := p.labels[key]
	switch {
	case absent:
		return !has, nil
	case p.accept("="), p.accept("=="):
		return p.word() == value && has, nil
	case p.accept("!="):
		return p.word() != value || !has, nil
	case p.accept("in"):
		values, err := p.values()
		return has && slices.Contains(values, value), err
	case p.accept("notin"):
		values, err := p.values()
		return !has || !slices.Contains(values, value), err
	case p.accept("<"):
		order, err := p.compare(value)
		return has && order < 0, err
	case p.accept(">"):
		order, err := p.compare(value)
		return has && order > 0, err
	}
	return has, nil
}

// values is a list in parentheses.
func (p *parser) values() (values []string, err error) {
	if !p.accept("(") {
		return nil, errors.New(`"(" is missing`)
	}
	values = append(values, p.word())
	for p.accept(",") {
		values = append(values, p.word())
	}
	if !p.accept(")") {
		return nil, errors.New(`")" is missing`)
	}
	return values, nil
}

// compare compares value with the number that comes next; what is no number is neither smaller nor greater.
func (p *parser) compare(value string) (order int, err error) {
	limit, err := strconv.ParseInt(p.word(), 10, 64)
	if err != nil {
		return 0, err
	}
	number, err := strconv.ParseInt(value, 10, 64)
	switch {
	case err != nil || number == limit:
		return 0, nil
	case number < limit:
		return -1, nil
	}
	return 1, nil
}
