//go:build e2e

// Package release_test is what a person sees who installs the chart on a cluster, upgrades it and removes it again, and
// what may happen meanwhile. Each test ends with the check that the cluster is as it was before.
package release_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: targets are DaemonSets, most of them app=apm-server in kube-system at port 9200. Each node has a client pod
// in the namespace "clients", older than all releases. The namespace "team" is for second releases and for pods that
// only look like targets.
const (
	chart       = "charts/magic-ip-address"
	name        = "169-254-210-210" // of the release, as in the documentation
	system      = "kube-system"
	daemonSet   = name + "-magic-ip-address"
	agentName   = system + "." + name
	clients     = "clients"
	team        = "team"
	servers     = "apm-server" // the DaemonSets of the targets, and their label app
	image       = "docker.io/magic-ip-address/magic-ip-address"
	runtimeDir  = lab.RuntimeDir
	pluginFile  = whole.CNIBinDir + "/magic-ip-address"
	longestTest = 5 * time.Minute
)

var (
	magic  = netip.MustParseAddrPort("169.254.210.210:9200")
	second = netip.MustParseAddrPort("169.254.210.211:9200")
	third  = netip.MustParseAddrPort("169.254.210.212:9200")
)

// site is a cluster that one test at a time has for itself.
type site struct {
	*whole.Cluster
	pristine snapshot // how it is without a release
}

// sites are the clusters that no test has. Most of a test is waiting for others, so two tests run at a time.
var sites = make(chan *site, 2)

