//go:build e2e

package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/kube"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// What `make e2e-bench` measures. None of it is asserted: it prints, with the targets beside it.

// BenchmarkReadinessFlip: from a change of readiness that is written to the API server, to the kernel's notification of
// the changed rule.
func BenchmarkReadinessFlip(b *testing.B) {
	const flips = 200
	w := serving(b)
	old := w.create("old").add().running(true)
	fresh := w.create("new").add().running(false)
	w.goesTo("old")
	rules := w.rules()
	watch, err := plane.Admin.CoreV1().Pods(w.namespace).Watch(b.Context(), metav1.ListOptions{FieldSelector: "metadata.name=new"})
	w.must(err)
	defer watch.Stop()
	for b.Loop() {
		var fromWrite, fromEvent []time.Duration
		for i := range flips {
			ready := i%2 == 0
			want := map[bool]netip.Addr{false: old.ip, true: fresh.ip}[ready]
			heard := make(chan time.Time, 1)
			go func() {
				for event := range watch.ResultChan() {
					pod := event.Object.(*corev1.Pod)
					if slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
						return c.Type == corev1.PodReady && (c.Status == corev1.ConditionTrue) == ready
					}) {
						heard <- time.Now()
						return
					}
				}
			}()
			written := time.Now()
			fresh.running(ready)
			at := w.ruleAt(rules, want, written)
			fromWrite = append(fromWrite, at.Sub(written))
			fromEvent = append(fromEvent, at.Sub(<-heard))
			w.goesTo(map[bool]string{false: "old", true: "new"}[ready])
		}
		report(b, "from the write to the API server to the rule", "write", fromWrite)
		report(b, "from the event at another watcher to the rule (target p99 ≤ 50 ms)", "event", fromEvent)
	}
}

func report(b *testing.B, what, unit string, took []time.Duration) {
	slices.Sort(took)
	p50, p99 := took[len(took)/2], took[len(took)*99/100]
	b.Logf("%s, %d times: p50 %.1f ms, p99 %.1f ms, max %.1f ms", what, len(took), ms(p50), ms(p99), ms(took[len(took)-1]))
	b.ReportMetric(ms(p50), unit+"-p50-ms")
	b.ReportMetric(ms(p99), unit+"-p99-ms")
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ruleChange is an element that has come into a map of nftables.
type ruleChange struct {
	at   time.Time
	data []byte
}

// rules are the kernel's notifications of new elements.
func (w *world) rules() <-chan ruleChange {
	w.Helper()
	var socket *nl.NetlinkSocket
	w.must(w.node.In(lab.Host, func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		return err
	}))
	changes := make(chan ruleChange, 1<<10)
	go func() {
		for {
			messages, _, err := socket.Receive()
			at := time.Now()
			if err != nil {
				close(changes)
				return
			}
			for _, message := range messages {
				if message.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM {
					changes <- ruleChange{at, message.Data}
				}
			}
		}
	}()
	w.Cleanup(socket.Close)
	return changes
}

func (w *world) ruleAt(rules <-chan ruleChange, address netip.Addr, since time.Time) time.Time {
	w.Helper()
	for {
		select {
		case change := <-rules:
			if change.at.After(since) && bytes.Contains(change.data, address.AsSlice()) {
				return change.at
			}
		case <-time.After(10 * time.Second):
			w.Fatalf("no rule for %s", address)
		}
	}
}

// usage is what a process has used.
type usage struct {
	at       time.Time
	cpu      time.Duration
	rss, hwm float64 // MiB
}

// usageOf is that of the node's process of this name.
func usageOf(w *world, node *lab.Node, name string) usage {
	w.Helper()
	const command = `for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = "$0" ] && cat $p/stat && grep -E "VmRSS|VmHWM" $p/status; done; true`
	text, err := node.Run(w.Context(), "sh", "-c", command, name)
	w.must(err)
	u := usage{at: time.Now()}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		number := func(i int) float64 {
			n, err := strconv.ParseFloat(fields[i], 64)
			w.must(err)
			return n
		}
		switch {
		case strings.HasPrefix(line, "VmRSS"):
			u.rss = number(1) / 1024
		case strings.HasPrefix(line, "VmHWM"):
			u.hwm = number(1) / 1024
		default: // proc(5): utime and stime are the 14th and 15th, in ticks of 10 ms
			u.cpu = time.Duration(number(13)+number(14)) * 10 * time.Millisecond
		}
	}
	if u.rss == 0 {
		w.Fatalf("no process %s: %s", name, text)
	}
	return u
}

// cores is how much of a core was used since before, in percent.
func (u usage) cores(before usage) float64 {
	return 100 * float64(u.cpu-before.cpu) / float64(u.at.Sub(before.at))
}

