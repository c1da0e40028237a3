package main

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/screen/screentest"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestStatusWatch: on a terminal a change of the endpoint is marked and listed, and the exit status is the one of what was shown last.
func TestStatusWatch(t *testing.T) {
	t.Setenv("TERM", "xterm")
	t.Setenv("NO_COLOR", "1")
	dir := runtimedir.New(t.TempDir())
	own := dir.Agent("default.magic-ip")
	lock, err := own.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	write := func(pod string) {
		t.Helper()
		err := own.WriteStatus(runtimedir.Status{StartedAt: time.Now(), Backend: "nftables", PollInterval: "1h", MagicIPs: []runtimedir.MagicIP{{
			Frontend:  runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: runtimedir.TCP, Port: 80},
			Namespace: "default", Selector: "app=echo", Action: "serve", Since: time.Now().Add(-time.Hour),
			Endpoints: []runtimedir.Endpoint{{Address: netip.MustParseAddrPort("10.244.1.2:8080"), Pod: pod}}, Count: &runtimedir.Count{Opened: 7, Refused: 3},
		}}})
		if err != nil {
			t.Fatal(err)
		}
	}
	write("default/old")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	const change = "169.254.210.210:80/tcp  10.244.1.2:8080 default/old → 10.244.1.2:8080 default/new"
	renewed := false
	out := screentest.Terminal(t, 120, 20, func(all string) {
		switch {
		case strings.Contains(all, change):
			stop()
		case strings.Contains(all, "default/old") && !renewed:
			renewed = true
			write("default/new")
		}
	}, func(terminal *os.File) {
		root := rootCommand()
		root.SetArgs([]string{"status", "--watch", "--runtime-dir", dir.Path()})
		root.SetOut(terminal)
		if code := execute(ctx, root); code != 0 {
			t.Errorf("exit status %d", code)
		}
	})
	for _, want := range []string{
		"MAGIC IP            PROTOCOL  ENDPOINT         POD          AGE   CONNECTIONS  OPENED  REFUSED\x1b[K",
		"  169.254.210.210:80  tcp       10.244.1.2:8080  default/old  1h0m", "* 169.254.210.210:80  tcp       10.244.1.2:8080  default/new  1h0m  0            7       3", change, "\x1b[?25h",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%q", want, out)
		}
	}
}

// TestStatusWatchExit: the exit status is that of what was shown last, in every format.
func TestStatusWatchExit(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	own := dir.Agent("default.magic-ip")
	lock, err := own.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := own.WriteStatus(runtimedir.Status{PollInterval: "5s"}); err != nil {
		t.Fatal(err)
	}
	for _, output := range []string{"table", "json"} {
		for age, want := range map[time.Duration]int{0: 0, time.Minute: 1} {
			if err := own.Renew(time.Now().Add(-age)); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithTimeout(t.Context(), 500*time.Millisecond)
			root := rootCommand()
			root.SetArgs([]string{"status", "--watch", "-o", output, "--runtime-dir", dir.Path()})
			var out strings.Builder
			root.SetOut(&out)
			if code := execute(ctx, root); code != want {
				t.Errorf("-o %s, polled %s ago: exit status %d, want %d\n%s", output, age, code, want, &out)
			}
			if hung := strings.Contains(out.String(), "has not polled for"); hung != (want == 1) {
				t.Errorf("-o %s, polled %s ago:\n%s", output, age, &out)
			}
			stop()
		}
	}
}
