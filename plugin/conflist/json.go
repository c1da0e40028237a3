package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
)

// parseJSON parses one JSON value so that Pack returns the same bytes. hujson alone would take comments and trailing
// commas, which no loader does.
func parseJSON(data []byte) (hujson.Value, error) {
	if !json.Valid(data) {
		if len(bytes.TrimSpace(data)) == 0 {
			return hujson.Value{}, errors.New("the file is empty")
		}
		return hujson.Value{}, fmt.Errorf("not JSON: %w", json.Unmarshal(data, new(any)))
	}
	return hujson.Parse(bytes.Clone(data))
}

// find returns the position of a key in an object, -1 where it has none. Of two the last one counts, as it does for
// the loaders.
func find(v *hujson.Value, key string) int {
	object, ok := v.Value.(*hujson.Object)
	if !ok {
		return -1
	}
	for i, m := range slices.Backward(object.Members) {
		if name, ok := m.Name.Value.(hujson.Literal); ok && name.String() == key {
			return i
		}
	}
	return -1
}

// get is the value of a key in an object, nil where it has none.
func get(v *hujson.Value, key string) *hujson.Value {
	if i := find(v, key); i >= 0 {
		return &v.Value.(*hujson.Object).Members[i].Value
	}
	return nil
}

// text is the string that a value is, empty where it is none.
func text(v *hujson.Value) string {
	if v == nil {
		return ""
	}
	literal, ok := v.Value.(hujson.Literal)
	if !ok || literal.Kind() != '"' {
		return ""
	}
	return literal.String()
}

// leads are the white space before each element of an array, or before the name of each member of an object.
func leads(v *hujson.Value) (leads []*hujson.Extra) {
	switch v := v.Value.(type) {
	case *hujson.Array:
		for i := range v.Elements {
			leads = append(leads, &v.Elements[i].BeforeExtra)
		}
	case *hujson.Object:
		for i := range v.Members {
			leads = append(leads, &v.Members[i].Name.BeforeExtra)
		}
	}
	return leads
}

// remove removes the element or member i with the comma and the white space before it, which is what add puts there;
// the first one with those behind it.
func remove(v *hujson.Value, i int) {
	if all := leads(v); i == 0 && len(all) > 1 {
		*all[1] = *all[0]
	}
	switch v := v.Value.(type) {
	case *hujson.Array:
		v.Elements = slices.Delete(v.Elements, i, i+1)
		if n := len(v.Elements); n > 0 {
			v.Elements[n-1].AfterExtra = nil // there would be a comma behind it
		}
	case *hujson.Object:
		v.Members = slices.Delete(v.Members, i, i+1)
		if n := len(v.Members); n > 0 {
			v.Members[n-1].Value.AfterExtra = nil
		}
	}
}

// add appends an element to an array, or a member to an object, laid out as those before it. text is asked for it in
// their style.
func add(v *hujson.Value, st style, text string) {
	lead := hujson.Extra(st.before)
	if len(leads(v)) == 1 && st.before == "" {
		lead = hujson.Extra(strings.TrimPrefix(st.comma, ","))
	}
	switch v := v.Value.(type) {
	case *hujson.Array:
		element, _ := hujson.Parse([]byte(text)) // which we have written
		element.BeforeExtra = lead
		v.Elements = append(v.Elements, element)
	case *hujson.Object:
		object, _ := hujson.Parse([]byte("{" + text + "}"))
		member := object.Value.(*hujson.Object).Members[0]
		member.Name.BeforeExtra = lead
		v.Members = append(v.Members, member)
	}
}

// style is how the elements of an array or object are laid out in a file.
type style struct {
	before string // the white space before each of them; ends in their indentation where they have lines of their own
	unit   string // one more level of indentation
	colon  string
	comma  string
}

// styleOf is the style of the elements of v, which is in root.
func styleOf(root, v *hujson.Value) style {
	st := style{unit: "  ", colon: ":", comma: ","}
	for value := range root.All() {
		if object, ok := value.Value.(*hujson.Object); ok && slices.ContainsFunc(object.Members, func(m hujson.ObjectMember) bool {
			return bytes.HasPrefix(m.Value.BeforeExtra, []byte(" "))
		}) {
			st.colon, st.comma = ": ", ", "
			break
		}
	}
	all := leads(v)
	if len(all) == 0 {
		return st
	}
	st.before = string(*all[len(all)-1])
	indent := st.indent()
	var inner []*hujson.Extra
	switch v := v.Value.(type) {
	case *hujson.Array:
		inner = leads(&v.Elements[len(v.Elements)-1])
	case *hujson.Object:
		inner = leads(&v.Members[len(v.Members)-1].Value)
	}
	if len(inner) > 0 {
		deeper := style{before: string(*inner[0])}
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

// lines reports whether each element has a line of its own.
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
	return eol + st.indent() + strings.Repeat(st.unit, levels)
}

// next separates two members that are so many levels deeper than the elements.
func (st style) next(levels int) string {
	if !st.lines() {
		return st.comma
	}
	return "," + st.newline(levels)
}

// quote writes a string as people do: json.Marshal would write \u003c for the < of a selector.
func quote(s string) string {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(s) // a string can be encoded
	return strings.TrimSuffix(text.String(), "\n")
}