// filler makes pods of a node, or one each of many, that run and are ready.
func (w *world) filler(count int, nodeOf func(i int) string) []*corev1.Pod {
	w.Helper()
	pods := make([]*corev1.Pod, count)
	w.inParallel(count, func(i int) error {
		pod := largePod(fmt.Sprintf("filler-%s-%d", nodeOf(i), i), nodeOf(i))
		made, err := plane.Admin.CoreV1().Pods(w.namespace).Create(w.Context(), pod, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		pods[i] = made
		return w.touch(made, i)
	})
	return pods
}

// touch writes the status of a pod.
func (w *world) touch(pod *corev1.Pod, i int) error {
	ip := fmt.Sprintf("10.250.%d.%d", i/250%250, i%250+1)
	conditions := []corev1.PodCondition{}
	for _, kind := range []corev1.PodConditionType{corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		conditions = append(conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()})
	}
	status := map[string]any{
		"phase": corev1.PodRunning, "conditions": conditions, "podIP": ip, "podIPs": []map[string]any{{"ip": ip}},
		"message": fmt.Sprint("at ", time.Now().UnixNano()),
	}
	data, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	_, err = plane.Admin.CoreV1().Pods(w.namespace).Patch(w.Context(), pod.Name, types.MergePatchType, data, metav1.PatchOptions{}, "status")
	return err
}

// storm writes the status of every pod once a second.
func (w *world) storm(pods []*corev1.Pod, during time.Duration) {
	w.Helper()
	for until := time.Now().Add(during); time.Now().Before(until); {
		second := time.After(time.Second)
		w.inParallel(len(pods), func(i int) error { return w.touch(pods[i], i) })
		<-second
	}
}

func (w *world) inParallel(count int, f func(i int) error) {
	w.Helper()
	var next atomic.Int64
	errs := make([]error, 8)
	var group sync.WaitGroup
	for worker := range errs {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < count && errs[worker] == nil; i = int(next.Add(1)) - 1 {
				errs[worker] = f(i)
			}
		})
	}
	group.Wait()
	w.must(errors.Join(errs...))
}

// largePod is as large as those that DaemonSets make.
func largePod(name, node string) *corev1.Pod {
	controller := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Labels:      map[string]string{"app": "filler", "controller-revision-hash": "6b8f7d5c9", "pod-template-generation": "1"},
			Annotations: map[string]string{"checksum/config": strings.Repeat("a1b2c3d4", 8), "prometheus.io/scrape": "true"},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "apps/v1", Kind: "DaemonSet", Name: "filler", UID: "11111111-2222-3333-4444-555555555555", Controller: &controller,
			}},
		},
		Spec: corev1.PodSpec{NodeName: node, ServiceAccountName: "default"},
	}
	for i, name := range []string{"main", "sidecar"} {
		container := corev1.Container{
			Name: name, Image: "registry.example.com/team/" + name + "@sha256:" + strings.Repeat("0123456789abcdef", 4),
			Ports: []corev1.ContainerPort{{Name: name, ContainerPort: int32(8000 + i)}},
		}
		for _, variable := range []string{"NODE_NAME", "POD_NAME", "LOG_LEVEL", "CLUSTER", "API_KEY_FILE"} {
			container.Env = append(container.Env, corev1.EnvVar{Name: variable, Value: "some value of " + variable})
		}
		for _, path := range []string{"config", "run", "log"} {
			container.VolumeMounts = append(container.VolumeMounts, corev1.VolumeMount{Name: path, MountPath: "/var/" + path})
			if i == 0 {
				pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{
					Name: path, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/" + path}},
				})
			}
		}
		pod.Spec.Containers = append(pod.Spec.Containers, container)
	}
	for _, key := range []string{"not-ready", "unreachable", "disk-pressure", "memory-pressure", "pid-pressure", "unschedulable"} {
		pod.Spec.Tolerations = append(pod.Spec.Tolerations, corev1.Toleration{Key: "node.kubernetes.io/" + key, Operator: corev1.TolerationOpExists})
	}
	return pod
}

