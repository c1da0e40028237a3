package plan

import (
	"slices"
	"strings"
)

// links sorts the links of in into those that rules name.
func (p *Plan) links(in Input) {
	named := func(links []string) []string {
		return slices.DeleteFunc(sortedSet(links, strings.Compare), func(name string) bool {
			if !Nameable(name) {
				p.Unnamed = append(p.Unnamed, name)
			}
			return !Nameable(name)
		})
	}
	p.NamedOnly = slices.ContainsFunc(slices.Concat(in.Uplinks, in.UnservedPairs), func(name string) bool { return !Nameable(name) })
	uplinks := named(in.Uplinks)
	isUplink := func(name string) bool { return slices.Contains(uplinks, name) }
	p.PodInterfaces = slices.DeleteFunc(named(in.PodInterfaces), isUplink)
	p.UnservedPairs = slices.DeleteFunc(named(slices.Concat(in.UnservedPairs, uplinks)), func(name string) bool {
		return slices.Contains(p.PodInterfaces, name)
	})
	p.Uplinks = slices.DeleteFunc(uplinks, func(name string) bool {
		return slices.ContainsFunc(p.Clients, func(c Clients) bool { return Names(c.Interfaces, name) })
	})
	p.Unnamed = sortedSet(p.Unnamed, strings.Compare)
}

// Names reports whether a hostInterface setting names a link: a trailing + matches any rest.
func Names(hostInterface []string, link string) bool {
	return slices.ContainsFunc(hostInterface, func(pattern string) bool {
		prefix, wild := strings.CutSuffix(pattern, "+")
		return pattern == link || wild && strings.HasPrefix(link, prefix)
	})
}

// Nameable reports whether a link can be named in rules. The kernel takes almost any bytes for a name, and a pod may choose it
// (CAP_NET_ADMIN in its own network namespace suffices): quotes end the text of a rule, a trailing + or * matches other links.
func Nameable(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-@~=", r)
	}) && name[0] != '-'
}
