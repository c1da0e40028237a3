package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// span is a JSON value and where it stands in its file, so that a change can be made to these bytes alone.
type span struct {
	start, end int
	kind       byte     // '{', '[', or 0 for a scalar
	members    []member // of an object, in order; a key may be there twice
	items      []span   // of an array
	text       string   // of a string
	isText     bool
}

type member struct {
	key   string
	start int // of the key
	value span
}

// white is the white space of JSON (RFC 8259, section 2).
const white = " \t\r\n"

// scan finds the spans of data, which must be one JSON value and nothing else.
func scan(data []byte) (span, error) {
	if !json.Valid(data) { // where a decoder would stop after the first value
		if len(bytes.TrimSpace(data)) == 0 {
			return span{}, errors.New("the file is empty")
		}
		err := json.Unmarshal(data, new(any))
		return span{}, fmt.Errorf("not JSON: %w", err)
	}
	s := scanner{data: data, decoder: json.NewDecoder(bytes.NewReader(data))}
	s.decoder.UseNumber()
	root, err := s.value()
	if err != nil {
		return span{}, err
	}
	if _, err := s.decoder.Token(); !errors.Is(err, io.EOF) {
		return span{}, fmt.Errorf("more than one JSON value: %w", err)
	}
	return root, nil
}

type scanner struct {
	data    []byte
	decoder *json.Decoder
}

// token returns the next token and its place: the decoder tells where it ends, and before it there is nothing
// but white space and punctuation.
func (s *scanner) token() (token json.Token, start, end int, err error) {
	start = int(s.decoder.InputOffset())
	token, err = s.decoder.Token()
	for start < len(s.data) && strings.IndexByte(white+",:", s.data[start]) >= 0 {
		start++
	}
	return token, start, int(s.decoder.InputOffset()), err
}

func (s *scanner) value() (span, error) {
	token, start, end, err := s.token()
	if err != nil {
		return span{}, err
	}
	v := span{start: start, end: end}
	v.text, v.isText = token.(string)
	delim, composed := token.(json.Delim)
	if !composed {
		return v, nil
	}
	v.kind = byte(delim)
	for s.decoder.More() {
		if v.kind == '[' {
			item, err := s.value()
			if err != nil {
				return span{}, err
			}
			v.items = append(v.items, item)
			continue
		}
		key, start, _, err := s.token()
		if err != nil {
			return span{}, err
		}
		item, err := s.value()
		if err != nil {
			return span{}, err
		}
		v.members = append(v.members, member{key: fmt.Sprint(key), start: start, value: item})
	}
	_, _, v.end, err = s.token()
	return v, err
}

// find returns the position of a key in an object, -1 where it has none. Of two the last one counts, as it does
// for the loaders.
func (s span) find(key string) int {
	for i := len(s.members) - 1; i >= 0; i-- {
		if s.members[i].key == key {
			return i
		}
	}
	return -1
}

// get is the value of a key in an object.
func (s span) get(key string) (span, bool) {
	i := s.find(key)
	if i < 0 {
		return span{}, false
	}
	return s.members[i].value, true
}

// bounds are where the elements of an array, or the members of an object with their keys, stand.
func (s span) bounds() (bounds [][2]int) {
	for _, item := range s.items {
		bounds = append(bounds, [2]int{item.start, item.end})
	}
	for _, m := range s.members {
		bounds = append(bounds, [2]int{m.start, m.value.end})
	}
	return bounds
}

// cut returns data without the element i of s: with the comma and the white space before it, which is what append
// puts there; for the first element with those behind it.
func (s span) cut(data []byte, i int) []byte {
	bounds := s.bounds()
	from, to := bounds[i][0], bounds[i][1]
	if i > 0 {
		from = bounds[i-1][1]
	} else if len(bounds) > 1 {
		to = bounds[1][0]
	}
	return splice(data, from, to, nil)
}

// append returns data with one more element at the end of s. text is asked to write it in the style of the
// elements there.
func (s span) append(data []byte, text func(style) string) []byte {
	bounds := s.bounds()
	st := styleOf(data, s)
	if len(bounds) == 0 {
		return splice(data, s.start+1, s.start+1, []byte(text(st)))
	}
	separator := "," + st.before
	if len(bounds) == 1 && st.before == "" {
		separator = st.comma
	}
	end := bounds[len(bounds)-1][1]
	return splice(data, end, end, []byte(separator+text(st)))
}

func splice(data []byte, from, to int, replacement []byte) []byte {
	return slices.Concat(data[:from], replacement, data[to:])
}

// style is how the elements of an array or object are laid out in a file.
type style struct {
	before string // the white space before each of them; ends in their indentation where they have lines of their own
	unit   string // one more level of indentation
	colon  string
	comma  string
}

func styleOf(data []byte, s span) style {
	st := style{unit: "  ", colon: ": ", comma: ", "}
	if !bytes.Contains(data, []byte(`": `)) {
		st.colon, st.comma = ":", ","
	}
	bounds := s.bounds()
	if len(bounds) == 0 {
		return st
	}
	last := bounds[len(bounds)-1][0]
	st.before = spaceBefore(data, last)
	indent := st.indent()
	if inner := s.last(); len(inner) > 0 {
		deeper := style{before: spaceBefore(data, inner[0][0])}
		if rest, ok := strings.CutPrefix(deeper.indent(), indent); ok && deeper.lines() && rest != "" {
			st.unit = rest
			return st
		}
	}
	if strings.HasPrefix(indent, "\t") {
		st.unit = "\t"
	}
	return st
}

// last are the bounds in the last element, where that is an array or object.
func (s span) last() [][2]int {
	switch {
	case len(s.items) > 0:
		return s.items[len(s.items)-1].bounds()
	case len(s.members) > 0:
		return s.members[len(s.members)-1].value.bounds()
	}
	return nil
}

func spaceBefore(data []byte, at int) string {
	from := at
	for from > 0 && strings.IndexByte(white, data[from-1]) >= 0 {
		from--
	}
	return string(data[from:at])
}

// lines says whether each element has a line of its own.
func (st style) lines() bool { return strings.Contains(st.before, "\n") }

// indent is the indentation of the elements.
func (st style) indent() string {
	return st.before[1+strings.LastIndexByte(st.before, '\n'):]
}

// newline begins a line that is so many levels deeper than the elements; nothing where they share one line.
func (st style) newline(levels int) string {
	if !st.lines() {
		return ""
	}
	eol := "\n"
	if strings.Contains(st.before, "\r\n") {
		eol = "\r\n"
	}
	line := eol + st.indent()
	for range levels {
		line += st.unit
	}
	return line
}
