package integration

import (
	"net/netip"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func TestSmoke(t *testing.T) {
	ctx := t.Context()
	n, err := lab.NewNode(ctx, lab.NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	conf, _ := lab.Conflist("10-bridge.conflist")
	n.AddConf("10-bridge.conflist", conf)
	a, err := n.StartAgent([]byte("name: default.magic-ip\nmagicIPs:\n- ipAddress: 169.254.210.210\n  namespace: default\n  selector: app=echo\n  ports: [{port: 8080},{port: 8080, protocol: udp}]\n"), "--log-level", "debug")
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	n.Add(ctx, "bridge", lab.Pod{Name: "echo", Labels: map[string]string{"app": "echo"}})
	n.Add(ctx, "bridge", lab.Pod{Name: "client"})
	_, err = n.StartEcho("echo", "echo", 8080)
	t.Log(err)
	time.Sleep(time.Second)
	t.Log(n.Run(ctx, "cat", "/run/magic-ip-address/state.json", "/run/magic-ip-address/agents/default.magic-ip.json"))
	t.Log(n.Run(ctx, "nft", "list", "ruleset"))
	for _, from := range []string{"client", "echo", lab.Host, lab.Uplink} {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			s := time.Now()
			ans, err := n.Ask(ctx, lab.Client{Kind: kind, From: from, To: netip.MustParseAddrPort("169.254.210.210:8080"), Timeout: time.Second})
			t.Log(from, kind, ans, err, time.Since(s))
		}
	}
	t.Log(n.Del(ctx, "bridge", lab.Pod{Name: "echo"}))
	time.Sleep(500 * time.Millisecond)
	for _, from := range []string{"client", lab.Host, lab.Uplink} {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.UDP} {
			s := time.Now()
			ans, err := n.Ask(ctx, lab.Client{Kind: kind, From: from, To: netip.MustParseAddrPort("169.254.210.210:8080"), Timeout: time.Second})
			t.Log(from, kind, ans, err, time.Since(s))
		}
	}
	t.Log(a.Log())
}
