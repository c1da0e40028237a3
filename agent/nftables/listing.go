package nftables

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// listing is a table as `nft --json list table` shows it (libnftables-json(5)).
type listing struct {
	exists bool
	// structure is all but the elements: tables, chains, rules in order, sets. It is compared with an
	// earlier listing of the same nft, never with what we wrote: nft words rules in its own way.
	structure string
	objects   []object                     // chains, sets and maps
	elements  map[string]map[string]string // by set, key to value
}

type object struct{ kind, name string }

func parseListing(out []byte) (*listing, error) {
	var document struct {
		Nftables []map[string]map[string]any `json:"nftables"`
	}
	if err := json.Unmarshal(out, &document); err != nil {
		return nil, fmt.Errorf("nft --json list table: %w", err)
	}
	l := &listing{exists: true, elements: map[string]map[string]string{}}
	var lines []string
	for _, entry := range document.Nftables {
		for kind, fields := range entry {
			if kind == "metainfo" {
				continue
			}
			if kind == "set" || kind == "map" {
				name, _ := fields["name"].(string)
				l.elements[name] = map[string]string{}
				list, _ := fields["elem"].([]any)
				for _, element := range list {
					if pair, isPair := element.([]any); isPair && len(pair) == 2 {
						l.elements[name][term(pair[0])] = term(pair[1])
					} else {
						l.elements[name][term(element)] = ""
					}
				}
				delete(fields, "elem")
			}
			delete(fields, "handle")
			line, err := json.Marshal(fields) // keys in order
			if err != nil {
				return nil, err
			}
			words := kind
			if name, ok := fields["name"].(string); ok {
				words += " " + name
				l.objects = append(l.objects, object{kind, name})
			} else if chain, ok := fields["chain"].(string); ok {
				words += " in chain " + chain
			}
			lines = append(lines, words+": "+string(line))
		}
	}
	l.structure = strings.Join(lines, "\n")
	return l, nil
}

// term words a JSON expression as ruleset does.
func term(expression any) string {
	switch e := expression.(type) {
	case string:
		return e
	case float64:
		return strconv.FormatFloat(e, 'f', -1, 64)
	case map[string]any:
		for kind, argument := range e {
			switch kind {
			case "concat":
				parts, _ := argument.([]any)
				words := make([]string, len(parts))
				for i, part := range parts {
					words[i] = term(part)
				}
				return concat(words...)
			case "goto", "jump":
				if fields, ok := argument.(map[string]any); ok {
					return kind + " " + term(fields["target"])
				}
			case "elem":
				if fields, ok := argument.(map[string]any); ok {
					return term(fields["val"])
				}
			default:
				return kind
			}
		}
	}
	return fmt.Sprint(expression)
}

// compare says in which respects the listing differs from rules, whose structure nft listed as structure
// when they were loaded.
func (l *listing) compare(rules *ruleset, structure string) []string {
	var differs []string
	if l.structure != structure {
		differs = append(differs, structureDiff(strings.Split(structure, "\n"), strings.Split(l.structure, "\n"))...)
	}
	for _, s := range rules.sets {
		there, exists := l.elements[s.name]
		if !exists {
			continue // said by the structure
		}
		var missing, foreign []string
		for key, value := range s.elements {
			if found, ok := there[key]; !ok || found != value {
				missing = append(missing, key)
			}
		}
		for key := range there {
			if _, ok := s.elements[key]; !ok {
				foreign = append(foreign, key)
			}
		}
		differs = append(differs, Summary("missing from "+s.name, missing)...)
		differs = append(differs, Summary("foreign in "+s.name, foreign)...)
	}
	return differs
}

// structureDiff words the difference of two listings by object, "rule in chain translate" for example.
func structureDiff(wanted, there []string) []string {
	count := map[string]int{}
	for _, line := range wanted {
		count[line]++
	}
	for _, line := range there {
		count[line]--
	}
	var differs []string
	for line, surplus := range count {
		words, _, _ := strings.Cut(line, ": ")
		switch {
		case surplus > 0:
			differs = append(differs, "missing "+words)
		case surplus < 0:
			differs = append(differs, "foreign or changed "+words)
		}
	}
	slices.Sort(differs)
	differs = slices.Compact(differs)
	if len(differs) == 0 {
		differs = []string{"rules in another order"}
	}
	return differs
}

// Summary names the first few of a long list.
func Summary(what string, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	const most = 3
	if more := len(names) - most; more > 0 {
		return []string{fmt.Sprintf("%s: %s and %d more", what, strings.Join(names[:most], ", "), more)}
	}
	return []string{what + ": " + strings.Join(names, ", ")}
}
