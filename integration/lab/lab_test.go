package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const bridgeOnly = `{"cniVersion": "1.0.0", "name": "plain", "plugins": [
	{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": {"type": "host-local",
	 "ranges": [[{"subnet": "10.244.9.0/24"}], [{"subnet": "fd00:10:244:9::/64"}]],
	 "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}}]}`

func newNode(t *testing.T) *Node {
	t.Helper()
	node, err := NewNode(t.Context(), NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	return node
}

// addPod attaches a pod and starts an echo server of its name in it.
func addPod(t *testing.T, node *Node, name string) (Attached, *Echo) {
	t.Helper()
	attached, err := node.Add(t.Context(), "plain", Pod{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	echo, err := node.StartEcho(name, name, 8080)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = echo.Close() })
	return attached, echo
}

// patience is for what happens soon or never.
func patience(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := Patience(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestTrafficBetweenPods(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	if err := node.AddConf("10-plain.conflist", []byte(bridgeOnly)); err != nil {
		t.Fatal(err)
	}
	server, _ := addPod(t, node, "server")
	client, _ := addPod(t, node, "client")
	for i, ip := range server.IPs {
		for _, kind := range []Kind{NewConnection, KeepAlive, UDP} {
			for from, address := range map[string]string{
				"client": client.IPs[i].String(),
				Host:     map[bool]string{true: "10.244.9.1", false: "fd00:10:244:9::1"}[ip.Is4()],
				Uplink:   map[bool]string{true: UplinkIPv4, false: UplinkIPv6}[ip.Is4()],
			} {
				answer, err := node.Ask(t.Context(), Client{Kind: kind, From: from, To: netip.AddrPortFrom(ip, 8080)})
				if err != nil || answer.Server != "server" || answer.Client.Addr().String() != address {
					t.Errorf("%s to %s from %q: answer %v, error %v, want one to %s", kind, ip, from, answer, err, address)
				}
			}
		}
	}
}

func TestProbeNotesWhatHappens(t *testing.T) {
	t.Parallel()
	for _, kind := range []Kind{NewConnection, KeepAlive, UDP} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			node := newNode(t)
			if err := node.AddConf("10-plain.conflist", []byte(bridgeOnly)); err != nil {
				t.Fatal(err)
			}
			server, echo := addPod(t, node, "server")
			addPod(t, node, "client")
			to := netip.AddrPortFrom(server.IPs[0], 8080)

			probe := node.StartProbe(Client{Kind: kind, From: "client", To: to, Timeout: 300 * time.Millisecond}, 10*time.Millisecond)
			if _, err := probe.Await(patience(t), AnsweredBy("server")); err != nil {
				t.Fatal(err)
			}
			if err := echo.Close(); err != nil {
				t.Fatal(err)
			}
			outcome, err := probe.Await(patience(t), Unanswered)
			if err != nil {
				t.Fatal(err)
			}
			if !errors.Is(outcome.Err, syscall.ECONNREFUSED) {
				t.Errorf("closed server: %v, want connection refused", outcome.Err)
			}
			// From here on nobody answers at all: not even a refusal comes back.
			if err := node.Del(t.Context(), "plain", Pod{Name: "server"}); err != nil {
				t.Fatal(err)
			}
			if _, err := probe.Await(patience(t), func(o Outcome) bool { return o.Took >= 300*time.Millisecond }); err != nil {
				t.Fatal(err)
			}
			outcomes := probe.Stop()
			if failed := len(outcomes.Failed()); failed == 0 || failed == len(outcomes) {
				t.Errorf("%d of %d requests failed, want some", failed, len(outcomes))
			}
			if gap, longest := outcomes.LongestGap(), outcomes.Longest(); gap < 300*time.Millisecond || longest < 300*time.Millisecond || longest > gap {
				t.Errorf("longest gap %v, longest request %v, want both above the time-out", gap, longest)
			}
		})
	}
}

func TestNodeLeavesTheMachineAlone(t *testing.T) {
	before := machine(t)
	node := newNode(t)
	if err := node.AddConf("10-plain.conflist", []byte(bridgeOnly)); err != nil {
		t.Fatal(err)
	}
	addPod(t, node, "server")
	if err := node.Sysctl(Host, "ipv4/ip_default_ttl", "42"); err != nil {
		t.Fatal(err)
	}
	if inside, err := node.Run(t.Context(), "cat", "/proc/sys/net/ipv4/ip_default_ttl"); err != nil || inside != "42\n" {
		t.Errorf("sysctl inside the node: %q, %v, want 42", inside, err)
	}
	if err := node.WriteFile("/proc/sys/net/ipv4/ip_default_ttl", []byte("42")); err == nil {
		t.Error("WriteFile wrote a sysctl of the machine")
	}
	if after := machine(t); after != before {
		t.Errorf("the machine has changed:\n%s\nwas:\n%s", after, before)
	}
}

