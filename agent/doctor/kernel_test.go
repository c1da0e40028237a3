package doctor

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestForeignRulesOfUnserved: a rule for an address that is not served is where its packets should go, such as kube2iam's for the
// metadata service.
func TestForeignRulesOfUnserved(t *testing.T) {
	e := examinationOf(t, "10.244.2.2:8080")
	reserved := magicIPOf("169.254.169.254", "app=metadata")
	reserved.Reason, reserved.UnservedBy = "169.254.169.254 belongs to the instance metadata service", runtimedir.ByConfiguration
	e.agents[0].MagicIPs = append(e.agents[0].MagicIPs, reserved)
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", "10.0.0.1:8181")
	e.foreignRules(t.Context())
	if lines := e.lines(); strings.Contains(lines, "another program translates") {
		t.Error(lines)
	}
	nodetest.Run(t, "iptables-nft", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.210.210", "-p", "tcp", "--dport", "8080", "-j", "DNAT", "--to-destination", "10.0.0.1:8181")
	e.foreignRules(t.Context())
	if lines := e.lines(); !strings.Contains(lines, "another program translates") {
		t.Error(lines)
	}
}

// TestUnservedAdvice: of two there are only where another agent has the frontend.
func TestUnservedAdvice(t *testing.T) {
	for by, want := range map[runtimedir.UnservedBy]string{
		runtimedir.ByConfiguration: "change the configuration",
		runtimedir.ByNode:          "change the configuration, or the node",
		runtimedir.ByAgent:         "change the configuration of one of the two",
	} {
		e := cniNode(t, "")
		e.agents[0].MagicIPs[0].Reason, e.agents[0].MagicIPs[0].UnservedBy = "a reason", by
		e.magicIPs()
		if len(e.found) != 1 || e.found[0].Next != want {
			t.Errorf("%s: %s", by, e.lines())
		}
	}
}

// TestNothingToLookAt: ok is said only of what was looked at.
func TestNothingToLookAt(t *testing.T) {
	e := examinationOf(t, "10.244.2.2:8080")
	e.RuntimeDir, e.agents = filepath.Join(t.TempDir(), "nowhere"), nil
	e.files()
	e.foreignRules(t.Context())
	snapshot, err := node.Kernel{}.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	e.bridges(node.Classify(snapshot, node.Known{}))
	e.reversePath()
	if lines := e.lines(); strings.Contains(lines, "ok ") || !strings.Contains(lines, "FAIL runtime directory") {
		t.Error(lines)
	}
}
