//go:build e2e

package release_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestConflistRewritten: the primary CNI writes its file anew, in one way after the other. The entry comes back each time, and
// pods start and are recorded.
func TestConflistRewritten(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues()...)
	for _, n := range w.cluster.Nodes {
		w.pathsOfTheNode(n)
	}
	original := func(n *whole.Node) []byte {
		return []byte(w.cluster.pristine.Nodes[n.Name].Conflists[filepath.Base(whole.ConflistFile)])
	}
	first := whole.CNIConfDir + "/05-pods.conflist"
	for _, step := range []struct {
		name  string
		write func(*whole.Node) error
		file  string // where the entry is then
	}{
		{"by a rename", func(n *whole.Node) error { return n.WriteFile(whole.ConflistFile, original(n), 0o644) }, whole.ConflistFile},
		{"in place", func(n *whole.Node) error { return os.WriteFile(n.Path(whole.ConflistFile), original(n), 0o644) }, whole.ConflistFile},
		{"by another name that comes first", func(n *whole.Node) error { return n.WriteFile(first, original(n), 0o644) }, first},
		{"by the name that it had", func(n *whole.Node) error { return os.Remove(n.Path(first)) }, whole.ConflistFile},
	} {
		began := time.Now()
		for _, n := range w.cluster.Nodes {
			w.must(step.write(n))
		}
		for _, n := range w.cluster.Nodes {
			w.eventually(step.name, func() error { return w.keyOnlyIn(n, step.file) })
		}
		figures.add("conflist written anew %s: the entry was back after %v", step.name, time.Since(began).Round(time.Millisecond))
		for _, n := range w.cluster.Nodes {
			pod := "target-" + n.Name
			made, _ := w.pod(n, system, pod, map[string]string{"app": servers})
			if !recorded(n, made) {
				t.Errorf("%s: pod %s has no record", step.name, pod)
			}
			w.served(n, magic, pod)
			w.removePod(system, pod)
		}
	}
}

// pathsOfTheNode: what is installed has the paths of the node in both containers, and doctor sees it in the installer's.
func (w *world) pathsOfTheNode(n *whole.Node) {
	w.Helper()
	pod := w.podOn(n, system, daemonSet)
	if printed := w.agent(pod, "status"); !strings.Contains(printed, "\ninstalled: "+whole.ConflistFile+" since ") {
		w.Errorf("status does not name %s:\n%s", whole.ConflistFile, printed)
	}
	printed, err := w.cluster.Kubectl(w.ctx, "exec", "-n", pod.Namespace, pod.Name, "-c", "installer", "--", "magic-ip-agent", "doctor")
	if err != nil && !strings.Contains(err.Error(), "exit code 3") { // rules cannot be seen from there
		w.Fatal(err)
	}
	for _, want := range []string{
		"\nok    plugin binary: " + whole.CNIBinDir + "/magic-ip-address\n",
		"\nok    conflist: " + whole.ConflistFile + " has the selectors of agent " + agentName + "\n",
	} {
		if !strings.Contains(printed, want) {
			w.Errorf("doctor in the installer's container does not say %q:\n%s", want, printed)
		}
	}
}

// keyOnlyIn is an error where the key of the release is not in this file of the CNI directory, or in another one too.
func (w *world) keyOnlyIn(n *whole.Node, file string) error {
	all, err := filepath.Glob(n.Path(whole.CNIConfDir + "/*"))
	if err != nil {
		return err
	}
	for _, path := range all {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if has := strings.Contains(string(data), `"`+agentName+`"`); has != (path == n.Path(file)) {
			return fmt.Errorf("%s: %s has the key: %v", n.Name, filepath.Base(path), has)
		}
	}
	return nil
}

// TestQuarrel: somebody removes the entry each time that it is put back. The installer puts it back ever more seldom, costs
// little meanwhile, and says so; helm uninstall does not wait for it.
func TestQuarrel(t *testing.T) {
	w := newWorld(t)
	w.upgrade(apm, apmValues()...)
	n := w.cluster.Node("node2")
	original := []byte(w.cluster.pristine.Nodes[n.Name].Conflists[filepath.Base(whole.ConflistFile)])
	pid := w.pidOf(n, w.podOn(n, system, daemonSet), "installer")
	before, removed, began := w.cpu(n, pid), 0, time.Now()
	const during = 10 * time.Second
	patience := w.within(during)
	for time.Since(began) < during || removed < 3 && patience.Err() == nil {
		if w.keyOnlyIn(n, whole.ConflistFile) == nil {
			w.must(n.WriteFile(whole.ConflistFile, original, 0o644))
			removed++
		}
		time.Sleep(time.Millisecond)
	}
	used, lasted := w.cpu(n, pid)-before, time.Since(began)
	figures.add("entry removed at once each time, for %v: put back %d times, %v CPU time of the installer", lasted, removed, used)
	// The first one was there before, and it comes back at once twice, then after 1, 2, 4 s …
	most := 3
	for pause := time.Second; lasted >= 2*pause-time.Second; pause *= 2 {
		most++
	}
	if removed < 3 || removed > most {
		t.Errorf("the entry was removed %d times in %v, want 3 to %d", removed, lasted, most)
	}
	if used > lasted/10 {
		t.Errorf("the installer used %v of CPU time in %v", used, lasted)
	}
	record, err := runtimedir.New(n.Path(runtimeDir)).Installer(agentName).ReadRecord()
	w.must(err)
	const said = "another program has removed the entry from "
	if notes := strings.Join(record.Notes, "\n"); !strings.Contains(notes, said) {
		t.Errorf("the installer notes %q", notes)
	}
	for _, command := range []string{"status", "doctor"} {
		printed := w.agent(w.podOn(n, system, daemonSet), command)
		if !strings.Contains(printed, said) {
			t.Errorf("%s does not speak of that:\n%s", command, printed)
		}
	}
	w.uninstall(apm)
	w.nodesPristine()
}