var (
	figures figureList
	root    string // of the module
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	ctx, cancel := lab.Patience(context.Background(), 4*time.Minute)
	defer cancel()
	var err error
	if root, err = lab.ModuleRoot(); err == nil {
		err = os.Chdir(root) // the commands are those of the documentation
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	tests := func() int {
		defer func() { fmt.Print(figures.String()) }()
		return m.Run()
	}
	var made []*whole.Cluster
	for i := range cap(sites) {
		cluster, err := whole.New(ctx, whole.Options{Name: fmt.Sprintf("release-%d", i+1), Nodes: whole.Mixed(), Images: []string{"bin/image.tar"}})
		if err != nil {
			for _, cluster := range made {
				err = errors.Join(err, cluster.Close())
			}
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		made = append(made, cluster)
		within := tests
		tests = func() int { return cluster.Test(func() error { return furnish(ctx, cluster) }, within) }
	}
	return tests()
}

// furnish makes the namespaces and client pods of a cluster, looks at everything as it is then, and offers it to the tests.
func furnish(ctx context.Context, cluster *whole.Cluster) error {
	namespaces := []string{clients, team}
	for _, namespace := range namespaces {
		if err := cluster.Apply(ctx, "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+namespace+"}\n"); err != nil {
			return err
		}
	}
	if err := cluster.AwaitNamespaces(ctx, append(namespaces, system)...); err != nil {
		return err
	}
	for _, n := range cluster.Nodes {
		if _, err := cluster.Admin.CoreV1().Pods(clients).Create(ctx, echoPod(n, clients, "client-"+n.Name, nil), metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	for _, n := range cluster.Nodes {
		if _, err := awaitReady(ctx, cluster, clients, "client-"+n.Name); err != nil {
			return err
		}
	}
	pristine, err := takeSnapshot(ctx, cluster)
	sites <- &site{cluster, pristine}
	return err
}

// world is a test, with the releases and targets that it has made.
type world struct {
	*testing.T
	cluster  *site
	ctx      context.Context
	releases []release
	twins    map[netip.AddrPort]bool // those that a release has
	logs     map[string]*os.File     // of its releases, by their names
	began    time.Time               // of the present lap
}

type release struct{ namespace, name string }

func (r release) agent() string     { return r.namespace + "." + r.name }
func (r release) daemonSet() string { return r.name + "-magic-ip-address" }

// newWorld begins a test once there is a cluster for it; when it ends, everything is uninstalled that still is installed, and the
// cluster must be as it was.
func newWorld(t *testing.T) *world {
	t.Parallel()
	cluster := <-sites
	t.Cleanup(func() { sites <- cluster })
	w := &world{T: t, cluster: cluster, twins: map[netip.AddrPort]bool{}, logs: map[string]*os.File{}, began: time.Now()}
	lab.Renew(t, &w.ctx, longestTest)
	w.Cleanup(func() {
		defer w.closeLogs()
		if t.Failed() {
			w.describe()
		}
		for len(w.releases) > 0 {
			w.uninstall(w.releases[len(w.releases)-1])
		}
		w.pristine()
		w.lap("the end")
	})
	return w
}

// Cleanup is that of the test, with time of its own where the test's is over.
func (w *world) Cleanup(f func()) { lab.CleanUp(w.T, &w.ctx, longestTest, f) }

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) within(limit time.Duration) context.Context {
	ctx, cancel := lab.Patience(w.ctx, limit)
	w.T.Cleanup(cancel)
	return ctx
}

// lap logs how long it took since the last lap.
func (w *world) lap(what string) {
	w.Helper()
	w.Logf("%s: %v", what, time.Since(w.began).Round(10*time.Millisecond))
	w.began = time.Now()
}

// eventually waits, for at most a minute.
func (w *world) eventually(what string, condition func() error) {
	w.Helper()
	if err := lab.Eventually(w.within(time.Minute), condition); err != nil {
		w.Fatalf("%s: %v", what, err)
	}
}

// describe is for people, after a failure.
func (w *world) describe() {
	show := func(what, out string, err error) {
		w.Logf("%s:\n%s", what, out)
		if err != nil {
			w.Log(err)
		}
	}
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--sort-by=.lastTimestamp", "--field-selector=type=Warning"},
		{"logs", "-n", system, "-l", "app=magic-ip-address", "--all-containers", "--prefix", "--tail=20"},
	} {
		out, err := w.cluster.Kubectl(w.ctx, args...)
		show(strings.Join(args, " "), out, err)
	}
	for _, n := range w.cluster.Nodes {
		out, err := n.Exec(w.ctx, "sh", "-c", "ls -lR "+runtimeDir+"; cat "+runtimeDir+"/install/*/record.json "+whole.CNIConfDir+"/*; nft list tables")
		show(n.Name, out, err)
	}
}

// keepLogs opens the logs of the containers of releases that are there: with its pod a log is removed.
func (w *world) keepLogs() {
	for _, n := range w.cluster.Nodes {
		for _, container := range []string{"agent", "installer"} {
			names, _ := filepath.Glob(n.Path("/var/log/pods/*/" + container + "/*.log"))
			for _, name := range names {
				if w.logs[name] != nil {
					continue
				}
				if file, err := os.Open(name); err == nil { // else it has gone meanwhile
					w.logs[name] = file
				}
			}
		}
	}
}

// closeLogs closes them; after a failure their ends are written, for people.
func (w *world) closeLogs() {
	for name, file := range w.logs {
		if w.Failed() {
			log, err := io.ReadAll(file)
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			w.Log(name, err, "\n"+strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
		_ = file.Close()
	}
}

// helm runs it, and returns what it printed.
func (w *world) helm(args ...string) string {
	w.Helper()
	out, err := w.cluster.Helm(w.ctx, args...)
	w.must(err)
	return out
}

func (w *world) kubectl(args ...string) string {
	w.Helper()
	out, err := w.cluster.Kubectl(w.ctx, args...)
	w.must(err)
	return out
}

// agent runs a command of the agent in its container. In the container doctor exits with 3, since it does not see the CNI directories.
func (w *world) agent(pod *corev1.Pod, command string) string {
	w.Helper()
	out, err := w.cluster.Kubectl(w.ctx, "exec", "-n", pod.Namespace, pod.Name, "-c", "agent", "--", "magic-ip-agent", command)
	if err != nil && !(command == "doctor" && strings.Contains(err.Error(), "exit code 3")) {
		w.Fatal(err)
	}
	return out
}

// upgrade installs or upgrades a release with these values, and waits until that is done on all nodes. It returns what helm
// has printed.
func (w *world) upgrade(r release, values ...string) string {
	w.Helper()
	notes := w.begin(r, values...)
	w.rolledOut(r)
	return notes
}

// begin is upgrade without the waiting.
func (w *world) begin(r release, values ...string) string {
	w.Helper()
	args := []string{"upgrade", r.name, chart, "--install", "--namespace", r.namespace}
	for _, value := range values {
		if _, address, found := strings.Cut(value, ".ipAddress="); found && strings.Contains(address, ":") {
			w.twins[netip.AddrPortFrom(netip.MustParseAddr(address), magic.Port())] = true
		}
		args = append(args, "--set", value)
	}
	if !slices.Contains(w.releases, r) {
		w.releases = append(w.releases, r)
	}
	return w.helm(args...)
}

// apm is the release of the documentation. New pods count as available at once, so that a roll-out takes less time.
var apm = release{system, name}

// They have the twin of the address as well, for datagrams too, with the same owner of its targets.
func apmValues(more ...string) []string {
	const six, ports = "config.magicIPs[0].", "config.magicIPs[0].ports"
	address, owner := magic, ""
	for _, value := range more {
		if other, found := strings.CutPrefix(value, "config.ipAddress="); found {
			address = netip.AddrPortFrom(netip.MustParseAddr(other), magic.Port())
		}
		if of, found := strings.CutPrefix(value, "config.owner="); found {
			owner = of
		}
	}
	return append([]string{"config.ipAddress=" + magic.Addr().String(), fmt.Sprintf("config.port=%d", magic.Port()), "config.selector=app=apm-server", "minReadySeconds=0",
		six + "ipAddress=" + twin(address).Addr().String(), six + "selector=app=apm-server", six + "owner=" + owner,
		fmt.Sprintf("%s[0].port=%d", ports, magic.Port()), fmt.Sprintf("%s[1].port=%d", ports, magic.Port()), ports + "[1].protocol=udp"}, more...)
}

// twin is the IPv6 address with the last byte of an IPv4 one, and the same port.
func twin(to netip.AddrPort) netip.AddrPort {
	bytes := to.Addr().As4()
	return netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("fd00:a9fe:d2d2::%d", bytes[3])), to.Port())
}

// both are an address, and its twin where a release has it.
func (w *world) both(to netip.AddrPort) []netip.AddrPort {
	if to.Addr().Is4() && w.twins[twin(to)] {
		return []netip.AddrPort{to, twin(to)}
	}
	return []netip.AddrPort{to}
}

// ofFamily is the first address of the family of another.
func ofFamily(six bool, addresses ...corev1.PodIP) string {
	for _, a := range addresses {
		if strings.Contains(a.IP, ":") == six {
			return a.IP
		}
	}
	return ""
}

// rolledOut waits until all pods of a release are of its present form and ready, the old ones are gone, and the agents
// serve.
func (w *world) rolledOut(r release) {
	w.Helper()
	w.eventually("roll-out of "+r.agent(), func() error {
		if err := w.daemonSetDone(r.namespace, r.daemonSet()); err != nil {
			return err
		}
		for _, n := range w.cluster.Nodes {
			agent, err := runtimedir.New(n.Path(runtimeDir)).Agent(r.agent()).ReadStatus()
			if err == nil && (agent.LastSync.IsZero() || !runtimedir.New(n.Path(runtimeDir)).Agent(r.agent()).Live()) {
				err = fmt.Errorf("agent %s has not made its rules yet", r.agent())
			}
			if err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
		}
		return nil
	})
}

func (w *world) daemonSetDone(namespace, name string) error {
	w.keepLogs()
	d, err := w.cluster.Admin.AppsV1().DaemonSets(namespace).Get(w.ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	s := d.Status
	if s.ObservedGeneration < d.Generation || int(s.UpdatedNumberScheduled) != len(w.cluster.Nodes) || int(s.NumberReady) != len(w.cluster.Nodes) {
		return fmt.Errorf("DaemonSet %s, generation %d: %+v", name, d.Generation, s)
	}
	pods, err := w.podsOf(d)
	if err == nil && len(pods) != len(w.cluster.Nodes) {
		err = fmt.Errorf("DaemonSet %s has %d pods", name, len(pods))
	}
	return err
}

func (w *world) podsOf(d *appsv1.DaemonSet) ([]corev1.Pod, error) {
	list, err := w.cluster.Admin.CoreV1().Pods(d.Namespace).List(w.ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// podOn is the pod of a DaemonSet on a node.
func (w *world) podOn(n *whole.Node, namespace, name string) *corev1.Pod {
	w.Helper()
	d, err := w.cluster.Admin.AppsV1().DaemonSets(namespace).Get(w.ctx, name, metav1.GetOptions{})
	w.must(err)
	pods, err := w.podsOf(d)
	w.must(err)
	for i := range pods {
		if pods[i].Spec.NodeName == n.Name {
			return &pods[i]
		}
	}
	w.Fatalf("DaemonSet %s has no pod on %s", name, n.Name)
	return nil
}

// uninstall removes a release, and returns when its pods are gone.
func (w *world) uninstall(r release) {
	w.Helper()
	if out, err := w.cluster.Helm(w.ctx, "uninstall", r.name, "--namespace", r.namespace); err != nil {
		w.Error(out, err)
	}
	w.releases = slices.DeleteFunc(w.releases, func(other release) bool { return other == r })
	w.podsGone(r.namespace, "app=magic-ip-address,release="+r.name)
}

func (w *world) podsGone(namespace, selector string) {
	w.Helper()
	err := lab.Eventually(w.within(time.Minute), func() error {
		w.keepLogs()
		list, err := w.cluster.Admin.CoreV1().Pods(namespace).List(w.ctx, metav1.ListOptions{LabelSelector: selector})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods with %s are still there", len(list.Items), selector)
		}
		return err
	})
	if err != nil {
		w.Error(err)
	}
}

// targets makes a DaemonSet of servers, app=apm-server, that answer at port 9200, and waits for them. They are removed
// after the test, before the release is.
func (w *world) targets(namespace string) {
	w.Helper()
	// Another label, so that it does not adopt pods of the test.
	labels := map[string]string{"app": servers, "daemon-set": servers}
	pod := echoPod(nil, namespace, "", labels)
	_, err := w.cluster.Admin.AppsV1().DaemonSets(namespace).Create(w.ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: servers},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: pod.Spec},
		},
	}, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() { w.removeTargets(namespace) })
	w.targetsReady(namespace)
}

