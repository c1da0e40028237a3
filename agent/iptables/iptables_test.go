package iptables

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// inIPTablesNamespace is a network namespace without the machine's tables lock.
func inIPTablesNamespace(t *testing.T) {
	t.Helper()
	nodetest.Namespace(t, "link set lo up")
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "tables.lock"))
}

// forEachVariant runs test in a namespace where kubelet has left its hint for that variant.
func forEachVariant(t *testing.T, test func(t *testing.T, suffix string)) {
	t.Helper()
	for _, suffix := range []string{"-nft", "-legacy"} {
		t.Run("iptables"+suffix, func(t *testing.T) {
			inIPTablesNamespace(t)
			nodetest.Run(t, "iptables"+suffix, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
			test(t, suffix)
		})
	}
}

const testAgent = "kube-system.apm"

func newTestIPTables(t *testing.T, suffix, agentName string) *Backend {
	t.Helper()
	variant, err := InUse()
	if err != nil {
		t.Fatal(err)
	}
	if variant.suffix != suffix {
		t.Fatalf("variant %q, want %q", variant.suffix, suffix)
	}
	backend := New(agentName, variant)
	if _, err := backend.Trial(t.Context()); err != nil {
		t.Fatal(err)
	}
	return backend
}

func mustSync(t *testing.T, backend *Backend, p *plan.Plan) {
	t.Helper()
	if err := backend.Sync(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

func wantIntact(t *testing.T, backend *Backend) {
	t.Helper()
	if differs, err := backend.Verify(t.Context()); err != nil || len(differs) > 0 {
		t.Fatalf("verify: %q, error %v; want nothing", differs, err)
	}
}

// savedRules is all that is in the kernel, without time stamps and counters, chains in order.
func savedRules(t *testing.T, suffix string) string {
	t.Helper()
	var all []string
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"mangle", "filter", "nat"} {
			lines := strings.Split(nodetest.Run(t, command+suffix+"-save", "-t", table), "\n")
			lines = slices.DeleteFunc(lines, func(line string) bool { return strings.HasPrefix(line, "#") || line == "" })
			for i, line := range lines {
				if strings.HasPrefix(line, ":") {
					lines[i], _, _ = strings.Cut(line, "[")
				}
			}
			rules := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, "-A") })
			if rules < 0 {
				rules = len(lines)
			}
			slices.Sort(lines[:rules])
			// Rules come by chain; the order of chains means nothing, that of a chain's rules does.
			slices.SortStableFunc(lines[rules:], func(a, b string) int {
				return strings.Compare(strings.Join(append(strings.Fields(a), "", "")[:2], " "), strings.Join(append(strings.Fields(b), "", "")[:2], " "))
			})
			all = append(all, command+" "+table)
			all = append(all, lines...)
		}
	}
	return strings.Join(all, "\n")
}

func TestIPTablesSyncTwiceChangesNothing(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		for name, input := range cases() {
			p := plan.Build(input)
			backend := newTestIPTables(t, suffix, testAgent)
			mustSync(t, backend, &p)
			wantIntact(t, backend)
			first := savedRules(t, suffix)
			generation := nftables.NewGeneration()
			before, err := generation()
			if err != nil {
				t.Fatal(err)
			}
			mustSync(t, backend, &p)
			if after, err := generation(); err != nil || after != before {
				t.Errorf("%s: the second sync has changed rules: generation %d, then %d, error %v", name, before, after, err)
			}
			// After a restart nothing is known, so all is loaded again.
			mustSync(t, newTestIPTables(t, suffix, testAgent), &p)
			wantIntact(t, backend)
			if diff := cmp.Diff(first, savedRules(t, suffix)); diff != "" {
				t.Errorf("%s: after a restart (-before +after):\n%s", name, diff)
			}
		}
	})
}

