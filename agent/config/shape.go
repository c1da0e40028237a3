package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxAliases is how many aliases are followed: those of a document of ten lines can be billions, one in another.
const maxAliases = 1_000

// shape compares the document with the structs that it is decoded into, and adds an error for each unknown key, each key that is
// there twice and each value of a wrong type. It returns false where nothing more can be said of the values: the decoder leaves
// out entries of a list that have a wrong type, so that the positions of the others are not those in the document.
func (v *validator) shape(node *yaml.Node, into reflect.Type, path []any) bool {
	if node.Kind == yaml.AliasNode {
		// The decoder refuses such documents too, but does not look below keys that it does not know.
		switch v.aliases++; {
		case v.inside[node.Alias]:
			v.badAt(node.Line, path, "*%s is a part of what it stands for", node.Value)
			return false
		case v.aliases == maxAliases+1:
			v.badAt(node.Line, path, "there are more than %d aliases, when those in aliases are counted too", maxAliases)
			fallthrough
		case v.aliases > maxAliases:
			return false
		}
		node = node.Alias
		v.inside[node] = true
		defer delete(v.inside, node)
	}
	for into.Kind() == reflect.Pointer {
		into = into.Elem()
	}
	switch {
	case node.Tag == "!!null":
	case into.Kind() == reflect.Struct && node.Kind == yaml.MappingNode:
		return v.mapping(node, into, path)
	case into.Kind() == reflect.Slice && node.Kind == yaml.SequenceNode:
		aligned := true
		for i, entry := range node.Content {
			before := len(v.misshapen)
			below := v.shape(entry, into.Elem(), at(path, i))
			aligned = aligned && below && !v.isMisshapen(at(path, i), before)
		}
		return aligned
	case node.Decode(reflect.New(into).Interface()) != nil:
		v.bad(path, "%s is not allowed; allowed: %s", described(node), allowed(into))
		v.misshapen = append(v.misshapen, path)
	}
	return true
}

// mapping compares a mapping with a struct.
func (v *validator) mapping(node *yaml.Node, into reflect.Type, path []any) bool {
	keys, aligned, seen := map[string]reflect.Type{}, true, map[string]int{}
	names := make([]string, into.NumField())
	for i := range names {
		names[i] = into.Field(i).Tag.Get("yaml")
		keys[names[i]] = into.Field(i).Type
	}
	for pair := range slices.Chunk(node.Content, 2) {
		key, value := pair[0], pair[1]
		expected, known := keys[key.Value]
		switch first, twice := seen[key.Value]; {
		case key.Tag == "!!merge": // the decoder has seen that none is merged into itself
			merged := []*yaml.Node{value}
			if merged[0].Kind == yaml.SequenceNode {
				merged = merged[0].Content
			}
			for _, other := range merged {
				aligned = v.shape(other, into, path) && aligned
			}
		case twice:
			v.badAt(key.Line, at(path, key.Value), "is there twice, first in line %d; allowed: once", first)
		case known:
			aligned = v.shape(value, expected, at(path, key.Value)) && aligned
		default:
			likely := similar(key.Value, names)
			if likely == "" {
				v.badAt(key.Line, path, "unknown key %q; allowed: %s", key.Value, strings.Join(names, ", "))
				break
			}
			v.badAt(key.Line, path, "unknown key %q; did you mean %s?", key.Value, likely)
			v.misshapen = append(v.misshapen, at(path, likely)) // that it is missing is said by this
			v.shape(value, keys[likely], at(path, key.Value))
		}
		seen[key.Value] = key.Line
	}
	return aligned
}

// at is a path one step further.
func at(path []any, step any) []any { return append(path[:len(path):len(path)], step) }

// isMisshapen reports whether path, or what it is in, has an error of its type already; before is how many of them not to look at.
func (v *validator) isMisshapen(path []any, before int) bool {
	for _, known := range v.misshapen[before:] {
		if len(known) <= len(path) && reflect.DeepEqual(known, path[:len(known)]) {
			return true
		}
	}
	return false
}

// described is a value as its writer sees it.
func described(node *yaml.Node) string {
	switch node.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	return fmt.Sprintf("%q", node.Value)
}

// allowed is what a value of a type is in YAML.
func allowed(into reflect.Type) string {
	switch into.Kind() {
	case reflect.Struct:
		return "a mapping"
	case reflect.Slice:
		return "a list"
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	}
	if into == reflect.TypeFor[targetPort]() {
		return "1 to 65535, or the name of a container port"
	}
	return "a single value, and no list or mapping"
}

// similar is the one of names that a word was meant to be: one has the other in it, or at most two letters differ; of three letters one. Empty where
// there is none.
func similar(word string, names []string) string {
	best, least := "", 3
	for _, name := range names {
		a, b := strings.ToLower(word), strings.ToLower(name)
		edits := distance(a, b)
		switch short := min(len(a), len(b)); {
		case short < 3 || short == 3 && edits > 1:
			continue
		case strings.Contains(a, b) || strings.Contains(b, a):
			edits = min(edits, 2)
		}
		if edits < least {
			best, least = name, edits
		}
	}
	return best
}

// distance is how many bytes have to be inserted, removed or replaced to make b of a (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := before
			if a[i] != b[j] {
				cost++
			}
			before, row[j+1] = row[j+1], min(cost, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}
