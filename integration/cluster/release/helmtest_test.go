//go:build e2e

package release_test

import (
	"regexp"
	"testing"
)

// TestHelmTest: helm test asks from a pod of each node. It passes with targets and without, fails where a target does not listen, names
// the node, and leaves nothing once it has passed.
func TestHelmTest(t *testing.T) {
	w := newWorld(t)
	test := func() (string, error) { // with what helm prints of the pod's log, to standard error
		out, err := w.cluster.Command(w.ctx, "helm", "test", name, "--namespace", system).CombinedOutput()
		return string(out), err
	}
	w.upgrade(apm, apmValues(udp()...)...)
	for _, targets := range []string{"without targets", "with targets"} {
		if targets == "with targets" {
			w.targets(system)
			w.servedBy(magic, system)
		}
		printed, err := test()
		if err != nil {
			t.Fatalf("%s: %v\n%s\n%s", targets, err, printed, w.kubectl("describe", "pods", "--namespace", system, "--selector", "release="+name))
		}
		for _, n := range w.cluster.Nodes {
			if !regexp.MustCompile(`(?m)^.*ok +` + n.Name + `$`).MatchString(printed) {
				t.Errorf("%s: helm test does not say that %s is well:\n%s", targets, n.Name, printed)
			}
		}
		w.podsGone(system, "app=magic-ip-address-test")
		w.lap(targets)
	}

	// A port at which the targets do not listen.
	w.upgrade(apm, apmValues("config.targetPort=9999")...)
	w.configured("5s")
	printed, err := test()
	if err == nil {
		t.Errorf("helm test passes although nobody listens:\n%s", printed)
	}
	for _, n := range w.cluster.Nodes {
		if !regexp.MustCompile(`(?m)FAIL +` + n.Name + `\n( +.*\n)*? +FAIL +169\.254\.210\.210:9200/tcp +refused in .*; endpoint kube-system/` + w.podOn(n, system, servers).Name).MatchString(printed) {
			t.Errorf("helm test does not say what is wrong with %s:\n%s", n.Name, printed)
		}
	}
	w.removePod(system, daemonSet+"-test")
	w.podsGone(system, "app=magic-ip-address-test")
}
