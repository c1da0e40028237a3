//go:build e2e

package release_test

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestReleases: three releases share the nodes, two of them a namespace and two of them a name. Who is uninstalled takes nothing
// of the others along.
func TestReleases(t *testing.T) {
	w := newWorld(t)
	other, namesake := release{system, "other"}, release{team, name}
	addresses := map[release]string{other: second.Addr().String(), namesake: third.Addr().String()}
	w.targets(system)
	w.targets(team)
	w.upgrade(apm, apmValues()...)
	for r, address := range addresses {
		w.begin(r, apmValues("config.ipAddress="+address)...)
	}
	for r := range addresses {
		w.rolledOut(r)
	}
	w.servedBy(magic, system)
	w.servedBy(second, system)
	w.servedBy(third, team)

	load := w.load(magic, lab.NewConnection, lab.KeepAlive)
	loadOfNamesake := w.load(third, lab.NewConnection, lab.KeepAlive)
	w.uninstall(other)
	w.left(other, apm, namesake)
	for _, n := range w.cluster.Nodes {
		w.refusedOrLost(n, second)
	}
	load.unbroken("another release in the same namespace is uninstalled")

	w.uninstall(apm)
	w.left(apm, namesake)
	loadOfNamesake.unbroken("a release of the same name in another namespace is uninstalled")
	w.uninstall(namesake)
	w.nodesPristine()
}

// left checks that a release has left the nodes, and that these others have not.
func (w *world) left(gone release, stay ...release) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		if err := installed(n, gone); !errors.Is(err, fs.ErrNotExist) {
			w.Errorf("%s: %s is still there: %v", n.Name, gone.agent(), err)
		}
		if _, err := n.Exec(w.ctx, "nft", "list", "table", "ip", "magic-ip-"+gone.agent()); err == nil {
			w.Errorf("%s: the rules of %s are still there", n.Name, gone.agent())
		}
		for _, r := range stay {
			if err := installed(n, r); err != nil {
				w.Errorf("%s: %v", n.Name, err)
			}
		}
	}
}
