package status_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestStatus: what people see of agents that run, have stopped, hang, or cannot be read; and that no name reaches the terminal as
// anything but text.
func TestStatus(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	if read, err := status.Read(dir, ""); err != nil || read.Unhealthy(time.Now()) == nil {
		t.Errorf("an empty directory: %+v, %v", read, err)
	}
	if _, err := status.Read(dir, "live"); err == nil || !strings.Contains(err.Error(), "no agent called live") {
		t.Errorf("an agent that is not there: %v", err)
	}
	frontend := runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: runtimedir.TCP, Port: 80}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	live := dir.Agent("live")
	lock, err := live.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	err = errors.Join(
		live.WriteStatus(runtimedir.Status{
			StartedAt: at, Backend: "nftables", PollInterval: "5s", LastError: "conntrack: \x1b[31mbroken", Notes: []string{"a note"},
			MagicIPs: []runtimedir.MagicIP{
				{Frontend: frontend, Namespace: "default", Selector: "app=echo", Action: "serve", Endpoints: []runtimedir.Endpoint{{Address: netip.MustParseAddrPort("10.244.1.2:8080"), Pod: "default/\x1b[2Jecho"}}},
				{Frontend: frontend, Namespace: "default", Selector: "app=none", Action: "reject"},
				{Frontend: frontend, Namespace: "default", Selector: "app=other", Reason: "claimed"},
			},
		}),
		dir.Agent("stopped").WriteStatus(runtimedir.Status{PollInterval: "5s"}),
		dir.Installer("live").WriteRecord(runtimedir.Record{Conflist: "/etc/cni/net.d/10-a.conflist", InstalledAt: at, LastError: "read-only", Notes: []string{"it comes back"}}),
		dir.Agent("unreadable").WriteStatus(runtimedir.Status{}),
		os.WriteFile(dir.Agent("unreadable").StatusPath(), []byte("{"), 0o600),
		live.Renew(at), dir.Agent("stopped").Renew(at),
		dir.Agent("starting").WriteClaims(nil), // it has no status yet
	)
	if err != nil {
		t.Fatal(err)
	}
	read, err := status.Read(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := read.Write(&out, at.Add(time.Second), false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"agent live: running since 2026-01-02T03:04:05Z, backend nftables\n", `error: conntrack: \x1b[31mbroken`, "note: a note\n",
		"installed: /etc/cni/net.d/10-a.conflist since 2026-01-02T03:04:05Z\n", "installer's error: read-only\n", "installer's note: it comes back\n",
		"169.254.210.210:80  tcp       default    app=echo   10.244.1.2:8080", `default/\x1b[2Jecho`,
		"none: reject", "unserved: claimed",
		"agent stopped: not running; its rules stay as they were at ", "agent unreadable: ", "status.json is corrupt",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Errorf("escapes reach the terminal:\n%q", out.String())
	}
	if strings.Contains(out.String(), "starting") {
		t.Errorf("an agent without a status is shown:\n%s", out.String())
	}
	if _, err := status.Read(dir, "starting"); err == nil || !strings.Contains(err.Error(), "no agent called starting") {
		t.Errorf("an agent without a status: %v", err)
	}
	one, err := status.Read(dir, "live")
	if err != nil {
		t.Fatal(err)
	}
	for after, healthy := range map[time.Duration]bool{0: true, 15 * time.Second: true, 16 * time.Second: false} {
		if err := one.Unhealthy(at.Add(after)); (err == nil) != healthy {
			t.Errorf("%s after the heartbeat: %v", after, err)
		}
	}
	if read.Unhealthy(at) == nil {
		t.Error("two agents of three are well, and all is well")
	}
}

func TestWriteLinks(t *testing.T) {
	read := status.Status{Agents: []status.Agent{{Status: runtimedir.Status{Name: "a", Links: []runtimedir.Links{
		{Names: []string{"eth0"}, Kind: "device", Role: "uplink", Reason: "a default route goes by it"},
		{Names: []string{"cali1", "cali2", "cali3", "cali4", "cali5", "cali6", "cali7"}, Kind: "veth", Role: "served", Reason: "its other end is in another network namespace"},
		{Names: []string{"a\x1b[2J"}, Kind: "veth", Role: "other", Reason: "both of its ends are on the node"},
	}}}}}
	var out strings.Builder
	if err := read.Write(&out, time.Now(), false); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"eth0                                      device  uplink  a default route goes by it\n",
		"cali1,cali2,cali3,cali4,cali5 and 2 more  veth    served  its other end is in another network namespace\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if strings.ContainsRune(out.String(), '\x1b') {
		t.Errorf("a control character in\n%q", &out)
	}
}

// TestCount: connections are counted for what is served, and are absent where they cannot be counted. A live screen shows them with
// the age of what is served.
func TestCount(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	address := netip.MustParseAddr("169.254.210.210")
	served, unserved := runtimedir.Frontend{Address: address, Protocol: runtimedir.TCP, Port: 80}, runtimedir.Frontend{Address: address, Protocol: runtimedir.UDP, Port: 53}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, name := range []string{"a", "b"} {
		if err := dir.Agent(name).WriteStatus(runtimedir.Status{MagicIPs: []runtimedir.MagicIP{
			{Frontend: served, Action: "reject", Since: at, Why: []string{"no pod"}}, {Frontend: unserved, Reason: "claimed"},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	read, err := status.Read(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	read.Count(func([]runtimedir.Frontend) (map[runtimedir.Frontend]int, error) {
		return nil, errors.New("not permitted")
	})
	if read.Agents[0].MagicIPs[0].Connections != nil {
		t.Error("connections that cannot be counted are there")
	}
	if frame, err := read.Frame(at); err != nil || !strings.Contains(fmt.Sprint(frame.Tables), "not permitted") {
		t.Errorf("the screen does not say why connections are not counted: %v, %v", frame.Tables, err)
	}
	read.Count(func(frontends []runtimedir.Frontend) (map[runtimedir.Frontend]int, error) {
		return map[runtimedir.Frontend]int{served: 10 * len(frontends)}, nil
	})
	frame, err := read.Frame(at.Add(90 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	rows := frame.Tables[1].Rows
	if got := strings.Join(rows[0].Cells, "|"); got != "169.254.210.210:80|tcp|none: reject||1m30s|40||" || rows[0].Key != "b 169.254.210.210:80/tcp" || rows[0].State != "none: reject" {
		t.Errorf("%q is %s, its state is %q", rows[0].Key, got, rows[0].State)
	}
	if got := strings.Join(rows[1].Cells, "|"); got != "169.254.210.210:53|udp|unserved: claimed|||||" {
		t.Errorf("unserved: %s", got)
	}
	if below := frame.Tables[0].Below; len(below) != 1 || !strings.Contains(below[0].Text, "no pod") {
		t.Errorf("below: %v", below)
	}
}