// cpu is the processor time that a process has used.
func (w *world) cpu(n *whole.Node, pid int) time.Duration {
	w.Helper()
	stat, err := os.ReadFile(n.Path(fmt.Sprintf("/proc/%d/stat", pid)))
	w.must(err)
	_, rest, _ := strings.Cut(string(stat), ") ")
	ticks := 0
	for _, field := range strings.Fields(rest)[11:13] { // utime, stime: proc(5)
		n, err := strconv.Atoi(field)
		w.must(err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// TestAgentAbsent: without image, and with a configuration that ends installer and agent at once, pods start and stop all the
// same, before the first roll-out and after one. What was served is served on.
func TestAgentAbsent(t *testing.T) {
	w := newWorld(t)
	usual := w.startAndStop("usual")
	w.begin(apm, apmValues("image.tag=missing", "image.pullPolicy=Never")...)
	w.waiting(len(w.cluster.Nodes), "ErrImageNeverPull")
	w.unhindered("no image, first roll-out", usual)
	w.uninstall(apm)
	w.nodesPristine()

	w.lap("first roll-out without an image")

	w.targets(system)
	w.upgrade(apm, apmValues()...)
	w.servedBy(magic, system)
	w.lap("installed")
	load, stays := w.load(magic, lab.NewConnection, lab.KeepAlive), w.staysInstalled(apm)
	w.begin(apm, apmValues("image.tag=missing", "image.pullPolicy=Never")...)
	w.waiting(1, "ErrImageNeverPull")
	w.unhindered("no image on a node that is served", usual)
	w.lap("no image")
	w.begin(apm, apmValues("extraArgs[0]=--no-such-flag", "installer.extraArgs[0]=--no-such-flag")...)
	w.kubectl("delete", "pods", "--namespace", system, "--selector", "release="+name) // else only the pod without an image is replaced
	w.waiting(1, "CrashLoopBackOff")
	w.unhindered("a crash loop", usual)
	w.lap("crash loop")
	stays()
	load.unbroken("agents absent: no image, then a crash loop")
	w.upgrade(apm, apmValues("podAnnotations.mended=now")...) // else the containers wait for the end of their back-off
	w.servedBy(magic, system)
}

// startAndStop starts and stops a pod on each node, in the namespace that is served, where the plugin has to look at it. It
// returns how long the slowest took for both.
func (w *world) startAndStop(prefix string) (slowest time.Duration) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		pod := prefix + "-" + n.Name
		_, started := w.pod(n, system, pod, map[string]string{"app": "bystander"})
		slowest = max(slowest, started+w.removePod(system, pod))
	}
	return slowest
}

// unhindered wants pods to start and stop as usual, but for what a busy machine may add.
func (w *world) unhindered(when string, usual time.Duration) {
	w.Helper()
	began := time.Now()
	took := w.startAndStop("unhindered")
	figures.add("%s: a pod started and stopped in %v, without a release in %v", when, took.Round(10*time.Millisecond), usual.Round(10*time.Millisecond))
	if lab.WorkingTime(began, time.Now()) > time.Duration(len(w.cluster.Nodes))*(3*usual+2*time.Second) {
		w.Errorf("%s: a pod needed %v to start and to stop, without a release %v", when, took, usual)
	}
	w.noWarnings(began)
}

// waiting waits until so many pods of the release have a container that waits for this reason.
func (w *world) waiting(pods int, reason string) {
	w.Helper()
	w.eventually(fmt.Sprintf("%d pods with %s", pods, reason), func() error {
		printed, err := w.cluster.Kubectl(w.ctx, "get", "pods", "--namespace", system, "--selector", "release="+name, "--no-headers",
			"--output=custom-columns=REASON:.status.containerStatuses[*].state.waiting.reason")
		if err != nil {
			return err
		}
		found := 0
		for line := range strings.Lines(printed) {
			if strings.Contains(line, reason) {
				found++
			}
		}
		if found < pods {
			return fmt.Errorf("the containers wait for %q", printed)
		}
		return nil
	})
}
