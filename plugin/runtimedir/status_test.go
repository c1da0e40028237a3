package runtimedir_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestStatusEqual: whatever differs makes two statuses differ, and the same values at other places in memory do not.
func TestStatusEqual(t *testing.T) {
	t.Parallel()
	status := func() *runtimedir.Status {
		at, address := time.Unix(1, 0), netip.MustParseAddr("169.254.210.210")
		return &runtimedir.Status{
			LastError: "x", DataPlane: runtimedir.DataPlane{LocalRoutes: []netip.Addr{address}}, MagicIPs: []runtimedir.MagicIP{
				{
					Frontend: frontend(80), Namespace: "default", Selector: "app=x", HostInterface: []string{"eth0"}, Action: "serve", Since: at, Count: &runtimedir.Count{Opened: 1, Refused: 2},
					Endpoints: []runtimedir.Endpoint{{Address: netip.AddrPortFrom(address, 8080)}}, Why: []string{"x"},
				},
				{Frontend: frontend(81), Reason: "claimed"},
			},
		}
	}
	if one, other := status(), status(); !one.Equal(other) {
		t.Error("the same differs")
	}
	for what, change := range map[string]func(*runtimedir.Status, *runtimedir.MagicIP){
		"an error":          func(s *runtimedir.Status, _ *runtimedir.MagicIP) { s.LastError = "y" },
		"local routes":      func(s *runtimedir.Status, _ *runtimedir.MagicIP) { s.DataPlane.LocalRoutes = nil },
		"fewer magic IPs":   func(s *runtimedir.Status, _ *runtimedir.MagicIP) { s.MagicIPs = s.MagicIPs[:1] },
		"a frontend":        func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Port++ },
		"a namespace":       func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Namespace = "other" },
		"a selector":        func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Selector = "app=y" },
		"a host interface":  func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.HostInterface = nil },
		"host clients":      func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.HostClients = true },
		"a reason":          func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Reason = "claimed" },
		"an action":         func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Action = "hold" },
		"an endpoint":       func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Endpoints[0].UID = "u" },
		"since when":        func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Since = m.Since.Add(1) },
		"why":               func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Why = nil },
		"a count":           func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Count.Opened++ },
		"another count":     func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Count.Refused++ },
		"no count any more": func(_ *runtimedir.Status, m *runtimedir.MagicIP) { m.Count = nil },
	} {
		one, other := status(), status()
		change(other, &other.MagicIPs[0])
		if one.Equal(other) || other.Equal(one) {
			t.Errorf("%s: it is equal", what)
		}
	}
}

// TestStatusWriter: whatever a status has become since the one before, the file is what all of it looks like.
func TestStatusWriter(t *testing.T) {
	t.Parallel()
	agent := runtimedir.New(t.TempDir()).Agent("a")
	writer := agent.StatusWriter()
	random := rand.New(rand.NewPCG(1, 2))
	status := runtimedir.Status{MagicIPs: []runtimedir.MagicIP{}}
	check := func(what string) {
		t.Helper()
		if err := writer.Write(status); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		whole := status
		whole.Version, whole.Name = runtimedir.Version, "a"
		want, err := json.MarshalIndent(whole, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(agent.StatusPath()); err != nil || string(got) != string(want)+"\n" {
			t.Fatalf("%s: %v, want\n%s\ngot\n%s", what, err, want, got)
		}
	}
	check("an empty one")
	// What looks like a part of the file is text in a string.
	const hostile = "\n \"magicIPs\": []\n  \"localRoutes\": [\n   \"\"\n  ]"
	for round := range 300 {
		status.MagicIPs, status.DataPlane.LocalRoutes = slices.Clone(status.MagicIPs), slices.Clone(status.DataPlane.LocalRoutes)
		address := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(3))})
		at := random.IntN(len(status.MagicIPs) + 1)
		switch action := random.IntN(6); {
		case action == 0 && at < len(status.MagicIPs):
			status.MagicIPs = slices.Delete(status.MagicIPs, at, at+1)
		case action <= 1:
			status.MagicIPs = slices.Insert(status.MagicIPs, at, runtimedir.MagicIP{Frontend: frontend(uint16(round)), Endpoints: []runtimedir.Endpoint{}})
		case action == 2 && at < len(status.MagicIPs):
			status.MagicIPs[at].Endpoints = []runtimedir.Endpoint{{Address: netip.AddrPortFrom(address, 80), Pod: hostile}}
			status.MagicIPs[at].Since = time.Unix(int64(round), 0).UTC()
		case action == 3:
			status.LastError = fmt.Sprint(hostile, round%2)
		case action == 4:
			status.DataPlane.LocalRoutes = append(status.DataPlane.LocalRoutes, address)
		case len(status.DataPlane.LocalRoutes) > 0:
			status.DataPlane.LocalRoutes = slices.Delete(status.DataPlane.LocalRoutes, 0, 1+random.IntN(len(status.DataPlane.LocalRoutes)))
		}
		check(fmt.Sprintf("round %d", round))
	}
}
