package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
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
	variant, err := InUse(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if variant.suffix != suffix {
		t.Fatalf("variant %q, want %q", variant.suffix, suffix)
	}
	backend := New(agentName, variant)
	if _, noZones, err := backend.Trial(t.Context()); noZones != nil || err != nil {
		t.Fatal(noZones, err)
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
		for _, table := range []string{"mangle", "filter", "nat", "raw"} {
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
	prefix := Prefix(testAgent)
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
		"deleted chain": "-t mangle -X " + Prefix(testAgent) + "pods",
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
				if differs, err := backend.Verify(t.Context()); err != nil || len(differs) != 1 {
					t.Errorf("verify: %q, error %v; want what the sync has found", differs, err)
				}
				wantIntact(t, backend)
				if diff := cmp.Diff(want, savedRules(t, suffix)); diff != "" {
					t.Errorf("rules (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// TestStrayed: rules are deleted by their number. Where others have moved them, nothing of theirs or ours is left in the wrong place.
func TestStrayed(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		before, after := moved()
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &after)
		want := savedRules(t, suffix)
		chain := Prefix(testAgent) + translated
		for name, commands := range map[string][]string{
			"one more":                       {"-I " + chain + " -j RETURN"},
			"one less":                       {"-D " + chain + " 2"},
			"another instead":                {"-R " + chain + " 1 -j RETURN"},
			"one more before, one less then": {"-I " + chain + " -j RETURN", "-D " + chain + " 3"},
			"two that have changed places":   {"-I " + chain + " -j ACCEPT", "-D " + chain + " 3"},
		} {
			mustSync(t, backend, &before)
			for _, command := range commands {
				nodetest.Run(t, "iptables"+suffix, append([]string{"-t", "nat"}, strings.Fields(command)...)...)
			}
			mustSync(t, backend, &after)
			if diff := cmp.Diff(want, savedRules(t, suffix)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			if _, err := backend.Verify(t.Context()); err != nil { // what the sync may have found
				t.Fatal(err)
			}
			wantIntact(t, backend)
		}
	})
}

// moved is a plan, and the same with another endpoint.
func moved() (before, after plan.Plan) {
	in := cases()["one"]
	before = plan.Build(in)
	in.Services[0].Endpoints = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.99:8080")}
	return before, plan.Build(in)
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

// instead puts a command before the one of iptables that is called name, until the function returned is called.
func instead(t *testing.T, name, script string) (back func()) {
	t.Helper()
	folder, path := t.TempDir(), os.Getenv("PATH")
	command, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	script = "#!/bin/sh\nreal=" + command + "\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(folder, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", folder+":"+path)
	return func() { t.Setenv("PATH", path) }
}

// TestHeldLock: while another program holds the xtables lock, a sync waits for it once, for a second, and fails with a message that
// says so. Nothing was externally modified. Afterwards the same sync succeeds, whether the rules were loaded before or not.
func TestHeldLock(t *testing.T) {
	inIPTablesNamespace(t)
	nodetest.Run(t, "iptables-legacy", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
	for _, loaded := range []bool{false, true} {
		backend := newTestIPTables(t, "-legacy", testAgent)
		one, many := plan.Build(cases()["one"]), plan.Build(cases()["every-policy"])
		if loaded {
			mustSync(t, backend, &one)
			wantIntact(t, backend)
		}
		before := savedRules(t, "-legacy")
		calls := filepath.Join(t.TempDir(), "calls")
		for _, command := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore"} {
			defer instead(t, command, `echo "$0 $*" >>`+calls+"\n"+`exec $real "$@"`)()
		}
		lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := backend.Sync(t.Context(), &many); err == nil || !strings.Contains(err.Error(), "holds the xtables lock") {
			t.Errorf("loaded %v: %v, want an error that names the lock", loaded, err)
		}
		if out, err := os.ReadFile(calls); err != nil || strings.Count(string(out), "\n") != 1 || !strings.Contains(string(out), "--wait 1") {
			t.Errorf("loaded %v: restored by %q, %v; want one attempt that waits for a second", loaded, out, err)
		}
		wantIntact(t, backend)
		if diff := cmp.Diff(before, savedRules(t, "-legacy")); diff != "" {
			t.Errorf("loaded %v: rules changed (-before +after):\n%s", loaded, diff)
		}
		if err := lock.Close(); err != nil {
			t.Fatal(err)
		}
		mustSync(t, backend, &many)
		wantIntact(t, backend)
		mustSync(t, backend, &plan.Plan{})
	}
}

// TestOneProcess: a change of endpoints is made by one process, however many tables it touches, and looked at by another; what moves
// clients comes first. So is a repair.
func TestOneProcess(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		before, after := moved()
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &before)
		calls := filepath.Join(t.TempDir(), "calls")
		defer instead(t, "iptables"+suffix+"-save", "echo save >>"+calls+"\n"+`exec $real "$@"`)()
		defer instead(t, "iptables"+suffix+"-restore", `rules=$(cat); echo restore $(echo "$rules" | grep "^\*") >>`+calls+"\n"+`echo "$rules" | $real "$@"`)()
		want := func(what, processes string) {
			t.Helper()
			out, err := os.ReadFile(calls)
			if got := strings.Join(strings.Fields(string(out)), " "); err != nil || got != processes {
				t.Errorf("%s: %q, %v; want %q", what, got, err, processes)
			}
			_ = os.Remove(calls)
		}
		mustSync(t, backend, &after)
		want("a change", map[string]string{"-nft": "restore *nat *mangle *nat *mangle save", "-legacy": "restore *nat *mangle save"}[suffix])
		wantIntact(t, backend)
		_ = os.Remove(calls)
		nodetest.Run(t, "iptables"+suffix, "-t", "mangle", "-F")
		if differs, err := backend.Verify(t.Context()); err != nil || len(differs) == 0 {
			t.Errorf("flushed: %q, %v", differs, err)
		}
		want("looking", "save")
		mustSync(t, backend, &after)
		want("a repair", "save restore *mangle *filter *nat save")
		wantIntact(t, backend)
	})
}

