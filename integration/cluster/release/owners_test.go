//go:build e2e

package release_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	ovnFile    = whole.CNIConfDir + "/05-ovn-kubernetes.conf"
	ovnList    = whole.CNIConfDir + "/05-ovn-kubernetes-conf.magic-ip-address.conflist"
	multusFile = whole.CNIConfDir + "/00-multus.conf"
	multusList = whole.CNIConfDir + "/00-multus-conf.magic-ip-address.conflist"
)

// single is the first plugin of a node's network as a configuration of its own, as OVN-Kubernetes and CRI-O write theirs.
func (w *world) single(n *whole.Node) (conf []byte, version string) {
	w.Helper()
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	w.must(json.Unmarshal([]byte(w.cluster.pristine.Nodes[n.Name].Conflists[filepath.Base(whole.ConflistFile)]), &list))
	plugin := list.Plugins[0]
	plugin["cniVersion"], plugin["name"] = list.CNIVersion, list.Name
	conf, err := json.Marshal(plugin)
	w.must(err)
	return conf, list.CNIVersion
}

// everywhere does something on each node.
func (w *world) everywhere(what func(*whole.Node) error) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		w.must(what(n))
	}
}

// keysIn waits until the key of the release is in this file on each node and in no other, and then wants pods to start, to be recorded, to
// be served and to stop, and the nodes to be ready.
func (w *world) keysIn(when, file string) {
	w.Helper()
	began := time.Now()
	for _, n := range w.cluster.Nodes {
		w.eventually(when, func() error { return w.keyOnlyIn(n, file) })
	}
	figures.add("%s: the entry was in %s after %v", when, filepath.Base(file), time.Since(began).Round(time.Millisecond))
	for _, n := range w.cluster.Nodes {
		pod := "target-" + n.Name
		made, _ := w.pod(n, system, pod, map[string]string{"app": servers})
		if !recorded(n, made) {
			w.Errorf("%s: pod %s has no record", when, pod)
		}
		w.served(n, magic, pod)
		w.removePod(system, pod)
	}
	w.nodesReady(when)
}

func (w *world) nodesReady(when string) {
	w.Helper()
	printed := w.kubectl("get", "nodes", "--no-headers", `--output=jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}`)
	if strings.Count(printed, "=True ") != len(w.cluster.Nodes) {
		w.Errorf("%s: %s", when, printed)
	}
}

// probe is a readiness probe of an owner that looks for its own file.
func (w *world) probe(file string) (stop func()) {
	end, failed := make(chan struct{}), make(chan error)
	go func() {
		var err error
		for {
			select {
			case <-end:
				failed <- err
				return
			case <-time.After(5 * time.Millisecond):
			}
			for _, n := range w.cluster.Nodes {
				if _, missing := os.Stat(n.Path(file)); missing != nil && err == nil {
					err = missing
				}
			}
		}
	}()
	return func() {
		w.Helper()
		close(end)
		if err := <-failed; err != nil {
			w.Errorf("the probe of the file's owner failed: %v", err)
		}
	}
}

// TestOwnerOfASingleConfiguration: one that looks for its file by name (a readiness probe), and deletes it when it stops, as
// OVN-Kubernetes does. And one that refers to the list of that by its path, as the thick Multus does.
func TestOwnerOfASingleConfiguration(t *testing.T) {
	w := newWorld(t)
	w.Cleanup(func() {
		for _, file := range []string{multusFile, ovnList, ovnFile, whole.CNIBinDir + "/multus-shim"} { // a network is there at each moment
			w.everywhere(func(n *whole.Node) error { return os.RemoveAll(n.Path(file)) })
		}
	})
	w.upgrade(apm, apmValues()...)
	start := func(n *whole.Node) error {
		conf, _ := w.single(n)
		return n.WriteFile(ovnFile, conf, 0o644)
	}
	remove := func(file string) func(n *whole.Node) error {
		return func(n *whole.Node) error { return os.Remove(n.Path(file)) }
	}
	w.everywhere(start)
	ready := w.probe(ovnFile)
	w.keysIn("a single-plugin configuration comes first", ovnList)
	ready()
	w.everywhere(remove(ovnFile))
	w.keysIn("its owner deletes it", whole.ConflistFile)
	w.everywhere(start)
	ready = w.probe(ovnFile)
	w.keysIn("its owner writes it again", ovnList)
	w.lap("OVN-Kubernetes")

	shim, err := os.ReadFile(filepath.Join(root, "bin/pods/multus-shim"))
	w.must(err)
	w.everywhere(func(n *whole.Node) error { return n.WriteFile(whole.CNIBinDir+"/multus-shim", shim, 0o755) })
	w.everywhere(func(n *whole.Node) error {
		_, version := w.single(n)
		return n.WriteFile(multusFile, fmt.Appendf(nil, `{"cniVersion":%q,"name":"multus-cni-network","clusterNetwork":"/host%s","type":"multus-shim"}`, version, ovnList), 0o600)
	})
	w.keysIn("Multus takes up the list by its path", multusList)
	ready()
	w.everywhere(remove(ovnFile))
	for _, n := range w.cluster.Nodes {
		w.eventually("its list to go with it", func() error {
			if _, err := os.Stat(n.Path(ovnList)); err == nil {
				return fmt.Errorf("%s is there", ovnList)
			}
			return nil
		})
	}
	w.everywhere(start)
	for _, n := range w.cluster.Nodes {
		w.eventually("its list to come back", func() error { _, err := os.Stat(n.Path(ovnList)); return err })
	}
	w.keysIn("the primary was restarted below Multus", multusList)
	w.uninstall(apm)
	usual := w.startAndStop("after")
	w.Logf("without the release, a pod started and stopped in %v by the list that Multus refers to", usual)
	w.nodesReady("uninstalled")
	for _, n := range w.cluster.Nodes {
		for file, want := range map[string]bool{ovnFile: true, ovnList: true, multusFile: true, multusList: false} {
			if _, err := os.Stat(n.Path(file)); (err == nil) != want {
				t.Errorf("after uninstalling, %s is there: %t", file, err == nil)
			}
		}
	}
}

// TestOwnerThatReverts: a reconciler writes its file as it was every 20 seconds, as AKS does now and then. The entry comes back, and
// that it is removed again and again is said.
func TestOwnerThatReverts(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues()...)
	usual := w.startAndStop("usual")
	for i := range 3 {
		began := time.Now()
		w.everywhere(func(n *whole.Node) error {
			return n.WriteFile(whole.ConflistFile, []byte(w.cluster.pristine.Nodes[n.Name].Conflists[filepath.Base(whole.ConflistFile)]), 0o644)
		})
		w.keysIn(fmt.Sprintf("reverted for the %d. time", i+1), whole.ConflistFile)
		w.unhindered("an owner that reverts its file", usual)
		time.Sleep(time.Until(began.Add(20 * time.Second)))
	}
	for _, n := range w.cluster.Nodes {
		record, err := runtimedir.New(n.Path(runtimeDir)).Installer(agentName).ReadRecord()
		w.must(err)
		if notes := strings.Join(record.Notes, "\n"); !strings.Contains(notes, "has removed the entry from") {
			t.Errorf("%s: the installer notes %q", n.Name, notes)
		}
	}
}
