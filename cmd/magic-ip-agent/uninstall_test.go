package main

import (
	"bytes"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// uninstalled is a network namespace in which an agent called a has hairpin mode on at a port of cni0, and a local route for 198.18.0.1.
type uninstalled struct {
	*testing.T
	dir  runtimedir.Dir
	port int
}

func newUninstalled(t *testing.T) *uninstalled {
	t.Helper()
	nodetest.Namespace(t, "addr add 192.0.2.2/24 dev lo\nlink set lo up\nlink add cni0 type bridge\nlink add veth-a type veth peer name pod\nlink set veth-a master cni0")
	u := &uninstalled{T: t, dir: runtimedir.New(t.TempDir())}
	kernel := node.Kernel{}
	for _, link := range u.snapshot().Links {
		if link.Name == "veth-a" {
			u.port = link.Index
		}
	}
	err := errors.Join(
		kernel.SetHairpin(u.port, true),
		kernel.AddLocalRoute(node.LocalRoute{Address: netip.MustParseAddr("198.18.0.1"), Source: netip.MustParseAddr("192.0.2.2")}),
		u.dir.Agent("a").WriteClaims(nil),
		u.dir.Agent("a").WriteMemory(runtimedir.Memory{Hairpins: []int{u.port}, Namespace: kernel.Namespace()}),
	)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *uninstalled) snapshot() node.Snapshot {
	u.Helper()
	snapshot, err := node.Kernel{}.Snapshot()
	if err != nil {
		u.Fatal(err)
	}
	return snapshot
}

// uninstall runs the command; it fails where says is not empty.
func (u *uninstalled) uninstall(says string, args ...string) {
	u.Helper()
	root := rootCommand()
	var stderr bytes.Buffer
	root.SetErr(&stderr)
	root.SetArgs(append([]string{"uninstall", "--name", "a", "--runtime-dir", u.dir.Path(), "--cni-conf-dir", u.TempDir(), "--cni-bin-dir", u.TempDir()}, args...))
	code := execute(u.Context(), root)
	if wrong := says != ""; (code == 1) != wrong || !strings.Contains(stderr.String(), says) {
		u.Errorf("exit status %d, it says %q, want %q", code, stderr.String(), says)
	}
}

// want compares what is on the node.
func (u *uninstalled) want(when string, route, hairpin, files bool) {
	u.Helper()
	snapshot := u.snapshot()
	hairpinOn := false
	for _, link := range snapshot.Links {
		hairpinOn = hairpinOn || link.Hairpin
	}
	_, err := os.Stat(filepath.Dir(u.dir.Agent("a").StatusPath()))
	if got := len(snapshot.LocalRoutes) > 0; got != route || hairpinOn != hairpin || errors.Is(err, fs.ErrNotExist) == files {
		u.Errorf("%s: local routes %v, hairpin mode is on: %t, files: %v; want %t, %t, %t", when, snapshot.LocalRoutes, hairpinOn, err, route, hairpin, files)
	}
}

// TestUninstallThatFails: where something stays in the kernel, the agent's files do too, so that uninstall can be run again; by force they go.
func TestUninstallThatFails(t *testing.T) {
	t.Run("the claims of another agent", func(t *testing.T) {
		u := newUninstalled(t)
		other := u.dir.Agent("other")
		if err := errors.Join(other.WriteStatus(runtimedir.Status{}), os.WriteFile(filepath.Join(filepath.Dir(other.StatusPath()), "claims.json"), []byte("{"), 0o600)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			u.uninstall("local routes stay: pods are refused at these addresses: ")
			u.want("unreadable", true, false, true)
		}
		if err := other.WriteClaims(nil); err != nil {
			t.Fatal(err)
		}
		u.uninstall("")
		u.want("readable", false, false, false)
	})
	t.Run("by force", func(t *testing.T) {
		u := newUninstalled(t)
		if err := u.dir.Agent("a").WriteStatus(runtimedir.Status{}); err != nil {
			t.Fatal(err)
		}
		memory := filepath.Join(filepath.Dir(u.dir.Agent("a").StatusPath()), "memory.json")
		if err := os.WriteFile(memory, []byte(`{"version": 2}`), 0o600); err != nil {
			t.Fatal(err)
		}
		u.uninstall("hairpin mode may stay on")
		u.want("without force", false, true, true)
		u.uninstall("", "--force")
		u.want("by force", false, true, false)
	})
	t.Run("own claims", func(t *testing.T) {
		u := newUninstalled(t)
		if err := os.WriteFile(filepath.Join(filepath.Dir(u.dir.Agent("a").StatusPath()), "claims.json"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		u.uninstall("")
		u.want("own claims are not asked for", false, false, false)
	})
}

// TestUninstallEndsFlows: what the rules translated goes with them, but for established TCP, and for what is another agent's.
func TestUninstallEndsFlows(t *testing.T) {
	u := newUninstalled(t)
	served := func(address string, protocol plan.Protocol) runtimedir.Claim {
		return runtimedir.Claim{Frontend: plan.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: 80}, Served: true}
	}
	if err := u.dir.Agent("a").WriteClaims([]runtimedir.Claim{served("198.18.0.1", plan.UDP), served("198.18.0.1", plan.TCP)}); err != nil {
		t.Fatal(err)
	}
	flow := func(protocol, to string, more ...string) {
		nodetest.Run(t, "conntrack", append([]string{"-I", "-t", "1000", "-p", protocol, "-s", "10.244.1.9", "-d", to, "--sport", "1000", "--dport", "80", "--dst-nat", "10.244.1.2"}, more...)...)
	}
	flow("udp", "198.18.0.1")
	flow("udp", "198.18.0.2")
	flow("tcp", "198.18.0.1", "--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED")
	u.uninstall("")
	left := nodetest.Run(t, "conntrack", "-L")
	for flow, want := range map[string]bool{"udp .* dst=198.18.0.1 ": false, "udp .* dst=198.18.0.2 ": true, "tcp .* dst=198.18.0.1 ": true} {
		if got := regexp.MustCompile(flow).MatchString(left); got != want {
			t.Errorf("%s: %t, want %t, in:\n%s", flow, got, want, left)
		}
	}
}
