//go:build e2e

package release_test

import (
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestReboot: a node loses its power, and comes back with its disk and an empty /run. Nobody does anything, and the clients of a
// new pod are answered.
func TestReboot(t *testing.T) {
	w := newWorld(t)
	w.targets(system)
	w.upgrade(apm, apmValues()...)
	w.servedBy(magic, system)
	for _, n := range w.cluster.Nodes {
		began := time.Now()
		w.must(n.Reboot(w.within(time.Minute)))
		up := time.Now()
		// Not before: nobody can have asked.
		if n.Name == "node1" {
			w.must(w.cluster.AwaitAPI(w.within(time.Minute)))
		}
		made, _ := w.pod(n, clients, "fresh-"+n.Name, nil)
		ns, err := n.PodNetNS(w.ctx, made)
		w.must(err)
		probe := n.Lab().StartProbe(lab.Client{Kind: lab.NewConnection, From: ns, To: magic, Timeout: time.Second}, 10*time.Millisecond)
		answer, err := probe.Await(w.within(time.Minute), func(o lab.Outcome) bool { return o.Err == nil })
		probe.Stop()
		w.must(err)
		figures.add("reboot of %s (%s): ready after %v, a client pod that was made then was answered %v later", n.Name, n.Runtime(),
			up.Sub(began).Round(10*time.Millisecond), answer.Sent.Sub(up).Round(10*time.Millisecond))
		w.rolledOut(apm)
		w.targetsReady(system)
		w.served(n, magic, w.podOn(n, system, servers).Name)
		if err := installed(n, apm); err != nil {
			t.Errorf("%s: %v", n.Name, err)
		}
		w.removePod(clients, "fresh-"+n.Name)
	}
	w.uninstall(apm)
	for _, n := range w.cluster.Nodes {
		if left, err := runtimeFiles(n); len(left) > 0 || err != nil {
			t.Errorf("%s: left in the runtime directory: %v, %v", n.Name, left, err)
		}
	}
}
