//go:build e2e

package release_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestRefusedDuringRollOut: pods of the release are replaced while the API server refuses them (403), restarts, and does not know
// their tokens (401). None of that is an uninstall: entry, rules and traffic stay all the time.
func TestRefusedDuringRollOut(t *testing.T) {
	w := newWorld(t)
	w.targets(system)
	w.upgrade(apm, apmValues()...)
	w.servedBy(magic, system)
	load, stays := w.load(magic, lab.NewConnection, lab.KeepAlive), w.staysInstalled(apm)

	w.lap("installed")

	// 403: the rights go, as with helm uninstall, but the DaemonSet stays.
	w.kubectl("delete", "rolebindings", "--namespace", system, "--selector", "release="+name)
	w.restart(apm)
	w.errs(apm, "forbidden")
	w.servedBy(magic, system)
	w.upgrade(apm, apmValues()...)
	w.errs(apm, "")
	w.lap("403")

	// 401: half of the pods are replaced when the API server goes, and comes back with another key for tokens. The rest of the
	// roll-out is of pods whose tokens it does not know.
	w.upgrade(apm, apmValues("minReadySeconds=8")...)
	w.kubectl("rollout", "status", "--namespace", system, "daemonset/"+daemonSet) // pods that have been ready for so long go one by one
	before := w.agents(apm)
	w.kubectl("rollout", "restart", "--namespace", system, "daemonset/"+daemonSet)
	var old *whole.Node
	w.eventually("half of the roll-out", func() error {
		d, err := w.cluster.Admin.AppsV1().DaemonSets(system).Get(w.ctx, daemonSet, metav1.GetOptions{})
		if err == nil && (d.Status.UpdatedNumberScheduled != 1 || int(d.Status.NumberReady) != len(w.cluster.Nodes)) {
			err = fmt.Errorf("%+v", d.Status)
		}
		return err
	})
	for i, n := range w.cluster.Nodes {
		if w.podOn(n, system, daemonSet).UID == before[i] {
			old = n
		}
	}
	w.cluster.KillAPIServer()
	w.must(w.cluster.Nodes[0].WriteFile("/etc/kubernetes/sa.key", newKey(t), 0o600))
	load.some(50)
	w.must(w.cluster.StartAPIServer(w.within(time.Minute)))
	w.lap("a restart")
	w.errsOn(old, apm, "nauthorized")
	w.lap("401 seen")
	w.rolledOut(apm)
	w.lap("rolled out")
	w.restart(apm) // who was first in the roll-out has a token of before
	w.errs(apm, "")
	w.lap("tokens of the new key")
	w.servedBy(magic, system)
	stays()
	load.unbroken("roll-outs with 403, with 401 and with a restart of the API server")
	w.lap("the last look")
}

// restart replaces all pods of a release.
func (w *world) restart(r release) {
	w.Helper()
	w.kubectl("rollout", "restart", "--namespace", r.namespace, "daemonset/"+r.daemonSet())
	w.rolledOut(r)
}

// errs waits until what the agents of both nodes say is wrong contains this text; empty for nothing is wrong.
func (w *world) errs(r release, text string) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		w.errsOn(n, r, text)
	}
}

func (w *world) errsOn(n *whole.Node, r release, text string) {
	w.Helper()
	w.eventually(fmt.Sprintf("error %q of the agent of %s", text, n.Name), func() error {
		agent, err := runtimedir.New(n.Path(runtimeDir)).Agent(r.agent()).ReadStatus()
		if err == nil && (text == "" && agent.LastError != "" || !strings.Contains(agent.LastError, text)) {
			err = fmt.Errorf("it is %q", agent.LastError)
		}
		return err
	})
}

func newKey(t *testing.T) []byte {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
}

// staysInstalled looks again and again, until the function returned is called, whether entry, notes and rules of a release are
// there.
func (w *world) staysInstalled(r release) (end func()) {
	stop := make(chan struct{})
	var all sync.WaitGroup
	for _, n := range w.cluster.Nodes {
		all.Go(func() {
			looked := 0
			for ; ; looked++ {
				if err := installed(n, r); err != nil {
					w.Errorf("%s, look %d: %v", n.Name, looked, err)
					return
				}
				if looked%50 == 0 {
					if _, err := n.Exec(w.ctx, "nft", "list", "table", "ip", "magic-ip-"+r.agent()); err != nil {
						w.Errorf("%s, look %d: %v", n.Name, looked, err)
						return
					}
				}
				select {
				case <-stop:
					w.Logf("%s: installed at each of %d looks", n.Name, looked)
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	end = sync.OnceFunc(func() {
		close(stop)
		all.Wait()
	})
	w.Cleanup(end)
	return end
}

// installed is an error where the key of a release is not in the conflist, or where installer or agent have published
// nothing.
func installed(n *whole.Node, r release) error {
	data, err := n.ReadFile(whole.ConflistFile)
	if err != nil {
		return err
	}
	if !strings.Contains(string(data), `"`+r.agent()+`": [`) {
		return fmt.Errorf("%w: no key of %s in the conflist", fs.ErrNotExist, r.agent())
	}
	if _, err := runtimedir.New(n.Path(runtimeDir)).Installer(r.agent()).ReadRecord(); err != nil {
		return err
	}
	_, err = runtimedir.New(n.Path(runtimeDir)).Agent(r.agent()).ReadStatus()
	return err
}