// TestOwnFailures: an update that fails for a reason of our own is an error with its cause, is made good by the next one, and is no
// modification by others. One that fails because rules were externally modified has its cause in what verify reports.
func TestOwnFailures(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		before, after := plan.Build(cases()["one"]), plan.Build(cases()["many"])
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &before)
		for _, tt := range []struct {
			says string
			exit int
		}{
			{"iptables-restore v1.8.9: Permission denied (you must be root)", 4},
			{"iptables-restore: line 5 failed: Cannot allocate memory.", 1},
			{"iptables-restore v1.8.9 (nf_tables): Could not fetch rule set generation id: Operation not permitted", 4},
			{"iptables-restore: line 5 failed: No buffer space available.", 1},
			{"iptables-restore: Resource temporarily unavailable", 4},
		} {
			// It fails after the first table, so that one is as wanted and others are not.
			back := instead(t, "iptables"+suffix+"-restore", fmt.Sprintf(`sed '/^COMMIT$/q' | $real "$@" && echo %q >&2; exit %d`, tt.says, tt.exit))
			if err := backend.Sync(t.Context(), &after); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%q: sync says %v", tt.says, err)
			}
			wantIntact(t, backend)
			back()
			mustSync(t, backend, &after)
			wantIntact(t, backend)
			mustSync(t, backend, &before)
		}
		nodetest.Run(t, "iptables"+suffix, "-t", "mangle", "-F")
		nodetest.Run(t, "iptables"+suffix, "-t", "nat", "-F")
		nodetest.Run(t, "iptables"+suffix, "-t", "nat", "-X", Prefix(testAgent)+"dnat")
		mustSync(t, backend, &after)
		differs, err := backend.Verify(t.Context())
		if err != nil || len(differs) != 1 || !strings.Contains(differs[0], "found when an endpoint changed: ") {
			t.Errorf("externally modified: %q, %v", differs, err)
		}
		t.Log(differs)
		wantIntact(t, backend)
	})
}