// machine is what a node could disturb by mistake.
func machine(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", `ip route; ip netns; ls -d /sys/class/net/cni0 /run/cni /var/lib/cni 2>/dev/null
		cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/ip_default_ttl`).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

// TestMain lets the test binary be the maker of a node that is killed.
func TestMain(m *testing.M) {
	if os.Getenv("LAB_TEST_MAKER") == "" {
		os.Exit(m.Run())
	}
	node, err := NewNode(context.Background(), NodeOptions{})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(node.pid)
	select {}
}

func TestNodeEndsWithItsMaker(t *testing.T) {
	t.Parallel()
	maker := exec.CommandContext(t.Context(), os.Args[0])
	maker.Env = append(os.Environ(), "LAB_TEST_MAKER=yes")
	stdout, err := maker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := maker.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanln(stdout, &pid); err != nil {
		t.Fatal(err)
	}
	holder := fmt.Sprintf("/proc/%d/ns/net", pid)
	if _, err := os.Stat(holder); err != nil {
		t.Fatal(err)
	}
	if err := maker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = maker.Wait()
	if err := Eventually(patience(t), func() error {
		if _, err := os.Stat(holder); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("process %d still holds the node", pid)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestCancelledCommandDies(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	ctx, cancel := context.WithCancel(t.Context())
	cmd := node.Command(ctx, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	running := func() string {
		out, err := node.Run(t.Context(), "sh", "-c", "cat /proc/[0-9]*/comm")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if err := Eventually(patience(t), func() error {
		if out := running(); !strings.Contains(out, "sleep") {
			return errors.New(out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	cancel()
	_ = cmd.Wait()
	if out := running(); strings.Contains(out, "sleep") {
		t.Errorf("still running in the node:\n%s", out)
	}
}

// The agent's part is played by a script: what is tested is that signals find the process.
func TestAgentProcess(t *testing.T) {
	t.Parallel()
	script := filepath.Join(t.TempDir(), "agent")
	content := "#!/bin/sh\ntrap 'echo stopping; exit 0' TERM\necho \"$@\"\ngrep -q fail $4 && exit 3\nwhile :; do sleep 0.01; done\n"
	if err := os.WriteFile(script, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	node, err := NewNode(t.Context(), NodeOptions{Name: "n1", Binaries: Binaries{Agent: script}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = node.Close() }()
	start := func(config string) *Agent {
		t.Helper()
		agent, err := node.StartAgent([]byte(config), "--log-level", "debug")
		if err != nil {
			t.Fatal(err)
		}
		if err := Eventually(patience(t), func() error {
			if !strings.Contains(agent.Log(), "--node-name n1 --runtime-dir /run/magic-ip-address --log-level debug\n") {
				return fmt.Errorf("log: %q", agent.Log())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return agent
	}

	agent := start("serve")
	if err := agent.Stop(patience(t)); err != nil || !strings.Contains(agent.Log(), "stopping") {
		t.Errorf("Stop: %v, log %q", err, agent.Log())
	}
	agent = start("serve")
	agent.Kill()
	if err := agent.Stop(patience(t)); err != nil || strings.Contains(agent.Log(), "stopping") {
		t.Errorf("Stop after Kill: %v, log %q", err, agent.Log())
	}
	agent = start("fail")
	<-agent.Exited()
	if err := agent.Stop(patience(t)); err == nil {
		t.Error("Stop is silent about an agent that has failed")
	}
	if out, err := node.Run(t.Context(), "sh", "-c", "cat /proc/[0-9]*/cmdline"); err != nil || strings.Contains(out, script) {
		t.Errorf("left in the node (%v): %q", err, out)
	}
}

func TestMissingBinarySaysHowToMakeIt(t *testing.T) {
	t.Parallel()
	node, err := NewNode(t.Context(), NodeOptions{Binaries: Binaries{CNITool: "/none/cnitool", Agent: "/none/agent"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = node.Close() }()
	if err := node.Status(t.Context(), "plain"); err == nil || !strings.Contains(err.Error(), "make build tools") {
		t.Errorf("without cnitool: %v", err)
	}
	if _, err := node.StartAgent(nil); err == nil || !strings.Contains(err.Error(), "make build tools") {
		t.Errorf("without the agent: %v", err)
	}
}