func (w *world) targetsReady(namespace string) {
	w.Helper()
	w.eventually("targets", func() error { return w.daemonSetDone(namespace, servers) })
}

func (w *world) removeTargets(namespace string) {
	w.Helper()
	err := w.cluster.Admin.AppsV1().DaemonSets(namespace).Delete(w.ctx, servers, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		w.Error(err)
	}
	w.podsGone(namespace, "daemon-set="+servers)
}

// echoPod answers with its name at port 9200, by HTTP and by datagrams.
func echoPod(n *whole.Node, namespace, name string, labels map[string]string) *corev1.Pod {
	grace := int64(1)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			DNSPolicy:                     corev1.DNSDefault, // the cluster has none of its own
			Containers: []corev1.Container{{
				Name: "echo", Image: whole.ImageEcho, ImagePullPolicy: corev1.PullNever, Args: []string{"serve", "--tcp", ":9200", "--udp", ":9200"},
			}},
		},
	}
	if n != nil {
		pod.Spec.NodeName = n.Name
	}
	return pod
}

// pod makes a pod of a node that is removed after the test, and waits until it is ready. It returns how long that took.
func (w *world) pod(n *whole.Node, namespace, name string, labels map[string]string) (*corev1.Pod, time.Duration) {
	w.Helper()
	began := time.Now()
	_, err := w.cluster.Admin.CoreV1().Pods(namespace).Create(w.ctx, echoPod(n, namespace, name, labels), metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() { w.removePod(namespace, name) })
	pod, err := awaitReady(w.within(time.Minute), w.cluster.Cluster, namespace, name)
	w.must(err)
	return pod, time.Since(began)
}