func TestIPTablesUpdateLeadsWhereALoadLeads(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		empty := savedRules(t, suffix)
		want := map[string]string{}
		for name, input := range cases() {
			p := plan.Build(input)
			backend := newTestIPTables(t, suffix, testAgent)
			mustSync(t, backend, &p)
			want[name] = savedRules(t, suffix)
			if err := backend.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(empty, savedRules(t, suffix)); diff != "" {
				t.Fatalf("%s: left behind (-before +after):\n%s", name, diff)
			}
		}
		backend := newTestIPTables(t, suffix, testAgent)
		for from, before := range cases() {
			for to, after := range cases() {
				for _, input := range []plan.Input{before, after} {
					p := plan.Build(input)
					mustSync(t, backend, &p)
				}
				wantIntact(t, backend)
				if diff := cmp.Diff(want[to], savedRules(t, suffix)); diff != "" {
					t.Fatalf("from %s to %s (-loaded +updated):\n%s", from, to, diff)
				}
			}
		}
		mustSync(t, backend, &plan.Plan{})
		if diff := cmp.Diff(empty, savedRules(t, suffix)); diff != "" {
			t.Errorf("after the last magic IP (-before +after):\n%s", diff)
		}
	})
}

func TestIPTablesMendsWhatOthersChange(t *testing.T) {
	prefix := chainPrefix(testAgent)
	for name, c := range map[string]struct {
		commands []string
		left     string // what the one who changed it keeps: a rule that is not ours
	}{
		"flushed table":          {commands: []string{"-t nat -F"}},
		"flushed chain":          {commands: []string{"-t filter -F " + prefix + "reject"}},
		"deleted jump":           {commands: []string{"-t filter -D FORWARD 1"}},
		"added rule":             {commands: []string{"-t nat -I " + prefix + "dnat -j RETURN"}},
		"replaced endpoint":      {commands: []string{"-t nat -R " + prefix + "dnat 1 -d 169.254.210.210 -p tcp -j DNAT --to-destination 10.0.0.1"}},
		"doubled jump":           {commands: []string{"-t nat -A PREROUTING -j " + prefix + "dnat"}},
		"doubled rule":           {commands: []string{"-t filter -A " + prefix + "reject -p tcp -j REJECT --reject-with tcp-reset"}},
		"rule before ours":       {commands: []string{"-t nat -I PREROUTING -d 169.254.210.210 -j DNAT --to-destination 10.0.0.1"}, left: "-A PREROUTING -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.1\n"},
		"conditional jump":       {commands: []string{"-t nat -I PREROUTING -p udp -j " + prefix + "dnat"}},
		"unloaded chain of ours": {commands: []string{"-t nat -N " + prefix + "old", "-t nat -A PREROUTING -j " + prefix + "old"}},
	} {
		t.Run(name, func(t *testing.T) {
			forEachVariant(t, func(t *testing.T, suffix string) {
				p := plan.Build(cases()["one"])
				backend := newTestIPTables(t, suffix, testAgent)
				mustSync(t, backend, &p)
				wantIntact(t, backend)
				want := savedRules(t, suffix)
				for _, command := range c.commands {
					nodetest.Run(t, "iptables"+suffix, strings.Fields(command)...)
				}
				differs, err := backend.Verify(t.Context())
				if err != nil || len(differs) == 0 {
					t.Fatalf("verify: %q, error %v; want a difference", differs, err)
				}
				t.Log(differs)
				mustSync(t, backend, &p)
				wantIntact(t, backend)
				if diff := cmp.Diff(want, strings.Replace(savedRules(t, suffix), c.left, "", 1)); diff != "" {
					t.Errorf("mended (-before +after):\n%s", diff)
				}
			})
		})
	}
}

