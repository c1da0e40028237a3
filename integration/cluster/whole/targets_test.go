//go:build e2e

package whole_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestStaticPod: the sandbox of a static pod has another UID than its object in the API.
func TestStaticPod(t *testing.T) {
	onEachNode(t, "static", func(w *world) {
		pod := echoPod(w.node, w.namespace, "static")
		pod.Spec.NodeName = ""
		name := pod.Name + "-" + w.node.Name // of the object that kubelet makes
		pod.Spec.Containers[0].Args = []string{"serve", "--name", name}
		manifest, err := json.Marshal(pod)
		w.must(err)
		file := whole.ManifestDir + "/static.json"
		w.must(w.node.WriteFile(file, manifest, 0o644))
		w.Cleanup(func() { _ = os.Remove(w.node.Path(file)) })
		ready, err := awaitReady(w.patience(), w.namespace+"/"+name)
		w.must(err)
		w.goesTo(name)
		if record := recordOf(w.node, ready); record == nil || record.UID == string(ready.UID) {
			w.Errorf("the record of pod %s is %+v", ready.UID, record)
		}
		if endpoints, err := w.endpoints(w.magic()); err != nil || len(endpoints) != 1 || !endpoints[0].Recorded {
			w.Errorf("endpoints %+v, %v: want one that is joined with its record", endpoints, err)
		}
		w.must(os.Remove(w.node.Path(file)))
		w.goesTo("")
	})
}

// TestOlderPod: a pod that was there before the plugin is known by the API alone, and leaves without a record.
func TestOlderPod(t *testing.T) {
	onEachNode(t, "older", func(w *world) {
		with, err := w.node.ReadFile(whole.ConflistFile)
		w.must(err)
		var conflist map[string]any
		w.must(json.Unmarshal(with, &conflist))
		plugins := conflist["plugins"].([]any)
		conflist["plugins"] = plugins[:len(plugins)-1]
		without, err := json.Marshal(conflist)
		w.must(err)

		w.must(w.node.WriteFile(whole.ConflistFile, without, 0o644))
		pod, errPod := awaitConflist(w.patience(), w.node, w.namespace, false)
		w.must(errors.Join(errPod, w.node.WriteFile(whole.ConflistFile, with, 0o644)))
		w.goesTo(pod.Name)
		other, err := awaitConflist(w.patience(), w.node, "start", true)
		w.must(err)
		w.must(removePod(w.patience(), other))

		w.must(removePod(w.patience(), pod)) // DEL reaches the plugin, which has never seen ADD
		w.goesTo("")
	})
}

// TestHostNetworkTarget: there is no ADD at all.
func TestHostNetworkTarget(t *testing.T) {
	onEachNode(t, "host", func(w *world) {
		pod := echoPod(w.node, w.namespace, "host-"+w.node.Name)
		pod.Spec.HostNetwork = true
		// On all addresses it would answer datagrams from the one of cni0, and the reply would find no flow.
		pod.Spec.Containers[0].Args = append(pod.Spec.Containers[0].Args, "--udp",
			fmt.Sprintf("%s,%s", netip.AddrPortFrom(w.node.Address, port), netip.AddrPortFrom(w.node.Address6, port)))
		made := w.create(pod)
		w.ready(made)
		w.goesTo(made.Name)
		w.must(removePod(w.patience(), made))
		w.goesTo("")
	})
}