// removePod removes a pod, and returns how long it took until it was gone. It is well if it is gone already.
func (w *world) removePod(namespace, name string) time.Duration {
	w.Helper()
	began := time.Now()
	pods := w.cluster.Admin.CoreV1().Pods(namespace)
	err := pods.Delete(w.ctx, name, metav1.DeleteOptions{})
	if err == nil {
		err = lab.Eventually(w.within(time.Minute), func() error {
			if _, err := pods.Get(w.ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				return fmt.Errorf("pod %s/%s is still there: %w", namespace, name, err)
			}
			return nil
		})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		w.Error(err)
	}
	return time.Since(began)
}

func awaitReady(ctx context.Context, cluster *whole.Cluster, namespace, name string) (pod *corev1.Pod, err error) {
	err = lab.Eventually(ctx, func() error {
		if pod, err = cluster.Admin.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		ready := slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
		if !ready || pod.DeletionTimestamp != nil {
			return fmt.Errorf("pod %s/%s is not ready: %+v", namespace, name, pod.Status)
		}
		return nil
	})
	return pod, err
}

// netns is the network namespace of a running pod.
func (w *world) netns(n *whole.Node, namespace, name string) string {
	w.Helper()
	pod, err := awaitReady(w.within(time.Minute), w.cluster.Cluster, namespace, name)
	w.must(err)
	ns, err := n.PodNetNS(w.ctx, pod)
	w.must(err)
	return ns
}

