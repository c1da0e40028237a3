//go:build dataplane

package dataplane_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// setting is what a data plane is set to, and what becomes of magic IPs by it.
type setting struct {
	name    string
	cilium  whole.Cilium
	flannel *whole.Flannel // in place of Cilium
	// masquerade is what the agent does besides local routes; source: servers see the client's address.
	masquerade, source bool
	reason             string // in status
	doctor             string // level and text
	short              bool
	backend            string // auto where empty
}

// row is what the setting is called in docs/compatibility.md: what is not part of it changes nothing.
func (s setting) row() string {
	if s.flannel != nil {
		return "flannel-" + s.name
	}
	name, _, _ := strings.Cut(s.name, " ")
	return "cilium-" + name
}

// plane is what status calls the data plane.
func (s setting) plane() string {
	if s.flannel != nil {
		return "netfilter"
	}
	return "cilium"
}

func (s setting) set(ctx context.Context) error {
	if s.flannel != nil {
		return cluster.SetFlannel(ctx, *s.flannel)
	}
	return node.SetCilium(ctx, s.cilium)
}

// restart ends what makes the data plane at once, and starts it again.
func (s setting) restart(ctx context.Context) error {
	if s.flannel != nil {
		return node.RestartFlannel(ctx)
	}
	return node.RestartCilium(ctx)
}

// follows waits until the agent says what it is to do with the setting, does it, and doctor says what that means.
func (w *world) follows(s setting) {
	w.Helper()
	w.awaitStatus("the data plane of "+s.name, func(status *runtimedir.Status) error {
		d := status.DataPlane
		if d.Name != s.plane() || d.Reason != s.reason || len(d.LocalRoutes) != 2 || (len(d.Masquerade) == 1) != s.masquerade || status.LastError != "" {
			return fmt.Errorf("the agent says %+v, error %q", d, status.LastError)
		}
		return nil
	})
	w.routes(true)
	shown := w.agent("status")
	if want := "data plane: " + s.plane() + " (" + s.reason + ")"; !strings.Contains(shown, want) {
		w.Errorf("status does not say %q:\n%s", want, shown)
	}
	level, text, _ := strings.Cut(s.doctor, " ")
	found := w.agent("doctor")
	if !slices.ContainsFunc(strings.Split(found, "\n"), func(line string) bool {
		words := strings.Join(strings.Fields(line), " ")
		return strings.HasPrefix(words, level+" data plane") && strings.Contains(words, strings.TrimPrefix(text, "data plane ")) && (s.flannel != nil || strings.Contains(words, s.reason+":"))
	}) {
		w.Errorf("doctor does not say %q of %q:\n%s", s.doctor, s.reason, found)
	}
	if strings.Contains(found, "FAIL data plane") || strings.Contains(found, "FAIL local routes") {
		w.Errorf("doctor says:\n%s", found)
	}
}

// routes waits until both magic IPs have a local route, or none.
func (w *world) routes(want bool) {
	w.Helper()
	w.eventually("local routes", func() error {
		for _, address := range []netip.Addr{magic.Addr(), unserved.Addr()} {
			shown := w.exec("ip route show table local " + address.String())
			if strings.Contains(shown, "proto 109") != want || want && !strings.Contains(shown, "src "+node.Address.String()) {
				return fmt.Errorf("%s: %q", address, shown)
			}
		}
		return nil
	})
}

// traffic: every kind of client is answered, with the right source, and refused at once without an endpoint, while nothing leaves.
func (w *world) traffic(s setting) {
	w.Helper()
	sniffer := listen(w.T)
	client := w.pod(clients, "client", nil)
	from := map[string]string{"a pod": w.netns(client), "the node": lab.Host}
	w.awaitEndpoint("")
	if w.refused("without an endpoint", magic, from) {
		w.observed.Refused = append(w.observed.Refused, compat.NoEndpoint)
	}
	if !s.cilium.CNIExclusive {
		w.chained()
	}
	server := w.pod("default", "echo", echoLabels)
	w.awaitEndpoint("echo")
	if !s.cilium.CNIExclusive { // else Cilium removes the entry, and the API alone knows the pod
		w.recorded("echo")
	}
	from["the server itself"] = w.netns(server)
	sources := w.served("with an endpoint", "echo", from)
	for who, name := range map[string]string{"a pod": compat.Pod, "the node": compat.Process, "the server itself": compat.Itself} {
		if sources[who].IsValid() {
			w.observed.Served = append(w.observed.Served, name)
		}
	}
	switch sources["a pod"].String() {
	case client.Status.PodIP:
		w.observed.Seen = compat.Client
	default: // its links have several addresses
		w.observed.Seen = compat.Node
	}
	if kept := sources["a pod"].String() == client.Status.PodIP; kept != s.source {
		w.Errorf("the client is seen as %s, and is %s: kept %t, want %t", sources["a pod"], client.Status.PodIP, kept, s.source)
	}
	if seen := sources["the node"]; seen != node.Address {
		w.Logf("processes of the node are seen as %s", seen)
	}
	w.Logf("%s: a pod is seen as %s, the node as %s, the server by itself as %s", s.name, sources["a pod"], sources["the node"], sources["the server itself"])
	w.refused("a magic IP without a target", unserved, from)
	w.refused("a port of no frontend", netip.AddrPortFrom(magic.Addr(), 22), from)
	w.remove("default", "echo")
	w.awaitEndpoint("")
	delete(from, "the server itself")
	w.refused("the endpoint is gone", magic, from)
	w.silent(sniffer, compat.Traffic)
}

