package ruleset

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// TestStopping: rules that certainly drop a pod's packet before it is translated, or keep it from being tracked, are found, through
// other chains too; others are not.
func TestStopping(t *testing.T) {
	const (
		toLinkLocal = `{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": {"prefix": {"addr": "169.254.0.0", "len": 16}}}}`
		fromUplink  = `{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth0"}}`
		spoofed     = `{"match": {"op": "==", "left": {"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, "right": false}}`
		established = `{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "established"}}`
	)
	packet := Packet{In: "cni0", Destination: netip.MustParseAddrPort("169.254.210.210:8080"), Protocol: "tcp"}
	for name, test := range map[string]struct {
		hook, kind string
		priority   string
		rules      []string
		found      bool
	}{
		"drop":                         {"prerouting", "filter", "-150", []string{toLinkLocal + `, {"drop": null}`}, true},
		"reject":                       {"prerouting", "filter", "-150", []string{toLinkLocal + `, {"reject": {"type": "tcp reset"}}`}, true},
		"notrack":                      {"prerouting", "filter", "-300", []string{`{"notrack": null}`}, true},
		"notrack too late":             {"prerouting", "filter", "-150", []string{`{"notrack": null}`}, false},
		"drop in a chain":              {"prerouting", "filter", "-150", []string{`{"jump": {"target": "other"}}`}, true},
		"from the uplink":              {"prerouting", "filter", "-150", []string{fromUplink + `, ` + toLinkLocal + `, {"drop": null}`}, false},
		"spoofed":                      {"prerouting", "filter", "-150", []string{spoofed + `, {"drop": null}`}, false},
		"established":                  {"prerouting", "filter", "-150", []string{established + `, {"drop": null}`}, false},
		"accepted before":              {"prerouting", "filter", "-150", []string{toLinkLocal + `, {"accept": null}`, `{"drop": null}`}, false},
		"after the translation":        {"prerouting", "filter", "-90", []string{`{"drop": null}`}, false},
		"another hook":                 {"input", "filter", "-150", []string{`{"drop": null}`}, false},
		"translated by another":        {"prerouting", "nat", "-150", []string{toLinkLocal + `, {"dnat": {"addr": "10.0.0.1"}}`}, false},
		"a priority that is no number": {"prerouting", "filter", `"filter"`, []string{`{"drop": null}`}, false},
	} {
		printed := fmt.Sprintf(`{"nftables": [{"chain": {"family": "ip", "table": "t", "name": "c", "type": %q, "hook": %q, "prio": %s}}, {"chain": {"family": "ip", "table": "t", "name": "other"}},
			{"rule": {"family": "ip", "table": "t", "chain": "other", "handle": 9, "expr": [{"drop": null}]}}`, test.kind, test.hook, test.priority)
		for i, rule := range test.rules {
			printed += fmt.Sprintf(`, {"rule": {"family": "ip", "table": "t", "chain": "c", "handle": %d, "expr": [%s]}}`, i+1, rule)
		}
		printed += `, {"flowtable": {"family": "ip", "name": "f", "table": "t", "handle": 3, "hook": "ingress", "prio": 0, "dev": ["eth0"]}}`
		tables, err := ParseNFTables([]byte(printed + "]}"))
		if err != nil || !slices.Equal(tables.Flowtables, []string{"ip t f"}) {
			t.Fatal(err, tables)
		}
		for _, passes := range []bool{false, true} {
			found := tables.Stopping(packet, Hook{Name: "prerouting", From: math.MinInt, Before: -105}, func(_, table, _ string) bool { return passes && strings.HasPrefix(table, "t") })
			if (len(found) == 1 && found[0].Sure) != (test.found && !passes) {
				t.Errorf("%s, passed over: %t: found %+v", name, passes, found)
			}
		}
	}
}

// TestTargetsOfIPTables: nft prints targets of iptables by their names, or not even those.
func TestTargetsOfIPTables(t *testing.T) {
	const aimed = `{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "169.254.210.210"}}`
	packet := Packet{Destination: netip.MustParseAddrPort("169.254.210.210:8080"), Protocol: "tcp"}
	for _, test := range []struct {
		kind, expr  string
		translates  bool
		stops, sure bool
	}{
		{kind: "nat", expr: aimed + `, {"xt": {"type": "match", "name": "comment"}}, {"counter": null}, {"xt": {"type": "target", "name": "DNAT"}}`, translates: true},
		{kind: "nat", expr: aimed + `, {"xt": null}, {"counter": null}, {"xt": null}`, translates: true, stops: true},
		{kind: "nat", expr: `{"xt": {"type": "match", "name": "set"}}, {"xt": {"type": "target", "name": "DNAT"}}`},
		{kind: "nat", expr: `{"xt": {"type": "target", "name": "REDIRECT"}}`, translates: true},
		{kind: "nat", expr: aimed + `, {"xt": {"type": "target", "name": "MARK"}}`},
		{kind: "filter", expr: aimed + `, {"xt": {"type": "target", "name": "TPROXY"}}`, translates: true},
		{kind: "filter", expr: aimed + `, {"xt": null}`, stops: true},
		{kind: "filter", expr: aimed + `, {"xt": {"type": "target", "name": "REJECT"}}`, stops: true, sure: true},
		{kind: "filter", expr: aimed + `, {"xt": {"type": "match", "name": "addrtype"}}, {"drop": null}`, stops: true},
	} {
		tables, err := ParseNFTables([]byte(`{"nftables": [{"chain": {"family": "ip", "table": "mangle", "name": "PREROUTING", "type": "` + test.kind + `", "hook": "prerouting", "prio": -150}},
			{"rule": {"family": "ip", "table": "mangle", "chain": "PREROUTING", "handle": 1, "expr": [` + test.expr + `]}}]}`))
		if err != nil {
			t.Fatal(err)
		}
		nothing := func(_, _, _ string) bool { return false }
		if found := tables.Translating(packet, -105, nothing); (len(found) == 1) != test.translates {
			t.Errorf("%s: translated by %+v", test.expr, found)
		}
		found := tables.Stopping(packet, Hook{Name: "prerouting", From: math.MinInt, Before: -105}, nothing)
		if (len(found) == 1) != test.stops || test.stops && found[0].Sure != test.sure {
			t.Errorf("%s: stopped by %+v", test.expr, found)
		}
	}
}