func (w *world) client(n *whole.Node) string { return w.netns(n, clients, "client-"+n.Name) }

// served waits until both kinds of client of a node, its client pod and its own processes, are answered by this server with
// their own source addresses, at the address and at its twin.
func (w *world) served(n *whole.Node, to netip.AddrPort, server string) {
	w.Helper()
	client, err := awaitReady(w.within(time.Minute), w.cluster.Cluster, clients, "client-"+n.Name)
	w.must(err)
	node := []corev1.PodIP{{IP: n.Address.String()}, {IP: n.Address6.String()}}
	for _, to := range w.both(to) {
		for from, addresses := range map[string][]corev1.PodIP{w.client(n): client.Status.PodIPs, lab.Host: node} {
			address := ofFamily(to.Addr().Is6(), addresses...)
			w.eventually(fmt.Sprintf("%s on %s, from %s", to, n.Name, address), func() error {
				answer, err := n.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: from, To: to, Timeout: time.Second})
				if err == nil && (answer.Server != server || answer.Client.Addr().String() != address) {
					err = fmt.Errorf("answered by %s, to %s; want %s", answer.Server, answer.Client, server)
				}
				return err
			})
		}
	}
}

// servedBy is served on all nodes, by the targets of a namespace.
func (w *world) servedBy(to netip.AddrPort, namespace string) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		w.served(n, to, w.podOn(n, namespace, servers).Name)
	}
}

// refused asks once from the client pod, and wants that refused at once.
func (w *world) refused(n *whole.Node, to netip.AddrPort) {
	w.Helper()
	for _, to := range w.both(to) {
		w.refusedOne(n, to)
	}
}

