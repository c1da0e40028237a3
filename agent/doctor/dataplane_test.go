package doctor

import (
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
)

// TestBypassed: where no pod is served for certain, that is a failure, and no warning.
func TestBypassed(t *testing.T) {
	for _, test := range []struct {
		name, links string
		level       Level
		text        string
	}{
		{"OVN-Kubernetes", "link ovn-k8s-mp0 openvswitch", Fail, "OVN-Kubernetes forwards the packets of pods in Open vSwitch"},
		{"Antrea", "link antrea-gw0 openvswitch", Fail, "Antrea forwards the packets of pods in Open vSwitch"},
		{"Kube-OVN", "link ovn0 openvswitch", Fail, "Kube-OVN forwards the packets of pods in Open vSwitch"},
		{"Open vSwitch in user space, which may connect some pods only", "link ovs-netdev tap", Warn, "Open vSwitch runs a data path in user space"},
	} {
		t.Run(test.name, func(t *testing.T) {
			e := &examination{}
			e.snapshot, _, _ = nodetest.Layout(t, test.links)
			e.network = node.Classify(e.snapshot, node.Known{})
			e.dataPlane()
			if len(e.found) != 1 || e.found[0].Level != test.level || e.found[0].Check != dataPlaneCheck || !strings.HasPrefix(e.found[0].Text, test.text) {
				t.Errorf("found %+v, want %s: %s", e.found, test.level, test.text)
			}
		})
	}
}
