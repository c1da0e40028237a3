package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestGapsAndFailures(t *testing.T) {
	t.Parallel()
	start := time.Now()
	outcome := func(sent, took int, err error) Outcome {
		return Outcome{Sent: start.Add(time.Duration(sent)), Took: time.Duration(took), Err: err}
	}
	failure := errors.New("refused")
	for name, test := range map[string]struct {
		outcomes             Outcomes
		failed, longest, gap int
	}{
		"nothing":               {},
		"all answered":          {Outcomes{outcome(0, 10, nil), outcome(20, 5, nil), outcome(40, 10, nil)}, 0, 10, 25},
		"a failure between":     {Outcomes{outcome(0, 10, nil), outcome(20, 300, failure), outcome(330, 10, nil)}, 1, 300, 330},
		"failures at the end":   {Outcomes{outcome(0, 10, nil), outcome(20, 30, failure), outcome(60, 30, failure)}, 2, 30, 80},
		"only failures":         {Outcomes{outcome(0, 10, failure), outcome(20, 10, failure)}, 2, 10, 30},
		"answered out of order": {Outcomes{outcome(10, 10, nil), outcome(20, 10, nil), outcome(0, 100, nil)}, 0, 100, 70},
	} {
		failed, longest, gap := len(test.outcomes.Failed()), test.outcomes.Longest(), test.outcomes.LongestGap()
		if failed != test.failed || longest != time.Duration(test.longest) || gap != time.Duration(test.gap) {
			t.Errorf("%s: %d failed, longest request %d, longest gap %d, want %d, %d, %d",
				name, failed, longest, gap, test.failed, test.longest, test.gap)
		}
	}
}

// TestStream: datagrams do not wait for one another, and each has one outcome.
func TestStream(t *testing.T) {
	t.Parallel()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := netip.MustParseAddrPort(server.LocalAddr().String())
	go func() {
		buffer := make([]byte, 100)
		for {
			size, from, err := server.ReadFrom(buffer)
			if err != nil {
				return
			}
			switch number, _ := strconv.Atoi(string(buffer[:size])); {
			case number%3 == 0: // lost
			case number%3 == 1:
				_, _ = server.WriteTo(fmt.Appendf(nil, "%s %d", formatAnswer("echo", to), number), from)
				fallthrough // answered twice
			default:
				_, _ = server.WriteTo(fmt.Appendf(nil, "%s %d", formatAnswer("echo", to), number), from)
			}
		}
	}()
	const timeout = time.Second // longer than the machine stands still
	ctx, cancel := Patience(t.Context(), 10*time.Second)
	defer cancel()
	probe := StartStream(new(net.Dialer).DialContext, Client{To: to, Timeout: timeout}, time.Millisecond)
	if _, err := probe.Await(ctx, func(o Outcome) bool { return errors.Is(o.Err, context.DeadlineExceeded) }); err != nil {
		t.Fatal(err)
	}
	answered := probe.Outcomes()
	if n := answered.Servers()["echo"]; n < 10 {
		t.Errorf("%d datagrams were answered before the first was given up: they have waited for it", n)
	}
	_ = server.Close()
	refused, err := probe.Await(ctx, func(o Outcome) bool { return errors.Is(o.Err, syscall.ECONNREFUSED) })
	if err != nil {
		t.Fatal(err)
	}
	if refused.Took >= timeout {
		t.Errorf("refused after %v", refused.Took)
	}
	seen := map[time.Time]bool{}
	for _, o := range probe.Stop() {
		if seen[o.Sent] {
			t.Fatalf("two outcomes of the datagram sent at %v", o.Sent)
		}
		seen[o.Sent] = true
	}
}

func TestRequestsOverAPipe(t *testing.T) {
	t.Parallel()
	client := netip.MustParseAddrPort("10.244.1.7:40000")
	sent := time.Now().Round(0) // without the monotonic clock, which stays here
	want := map[Target]Outcomes{
		{UDP, netip.MustParseAddrPort("169.254.210.210:80")}: {{Sent: sent, Took: 5, Answer: Answer{"echo", client}}, {Sent: sent, Took: 7, Err: errors.New("refused")}},
		{KeepAlive, netip.MustParseAddrPort("[fd00::1]:80")}: {{Sent: sent, Took: 9, Answer: Answer{"echo", client}}},
	}
	var text bytes.Buffer
	for target, outcomes := range want {
		if err := WriteRequests(json.NewEncoder(&text), Client{Kind: target.Kind, To: target.To}, outcomes); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadRequests(&text)
	if err != nil {
		t.Fatal(err)
	}
	sameText := cmp.Comparer(func(a, b error) bool { return (a == nil) == (b == nil) && (a == nil || a.Error() == b.Error()) })
	if diff := cmp.Diff(want, got, sameText, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}