// chained waits until the entry is in the file of the primary CNI, which Cilium's agent writes anew at each start.
func (w *world) chained() {
	w.Helper()
	w.eventually("the entry in the file of the primary CNI", func() error {
		data, err := node.ReadFile(node.Conflist())
		if err == nil && !strings.Contains(string(data), `"type": "magic-ip-address"`) {
			err = fmt.Errorf("it has %s", data)
		}
		return err
	})
}

// recorded wants a pod recorded by the plugin.
func (w *world) recorded(name string) {
	w.Helper()
	file, err := runtimedir.New(node.Path(lab.RuntimeDir)).ReadState()
	if err != nil || !slices.ContainsFunc(file.Attachments, func(a runtimedir.Attachment) bool { return a.Name == name }) {
		w.Errorf("pod %s is not recorded: %+v, %v", name, file, err)
	}
}

// rollout rolls a DaemonSet with maxSurge; no new connection may fail.
func (w *world) rollout() {
	w.Helper()
	client := w.ready(clients, "client")
	pod := echoPod("default", "", echoLabels)
	pod.Spec.NodeName, pod.Spec.NodeSelector = "", map[string]string{"kubernetes.io/hostname": node.Name}
	grace := int64(5)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	pod.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
		PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(8081)}},
	}
	one, none := intstr.FromInt32(1), intstr.FromInt32(0)
	_, err := cluster.Admin.AppsV1().DaemonSets("default").Create(w.ctx, &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "echo"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: echoLabels}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: echoLabels}, Spec: pod.Spec},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
				Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &one, MaxUnavailable: &none},
			},
		},
	}, metav1.CreateOptions{})
	w.must(err)
	w.Cleanup(func() {
		_, err := cluster.Kubectl(w.ctx, "delete", "--namespace", "default", "--cascade=foreground", "--wait", "daemonset/echo")
		if err != nil {
			w.Error(err)
		}
	})
	_, err = cluster.Kubectl(w.ctx, "rollout", "status", "daemonset/echo")
	w.must(err)
	sniffer := listen(w.T)
	waits, err := node.Lab().WatchWaits(w.ctx, "^"+agent+" run")
	w.must(err)
	old := w.endpoint()
	probes := map[lab.Kind]*lab.Probe{}
	for kind, load := range lab.Loads {
		probes[kind] = node.Lab().StartProbe(lab.Client{Kind: kind, From: w.netns(client), To: magic, Timeout: load.Timeout}, 4*load.Interval)
		defer probes[kind].Stop()
		_, err := probes[kind].Await(w.ctx, lab.AnsweredBy(old))
		w.must(err)
	}
	for _, command := range []string{"restart", "status"} {
		_, err := cluster.Kubectl(w.ctx, "rollout", command, "daemonset/echo")
		w.must(err)
	}
	for kind, probe := range probes { // a connection stays until the old pod ends
		if _, err := probe.Await(w.ctx, func(o lab.Outcome) bool { return o.Err == nil && o.Server != old }); err != nil {
			w.Errorf("rollout: %s is not answered by the new pod: %v", kind, err)
		}
	}
	time.Sleep(time.Second) // for what goes wrong afterwards
	waited := waits.End()
	for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
		o := probes[kind].Stop()
		failed := slices.DeleteFunc(o.Failed(), func(o lab.Outcome) bool { return o.Stalled(waited) })
		w.Logf("rollout: %s: %d of %d failed, %d of them while the agent could not go on, longest gap %v, %d pods",
			kind, len(o.Failed()), len(o), len(o.Failed())-len(failed), o.LongestGap().Round(time.Millisecond), len(o.Servers()))
		if kind == lab.NewConnection && len(failed) > 0 {
			w.Errorf("rollout: %d of %d new connections failed while the agent could go on, the first with %v", len(failed), len(o), failed[0].Err)
		}
		if len(o.Servers()) != 2 {
			w.Errorf("rollout: %s was answered by %v, want the old pod and the new one", kind, o.Servers())
		}
	}
	w.silent(sniffer, compat.Rollout)
}