// BenchmarkFullNode: memory and CPU of an agent on a node with 250 pods in the namespace, 100 of them with a record, and
// of what 5,000 pods on other nodes cost it.
func BenchmarkFullNode(b *testing.B) {
	const onNode, recorded, attached, elsewhere = 250, 100, 5, 5000
	const idle, storm = 40 * time.Second, 20 * time.Second
	w := apart(b, "full", "full")
	w.poll = "5s"
	for b.Loop() {
		w.serve()
		w.measure(b, "with one pod in the namespace, idle", idle, nil)
		for i := range attached {
			w.create(fmt.Sprint("echo-", i)).add().running(true)
		}
		pods := w.filler(onNode-attached-1, func(int) string { return w.node.Name }) // and the marker
		var records []runtimedir.Attachment
		for i, pod := range pods[:recorded-attached] {
			records = append(records, runtimedir.Attachment{
				ContainerID: fmt.Sprint("c", i), IfName: "eth0", Network: network, Namespace: w.namespace, Name: pod.Name, UID: string(pod.UID),
				Labels: pod.Labels, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 251, 0, byte(i)})}, AddedAt: time.Now(),
			})
		}
		_, err := runtimedir.New(w.node.Path(lab.RuntimeDir)).Update(time.Second, nil, records...)
		w.must(err)
		w.goesTo(fmt.Sprint("echo-", attached-1))
		w.measure(b, "with 250, idle (targets ≤ 40 MiB, ≤ 0.5 %)", idle, nil)
		w.measure(b, "with 250, each written once a second", storm, func() { w.storm(pods, storm) })
		others := w.filler(elsewhere, func(i int) string { return fmt.Sprint("other-", i/50) })
		w.measure(b, "and 5,000 on other nodes, idle", idle, nil)
		w.measure(b, "and 5,000 on other nodes, 250 of these written once a second", storm, func() { w.storm(others[:250], storm) })
	}
}

// BenchmarkBigPods: what pods cost the agent whose authors give them 0.7 MB of labels each. Once it watches them, and once it starts
// beside them.
func BenchmarkBigPods(b *testing.B) {
	const count, target = 40, 64.0 // MiB
	w := apart(b, "big", "big")
	labels := map[string]string{"app": "echo"}
	for i := range 5500 {
		labels[fmt.Sprintf("%058d.example/%04d", i, i)] = strings.Repeat("v", 63)
	}
	for b.Loop() {
		w.serve()
		before := usageOf(w, w.node, "magic-ip-agent")
		for i := range count {
			w.create(fmt.Sprint("big-", i), func(p *corev1.Pod) { p.Labels = labels }).running(true)
		}
		w.settle()
		watched := usageOf(w, w.node, "magic-ip-agent")
		w.agent.Kill()
		w.start()
		w.settle()
		started := usageOf(w, w.node, "magic-ip-agent")
		b.Logf("%d pods with %d labels: agent %.0f MiB before, %.0f (at most %.0f) when they have come, %.0f (at most %.0f) when it starts beside them; target %.0f",
			count, len(labels), before.rss, watched.rss, watched.hwm, started.rss, started.hwm, target)
		if watched.rss > target {
			b.Errorf("%.0f MiB resident, target %.0f", watched.rss, target)
		}
	}
}

// measure prints what the agent uses meanwhile, and what comes to it from the API server.
func (w *world) measure(b *testing.B, what string, during time.Duration, meanwhile func()) {
	w.Helper()
	w.waitPolls(12 * time.Second) // settled: what was put off is done
	before, bytes, requests := usageOf(w, w.node, "magic-ip-agent"), w.proxy.bytes.Load(), w.proxy.total()
	if meanwhile != nil {
		meanwhile()
	} else {
		w.waitPolls(during)
	}
	after := usageOf(w, w.node, "magic-ip-agent")
	b.Logf("%-62s %5.1f MiB resident (most so far %5.1f), %5.2f %% of a core, %d requests, %8d bytes from the API server in %v",
		what, after.rss, after.hwm, after.cores(before), w.proxy.total()-requests, w.proxy.bytes.Load()-bytes, after.at.Sub(before.at).Round(time.Second))
}

// traffic counts what a kind of client exchanges with the API server.
type traffic struct{ requests, failed, received atomic.Int64 }

func (t *traffic) dial(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := plane.node.Dial(lab.Host)(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &countedConn{conn, t}, nil
}

type countedConn struct {
	net.Conn
	traffic *traffic
}

func (c *countedConn) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	c.traffic.received.Add(int64(n))
	return n, err
}

type countedRequests struct {
	http.RoundTripper
	traffic *traffic
}

func (c countedRequests) RoundTrip(r *http.Request) (*http.Response, error) {
	c.traffic.requests.Add(1)
	response, err := c.RoundTripper.RoundTrip(r)
	if err != nil || response.StatusCode != http.StatusOK {
		c.traffic.failed.Add(1)
	}
	return response, err
}

