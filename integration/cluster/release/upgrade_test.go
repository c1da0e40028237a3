//go:build e2e

package release_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// udp is the same address and port for datagrams, as values.
func udp() []string {
	one := "config.magicIPs[1]."
	return []string{one + "ipAddress=" + magic.Addr().String(), one + "selector=app=apm-server", one + "ports[0].protocol=udp", fmt.Sprintf("%sports[0].port=%d", one, magic.Port())}
}

// agents are the UIDs of a release's pods.
func (w *world) agents(r release) (uids []types.UID) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		uids = append(uids, w.podOn(n, r.namespace, r.daemonSet()).UID)
	}
	return uids
}

// TestUpgrade: clients of all kinds notice nothing when the release is upgraded, with pods that are replaced one after
// the other or with a surge, rolled back, or when the configuration alone changes.
func TestUpgrade(t *testing.T) {
	w := newWorld(t)
	for _, n := range w.cluster.Nodes { // a newer version, by its tag
		w.ctr(n, "images", "tag", "--force", image+":1.0.0", image+":next")
	}
	w.targets(system)
	values := apmValues(udp()...)
	w.upgrade(apm, values...)
	w.servedBy(magic, system)
	began := w.load(magic, lab.NewConnection, lab.KeepAlive, lab.UDP)

	for _, step := range []struct {
		name     string
		do       func()
		replaced bool
	}{
		{"another image, resources and interval", func() {
			values = append(values, "image.tag=next", "resources.requests.cpu=11m", "config.pollInterval=3")
			w.upgrade(apm, values...)
		}, true},
		{"a surge", func() {
			values = append(values, "updateStrategy.rollingUpdate.maxSurge=1", "updateStrategy.rollingUpdate.maxUnavailable=0", "podAnnotations.upgraded=again")
			w.upgrade(apm, values...)
		}, true},
		{"rolled back", func() {
			w.helm("rollback", apm.name, "1", "--namespace", apm.namespace)
			w.rolledOut(apm)
		}, true},
		{"the configuration alone", func() {
			w.upgrade(apm, append(apmValues(udp()...), "config.pollInterval=2", "config.magicIPs[2].ipAddress="+third.Addr().String(), "config.magicIPs[2].selector=app="+servers,
				"config.magicIPs[2].namespace="+team, fmt.Sprintf("config.magicIPs[2].ports[0].port=%d", third.Port()))...)
			w.configured("2s")
		}, false},
	} {
		before, stepBegan := w.agents(apm), time.Now()
		step.do()
		t.Logf("%s: %v", step.name, time.Since(stepBegan).Round(time.Millisecond))
		after := w.agents(apm)
		for _, uid := range before {
			if slices.Contains(after, uid) == step.replaced {
				t.Errorf("%s: pods %v before, %v afterwards", step.name, before, after)
			}
		}
	}
	began.unbroken("helm upgrade and rollback of the chart under load")
	w.servedBy(magic, system)
	for _, value := range []string{"cni.enabled=false", "runtimeDir=/run/other", "config.name=other"} {
		args := []string{"upgrade", name, chart, "--namespace", system, "--reuse-values", "--set", value}
		if _, err := w.cluster.Helm(w.ctx, args...); err == nil || !strings.Contains(err.Error(), "by an upgrade") || !strings.Contains(err.Error(), "helm uninstall "+name+" --namespace "+system) {
			t.Errorf("helm upgrade to %s: %v", value, err)
		}
	}
	// The new magic IP has rights in its namespace, and the plugin records there.
	w.targets(team)
	w.servedBy(third, team)
	for _, n := range w.cluster.Nodes {
		if !recorded(n, w.podOn(n, team, servers)) {
			t.Errorf("%s: the target in namespace %s has no record", n.Name, team)
		}
	}
}