// faults: the agent is killed, rules and routes are removed, the agent of the data plane is killed and comes back. Nothing leaves the node, and
// everything is served again.
func (w *world) faults(s setting) {
	w.Helper()
	client := w.ready(clients, "client")
	from := map[string]string{"a pod": w.netns(client), "the node": lab.Host}
	server := w.endpoint()
	sniffer := listen(w.T)
	probe := node.Lab().StartProbe(lab.Client{Kind: lab.NewConnection, From: from["a pod"], To: magic, Timeout: time.Second}, 10*time.Millisecond)
	defer probe.Stop()
	_, err := probe.Await(w.ctx, lab.AnsweredBy(server))
	w.must(err)

	// Another pod is there sooner than the container is started again, for which kubelet waits the longer the more often it ends.
	killed := time.Now()
	w.exec("kill -KILL " + w.agentPID())
	_, err = cluster.Kubectl(w.ctx, "delete", "pod", "--namespace", "kube-system", "--field-selector", "spec.nodeName="+node.Name, "--selector", agentLabels)
	w.must(err)
	w.eventually("the agent comes back", func() error {
		if status := w.status(); status.StartedAt.Before(killed) || !runtimedir.New(node.Path(lab.RuntimeDir)).Agent(agentName).Live() {
			return fmt.Errorf("it started at %v", status.StartedAt)
		}
		return nil
	})
	w.follows(s)
	w.silent(sniffer, compat.AgentKilled)
	sniffer = listen(w.T)
	w.must(s.restart(w.ctx))
	w.follows(s)
	if failed := probe.Stop().Failed(); len(failed) > 0 {
		w.Errorf("agents killed: %d requests failed, the first with %v", len(failed), failed[0].Err)
	}
	w.served("agents killed", server, from)
	w.silent(sniffer, compat.PlaneRestart)

	// The rules are flushed while the agent does not run, and then the one of the data plane comes back too.
	pid, flush := w.agentPID(), "nft delete table ip magic-ip-"+agentName
	if w.status().Backend == "iptables" {
		flush = `for table in nat filter mangle raw; do for tool in iptables-nft iptables-legacy; do
	$tool-save -t $table | sed -n 's/^-A \([A-Z]* .*MIP-.*\)/-D \1/p' | while read -r rule; do echo "$rule" | xargs $tool -t $table; done
done; done`
	}
	w.exec("kill -STOP " + pid + "\n" + flush)
	sniffer = listen(w.T)
	refused := w.refused("rules flushed", magic, from)
	refused = w.refused("rules flushed, without a target", unserved, from) && refused
	w.must(s.restart(w.ctx))
	refused = w.refused("rules flushed, data plane restarted", magic, from) && refused
	if refused {
		w.observed.Refused = append(w.observed.Refused, compat.RulesFlushed)
	}
	w.silent(sniffer, compat.RulesFlushed)
	w.exec("kill -CONT " + pid)
	w.eventually("rules restored", func() error {
		_, err := w.ask(lab.NewConnection, from["a pod"], magic)
		return err
	})
	w.served("rules restored", server, from)
	w.exec("ip route del local " + magic.Addr().String() + " table local")
	w.routes(true)
	w.served("route restored", server, from)
}

// silent wants nothing to have left the node.
func (w *world) silent(s *sniffer, when string) {
	w.Helper()
	if s.silent(w.T, when) {
		w.observed.StaysIn = append(w.observed.StaysIn, when)
	}
}

// advice is the setting that doctor names for who needs the client's address.
func (w *world) advice() {
	w.Helper()
	if _, advice, found := strings.Cut(w.agent("doctor"), "→ where that matters: "); found {
		w.observed.Advice, _, _ = strings.Cut(advice, "\n")
	}
}

// endpoint is the pod that traffic goes to.
func (w *world) endpoint() (name string) {
	w.Helper()
	w.awaitStatus("an endpoint", func(status *runtimedir.Status) error {
		for _, m := range status.MagicIPs {
			if m.Address == magic.Addr() && len(m.Endpoints) == 1 {
				name = strings.TrimPrefix(m.Endpoints[0].Pod, "default/")
				return nil
			}
		}
		return errors.New("there is none")
	})
	return name
}

// agentPID is the process of the agent's container. A program that the agent starts has the agent's command line at first, so that there may be two.
func (w *world) agentPID() (pid string) {
	w.Helper()
	w.eventually("the process of the agent", func() error {
		pids := strings.Fields(w.exec("pgrep -f '^" + agent + " run ' || true"))
		if len(pids) != 1 {
			return fmt.Errorf("there are %v", pids)
		}
		pid = pids[0]
		return nil
	})
	return pid
}
