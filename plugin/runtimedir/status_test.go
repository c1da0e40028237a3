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
