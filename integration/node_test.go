// Package integration tests the binaries from outside: real cnitool, real agents, real packets, in nodes
// made of namespaces (see integration/lab).
package integration

import (
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// newNode makes a node that has these files of cni-conf/, and ends it with the test.
func newNode(t *testing.T, conflists ...string) *lab.Node {
	t.Helper()
	node, err := lab.NewNode(t.Context(), lab.NodeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, file := range conflists {
		addConf(t, node, file, conflist(t, file))
	}
	return node
}

func conflist(t *testing.T, file string) []byte {
	t.Helper()
	data, err := lab.Conflist(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func addConf(t *testing.T, node *lab.Node, file string, data []byte) {
	t.Helper()
	if err := node.AddConf(file, data); err != nil {
		t.Fatal(err)
	}
}

// add attaches a pod; del detaches it.
func add(t *testing.T, node *lab.Node, network string, pod lab.Pod) lab.Attached {
	t.Helper()
	attached, err := node.Add(t.Context(), network, pod)
	if err != nil {
		t.Fatal(err)
	}
	return attached
}

func del(t *testing.T, node *lab.Node, network string, pod lab.Pod) {
	t.Helper()
	if err := node.Del(t.Context(), network, pod); err != nil {
		t.Fatal(err)
	}
}
