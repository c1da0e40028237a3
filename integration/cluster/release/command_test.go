//go:build e2e

package release_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// command is that of the documentation, as it stands.
const command = "upgrade 169-254-210-210 charts/magic-ip-address --set config.ipAddress=169.254.210.210 --set config.port=9200 " +
	"--set config.selector=app=apm-server --namespace kube-system --install"

// TestCommand: one command, and each node's clients are answered by their own node's pod. The release is looked at as its
// user would.
func TestCommand(t *testing.T) {
	w := newWorld(t)
	w.releases = append(w.releases, apm)
	notes := w.helm(strings.Fields(command)...)
	for _, said := range []string{"169.254.210.210 tcp 9200 -> 9200 of app=apm-server in namespace kube-system", "http://169.254.210.210:9200/"} {
		if !strings.Contains(notes, said) {
			t.Errorf("helm does not say %q:\n%s", said, notes)
		}
	}
	w.rolledOut(apm)
	for _, n := range w.cluster.Nodes {
		w.refused(n, magic)
	}

	w.targets(system)
	w.servedBy(magic, system)
	for _, n := range w.cluster.Nodes {
		if !recorded(n, w.podOn(n, system, servers)) {
			t.Errorf("%s: the target, newer than the release, has no record", n.Name)
		}
	}

	// What the notes say to look with.
	look := regexp.MustCompile(`(?m)^ *kubectl (.* exec .*)$`).FindStringSubmatch(notes)
	if look == nil {
		t.Fatalf("helm does not say how to look at the status:\n%s", notes)
	}
	status := w.kubectl(strings.Fields(look[1])...)
	if !strings.Contains(status, "running since") || !strings.Contains(status, "kube-system/apm-server-") || strings.Contains(status, "error:") {
		t.Errorf("status:\n%s", status)
	}
	for _, n := range w.cluster.Nodes {
		w.confined(n)
		w.events(n)
	}
}

// confined: the pod asks for no more than is said, and the kernel gives it no more.
func (w *world) confined(n *whole.Node) {
	w.Helper()
	pod := w.podOn(n, system, daemonSet)
	want := map[string]string{"agent": "NET_ADMIN", "installer": ""}
	for _, container := range pod.Spec.Containers {
		var added []string
		s := container.SecurityContext
		for _, capability := range s.Capabilities.Add {
			added = append(added, string(capability))
		}
		if got := strings.Join(added, ","); got != want[container.Name] || len(s.Capabilities.Drop) != 1 || s.Capabilities.Drop[0] != "ALL" {
			w.Errorf("%s has the capabilities %+v", container.Name, s.Capabilities)
		}
		if *s.Privileged || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
			w.Errorf("%s is not confined: %+v", container.Name, s)
		}
		if len(container.Ports) > 0 {
			w.Errorf("%s takes ports of the node: %+v", container.Name, container.Ports)
		}
		w.confinedProcess(n, pod, container.Name)
	}
	if listening, err := n.Exec(w.ctx, "ss", "--no-header", "--listening", "--processes", "--tcp", "--udp", "--numeric"); err != nil || strings.Contains(listening, "magic-ip") {
		w.Errorf("%s: %v, somebody of ours listens:\n%s", n.Name, err, listening)
	}
}

// confinedProcess looks at the process of a container, and notes how much memory it has.
func (w *world) confinedProcess(n *whole.Node, pod *corev1.Pod, container string) {
	w.Helper()
	pid := w.pidOf(n, pod, container)
	field := func(name string) string { return w.processField(pid, n, name) }
	capabilities := map[string]string{"agent": "0000000000001000", "installer": "0000000000000000"}[container] // bit 12: CAP_NET_ADMIN
	for name, want := range map[string]string{"CapEff": capabilities, "CapPrm": capabilities, "CapBnd": capabilities, "NoNewPrivs": "1", "Seccomp": "2"} {
		if got := field(name); got != want {
			w.Errorf("%s on %s: %s is %s, want %s", container, n.Name, name, got, want)
		}
	}
	own := map[string][]string{"agent": {"agents/" + agentName}, "installer": {"install/" + agentName, "plugin"}}
	for _, directory := range []string{"", "agents", "agents/" + agentName, "install", "install/" + agentName, "plugin"} {
		writable := w.writable(n, pid, filepath.Join(runtimeDir, directory))
		if want := slices.Contains(own[container], directory); writable != want {
			w.Errorf("the %s on %s can write %s/%s: %v, want %v", container, n.Name, runtimeDir, directory, writable, want)
		}
	}
	if w.writable(n, pid, "/usr/local/bin") {
		w.Errorf("the root of the %s on %s can be written", container, n.Name)
	}
	kilobytes, err := strconv.Atoi(strings.TrimSuffix(field("VmRSS"), " kB"))
	w.must(err)
	figures.add("resident memory of the %s on %s: %.1f MiB", container, n.Name, float64(kilobytes)/1024)
}