// TestForeignJump: a rule of others that leads to a chain of ours keeps that from being deleted. It is an external modification, and restored.
func TestForeignJump(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		before, after := plan.Build(cases()["many"]), plan.Build(cases()["one"])
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &before)
		f := backend.families[0]
		nat := func(tables []table) table {
			return tables[slices.IndexFunc(tables, func(t table) bool { return t.name == "nat" })]
		}
		remain := nat(render(&after, f.family, f.agent)).chains
		chains := slices.Clone(nat(f.tables).chains)
		gone := slices.IndexFunc(chains, func(c chain) bool {
			return !slices.ContainsFunc(remain, func(r chain) bool { return r.name == c.name })
		})
		if gone < 0 {
			t.Fatal("no chain goes")
		}
		nodetest.Run(t, "iptables"+suffix, "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1", "-j", chains[gone].name)
		mustSync(t, backend, &after)
		differs, err := backend.Verify(t.Context())
		if err != nil || len(differs) != 1 || !strings.Contains(differs[0], "found when an endpoint changed: ") {
			t.Errorf("externally modified: %q, %v", differs, err)
		}
		wantIntact(t, backend)
	})
}

// TestExistsWithoutRawSockets: rules of others that match by ipset, as Cilium's do, keep iptables-nft-save from all rules where the
// process has no CAP_NET_RAW, as the agent's container. Whether there are chains of ours is known all the same.
func TestExistsWithoutRawSockets(t *testing.T) {
	inIPTablesNamespace(t)
	nodetest.Run(t, "ipset", "create", "nodes", "hash:net")
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-m", "set", "!", "--match-set", "nodes", "dst", "-j", "MASQUERADE")
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0); err != nil { // of this thread, which ends with the test
		t.Fatal(err)
	}
	if out, err := exec.Command("iptables-nft-save", "-t", "nat").CombinedOutput(); err == nil {
		t.Fatalf("iptables-nft-save does without a raw socket:\n%s", out)
	}
	backend := New(testAgent, Variant{suffix: "-nft"})
	want := func(when string, want bool) {
		t.Helper()
		if exists, err := backend.Exists(t.Context()); err != nil || exists != want {
			t.Errorf("%s: %t, %v; want %t", when, exists, err, want)
		}
	}
	want("nothing of ours", false)
	nodetest.Run(t, "iptables-nft", "-t", "mangle", "-N", Prefix("another.agent")+"pods")
	want("chains of another agent", false)
	nodetest.Run(t, "iptables-nft", "-t", "mangle", "-N", Prefix(testAgent)+"pods")
	want("a chain of ours", true)
}

// TestHungProcess: an iptables-restore or -save that does not end is killed, and is an error that names it. No rule was externally modified,
// and the next sync makes it good.
func TestHungProcess(t *testing.T) {
	forEachVariant(t, func(t *testing.T, suffix string) {
		before, after := moved()
		backend := newTestIPTables(t, suffix, testAgent)
		mustSync(t, backend, &before)
		for _, command := range []string{"-restore", "-save"} {
			back := instead(t, "iptables"+suffix+command, "sleep 600")
			var err error
			// On a busy machine what does not hang needs more.
			for timeout := 100 * time.Millisecond; timeout <= program.Timeout && (err == nil || !strings.Contains(err.Error(), "iptables"+suffix+command)); timeout *= 4 {
				for _, f := range backend.families {
					f.timeout = timeout
				}
				err = backend.Sync(t.Context(), &after)
			}
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "iptables"+suffix+command) {
				t.Errorf("%s hangs: %v", command, err)
			}
			back()
			for _, f := range backend.families {
				f.timeout = program.Timeout
			}
			mustSync(t, backend, &after)
			wantIntact(t, backend)
			mustSync(t, backend, &before)
		}
	})
}

// TestUnreadTables: that it cannot be read which tables are in use is not that there are none.
func TestUnreadTables(t *testing.T) {
	inIPTablesNamespace(t)
	nodetest.Run(t, "iptables-legacy", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
	backend := newTestIPTables(t, "-legacy", testAgent)
	p, _ := moved()
	mustSync(t, backend, &p)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	_, inUseErr := LegacyTable(plan.IPv4, "nat")
	differs, err := backend.Verify(t.Context())
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(inUseErr, unix.EMFILE) || !errors.Is(err, unix.EMFILE) || len(differs) > 0 {
		t.Errorf("in use: %v; verify says %v, %v; want %v", inUseErr, differs, err, unix.EMFILE)
	}
}