// BenchmarkAPIServer: what agents cost the API server, of which each watches the one pod of its node, and what pollers cost
// it, of which each lists all pods of the namespace every 5 s, as JSON and compressed as kubectl asks for. The clients are in
// this process, with a connection each; what the API server uses is measured of its own process.
func BenchmarkAPIServer(b *testing.B) {
	const nodes = 1000
	const during = time.Minute
	w := &world{TB: b, node: plane.node, namespace: "fleet"}
	account, err := allowAccount(b.Context(), w.namespace)
	w.must(err)
	token, err := newToken(b.Context(), account)
	w.must(err)
	authority, err := os.ReadFile(plane.node.Path(dir + "/ca.crt"))
	w.must(err)
	nodeName := func(i int) string { return fmt.Sprint("node-", i) }
	pods := w.filler(nodes, nodeName)

	row := func(what string, t *traffic, during time.Duration, meanwhile func()) {
		b.Helper()
		before, requests, failed, received := usageOf(w, plane.node, "kube-apiserver"), t.requests.Load(), t.failed.Load(), t.received.Load()
		end := time.After(during)
		if meanwhile != nil {
			meanwhile()
		}
		<-end
		after := usageOf(w, plane.node, "kube-apiserver")
		perMinute := float64(time.Minute) / float64(after.at.Sub(before.at))
		b.Logf("%-54s %8.0f requests/min (%d failed), %10.1f kB/min; API server: %6.1f %% of a core, %5.0f MiB resident", what,
			perMinute*float64(t.requests.Load()-requests), t.failed.Load()-failed, perMinute*float64(t.received.Load()-received)/1000,
			after.cores(before), after.rss)
	}
	for b.Loop() {
		row("nobody", &traffic{}, during, nil)
		for _, count := range []int{1, nodes} {
			ctx, cancel := context.WithCancel(b.Context())
			t := &traffic{}
			before, begun := usageOf(w, plane.node, "kube-apiserver"), time.Now()
			agents := make([]*kube.Pods, count)
			for i := range agents {
				config := &rest.Config{
					Host: endpoint, Dial: t.dial, BearerToken: string(token), TLSClientConfig: rest.TLSClientConfig{CAData: authority},
					WrapTransport: func(next http.RoundTripper) http.RoundTripper { return countedRequests{next, t} },
				}
				agents[i], err = kube.New(config, nodeName(i))
				w.must(err)
				agents[i].Select(inventory.Query{Namespaces: []string{w.namespace}, LabelKeys: map[string]bool{"app": true}})
				go func() { _ = agents[i].Run(ctx, func() {}) }()
			}
			patience, stop := context.WithTimeout(ctx, 3*time.Minute)
			for i, agent := range agents {
				w.must(lab.Eventually(patience, func() error {
					if view := agent.View(); len(view.Current) == 0 || len(view.Pods) != 1 {
						return fmt.Errorf("agent %d sees %+v", i, view)
					}
					return nil
				}))
			}
			stop()
			after := usageOf(w, plane.node, "kube-apiserver")
			b.Logf("%d agents started at once: all have heard after %v; %d requests (%d failed), %.1f kB each; %.1f s of the API server's CPU", count,
				time.Since(begun).Round(time.Millisecond), t.requests.Load(), t.failed.Load(), float64(t.received.Load())/1000/float64(count), (after.cpu - before.cpu).Seconds())
			go func() {
				for ticker := time.NewTicker(5 * time.Second); ctx.Err() == nil; <-ticker.C {
					for _, agent := range agents {
						agent.Poll(ctx)
					}
				}
			}()
			row(fmt.Sprintf("%d agents, nothing happens", count), t, during, nil)
			if count == nodes {
				row("the same, and 20 pods are written each second", t, during, func() {
					for i := range int(during / time.Second) {
						w.storm(pods[20*i%nodes:20*i%nodes+20], time.Second/2)
					}
				})
			}
			cancel()
		}
		row("20 pods are written each second, nobody listens", &traffic{}, during, func() {
			for i := range int(during / time.Second) {
				w.storm(pods[20*i%nodes:20*i%nodes+20], time.Second/2)
			}
		})
		for _, count := range []int{1, 10, 100} {
			ctx, cancel := context.WithCancel(b.Context())
			t := &traffic{}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(authority)
			var pollers sync.WaitGroup
			for i := range count {
				client := &http.Client{Transport: countedRequests{&http.Transport{
					DialContext: t.dial, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots},
				}, t}}
				pollers.Go(func() {
					defer client.CloseIdleConnections()
					start := time.NewTimer(5 * time.Second * time.Duration(i) / time.Duration(count))
					defer start.Stop()
					select {
					case <-start.C:
					case <-ctx.Done():
						return
					}
					for ticker := time.NewTicker(5 * time.Second); ; {
						request, _ := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+"/api/v1/namespaces/"+w.namespace+"/pods", nil)
						request.Header.Set("Authorization", "Bearer "+string(token))
						request.Header.Set("Accept", "application/json")
						if response, err := client.Do(request); err == nil {
							_, _ = io.Copy(io.Discard, response.Body)
							_ = response.Body.Close()
						}
						select {
						case <-ticker.C:
						case <-ctx.Done():
							return
						}
					}
				})
			}
			row(fmt.Sprintf("%d pollers", count), t, during, nil)
			cancel()
			pollers.Wait()
		}
	}
}
