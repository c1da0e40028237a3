package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/agent/foreign"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestLookout: what bypasses the rules or translates a magic IP is reported for as long as it is there, whenever it came, and what cannot be
// seen is reported too.
func TestLookout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // of what the node has
		var bypasses, rules, hidden []string
		var unread error
		set := func(change func()) { mu.Lock(); defer mu.Unlock(); change() }
		var log bytes.Buffer
		l := newLookout(slog.New(slog.NewTextHandler(&log, nil)))
		l.bypasses = func() ([]string, error) { mu.Lock(); defer mu.Unlock(); return bypasses, unread }
		looks := 0
		l.rules = func(_ context.Context, frontends []plan.Frontend) (found []foreign.Rule, _ []string) {
			mu.Lock()
			defer mu.Unlock()
			looks++
			for _, rule := range rules {
				for _, f := range frontends {
					found = append(found, foreign.Rule{Text: fmt.Sprintf("%s of port %d", rule, f.Port)})
				}
			}
			return found, hidden
		}
		woken := 0
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- l.run(ctx, func(agent.Source) { woken++ }) }()
		configure := func(ports ...uint16) {
			status := &runtimedir.Status{}
			for _, port := range ports {
				status.MagicIPs = append(status.MagicIPs, runtimedir.MagicIP{Frontend: plan.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Port: port}})
			}
			l.observe(nil, status)
			synctest.Wait()
		}
		want := func(when string, wakes int, notes ...agent.Note) {
			t.Helper()
			synctest.Wait()
			if diff := cmp.Diff(notes, l.found()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
			if woken != wakes {
				t.Errorf("%s: the agent was woken %d times, want %d", when, woken, wakes)
			}
			woken = 0
		}
		configure(80)
		configure(80)
		want("at the start", 0)
		l.observe(nil, &runtimedir.Status{MagicIPs: []runtimedir.MagicIP{
			{Frontend: plan.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Port: 80}},
			{Frontend: plan.Frontend{Address: netip.MustParseAddr("169.254.169.254"), Port: 81}, Reason: "it is reserved"},
		}})
		want("a rule for an address that is not served is where its packets should go", 0)
		if looks != 1 {
			t.Errorf("looked %d times for rules", looks)
		}

		set(func() { bypasses = []string{"Calico"} })
		time.Sleep(bypassInterval)
		bypass := agent.Note{Kind: "bypass", Text: "Calico"}
		want("programs are attached later", 1, bypass)
		set(func() { unread = errors.New("EMFILE") })
		time.Sleep(2 * bypassInterval)
		want("they cannot be read", 1, bypass, agent.Note{Kind: "unseen", Text: "it cannot be seen whether packets of pods bypass the rules: EMFILE"})
		set(func() { bypasses, unread = []string{"Calico, at another link"}, nil })
		time.Sleep(bypassInterval)
		bypass.Text = "Calico, at another link"
		want("they can be read", 1, bypass)
		set(func() { bypasses = nil })
		time.Sleep(bypassInterval)
		want("they are gone", 1)

		set(func() { rules = []string{"a rule"} })
		time.Sleep(ruleInterval)
		rule := func(port int) agent.Note {
			return agent.Note{Kind: "foreign_rule", Text: fmt.Sprintf("another program translates a magic IP too; remove the rule: a rule of port %d", port)}
		}
		want("a rule comes later", 1, rule(80))
		configure(80, 81)
		want("a magic IP is added", 1, rule(80), rule(81))
		set(func() { rules, hidden = nil, []string{"no CAP_NET_RAW"} })
		time.Sleep(ruleInterval)
		want("the rule is gone, others are hidden", 1, agent.Note{Kind: "unseen", Text: "it cannot be seen whether another program translates a magic IP: no CAP_NET_RAW"})
		set(func() { hidden = nil })
		time.Sleep(ruleInterval)
		want("nothing is hidden", 1)
		time.Sleep(ruleInterval)
		want("nothing changes", 0)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if warned, recovered := strings.Count(log.String(), "level=WARN"), strings.Count(log.String(), "msg=recovered"); warned != 5 || recovered != 5 {
			t.Errorf("warned %d times, recovered %d times:\n%s", warned, recovered, &log)
		}
	})
}
