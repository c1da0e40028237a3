package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// magic4 is the plain magic IP.
const magic4 = "169.254.210.210"

// TestDrift: what others do to our rules is mended within a poll, and what is theirs stays as it is.
func TestDrift(t *testing.T) {
	damages := []struct{ name, command, wantLog string }{
		{"table gone", "nft delete table ip magic-ip-" + agentName, "the whole table"},
		{"map emptied", "nft flush map ip magic-ip-" + agentName + " destinations", "missing from destinations"},
		{"chain flushed", "nft flush chain ip magic-ip-" + agentName + " translate", "missing rules translate"},
		{"rule added", "nft insert rule ip magic-ip-" + agentName + " from-network drop", "changed rules from-network"},
		{"element added", "nft add element ip magic-ip-" + agentName + " destinations { 169.254.210.210 . tcp . 99 : 10.244.3.99 . 99 }", "foreign in destinations"},
		{"ruleset flushed", "nft flush ruleset", "the whole table"},
	}
	w := serving(t, "nftables", "bridge", config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	ruleset := func() string {
		out, err := w.Run(t.Context(), "nft", "--stateless", "list", "ruleset")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, damage := range damages {
		t.Run(damage.name, func(t *testing.T) {
			before, logged, since := ruleset(), len(w.agent.Log()), time.Now()
			if _, err := w.Run(t.Context(), "nft", "add", "table", "ip", "theirs"); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Run(t.Context(), "sh", "-c", damage.command); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Run(t.Context(), "nft", "add", "table", "ip", "theirs"); err != nil {
				t.Fatal(err)
			}
			err := lab.Eventually(patience(t), func() error {
				if !strings.Contains(w.agent.Log()[logged:], damage.wantLog) {
					return fmt.Errorf("the log does not say %q", damage.wantLog)
				}
				if diff := cmp.Diff(sorted(before), sorted(strings.Replace(ruleset(), "table ip theirs {\n}\n", "", 1))); diff != "" {
					return fmt.Errorf("rules (-before +after):\n%s", diff)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			// What is damaged while the agent is still at it is mended in the same go, without a word.
			w.await("to be done with mending", func(a *runtimedir.Status) bool { return a.LastSync.After(since) })
			if got := w.fate("client", lab.NewConnection, magic(false)); !strings.HasPrefix(got, "answered by echo") {
				t.Errorf("after the repair: %s", got)
			}
			if _, err := w.Run(t.Context(), "nft", "delete", "table", "ip", "theirs"); err != nil {
				t.Error(err)
			}
		})
	}
}

// sorted makes listings comparable whose tables stand in another order.
func sorted(ruleset string) []string {
	tables := strings.SplitAfter(ruleset, "\n}\n")
	wanted := map[string]bool{}
	var out []string
	for _, table := range tables {
		if !wanted[table] {
			wanted[table] = true
			out = append(out, table)
		}
	}
	for i := range out {
		for j := i + 1; j < len(out); j++ {
			if out[j] < out[i] {
				out[i], out[j] = out[j], out[i]
			}
		}
	}
	return out
}

// TestConfigurationChange: a changed file counts without a restart, a broken one is reported and changes nothing.
func TestConfigurationChange(t *testing.T) {
	w := serving(t, "nftables", "bridge", config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	const file = "/run/agent-1.yaml"
	write := func(data string) {
		t.Helper()
		if err := w.WriteFile(file+".new", []byte(data)); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(w.Path(file+".new"), w.Path(file)); err != nil {
			t.Fatal(err)
		}
	}
	other := netip.MustParseAddrPort("169.254.210.211:8080")
	write(strings.ReplaceAll(string(config()), magic4, other.Addr().String()))
	w.await("to serve the new address", func(a *runtimedir.Status) bool {
		return a.MagicIPs[0].Address == other.Addr() && len(a.MagicIPs[0].Endpoints) == 1
	})
	if got := w.fate("client", lab.NewConnection, other); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("new address: %s", got)
	}
	write("name: " + agentName + "\nmagicIPs: [{ipAddress: nonsense}]\n")
	agent := w.await("to report the broken configuration", func(a *runtimedir.Status) bool { return a.LastError != "" })
	if !strings.Contains(agent.LastError, `magicIPs[0].ipAddress: "nonsense" is not allowed`) {
		t.Errorf("lastError is %q", agent.LastError)
	}
	if got := w.fate("client", lab.NewConnection, other); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("with a broken configuration: %s", got)
	}
	write(string(config()))
	w.await("to be back", func(a *runtimedir.Status) bool { return a.LastError == "" && a.MagicIPs[0].Address.String() == magic4 })
	if got := w.fate("client", lab.NewConnection, magic(false)); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("back: %s", got)
	}
}

// TestUnusableAddresses: what cannot be served is refused with the reason, and the others are served.
func TestUnusableAddresses(t *testing.T) {
	conf := "name: " + agentName + "\npollInterval: 1s\nmagicIPs:\n"
	for _, address := range []string{"169.254.169.254", "192.0.2.2", "127.0.0.5", "fe80::1", "224.0.0.1", magic4, magic4} {
		conf += fmt.Sprintf("- {ipAddress: %q, namespace: default, selector: app=echo, ports: [{port: %d}]}\n", address, port)
	}
	w := serving(t, "nftables", "bridge", []byte(conf))
	agent := w.await("to run", func(a *runtimedir.Status) bool { return len(a.MagicIPs) == 7 })
	for i, want := range []string{"instance metadata", "address of this node", "loopback", "link-local", "multicast", "", "claimed twice"} {
		if got := agent.MagicIPs[i].Reason; want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%s: refused because %q, want %q", agent.MagicIPs[i].Address, got, want)
		}
	}
	w.addClient()
	w.addPod("bridge", target("echo"))
	w.await("to have an endpoint", func(a *runtimedir.Status) bool { return len(a.MagicIPs[5].Endpoints) == 1 })
	w.echo("echo")
	if got := w.fate("client", lab.NewConnection, magic(false)); !strings.HasPrefix(got, "answered by echo") {
		t.Errorf("the usable one: %s", got)
	}
}

// claimedPort: the older of two claims stands, a port of the other agent on the same address is left to
// it, and when the older agent's file goes the younger takes over. A second process with the same name waits.
func claimedPort(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "bridge", config())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	younger, err := w.StartAgent([]byte(fmt.Sprintf(
		"name: default.younger\npollInterval: 1s\nmagicIPs: [{ipAddress: %s, namespace: default, selector: app=echo, ports: [{port: %d}, {port: 81, targetPort: %d}]}]\n",
		magic4, port, port)))
	if err != nil {
		t.Fatal(err)
	}
	readYounger := func(wanted func(*runtimedir.Status) bool) {
		t.Helper()
		err := lab.Eventually(patience(t), func() error {
			agent, err := runtimedir.New(w.Path(lab.RuntimeDir)).Agent("default.younger").ReadStatus()
			if err == nil && !wanted(agent) {
				err = fmt.Errorf("the younger agent has published %+v", agent)
			}
			return err
		})
		if err != nil {
			t.Fatalf("%v\n%s", err, younger.Log())
		}
	}
	readYounger(func(a *runtimedir.Status) bool {
		return strings.Contains(a.MagicIPs[0].Reason, "claimed by agent "+agentName) && a.MagicIPs[1].Reason == "" && len(a.MagicIPs[1].Endpoints) == 1
	})
	port81 := netip.AddrPortFrom(magic(false).Addr(), 81)
	err = lab.Eventually(patience(t), func() error {
		for _, to := range []netip.AddrPort{magic(false), port81} {
			for _, from := range []string{"client", lab.Host} {
				if got := w.fate(from, lab.NewConnection, to); !strings.HasPrefix(got, "answered by echo") {
					return fmt.Errorf("%q to %s: %s", from, to, got)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if got := w.fate("client", lab.NewConnection, netip.AddrPortFrom(magic(false).Addr(), 82)); got != "refused" {
		t.Errorf("a port that nobody claims: %s", got)
	}

	standby, err := w.StartAgent(config())
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Eventually(patience(t), func() error {
		if !strings.Contains(standby.Log(), "standing by") {
			return errors.New("no word of standing by")
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := w.await("to run", func(*runtimedir.Status) bool { return true }).StartedAt
	w.agent.Kill()
	w.await("to be replaced by the standby", func(a *runtimedir.Status) bool { return a.StartedAt.After(before) })

	standby.Kill()
	if err := runtimedir.New(w.Path(lab.RuntimeDir)).Agent(agentName).Leave(); err != nil {
		t.Fatal(err)
	}
	readYounger(func(a *runtimedir.Status) bool {
		return a.MagicIPs[0].Reason == "" && len(a.MagicIPs[0].Endpoints) == 1
	})
}

// TestMountedReadOnly: as in the chart's pod, the agent sees the runtime directory read-only and may write in its own directory
// alone. It serves, follows the state file that the plugin makes later, is restarted, and what it writes is nowhere else.
func TestMountedReadOnly(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "nftables", "bridge")
	own := lab.RuntimeDir + "/agents/" + agentName
	w.run("mkdir -p " + own)
	w.AgentPrefix = []string{"unshare", "--mount", "--propagation", "private", "sh", "-ec",
		fmt.Sprintf("mount --bind -o ro %[1]s %[1]s; mount --bind %[2]s %[2]s; mount -o remount,bind,rw %[2]s; exec \"$0\" \"$@\"", lab.RuntimeDir, own)}
	w.start(config())
	w.addTarget("echo")
	w.awaitEndpoint("echo")
	w.agent.Kill()
	w.start(config())
	w.awaitEndpoint("echo")
	w.delTarget("echo")
	w.await("to have no endpoint", func(a *runtimedir.Status) bool { return len(a.MagicIPs[0].Endpoints) == 0 && a.LastError == "" })
	got := strings.Fields(w.run("cd " + lab.RuntimeDir + " && find . -type f | sort"))
	want := []string{
		"./agents/default.magic-ip/claims.json", "./agents/default.magic-ip/live", "./agents/default.magic-ip/lock", "./agents/default.magic-ip/memory.json",
		"./agents/default.magic-ip/pods.json", "./agents/default.magic-ip/status.json", "./plugin/state.json", "./plugin/state.lock",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}