// TestIPTablesDoesNotQuarrelAboutTheFirstPlace: whoever else wants to be first gets it, for a while.
func TestIPTablesDoesNotQuarrelAboutTheFirstPlace(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		p := plan.Build(cases()["one"])
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &p)
		other := []string{"-t", "nat", "-I", "PREROUTING", "-p", "tcp"}
		nodetest.Run(t, "iptables"+suffix, other...)
		if differs, err := backend.Verify(t.Context()); err != nil || len(differs) != 1 {
			t.Fatalf("verify: %q, error %v; want one difference", differs, err)
		}
		mustSync(t, backend, &p)
		nodetest.Run(t, "iptables"+suffix, other...)
		wantIntact(t, backend)
		for hook := range backend.families[0].moved {
			backend.families[0].moved[hook] = time.Now().Add(-2 * moveAgainAfter)
		}
		if differs, err := backend.Verify(t.Context()); err != nil || len(differs) != 1 {
			t.Errorf("verify after a while: %q, error %v; want one difference", differs, err)
		}
	})
}

// TestIPTablesUpdateMeetsChanges: a change of the plan finds what nobody has told of yet.
func TestIPTablesUpdateMeetsChanges(t *testing.T) {
	before, after := plan.Build(cases()["one"]), plan.Build(cases()["many"])
	for name, command := range map[string]string{
		"deleted jump":  "-t nat -D PREROUTING 1",
		"flushed table": "-t filter -F",
		"deleted chain": "-t mangle -X " + chainPrefix(testAgent) + "pods",
	} {
		t.Run(name, func(t *testing.T) {
			forEachVariant(t, func(t *testing.T, suffix string) {
				backend := newTestIPTables(t, suffix, testAgent)
				mustSync(t, backend, &after)
				want := savedRules(t, suffix)
				mustSync(t, backend, &before)
				if strings.Contains(command, "-X") {
					nodetest.Run(t, "iptables"+suffix, "-t", "mangle", "-F")
				}
				nodetest.Run(t, "iptables"+suffix, strings.Fields(command)...)
				mustSync(t, backend, &after)
				wantIntact(t, backend)
				if diff := cmp.Diff(want, savedRules(t, suffix)); diff != "" {
					t.Errorf("rules (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestIPTablesAgentsLeaveEachOtherAlone(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		p := plan.Build(cases()["every-policy"])
		nodetest.Run(t, "iptables"+suffix, "-t", "nat", "-A", "PREROUTING", "-p", "udp")
		a, b := newTestIPTables(t, suffix, "a"), newTestIPTables(t, suffix, "b")
		mustSync(t, a, &p)
		alone := savedRules(t, suffix)
		mustSync(t, b, &p)
		wantIntact(t, a)
		wantIntact(t, b)
		if err := b.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantIntact(t, a)
		if diff := cmp.Diff(alone, savedRules(t, suffix)); diff != "" {
			t.Errorf("after the other agent (-before +after):\n%s", diff)
		}
	})
}

// TestUpgrade: chains that an older version has loaded, by other names, become the wanted ones and leave nothing.
func TestUpgrade(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		p := plan.Build(cases()["one"])
		fresh := newTestIPTables(t, suffix, testAgent)
		mustSync(t, fresh, &p)
		want := savedRules(t, suffix)
		if err := fresh.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		old, err := os.ReadFile("testdata/1.0.0.rules")
		if err != nil {
			t.Fatal(err)
		}
		four, six, _ := strings.Cut(string(old), "icmp6") // the rules of IPv4, then those of IPv6
		at := strings.LastIndex(four, "*mangle\n")
		restore := func(command, rules string) {
			path := filepath.Join(t.TempDir(), "rules")
			if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
				t.Fatal(err)
			}
			nodetest.Run(t, command+suffix+"-restore", "--noflush", path)
		}
		restore("iptables", four[:at])
		restore("ip6tables", four[at:]+"icmp6"+six)
		upgraded := newTestIPTables(t, suffix, testAgent)
		mustSync(t, upgraded, &p)
		wantIntact(t, upgraded)
		if diff := cmp.Diff(want, savedRules(t, suffix)); diff != "" {
			t.Errorf("rules (-fresh +upgraded):\n%s", diff)
		}
	})
}
