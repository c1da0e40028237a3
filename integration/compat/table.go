package compat

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// unknown is a cell of which nothing is known.
const unknown = "–"

// Known is how a row is known, for the table.
func (r Row) Known() string {
	var how []string
	if len(r.Tests) > 0 {
		kind := "run here"
		if r.Simulated {
			kind = "simulated here"
		}
		how = append(how, kind+": `"+strings.Join(r.Tests, "`, `")+"`")
	}
	if len(r.Links) > 0 {
		how = append(how, "its links simulated here: `"+strings.Join(r.Links, "`, `")+"`")
	}
	if len(r.Documents) > 0 {
		var links []string
		for i, link := range r.Documents {
			links = append(links, fmt.Sprintf("[%d](%s)", i+1, link))
		}
		kind := "from a document: "
		if len(how) > 0 {
			kind = "the rest from a document: "
		}
		how = append(how, kind+strings.Join(links, ", "))
	}
	return strings.Join(how, "; ")
}

// works is whom the endpoint answers.
func (r Row) works() string {
	served := r.Observed.Served
	switch {
	case r.Works != "":
		return r.Works
	case len(served) == 3:
		return "yes"
	case len(served) > 0:
		return "for " + strings.Join(served, " and ") + " only"
	}
	return "no"
}

func (r Row) policies() string {
	if r.Observed.Ingress == "" {
		return cmp.Or(r.Policies, unknown)
	}
	return "ingress: " + r.Observed.Ingress + "; egress: " + r.Observed.Egress
}

func (r Row) refused() string {
	if slices.Contains(r.Observed.Refused, NoEndpoint) {
		return "refused at once"
	}
	return cmp.Or(r.Refused, unknown)
}

// staysIn is when nothing leaves the node.
func (r Row) staysIn() string {
	if len(r.Observed.StaysIn) == 0 {
		return unknown
	}
	return strings.Join(r.Observed.StaysIn, ", ")
}

// Table is the table of docs/compatibility.md.
func Table(rows []Row) string {
	var out strings.Builder
	out.WriteString("| network | setting | works | servers see | policies let pass | without an endpoint | packets stay on the node with | what to set | how it is known |\n" +
		"|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", r.Network, cmp.Or(r.Setting, unknown), r.works(), cmp.Or(r.Observed.Seen, r.Seen, unknown),
			r.policies(), r.refused(), r.staysIn(), cmp.Or(r.Observed.Advice, r.Set, unknown), r.Known())
	}
	return out.String()
}

// Short is the table of the README: networks by what becomes of them.
func Short(rows []Row) string {
	kinds := []struct {
		title string
		has   func(Row) bool
	}{
		{"works, and servers see the client's address", func(r Row) bool { return r.works() == "yes" && cmp.Or(r.Observed.Seen, r.Seen) == Client }},
		{"works, and servers see an address of the node", func(r Row) bool { return r.works() == "yes" && cmp.Or(r.Observed.Seen, r.Seen) != Client }},
		{"works in part", func(r Row) bool { return strings.HasPrefix(r.works(), "for ") }},
		{"does not work", func(r Row) bool { return r.works() == "no" }},
		{"not tried", func(r Row) bool { return r.works() == "not tried" }},
	}
	out := "| | pods' networks |\n|---|---|\n"
	for _, kind := range kinds {
		var networks []string
		settings := map[string][]string{}
		for _, r := range rows {
			if !kind.has(r) {
				continue
			}
			name := r.Network
			switch {
			case len(r.Tests) == 0:
				name += " (read)"
			case r.Simulated:
				name += " (simulated)"
			}
			if !slices.Contains(networks, name) {
				networks = append(networks, name)
			}
			if r.Setting != "" {
				settings[name] = append(settings[name], r.Setting)
			}
		}
		for i, name := range networks {
			if len(settings[name]) > 0 {
				networks[i] += ": " + strings.Join(settings[name], ", ")
			}
		}
		if len(networks) == 0 {
			continue
		}
		out += "| **" + kind.title + "** | " + strings.Join(networks, "; ") + " |\n"
	}
	return out
}
