package node_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

func TestLayouts(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/layouts.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range archive.Files {
		t.Run(file.Name, func(t *testing.T) {
			snapshot, known, want := nodetest.Layout(t, string(file.Data))
			network := node.Classify(snapshot, known)
			if diff := cmp.Diff(strings.Join(want, "\n"), shown(network)); diff != "" {
				t.Errorf("links (-want +got):\n%s", diff)
			}
			// A second look finds the same.
			known.Uplinks = network.Keep
			if diff := cmp.Diff(network.Links, node.Classify(snapshot, known).Links); diff != "" {
				t.Errorf("second look (-first +second):\n%s", diff)
			}
			for _, link := range network.Links {
				if served := slices.Contains(network.PodInterfaces, link.Name); served != (link.Role == node.Served && !link.Port) {
					t.Errorf("%s: among the pod interfaces: %v", link.Name, served)
				}
				if _, port := network.PodPorts[link.Index]; port && (!link.Port || link.Role != node.Served) {
					t.Errorf("%s: hairpin at what is no port of pods", link.Name)
				}
			}
		})
	}
}

// shown are links with the same role and reason on one line.
func shown(network node.Network) string {
	var lines []string
	names := map[string][]string{}
	for _, link := range network.Links {
		line := fmt.Sprintf("%s: %s", link.Role, link.Reason)
		if names[line] == nil {
			lines = append(lines, line)
		}
		names[line] = append(names[line], link.Name)
	}
	for i, line := range lines {
		lines[i] = strings.Join(names[line], " ") + ": " + line
	}
	return strings.Join(lines, "\n")
}
