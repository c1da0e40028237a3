package netfilter

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// inIPTablesNamespace is a network namespace without the machine's xtables lock.
func inIPTablesNamespace(t *testing.T) {
	t.Helper()
	nodetest.Namespace(t, "link set lo up")
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
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

func newTestIPTables(t *testing.T, suffix, agentName string) *IPTables {
	t.Helper()
	backend, err := NewIPTables(t.Context(), agentName)
	if err != nil {
		t.Fatal(err)
	}
	if backend.variant.suffix != suffix {
		t.Fatalf("variant %q, want %q", backend.variant.suffix, suffix)
	}
	return backend
}

func mustSync(t *testing.T, backend *IPTables, p *plan.Plan) {
	t.Helper()
	if err := backend.Sync(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

func wantIntact(t *testing.T, backend *IPTables) {
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
		for name, input := range xtablesCases() {
			p := plan.Build(input)
			backend := newTestIPTables(t, suffix, testAgent)
			mustSync(t, backend, &p)
			wantIntact(t, backend)
			first := savedRules(t, suffix)
			generation := newGeneration()
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
		for name, input := range xtablesCases() {
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
		for from, before := range xtablesCases() {
			for to, after := range xtablesCases() {
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
		"flushed chain":          {commands: []string{"-t filter -F " + prefix + "refuse"}},
		"deleted jump":           {commands: []string{"-t filter -D FORWARD 1"}},
		"added rule":             {commands: []string{"-t nat -I " + prefix + "dnat -j RETURN"}},
		"replaced endpoint":      {commands: []string{"-t nat -R " + prefix + "dnat 1 -d 169.254.210.210 -p tcp -j DNAT --to-destination 10.0.0.1"}},
		"doubled jump":           {commands: []string{"-t nat -A PREROUTING -j " + prefix + "dnat"}},
		"doubled rule":           {commands: []string{"-t filter -A " + prefix + "refuse -p tcp -j REJECT --reject-with tcp-reset"}},
		"rule before ours":       {commands: []string{"-t nat -I PREROUTING -d 169.254.210.210 -j DNAT --to-destination 10.0.0.1"}, left: "-A PREROUTING -d 169.254.210.210/32 -j DNAT --to-destination 10.0.0.1\n"},
		"conditional jump":       {commands: []string{"-t nat -I PREROUTING -p udp -j " + prefix + "dnat"}},
		"unloaded chain of ours": {commands: []string{"-t nat -N " + prefix + "old", "-t nat -A PREROUTING -j " + prefix + "old"}},
	} {
		t.Run(name, func(t *testing.T) {
			forEachVariant(t, func(t *testing.T, suffix string) {
				p := plan.Build(xtablesCases()["one"])
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
		p := plan.Build(xtablesCases()["one"])
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
	before, after := plan.Build(xtablesCases()["one"]), plan.Build(xtablesCases()["many"])
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
		p := plan.Build(xtablesCases()["every-policy"])
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

func TestSelectRemovesWhatAnotherBackendLeft(t *testing.T) {
	inIPTablesNamespace(t)
	p := plan.Build(xtablesCases()["every-policy"])
	there := func() (found []string) {
		for _, suffix := range []string{"-nft", "-legacy"} {
			if strings.Contains(savedRules(t, suffix), agentsPrefix) {
				found = append(found, "iptables"+suffix)
			}
		}
		if strings.Contains(nodetest.Run(t, "nft", "list", "tables"), "magic-ip-") {
			found = append(found, "nftables")
		}
		return found
	}
	const hint = "KUBE-IPTABLES-HINT"
	for _, step := range []struct {
		backend, hint, want string
	}{
		{BackendNFTables, "", "nftables"},
		{BackendIPTables, "iptables-legacy", "iptables-legacy"},
		{BackendIPTables, "iptables-nft", "iptables-nft"},
		{BackendIPTables, "iptables-legacy", "iptables-legacy"},
		{Auto, "", "nftables"},
		{BackendIPTables, "iptables-nft", "iptables-nft"},
		{BackendNFTables, "", "nftables"},
	} {
		if step.hint != "" {
			nodetest.Run(t, step.hint, "-t", "mangle", "-N", hint)
		}
		backend, err := Select(t.Context(), step.backend, testAgent)
		if err != nil {
			t.Fatal(err)
		}
		if err := backend.Sync(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{step.want}, there()); diff != "" {
			t.Fatalf("%s %s: rules in (-want +got):\n%s", step.backend, step.hint, diff)
		}
		if step.hint != "" {
			nodetest.Run(t, step.hint, "-t", "mangle", "-X", hint)
		}
	}
}

// TestSelectLeftoversDoNotStandInTheWay: rules of another backend that cannot be removed are named, and those that
// are wanted are in place all the same.
func TestSelectLeftoversDoNotStandInTheWay(t *testing.T) {
	inIPTablesNamespace(t)
	p := plan.Build(xtablesCases()["every-policy"])
	old := newIPTables(testAgent, variant{suffix: "-nft"})
	mustSync(t, old, &p)
	broken := t.TempDir()
	if err := os.WriteFile(broken+"/iptables-nft-restore", []byte("#!/bin/sh\necho broken >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", broken+":"+path)
	backend, err := Select(t.Context(), BackendNFTables, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var left *LeftoverError
		if err := backend.Sync(t.Context(), &p); !errors.As(err, &left) || !left.InPlace() || !strings.Contains(err.Error(), "left behind by backend iptables") {
			t.Fatalf("sync: %v, want an error that names what is left", err)
		}
		if !strings.Contains(nodetest.Run(t, "nft", "list", "tables"), "magic-ip-") {
			t.Fatal("the rules that are wanted are not there")
		}
	}
	t.Setenv("PATH", path)
	if err := backend.Sync(t.Context(), &p); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(savedRules(t, "-nft"), agentsPrefix) {
		t.Error("the leftovers are still there")
	}
}

func TestSelectSaysWhyNot(t *testing.T) {
	inIPTablesNamespace(t)
	if _, err := Select(t.Context(), "ipvs", testAgent); err == nil || !strings.Contains(err.Error(), "auto, nftables, iptables") {
		t.Errorf("unknown backend: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	_, err := Select(t.Context(), Auto, testAgent)
	if err == nil || !strings.Contains(err.Error(), "nft") || !strings.Contains(err.Error(), "no iptables command") {
		t.Errorf("without any tool: %v, want an error that names both causes", err)
	}
}

// TestIPTablesWithoutIP6Tables: what is not needed may be missing; what is needed is named.
func TestIPTablesWithoutIP6Tables(t *testing.T) {
	inIPTablesNamespace(t)
	tools := t.TempDir()
	for _, tool := range []string{"iptables", "iptables-save", "iptables-restore"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(path, filepath.Join(tools, tool)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tools)
	backend, err := Select(t.Context(), Auto, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	if backend.Name() != BackendIPTables || !strings.Contains(backend.Reason, "nftables cannot be used") {
		t.Errorf("backend %s, reason %q", backend.Name(), backend.Reason)
	}
	one, both := plan.Build(xtablesCases()["one"]), plan.Build(xtablesCases()["every-policy"])
	if err := backend.Sync(t.Context(), &one); err != nil {
		t.Error(err)
	}
	if err := backend.Sync(t.Context(), &both); err == nil || !strings.Contains(err.Error(), "ip6tables") {
		t.Errorf("IPv6 without ip6tables: %v, want an error that names it", err)
	}
	if err := backend.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestForeignDNATLooksOnly: a look at rules does not bring a table into use.
func TestForeignDNATLooksOnly(t *testing.T) {
	inIPTablesNamespace(t)
	if found := ForeignDNAT(t.Context(), []netip.Addr{netip.MustParseAddr("169.254.210.210")}); len(found) > 0 {
		t.Errorf("found %q on an empty node", found)
	}
	for _, family := range []knftables.Family{knftables.IPv4Family, knftables.IPv6Family} {
		if legacyTable(family, "nat") {
			t.Errorf("%s: the legacy table nat is in use now", family)
		}
	}
	if tables := nodetest.Run(t, "nft", "list", "tables"); tables != "" {
		t.Errorf("tables that were not there: %s", tables)
	}
}
