package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// slowly is the configuration with polls so seldom that only events can explain what happens.
func slowly() []byte {
	return []byte(strings.Replace(string(config()), "pollInterval: 1s", "pollInterval: 1h", 1))
}

// TestDriftIsMendedAtOnce: the kernel tells of changes to our table, and the agent does not wait for a poll.
func TestDriftIsMendedAtOnce(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "bridge", slowly())
	w.addClient()
	w.addTarget("echo")
	w.echo("echo")
	probe := w.StartProbe(lab.Client{Kind: lab.NewConnection, From: "client", To: magic(false), Timeout: 200 * time.Millisecond}, 5*time.Millisecond)
	defer probe.Stop()
	if _, err := w.Run(t.Context(), "nft", "delete", "table", "ip", "magic-ip-"+agentName); err != nil {
		t.Fatal(err)
	}
	if _, err := probe.Await(patience(t), lab.AnsweredBy("echo")); err != nil {
		t.Errorf("the rules did not come back: %v", err)
	}
	if log := w.agent.Log(); !strings.Contains(log, "the whole table") {
		t.Errorf("the log does not say what was missing")
	}
}

// TestForeignTranslationIsNamed: the rule that the bash tool has left behind is named to the operator.
func TestForeignTranslationIsNamed(t *testing.T) {
	t.Parallel()
	for _, rule := range []struct{ name, command string }{
		{"iptables-nft", "iptables-nft -t nat -A PREROUTING -p tcp -i cni0 -d " + magic4 + " --dport 8080 -j DNAT --to-destination 10.9.9.9:80"},
		{"iptables-legacy", "iptables-legacy -t nat -A PREROUTING -p tcp -i cni0 -d " + magic4 + " --dport 8080 -j DNAT --to-destination 10.9.9.9:80"},
		{"nft", "nft 'add table ip theirs; add chain ip theirs pre { type nat hook prerouting priority dstnat; }; add rule ip theirs pre ip daddr " + magic4 + " tcp dport 8080 dnat to 10.9.9.9:80'"},
	} {
		t.Run(rule.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "nftables", "bridge")
			if _, err := w.Run(t.Context(), "sh", "-c", rule.command); err != nil {
				t.Fatal(err)
			}
			w.start(config())
			agent := w.await("to name the rule", func(a *runtimedir.Status) bool { return len(a.Notes) > 0 })
			if note := strings.Join(agent.Notes, "\n"); !strings.Contains(note, "10.9.9.9:80") || len(agent.Notes) != 1 {
				t.Errorf("notes: %s", note)
			}
			out, err := w.RunAgent(t.Context(), "status", "--runtime-dir", lab.RuntimeDir)
			if err != nil || !strings.Contains(out, "10.9.9.9:80") {
				t.Errorf("status: %v\n%s", err, out)
			}
		})
	}
}

// TestStatus: what the operator and kubelet see of a running, and of a dead agent.
func TestStatus(t *testing.T) {
	t.Parallel()
	w := serving(t, "nftables", "bridge", config())
	w.addTarget("echo")
	status := func(flags ...string) (string, error) {
		return w.RunAgent(t.Context(), append([]string{"status", "--runtime-dir", lab.RuntimeDir}, flags...)...)
	}
	out, err := status()
	if err != nil || !strings.Contains(out, "agent "+agentName+": running since") || !strings.Contains(out, "default/echo") {
		t.Errorf("status: %v\n%s", err, out)
	}
	if out, err := status("-o", "json"); err != nil || !strings.Contains(out, `"live": true`) {
		t.Errorf("status -o json: %v\n%s", err, out)
	}
	if out, err := status("--probe"); err != nil || out != "" {
		t.Errorf("status --probe of a running agent: %v\n%s", err, out)
	}
	w.agent.Kill()
	if _, err := status("--probe"); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("status --probe of a dead agent: %v", err)
	}
	if _, err := status("--name", "nobody"); err == nil || !strings.Contains(err.Error(), "no agent called nobody") {
		t.Errorf("status of an agent that is not there: %v", err)
	}
}