// writable reports whether files can be made in a directory as a process sees it.
func (w *world) writable(n *whole.Node, pid int, directory string) bool {
	w.Helper()
	file := n.Path(fmt.Sprintf("/proc/%d/root/%s/written", pid, directory))
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return false
	}
	w.must(os.Remove(file))
	return true
}

// processField is a field of /proc/PID/status.
func (w *world) processField(pid int, n *whole.Node, name string) string {
	w.Helper()
	status, err := os.ReadFile(n.Path(fmt.Sprintf("/proc/%d/status", pid)))
	w.must(err)
	match := regexp.MustCompile(`(?m)^` + name + `:\s+(.*)$`).FindSubmatch(status)
	if match == nil {
		w.Fatalf("no %s in\n%s", name, status)
	}
	return string(match[1])
}

// pidOf is the process of a container, as the node numbers them.
func (w *world) pidOf(n *whole.Node, pod *corev1.Pod, container string) int {
	w.Helper()
	printed := w.ctr(n, "tasks", "list")
	for _, status := range pod.Status.ContainerStatuses {
		_, id, _ := strings.Cut(status.ContainerID, "://")
		for line := range strings.Lines(printed) {
			if fields := strings.Fields(line); status.Name == container && len(fields) > 1 && fields[0] == id {
				pid, err := strconv.Atoi(fields[1])
				w.must(err)
				return pid
			}
		}
	}
	w.Fatalf("container %s of pod %s does not run:\n%s", container, pod.Name, printed)
	return 0
}

// events: what the agent says of its magic IP stands with its pod.
func (w *world) events(n *whole.Node) {
	w.Helper()
	pod, target := w.podOn(n, system, daemonSet), w.podOn(n, system, servers)
	said := "169.254.210.210:9200/tcp: traffic goes to pod kube-system/" + target.Name
	w.eventually("events of "+pod.Name, func() error {
		for _, args := range [][]string{{"get", "events", "-n", system}, {"describe", "pod", "-n", system, pod.Name}} {
			printed, err := w.cluster.Kubectl(w.ctx, args...)
			if err != nil {
				return err
			}
			if !strings.Contains(printed, said) {
				return fmt.Errorf("kubectl %v does not show %q:\n%s", args, said, printed)
			}
		}
		return nil
	})
}

// TestServedSoon: how long it takes from the command until the clients of both nodes are answered, with targets that
// were there before.
func TestServedSoon(t *testing.T) {
	w := newWorld(t)
	w.targets(system)
	began := time.Now()
	probes := map[string]*lab.Probe{}
	for _, n := range w.cluster.Nodes {
		probes[n.Name] = n.Lab().StartProbe(lab.Client{Kind: lab.NewConnection, From: w.client(n), To: magic, Timeout: 100 * time.Millisecond}, 20*time.Millisecond)
		defer probes[n.Name].Stop()
	}
	w.releases = append(w.releases, apm)
	w.helm(strings.Fields(command)...)
	for _, n := range w.cluster.Nodes {
		answer, err := probes[n.Name].Await(w.within(30*time.Second), func(o lab.Outcome) bool { return o.Err == nil })
		w.must(err)
		figures.add("from helm install to the first answer on %s (%s): %v", n.Name, n.Runtime(), answer.Sent.Sub(began).Round(10*time.Millisecond))
		if want := w.podOn(n, system, servers).Name; answer.Server != want {
			t.Errorf("%s was served by %s, want %s", n.Name, answer.Server, want)
		}
	}
	w.rolledOut(apm)
	uninstalled := time.Now()
	w.uninstall(apm)
	figures.add("helm uninstall, until all pods were gone: %v", time.Since(uninstalled).Round(10*time.Millisecond))
	w.nodesPristine()
}
