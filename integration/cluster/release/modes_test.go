//go:build e2e

package release_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestWhoIsTarget: who bears the labels in another namespace, or in the right one without belonging to the owner, receives
// nothing, not even when there is nobody else.
func TestWhoIsTarget(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues("config.owner=DaemonSet/apm-server", "metrics.enabled=true")...)
	w.targets(system)
	w.servedBy(magic, system)
	for _, n := range w.cluster.Nodes { // newer than the targets
		w.pod(n, team, "elsewhere-"+n.Name, map[string]string{"app": servers})
		w.pod(n, system, "orphan-"+n.Name, map[string]string{"app": servers})
	}
	for _, n := range w.cluster.Nodes {
		client, target := w.client(n), w.podOn(n, system, servers).Name
		for range 50 {
			answer, err := n.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: client, To: magic, Timeout: 2 * time.Second})
			if err != nil || answer.Server != target {
				t.Fatalf("%s: answered by %q, %v; want %s", n.Name, answer.Server, err, target)
			}
		}
		w.metrics(n)
	}
	w.removeTargets(system)
	for _, n := range w.cluster.Nodes {
		w.refused(n, magic)
	}
}

// metrics are served at the node's address, and not elsewhere.
func (w *world) metrics(n *whole.Node) {
	w.Helper()
	_, err := w.scrape(n, n.Address.String()+":9641")
	w.must(err)
	if _, err := w.scrape(n, "127.0.0.1:9641"); err == nil {
		w.Errorf("%s: metrics are served at 127.0.0.1 too", n.Name)
	}
}

// TestWithoutCNI: cni.enabled=false touches nothing of CNI. What the API tells is enough, a little later.
func TestWithoutCNI(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues("cni.enabled=false")...)
	w.targets(system)
	w.servedBy(magic, system)
	for _, n := range w.cluster.Nodes {
		if pod := w.podOn(n, system, daemonSet); len(pod.Spec.Containers) != 1 {
			t.Errorf("%s: the pod has %d containers", n.Name, len(pod.Spec.Containers))
		}
		now, err := takeNodeSnapshot(w.ctx, n)
		w.must(err)
		was := w.cluster.pristine.Nodes[n.Name]
		if fmt.Sprint(now.Conflists, now.Plugins) != fmt.Sprint(was.Conflists, was.Plugins) {
			t.Errorf("%s: the CNI directories are not as before: %+v", n.Name, now)
		}
		// As docs/troubleshooting.md has it. No pod has a record.
		pod := system + "/" + w.podOn(n, system, servers).Name
		found, err := n.Exec(w.ctx, "sh", "-c", "/proc/$(pgrep -o magic-ip-agent)/root/usr/local/bin/magic-ip-agent doctor --from-pod "+pod+" || true")
		w.must(err)
		for _, want := range []string{"ok    conflist: no plugin is installed; pods are known by the API\n", "ok    probe: from pod " + pod + ": "} {
			if !strings.Contains(found, want) || strings.Contains(found, "plugin binary") {
				t.Errorf("%s: doctor on the node does not say %q:\n%s", n.Name, want, found)
			}
		}
		w.removePod(system, w.podOn(n, system, servers).Name)
	}
	w.targetsReady(system)
	w.servedBy(magic, system)
	w.uninstall(apm)
	w.nodesPristine()
}

// TestWithoutAPI: api.enabled=false. A runtime that passes labels, here cnitool in its place, is enough. containerd passes none:
// its pods are recorded, and are no target. Both ways to uninstall are those of the chart's README.
func TestWithoutAPI(t *testing.T) {
	w := newWorld(t)
	notes := w.upgrade(apm, apmValues("api.enabled=false")...)
	if !strings.Contains(notes, "helm uninstall is not noticed on the nodes") {
		t.Errorf("helm does not say what API off means:\n%s", notes)
	}
	w.targets(system)
	for _, n := range w.cluster.Nodes {
		pod := w.podOn(n, system, daemonSet)
		for _, volume := range pod.Spec.Volumes {
			if volume.Projected != nil {
				t.Errorf("%s: the pod has a token", n.Name)
			}
		}
		if !recorded(n, w.podOn(n, system, servers)) {
			t.Errorf("%s: the target has no record", n.Name)
		}
		w.refused(n, magic)
		status := w.kubectl("exec", "--namespace", system, pod.Name, "--container", "agent", "--", "magic-ip-agent", "status")
		if !strings.Contains(status, "1 recorded pods have no labels that are known") {
			t.Errorf("%s: status does not say why there is no target:\n%s", n.Name, status)
		}
	}
	n := w.cluster.Node("node2")
	server, remove := w.labelled(n, "by-cnitool")
	w.served(n, magic, server)
	remove()

	w.uninstall(apm)
	for _, n := range w.cluster.Nodes {
		w.must(installed(n, apm))
		w.kubectl("debug", "node/"+n.Name, "--namespace", clients, "--profile=sysadmin", "--image="+image+":1.0.0", "--", "magic-ip-agent", "uninstall", "--name", agentName,
			"--runtime-dir", "/host"+runtimeDir, "--cni-conf-dir", "/host"+whole.CNIConfDir, "--cni-bin-dir", "/host"+whole.CNIBinDir)
	}
	w.nodesPristine()
	w.kubectl("delete", "pods", "--namespace", clients, "--selector", "app.kubernetes.io/managed-by=kubectl-debug")

	w.upgrade(apm, apmValues("api.enabled=false")...)
	w.upgrade(apm, apmValues()...)
	w.servedBy(magic, system)
	w.uninstall(apm)
	w.nodesPristine()
}

// labelled is a pod that cnitool adds to the node's own network with the labels of the targets. It is removed after the
// test, or before.
func (w *world) labelled(n *whole.Node, name string) (server string, remove func()) {
	w.Helper()
	cnitool := func(command string) string {
		printed, err := n.Exec(w.ctx, "env", "CNI_PATH="+whole.CNIBinDir, "NETCONFPATH="+whole.CNIConfDir,
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+system+";K8S_POD_NAME="+name+";K8S_POD_UID="+name,
			`CAP_ARGS={"labels": {"app": "apm-server"}}`, filepath.Join(root, "bin", "cnitool"), command, "pods", "/run/netns/"+name)
		w.must(err)
		return printed
	}
	// With lo, as runtimes have it: where ::1 is not there, package net takes the machine for one without IPv6.
	_, err := n.Exec(w.ctx, "sh", "-ec", "ip netns add "+name+"; ip -netns "+name+" link set lo up")
	w.must(err)
	added := cnitool("add")
	listener, err := n.Lab().Listen("/run/netns/"+name, "tcp", fmt.Sprintf(":%d", magic.Port()))
	w.must(err)
	packets, err := n.Lab().ListenPacket("/run/netns/"+name, "udp", fmt.Sprintf(":%d", magic.Port()))
	w.must(err)
	echo := lab.NewEcho(name, listener, packets)
	remove = sync.OnceFunc(func() {
		_ = echo.Close()
		cnitool("del")
		_, err := n.Exec(w.ctx, "ip", "netns", "delete", name)
		w.must(err)
	})
	w.Cleanup(remove)
	file, err := runtimedir.New(n.Path(runtimeDir)).ReadState()
	w.must(err)
	for _, record := range file.Attachments {
		if record.UID == name && record.Labels["app"] == "apm-server" && len(record.IPs) == 2 {
			return name, remove
		}
	}
	w.Fatalf("no record of %s after %s: %+v", name, added, file)
	return "", nil
}
