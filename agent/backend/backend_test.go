package backend

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

const testAgent = "kube-system.apm"

// inIPTablesNamespace is a network namespace without the machine's xtables lock.
func inIPTablesNamespace(t *testing.T) {
	t.Helper()
	nodetest.Namespace(t, "link set lo up")
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(t.TempDir(), "xtables.lock"))
}

// planOf has one frontend for each of these addresses.
func planOf(addresses ...string) *plan.Plan {
	var in plan.Input
	for _, address := range addresses {
		in.Services = append(in.Services, plan.Service{
			Frontend: plan.Frontend{Address: netip.MustParseAddr(address), Protocol: plan.TCP, Port: 80}, WithoutEndpoint: plan.Reject,
		})
	}
	p := plan.Build(in)
	return &p
}

// hasChains reports whether iptables-save or ip6tables-save of this kind prints a chain of an agent.
func hasChains(t *testing.T, suffix string) bool {
	t.Helper()
	for _, command := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"mangle", "filter", "nat", "raw"} {
			if strings.Contains(nodetest.Run(t, command+suffix+"-save", "-t", table), iptables.ChainPrefix) {
				return true
			}
		}
	}
	return false
}

func TestSelectRemovesWhatAnotherBackendLeft(t *testing.T) {
	inIPTablesNamespace(t)
	p := planOf("169.254.210.210", "fd00:a::1")
	there := func() (found []string) {
		for _, suffix := range []string{"-nft", "-legacy"} {
			if hasChains(t, suffix) {
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
		{NFTables, "", "nftables"},
		{IPTables, "iptables-legacy", "iptables-legacy"},
		{IPTables, "iptables-nft", "iptables-nft"},
		{IPTables, "iptables-legacy", "iptables-legacy"},
		{Auto, "", "nftables"},
		{Auto, "iptables-legacy", "nftables"}, // which kubelet uses
		{Auto, "iptables-nft", "nftables"},
		{IPTables, "iptables-nft", "iptables-nft"},
		{NFTables, "", "nftables"},
	} {
		if step.hint != "" {
			nodetest.Run(t, step.hint, "-t", "mangle", "-N", hint)
		}
		backend, err := Select(t.Context(), step.backend, testAgent)
		if err != nil {
			t.Fatal(err)
		}
		if err := backend.Sync(t.Context(), p); err != nil {
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
	p := planOf("169.254.210.210", "fd00:a::1")
	nodetest.Run(t, "iptables-nft", "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
	variant, err := iptables.InUse(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := iptables.New(testAgent, variant).Sync(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	broken := t.TempDir()
	if err := os.WriteFile(broken+"/iptables-nft-restore", []byte("#!/bin/sh\necho broken >&2; exit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", broken+":"+path)
	backend, err := Select(t.Context(), NFTables, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var left *LeftoverError
		if err := backend.Sync(t.Context(), p); !errors.As(err, &left) || !left.InPlace() || !strings.Contains(err.Error(), "left behind by backend iptables") {
			t.Fatalf("sync: %v, want an error that names what is left", err)
		}
		if !strings.Contains(nodetest.Run(t, "nft", "list", "tables"), "magic-ip-") {
			t.Fatal("the rules that are wanted are not there")
		}
	}
	t.Setenv("PATH", path)
	if err := backend.Sync(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if hasChains(t, "-nft") {
		t.Error("the leftovers are still there")
	}
}

// TestLeftoversBehindAHeldLock: while another program holds the xtables lock, a sync waits for it for a second in all, since the agent's loop
// waits too. The end of the agent has more time.
func TestLeftoversBehindAHeldLock(t *testing.T) {
	inIPTablesNamespace(t)
	p := planOf("169.254.210.210", "fd00:a::1")
	leave := func() {
		t.Helper()
		if err := iptables.New(testAgent, legacyVariant(t)).Sync(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	leave()
	tools, calls := t.TempDir(), filepath.Join(t.TempDir(), "calls")
	for _, command := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore"} {
		standIn(t, tools, command, `echo "$*" >>`+calls+"\n"+`exec $real "$@"`)
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	backend, err := Select(t.Context(), NFTables, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	called := func() string {
		t.Helper()
		out, err := os.ReadFile(calls)
		if err = errors.Join(err, os.Remove(calls)); err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	var left *LeftoverError
	if err := backend.Sync(t.Context(), p); !errors.As(err, &left) || !strings.Contains(err.Error(), "holds the xtables lock") {
		t.Errorf("sync: %v, want an error that names the lock", err)
	}
	if got, want := called(), "--noflush --wait 1\n"; got != want {
		t.Errorf("restored by %q, want %q", got, want)
	}
	if err := errors.Join(lock.Close(), backend.Sync(t.Context(), p)); err != nil || hasChains(t, "-legacy") {
		t.Errorf("the lock is free: %v", err)
	}
	called()

	leave()
	called()
	if backend, err = Select(t.Context(), NFTables, testAgent); err != nil {
		t.Fatal(err)
	}
	if err := backend.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if got, want := called(), strings.Repeat("--noflush --wait 10\n", 2); got != want {
		t.Errorf("removed by %q, want %q", got, want)
	}
}

// standIn puts a script called as a command into a directory; $real is the command.
func standIn(t *testing.T, directory, command, script string) {
	t.Helper()
	path, err := exec.LookPath(command)
	if err == nil {
		err = os.WriteFile(filepath.Join(directory, command), []byte("#!/bin/sh\nreal="+path+"\n"+script+"\n"), 0o755)
	}
	if err != nil {
		t.Fatal(err)
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
	if backend.Name() != IPTables || !strings.Contains(backend.Reason, "nftables cannot be used") {
		t.Errorf("backend %s, reason %q", backend.Name(), backend.Reason)
	}
	one, both := planOf("169.254.210.210"), planOf("169.254.210.210", "fd00:a::1")
	if err := backend.Sync(t.Context(), one); err != nil {
		t.Error(err)
	}
	if err := backend.Sync(t.Context(), both); err == nil || !strings.Contains(err.Error(), "ip6tables") {
		t.Errorf("IPv6 without ip6tables: %v, want an error that names it", err)
	}
	if err := backend.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestLeftoversThatCannotBeRead: without CAP_NET_RAW, as in a container with the nftables backend, rules of iptables-legacy cannot be
// read. That keeps the agent from nothing, its end included; it is told.
func TestLeftoversThatCannotBeRead(t *testing.T) {
	inIPTablesNamespace(t)
	legacy := iptables.New(testAgent, legacyVariant(t))
	if err := legacy.Sync(t.Context(), planOf("169.254.210.210")); err != nil {
		t.Fatal(err)
	}
	if names, unread, err := Leftovers(t.Context(), NFTables, testAgent); err != nil || unread != "" || len(names) != 1 {
		t.Errorf("with CAP_NET_RAW: left by %q, %q, %v", names, unread, err)
	}
	dropNetRaw(t)
	s, err := Select(t.Context(), NFTables, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(s.Unread, "CAP_NET_RAW") {
		t.Errorf("unread: %q", s.Unread)
	}
	if err := errors.Join(s.Sync(t.Context(), planOf("169.254.210.210")), s.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	if exists, err := s.Exists(t.Context()); exists || err != nil {
		t.Errorf("exists: %v, %v", exists, err)
	}
	if names, unread, err := Leftovers(t.Context(), NFTables, testAgent); err != nil || unread == "" || len(names) > 0 {
		t.Errorf("left by %q, %q, %v", names, unread, err)
	}
}

func legacyVariant(t *testing.T) iptables.Variant {
	t.Helper()
	for _, v := range iptables.Variants(t.Context()) {
		if v.Legacy {
			return v
		}
	}
	t.Fatal("iptables-legacy is not installed")
	return iptables.Variant{}
}

// dropNetRaw takes CAP_NET_RAW from this thread and what it executes.
func dropNetRaw(t *testing.T) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Effective &^= 1 << unix.CAP_NET_RAW
	data[0].Permitted &^= 1 << unix.CAP_NET_RAW
	if err := errors.Join(unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_RAW, 0, 0, 0), unix.Capset(&header, &data[0])); err != nil {
		t.Fatal(err)
	}
}

// TestSelectTriesAgain: a trial that fails for a reason that may pass is made again. It decides neither on the backend nor on zones.
func TestSelectTriesAgain(t *testing.T) {
	for _, tt := range []struct {
		name, backend, command, fails string // fails: a pattern of arguments and input
		want                          string
	}{
		{"the first runs of nft", Auto, "nft", `*" -f "*`, NFTables},
		{"a trial with zones", Auto, "nft", `*zone\ set*`, NFTables},
		{"the table raw", IPTables, "iptables-nft-restore", `*\*raw*`, IPTables},
		{"the look for kubelet's chain", IPTables, "iptables-legacy", `*-S\ KUBE-*`, IPTables},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inIPTablesNamespace(t)
			kind := "iptables-nft"
			if tt.command == "iptables-legacy" {
				kind = tt.command
			}
			nodetest.Run(t, kind, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
			tools, failures := t.TempDir(), filepath.Join(t.TempDir(), "failures")
			standIn(t, tools, tt.command, `input=$(cat)
case " $* $input" in `+tt.fails+`)
	echo once >>`+failures+`
	if [ $(wc -l <`+failures+`) -le 2 ]; then
		echo "Error: Could not process rule: Device or resource busy" >&2
		exit 4
	fi ;;
esac
printf '%s\n' "$input" | $real "$@"`)
			t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
			selected, err := Select(t.Context(), tt.backend, testAgent)
			if err != nil {
				t.Fatal(err)
			}
			if called, err := os.ReadFile(failures); err != nil || strings.Count(string(called), "once") < 3 {
				t.Errorf("the stand-in was called %q, %v; want two failures and then none", called, err)
			}
			if selected.Name() != tt.want || selected.NoZones != nil || selected.Fallback != "" {
				t.Errorf("%s, no zones: %v, fallback %q", selected.Name(), selected.NoZones, selected.Fallback)
			}
			if tt.want == IPTables && !strings.Contains(selected.Reason, "kubelet uses it") {
				t.Errorf("reason %q", selected.Reason)
			}
		})
	}
}

// TestSelectNamesWhatItDoesNotKnow: where it cannot be read which iptables kubelet uses, the reason says so.
func TestSelectNamesWhatItDoesNotKnow(t *testing.T) {
	inIPTablesNamespace(t)
	tools := t.TempDir()
	standIn(t, tools, "iptables-nft", `case "$*" in *-S*) echo "Could not fetch rule set generation id: Permission denied" >&2; exit 4 ;; esac
exec $real "$@"`)
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	selected, err := Select(t.Context(), IPTables, testAgent)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(selected.Reason, "it is not known which one kubelet uses: ") || !strings.Contains(selected.Reason, "Permission denied") {
		t.Errorf("reason %q", selected.Reason)
	}
}