// TestForceDelete: the object is gone from the API at once, and the process lives on. No client hangs: requests are
// answered by the old pod, refused, or answered by the new one. Datagrams may be lost in between, as the kernel limits
// how many it refuses, but their socket finds the new pod.
func TestForceDelete(t *testing.T) {
	onEachNode(t, "forced", func(w *world) {
		old := echoPod(w.node, w.namespace, "old-"+w.node.Name)
		old.Spec.Containers[0].Args = append(old.Spec.Containers[0].Args, "--drain", "300ms")
		old = w.create(old)
		w.ready(old)
		w.goesTo(old.Name)
		probes := map[lab.Client]*lab.Probe{}
		for kind, load := range lab.Loads {
			for _, to := range w.magicIPs() {
				client := lab.Client{Kind: kind, From: w.client, To: to, Timeout: load.Timeout}
				probes[client] = w.node.Lab().StartProbe(client, 2*load.Interval)
				defer probes[client].Stop()
			}
		}
		for _, probe := range probes {
			_, err := probe.Await(w.patience(), lab.AnsweredBy(old.Name))
			w.must(err)
		}
		_, err := cluster.Kubectl(w.Context(), "delete", "pod", "--namespace", w.namespace, "--force", "--grace-period=0", "--wait=false", old.Name)
		w.must(err)
		fresh := w.create(echoPod(w.node, w.namespace, "new-"+w.node.Name))
		for client, probe := range probes {
			if _, err := probe.Await(w.patience(), lab.AnsweredBy(fresh.Name)); err != nil {
				w.Errorf("%s to %s: %v", client.Kind, client.To, err)
			}
		}
		w.ready(fresh)
		for client, probe := range probes {
			outcomes := probe.Stop()
			w.Logf("%s to %s: %d requests, %d failed, longest request %v, longest time without an answer %v", client.Kind, client.To,
				len(outcomes), len(outcomes.Failed()), outcomes.Longest().Round(time.Millisecond), outcomes.LongestGap().Round(time.Millisecond))
			if slowest := outcomes.LongestWorking(); client.Kind != lab.UDP && slowest >= lab.Loads[lab.NewConnection].Timeout {
				w.Errorf("%s to %s: a request took %v", client.Kind, client.To, slowest)
			}
		}
		w.must(removePod(w.patience(), old))
		w.goesTo(fresh.Name)
	})
}

// TestAPIServerOutage: clients notice nothing of an API server that hangs, or is gone, or comes back.
func TestAPIServerOutage(t *testing.T) {
	w := newWorld(t, cluster.Node("node2"), "outage")
	target := w.create(echoPod(w.node, w.namespace, "before"))
	w.ready(target)
	w.goesTo(target.Name)
	load := lab.Loads[lab.NewConnection]
	probes := map[netip.AddrPort]*lab.Probe{}
	for _, to := range w.magicIPs() {
		probes[to] = w.node.Lab().StartProbe(lab.Client{Kind: lab.NewConnection, From: w.client, To: to, Timeout: load.Timeout}, 2*load.Interval)
		defer probes[to].Stop()
	}
	ask := func() {
		t.Helper()
		for _, probe := range probes {
			for range 50 {
				_, err := probe.Await(w.patience(), lab.AnsweredBy(target.Name))
				w.must(err)
			}
		}
	}
	w.must(cluster.FreezeAPIServer())
	ask()
	w.must(cluster.ThawAPIServer())
	cluster.KillAPIServer()
	ask()
	w.must(cluster.StartAPIServer(w.patience()))
	ask()
	for to, probe := range probes {
		if failed := probe.Stop().Failed(); len(failed) > 0 {
			t.Errorf("%s: %d requests failed, the first with %v", to, len(failed), failed[0].Err)
		}
	}
	fresh := w.create(echoPod(w.node, w.namespace, "after"))
	w.ready(fresh)
	w.goesTo(fresh.Name)
}

// TestReboot: /run is empty then, kubelet makes new sandboxes for its pods, and the agent begins with nothing. The
// first node, which takes the API server with it, is the last: kubelets elsewhere may take half a minute to come back.
func TestReboot(t *testing.T) {
	for _, n := range slices.Backward(cluster.Nodes) {
		t.Run(string(n.Runtime()), func(t *testing.T) {
			w := newWorld(t, n, "reboot")
			target := w.create(echoPod(n, w.namespace, "echo-"+n.Name))
			before := w.ready(target)
			w.goesTo(target.Name)
			lost := recordOf(n, before).Key()
			w.must(n.Reboot(w.patience()))
			w.must(startAgent(w.patience(), n))
			w.must(lab.Eventually(w.patience(), func() error {
				after, err := awaitReady(w.patience(), w.namespace+"/"+target.Name)
				if err == nil && (after.Status.PodIP == before.Status.PodIP || recordOf(n, after) == nil) {
					err = fmt.Errorf("the pod has no new sandbox: %+v", after.Status)
				}
				return err
			}))
			file, err := runtimedir.New(n.Path(lab.RuntimeDir)).ReadState()
			w.must(err)
			if slices.ContainsFunc(file.Attachments, func(a runtimedir.Attachment) bool { return a.Key() == lost }) {
				t.Errorf("the record %+v has outlived the reboot", lost)
			}
			newWorld(t, n, "reboot").goesTo(target.Name)
		})
	}
}