func (w *world) refusedOne(n *whole.Node, to netip.AddrPort) {
	w.Helper()
	began := time.Now()
	answer, err := n.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: w.client(n), To: to, Timeout: 2 * time.Second})
	if took := time.Since(began); err == nil || lab.WorkingTime(began, time.Now()) > time.Second || !strings.Contains(err.Error(), "connection refused") {
		w.Errorf("%s on %s: answered by %q, %v after %v, want it refused at once", to, n.Name, answer.Server, err, took)
	}
}

// refusedOrLost asks once, and wants no answer: nobody serves this address any more.
func (w *world) refusedOrLost(n *whole.Node, to netip.AddrPort) {
	w.Helper()
	for _, to := range w.both(to) {
		answer, err := n.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: w.client(n), To: to, Timeout: 300 * time.Millisecond})
		if err == nil {
			w.Errorf("%s on %s was answered by %s", to, n.Name, answer.Server)
		}
	}
}

// recorded reports whether the plugin has a record of a pod.
func recorded(n *whole.Node, pod *corev1.Pod) bool {
	file, err := runtimedir.New(n.Path(runtimeDir)).ReadState()
	return err == nil && slices.ContainsFunc(file.Attachments, func(r runtimedir.Attachment) bool { return r.UID == string(pod.UID) })
}

// load is clients of all kinds on both nodes.
type load struct {
	*world
	probes map[string]*lab.Probe
}

// load begins to ask, at the address and at its twin: each client fifty times a second or 25 times each of both, and each request may
// take a second.
func (w *world) load(to netip.AddrPort, kinds ...lab.Kind) *load {
	w.Helper()
	l := &load{world: w, probes: map[string]*lab.Probe{}}
	for _, n := range w.cluster.Nodes {
		addresses := w.both(to)
		for _, to := range addresses {
			for _, kind := range kinds {
				client := lab.Client{Kind: kind, From: w.client(n), To: to, Timeout: time.Second}
				l.probes[fmt.Sprintf("%s %s %s", n.Name, kind, to)] = n.Lab().StartProbe(client, time.Duration(20*len(addresses))*time.Millisecond)
			}
		}
	}
	w.Cleanup(func() {
		for _, probe := range l.probes {
			probe.Stop()
		}
	})
	l.some(1)
	return l
}

// some waits until each client has been answered so many times from now on.
func (l *load) some(answers int) {
	l.Helper()
	for which, probe := range l.probes {
		for range answers {
			if _, err := probe.Await(l.within(20*time.Second), func(o lab.Outcome) bool { return o.Err == nil }); err != nil {
				l.Fatalf("%s: %v", which, err)
			}
		}
	}
}

// unbroken ends the load, some time after what it was for; not one request may have failed.
func (l *load) unbroken(during string) {
	l.Helper()
	l.some(20)
	requests, gap := 0, time.Duration(0)
	for which, probe := range l.probes {
		outcomes := probe.Stop()
		requests += len(outcomes)
		gap = max(gap, outcomes.LongestGap())
		if failed := outcomes.Failed(); len(failed) > 0 {
			l.Errorf("%s: %s: %d of %d requests failed, the first after %v at %v: %v", during, which, len(failed), len(outcomes),
				failed[0].Took, failed[0].Sent.Format(time.StampMilli), failed[0].Err)
		}
	}
	figures.add("%s: %d requests, none failed, longest gap %v", during, requests, gap.Round(time.Millisecond))
}

// figureList is what was measured, to be printed at the end.
type figureList struct {
	mu    sync.Mutex
	lines []string
}

func (f *figureList) add(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, fmt.Sprintf(format, args...))
}

func (f *figureList) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.lines) == 0 {
		return ""
	}
	return "Measured:\n  " + strings.Join(f.lines, "\n  ") + "\n"
}

// ctr runs the client of a node's containerd.
func (w *world) ctr(n *whole.Node, args ...string) string {
	w.Helper()
	printed, err := n.Exec(w.ctx, filepath.Join(root, "bin", string(n.Runtime()), "ctr"), append([]string{"--namespace", "k8s.io"}, args...)...)
	w.must(err)
	return printed
}