// configured waits until the agents have read a configuration with this interval. The kubelet brings it to the node as soon
// as it looks at the pod again, which a change of the pod brings about.
func (w *world) configured(interval string) {
	w.Helper()
	w.kubectl("annotate", "pods", "-n", system, "-l", "release="+name, "--overwrite", "look-again=now")
	w.eventually("configuration with the interval "+interval, func() error {
		for _, n := range w.cluster.Nodes {
			agent, err := runtimedir.New(n.Path(runtimeDir)).Agent(agentName).ReadStatus()
			if err == nil && agent.PollInterval != interval {
				err = fmt.Errorf("%s: the agent polls every %s", n.Name, agent.PollInterval)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// oldValues are a values file of chart 0.1.x: its defaults, which people copy whole, and extraVars in base64, since that chart put
// them into a Secret as they were: 9200 and 10.
const oldValues = `
image: {repository: mumoshu/kube-magic-ip-assigner, tag: 0.9.0-1.9.8, pullPolicy: IfNotPresent}
config: {ipAddress: 169.254.210.210, selector: app=apm-server, hostInterface: cni0, port: 80, protocol: tcp, verbose: null, pollInterval: 5}
extraVars: {TARGET_PORT: OTIwMA==, POLL_INTERVAL: MTA=, CLUSTER: cHJvZA==}
resources: {}
rbac: {create: true}
serviceAccount: {create: true, name: null}
`

// TestUpgradeOfOldChart: a release of chart 0.1.x becomes one of this chart, by the old command or with the old values. The DNAT
// rules of its agents, which nobody removes, are named, and take no packet.
func TestUpgradeOfOldChart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(oldValues), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, old := range []struct {
		version string
		upgrade []string
		port    uint16
	}{
		{"0.1.0", strings.Fields(command), magic.Port()},
		{"0.1.1", []string{"upgrade", name, chart, "--namespace", system, "--values", file}, 80},
		{"0.1.2", []string{"upgrade", name, chart, "--namespace", system, "--reset-then-reuse-values"}, 80},
	} {
		t.Run(old.version, func(t *testing.T) {
			w := newWorld(t)
			w.targets(system)
			w.upgradeOfOldChart(old.version, file, old.upgrade, netip.AddrPortFrom(magic.Addr(), old.port))
		})
	}
}

func (w *world) upgradeOfOldChart(version, values string, upgrade []string, to netip.AddrPort) {
	w.Helper()
	w.releases = append(w.releases, apm)
	w.helm("install", name, "integration/cluster/release/testdata/chart-"+version, "--namespace", system, "--values", values)
	w.eventually("the old release", func() error { return w.daemonSetDone(system, daemonSet) })
	// The rules that its agents have made: their targets are gone since.
	rules := map[string][]string{} // by node, the commands that remove them
	for i, n := range w.cluster.Nodes {
		iptables := []string{"iptables-nft", "iptables-legacy"}[i]
		gone := n.Pods().Addr().Next().Next() // the client's by now
		rule := strings.Fields(fmt.Sprintf("PREROUTING -d %s/32 -i cni0 -p tcp -m tcp --dport %d -j DNAT --to-destination %s:9200", to.Addr(), to.Port(), gone))
		_, err := n.Exec(w.ctx, iptables, append([]string{"-t", "nat", "-A"}, rule...)...)
		w.must(err)
		rules[n.Name] = append([]string{iptables, "-t", "nat", "-D"}, rule...)
	}
	remove := sync.OnceFunc(func() {
		for _, n := range w.cluster.Nodes {
			_, err := n.Exec(w.ctx, rules[n.Name][0], rules[n.Name][1:]...)
			w.must(err)
		}
	})
	w.Cleanup(remove)

	// --reuse-values leaves out the values that the old chart did not have: rejected, with the remedy.
	_, err := w.cluster.Helm(w.ctx, "upgrade", name, chart, "--namespace", system, "--reuse-values")
	if err == nil || !strings.Contains(err.Error(), "--reset-then-reuse-values") {
		w.Errorf("helm upgrade --reuse-values over the old chart: %v", err)
	}
	notes := w.helm(upgrade...)
	if !strings.Contains(notes, "This release was chart "+version) || !strings.Contains(notes, "iptables rule") {
		w.Errorf("helm does not speak of what chart %s has left:\n%s", version, notes)
	}
	w.rolledOut(apm)
	w.servedBy(to, system)
	for _, n := range w.cluster.Nodes {
		pod := w.podOn(n, system, daemonSet)
		// A container without NET_RAW cannot read the tables of iptables-legacy, and says so.
		said := map[string]string{"doctor": "the nat table of iptables-legacy is in use"}
		if rules[n.Name][0] == "iptables-nft" {
			said = map[string]string{"status": strings.Join(rules[n.Name][4:], " "), "doctor": strings.Join(rules[n.Name], " ")}
		}
		for command, want := range said {
			if printed := w.agent(pod, command); !strings.Contains(printed, want) {
				w.Errorf("%s on %s does not say %q:\n%s", command, n.Name, want, printed)
			}
		}
	}
	load := w.load(to, lab.NewConnection, lab.KeepAlive)
	remove()
	w.servedBy(to, system)
	load.unbroken("an old rule removed")
}

// TestUninstall: nothing is left on the nodes but the plugin's binary, which does nothing; pods of before and of
// meanwhile end, and new ones start.
func TestUninstall(t *testing.T) {
	w := newWorld(t)
	for _, n := range w.cluster.Nodes {
		w.pod(n, system, "before-"+n.Name, map[string]string{"app": servers})
	}
	w.upgrade(apm, apmValues()...)
	for _, n := range w.cluster.Nodes {
		w.served(n, magic, "before-"+n.Name)
		w.removePod(system, "before-"+n.Name) // the plugin has never seen its ADD
	}
	w.targets(system)
	w.servedBy(magic, system)
	entries := map[string]string{}
	for _, n := range w.cluster.Nodes {
		if pod, _ := w.pod(n, system, "meanwhile-"+n.Name, map[string]string{"app": servers}); !recorded(n, pod) {
			t.Errorf("pod %s has no record", pod.Name)
		}
		entries[n.Name] = w.conflist(n)
	}
	began := time.Now()
	w.uninstall(apm)
	figures.add("helm uninstall with targets, until all pods were gone: %v", time.Since(began).Round(10*time.Millisecond))
	w.nodesPristine()
	for _, n := range w.cluster.Nodes {
		w.inert(n, entries[n.Name])
		t.Logf("%s: a pod with a record was gone after %v", n.Name, w.removePod(system, "meanwhile-"+n.Name))
		_, took := w.pod(n, system, "after-"+n.Name, map[string]string{"app": servers})
		t.Logf("%s: a new pod was ready after %v", n.Name, took)
	}
	w.noWarnings(began)
}

func (w *world) conflist(n *whole.Node) string {
	w.Helper()
	data, err := n.ReadFile(whole.ConflistFile)
	w.must(err)
	return string(data)
}

// inert: the binary that stays does nothing when a runtime calls it with the configuration that it has cached.
func (w *world) inert(n *whole.Node, conflist string) {
	w.Helper()
	_, entry, found := strings.Cut(conflist, `"type": "magic-ip-address",`)
	end := strings.LastIndex(entry, "}\n  ]")
	if !found || end < 0 {
		w.Fatalf("no entry in\n%s", conflist)
	}
	conf := `{"cniVersion": "1.0.0", "name": "pods", "type": "magic-ip-address",` + entry[:end] + "}"
	file := "/run/inert.conf"
	w.must(n.WriteFile(file, []byte(conf), 0o644))
	_, err := n.Exec(w.ctx, "sh", "-c", "CNI_COMMAND=DEL CNI_CONTAINERID=gone CNI_NETNS= CNI_IFNAME=eth0 CNI_PATH="+whole.CNIBinDir+
		" CNI_ARGS='K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=gone;K8S_POD_UID=gone' "+pluginFile+" <"+file)
	if err != nil {
		w.Errorf("%s: the plugin that stays: %v", n.Name, err)
	}
	w.must(os.Remove(n.Path(file)))
	if left, err := runtimeFiles(n); err != nil || len(left) > 0 {
		w.Errorf("%s: the plugin that stays has written %v", n.Name, left)
	}
}

// noWarnings: no pod but those of the release has had trouble with its start or its end since then.
func (w *world) noWarnings(since time.Time) {
	w.Helper()
	printed := w.kubectl("get", "events", "-A", "--field-selector=type=Warning",
		`--output=jsonpath={range .items[*]}{.lastTimestamp} {.involvedObject.kind}/{.involvedObject.name} {.reason}: {.message}{"\n"}{end}`)
	for line := range strings.Lines(printed) {
		stamp, what, _ := strings.Cut(line, " ")
		// Of whole seconds. Those of the release's own pods, which may be meant to fail, are something else.
		if at, err := time.Parse(time.RFC3339, stamp); err == nil && at.After(since) && strings.HasPrefix(what, "Pod/") && !strings.HasPrefix(what, "Pod/"+daemonSet) {
			w.Errorf("a warning: %s", line)
		}
	}
}

// TestUninstallAtOnce: who thinks better of it while the pods are still starting gets rid of everything too.
func TestUninstallAtOnce(t *testing.T) {
	w := newWorld(t)
	for _, after := range []time.Duration{0, 300 * time.Millisecond, 600 * time.Millisecond, 900 * time.Millisecond, 1500 * time.Millisecond} {
		w.begin(apm, apmValues()...)
		time.Sleep(after)
		w.uninstall(apm)
		w.nodesPristine()
		w.lap("uninstalled after " + after.String())
	}
}
