package inventory_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

var (
	now     = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	all     = []string{inventory.AllNamespaces}
	byValue = cmpopts.EquateComparable(netip.Addr{})
)

func id(namespace, name, uid string) inventory.PodID {
	return inventory.PodID{Namespace: namespace, Name: name, UID: uid}
}

func addr(n byte) []netip.Addr { return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n})} }

func record(pod inventory.PodID, n byte) runtimedir.Attachment {
	return runtimedir.Attachment{
		ContainerID: "c-" + pod.Namespace + pod.Name, IfName: "eth0", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID,
		HostInterface: "veth-" + pod.Name, IPs: addr(n), AddedAt: now,
	}
}

// synced is an inventory of which all sources are.
func synced(records []runtimedir.Attachment, pods ...inventory.Pod) *inventory.Inventory {
	i := inventory.New(true, runtimedir.Memory{}, nil, now)
	i.SetNamespaces(all)
	i.SetRecords(runtimedir.File{Attachments: records}, now)
	links := map[string]int{}
	for n, r := range records {
		links[r.HostInterface] = n + 1
	}
	i.SetLinks(links)
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	return i
}

// TestNoPodSpeaksForAnother: whatever pods of other namespaces or names say of themselves, in the fields that their authors
// write and in those that they do not, a record and its pod stay what they are. The only thing that a pod can take is an address
// that is in no record.
func TestNoPodSpeaksForAnother(t *testing.T) {
	victim := id("default", "victim", "uid-victim")
	pod := inventory.Pod{PodID: victim, Labels: map[string]string{"app": "echo"}, IPs: addr(1), CreatedAt: now, Running: true, Ready: true}
	static := id("kube-system", "static-node", "hash")
	mirror := inventory.Pod{PodID: id("kube-system", "static-node", "uid-mirror"), StaticUID: "hash", Labels: map[string]string{"app": "static"}, IPs: addr(2), CreatedAt: now, Ready: true}
	records := []runtimedir.Attachment{record(victim, 1), record(static, 2)}
	of := func(i *inventory.Inventory) (targets []inventory.Target, labels []runtimedir.PodLabels) {
		for _, t := range i.Targets(now.Add(time.Hour)) {
			if t.PodID == victim || t.PodID == static {
				targets = append(targets, t)
			}
		}
		for _, l := range i.Labels(map[string]bool{"app": true}) {
			if l.PodID == victim || l.PodID == static {
				labels = append(labels, l)
			}
		}
		return targets, labels
	}
	wantTargets, wantLabels := of(synced(records, pod, mirror))
	if len(wantTargets) != 2 || len(wantLabels) != 2 || wantTargets[1].Labels["app"] != "static" {
		t.Fatalf("targets %+v, labels %+v", wantTargets, wantLabels)
	}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	one := func(of ...string) string { return of[random.IntN(len(of))] }
	for range 20000 {
		pods := []inventory.Pod{pod, mirror}
		for range 1 + random.IntN(3) {
			evil := inventory.Pod{
				PodID:     id(one("default", "kube-system", "evil"), one("victim", "static-node", "evil"), one("uid-victim", "uid-mirror", "hash", "uid-evil", "")),
				StaticUID: one("", "uid-victim", "hash", "uid-mirror"), Labels: map[string]string{"app": one("echo", "none")},
				IPs: addr(byte(random.IntN(4))), CreatedAt: now.Add(time.Duration(random.IntN(3)-1) * time.Hour),
				Ready: random.IntN(2) == 0, Finished: random.IntN(2) == 0, Terminating: random.IntN(2) == 0,
			}
			if evil.Namespace == "default" && evil.Name == "victim" || evil.Namespace == "kube-system" && evil.Name == "static-node" {
				continue // the API has one pod of a name
			}
			if evil.UID == "hash" {
				continue // the API server makes the UIDs: none is the hash of a static pod
			}
			pods = append(pods, evil)
		}
		random.Shuffle(len(pods), func(i, j int) { pods[i], pods[j] = pods[j], pods[i] })
		targets, labels := of(synced(records, pods...))
		if diff := cmp.Diff(wantTargets, targets, byValue, cmpopts.IgnoreUnexported(inventory.Target{})); diff != "" {
			t.Fatalf("seed %d: beside %+v: targets (-want +got):\n%s", seed, pods, diff)
		}
		if diff := cmp.Diff(wantLabels, labels); diff != "" {
			t.Fatalf("seed %d: beside %+v: labels (-want +got):\n%s", seed, pods, diff)
		}
	}
}

// TestRestartIsNoEvent: an inventory that goes on with what another one has remembered has the same targets, until a source
// reports otherwise.
func TestRestartIsNoEvent(t *testing.T) {
	old, fresh, api := id("default", "old", "uid-old"), id("default", "fresh", "uid-fresh"), id("default", "api", "uid-api")
	records := []runtimedir.Attachment{record(old, 1), record(fresh, 2)}
	keys := map[string]bool{"app": true}
	before := synced(records,
		inventory.Pod{PodID: old, Labels: map[string]string{"app": "echo"}, IPs: addr(1), CreatedAt: now.Add(-time.Hour), Ready: true},
		inventory.Pod{PodID: fresh, Labels: map[string]string{"app": "echo"}, IPs: addr(2), CreatedAt: now, Running: true, Owners: []string{"DaemonSet/echo"}},
		inventory.Pod{PodID: api, Labels: map[string]string{"app": "echo", "other": "dropped"}, IPs: addr(3), CreatedAt: now, Ready: true},
		inventory.Pod{PodID: id("default", "none", "uid-none"), Labels: map[string]string{"app": "none"}, IPs: addr(4), CreatedAt: now},
	)
	var memory runtimedir.Memory
	before.Remember(&memory, func(ip netip.Addr) bool { return ip != addr(4)[0] && ip != addr(2)[0] }, keys)
	after := inventory.New(true, memory, before.Labels(keys), now.Add(time.Minute))
	after.SetNamespaces(all)
	want := slices.DeleteFunc(before.Targets(now), func(t inventory.Target) bool { return t.Name == "none" || t.Name == "fresh" })
	want[1].Labels = map[string]string{"app": "echo"}
	check := func(when string) {
		t.Helper()
		got := slices.DeleteFunc(after.Targets(now.Add(2*time.Minute)), func(t inventory.Target) bool { return t.Name == "fresh" })
		for i := range got {
			got[i].HostInterface = want[i].HostInterface // the links are not synced
		}
		if diff := cmp.Diff(want, got, byValue, cmpopts.IgnoreUnexported(inventory.Target{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", when, diff)
		}
	}
	check("before any source is synced")
	after.SetPods(inventory.View{}, now)
	check("the API is silent")
	if after.RecordsSynced() || after.Synced("default") || after.AllSynced() {
		t.Error("synced")
	}
	if after.SetNoRecords() || after.RecordsSynced() {
		t.Error("that there is no state file is news, although records are known")
	}
	after.SetRecords(runtimedir.File{Attachments: records}, now)
	check("the state file is read")
	if got := after.Targets(now); len(got) != 3 || got[1].Name != "fresh" || !slices.Equal(got[1].Owners, []string{"DaemonSet/echo"}) {
		t.Errorf("targets %+v", got)
	}
	after.SetLinks(map[string]int{"veth-old": 1, "veth-fresh": 2})
	check("the links are read")
	if !after.RecordsSynced() || after.Synced("default") {
		t.Error("the API is not synced")
	}
	after.SetPods(inventory.View{Synced: all, Current: all}, now)
	if got := after.Targets(now); len(got) != 2 || !after.AllSynced() {
		t.Errorf("pods that are only in the API, and are not in it any more: %+v", got)
	}
}

// TestLabels: of the pods that are known, under the IDs that CNI has of them, and no other keys.
func TestLabels(t *testing.T) {
	i := synced([]runtimedir.Attachment{record(id("default", "gone", "uid-gone"), 1)},
		inventory.Pod{PodID: id("default", "gone", "uid-gone"), Labels: map[string]string{"app": "gone"}},
		inventory.Pod{PodID: id("default", "echo", "uid-echo"), Labels: map[string]string{"app": "echo", "secret": "x"}},
		inventory.Pod{PodID: id("default", "bare", "uid-bare")},
		inventory.Pod{PodID: id("default", "static", "uid-mirror"), StaticUID: "hash", Labels: map[string]string{"app": "static"}},
	)
	i.SetPods(inventory.View{Pods: []inventory.Pod{
		{PodID: id("default", "echo", "uid-echo"), Labels: map[string]string{"app": "echo", "secret": "x"}},
		{PodID: id("default", "bare", "uid-bare")},
		{PodID: id("default", "static", "uid-mirror"), StaticUID: "hash", Labels: map[string]string{"app": "static"}},
	}, Synced: all, Current: all}, now)
	want := []runtimedir.PodLabels{
		{PodID: id("default", "static", "hash"), Labels: map[string]string{"app": "static"}},
		{PodID: id("default", "bare", "uid-bare"), Labels: map[string]string{}},
		{PodID: id("default", "echo", "uid-echo"), Labels: map[string]string{"app": "echo"}},
		{PodID: id("default", "gone", "uid-gone"), Labels: map[string]string{"app": "gone"}},
	}
	if diff := cmp.Diff(want, i.Labels(map[string]bool{"app": true})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestLostRecords: a state file that was begun anew does not report the DEL of what was in the one before.
func TestLostRecords(t *testing.T) {
	one, two, bare := record(id("default", "one", "u1"), 1), record(id("default", "two", "u2"), 2), record(id("default", "bare", "u3"), 3)
	bare.HostInterface = ""
	i := inventory.New(false, runtimedir.Memory{}, nil, now)
	i.SetNamespaces(all)
	names := func() (names []string) {
		for _, t := range i.Targets(now) {
			names = append(names, t.Name)
		}
		return names
	}
	want := func(when string, want ...string) {
		t.Helper()
		if got := names(); !slices.Equal(got, want) {
			t.Errorf("%s: targets %v, want %v", when, got, want)
		}
	}
	since := func(n int) time.Time { return now.Add(time.Duration(n) * time.Hour) }
	i.SetRecords(runtimedir.File{Since: since(0), Attachments: []runtimedir.Attachment{one, two, bare}}, now)
	i.SetLinks(map[string]int{"veth-one": 1, "veth-two": 2})
	want("at first", "one", "two", "bare")
	i.SetRecords(runtimedir.File{Since: since(1)}, now)
	want("begun anew", "one", "two")
	if len(i.Lost()) != 2 {
		t.Errorf("lost %v", i.Lost())
	}
	i.SetRecords(runtimedir.File{Since: since(2), Attachments: []runtimedir.Attachment{one}}, now)
	want("begun anew again, and one was added again", "two", "one")
	i.SetLinks(map[string]int{"veth-one": 1})
	want("the link of two is gone", "one")
	i.SetLinks(map[string]int{"veth-one": 1, "veth-two": 3})
	want("another link of its name", "one")

	// With the API, nothing says that a sandbox without a link was deleted.
	i = synced([]runtimedir.Attachment{one, bare}, inventory.Pod{PodID: id("default", "bare", "u3"), IPs: addr(3), CreatedAt: now})
	i.SetRecords(runtimedir.File{Since: since(1)}, now)
	if got, sandboxes := targetsOf(i, now), i.Sandboxes(now); got != "one=10.0.0.1 bare=10.0.0.3" || !slices.Contains(sandboxes, addr(3)[0]) {
		t.Errorf("with the API: targets %q, sandboxes %v", got, sandboxes)
	}
}

// TestGrace: how long a record counts whose pod is not in the API is measured from when it was seen, not by its clock.
func TestGrace(t *testing.T) {
	for _, skew := range []time.Duration{0, -24 * time.Hour, 24 * time.Hour} {
		r := record(id("default", "echo", "u"), 1)
		r.HostInterface, r.AddedAt = "", now.Add(skew)
		i := synced(nil)
		i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{r}}, now)
		for after, want := range map[time.Duration]int{0: 1, inventory.Grace - 1: 1, inventory.Grace: 0} {
			if got := i.Targets(now.Add(after)); len(got) != want {
				t.Errorf("clock off by %s, after %s: %d targets, want %d", skew, after, len(got), want)
			}
		}
	}
	// A record that was there when this process started may be older than that.
	r := record(id("default", "echo", "u"), 1)
	r.HostInterface, r.AddedAt = "", now.Add(-time.Hour)
	if got := synced([]runtimedir.Attachment{r}).Targets(now); len(got) > 0 {
		t.Errorf("targets %+v", got)
	}
}

// TestLinks: a record stands for as long as its link is there, which its index identifies.
func TestLinks(t *testing.T) {
	type links = map[string]int
	for _, test := range []struct {
		name  string
		index int // in the record
		seen  []links
		want  string // the link's name; empty: it does not stand
	}{
		{"of an older plugin", 0, []links{{"veth-a": 7}}, "veth-a"},
		{"the index is recorded", 7, []links{{"veth-a": 7}}, "veth-a"},
		{"gone", 7, []links{{"veth-a": 7}, {}}, ""},
		{"replaced", 0, []links{{"veth-a": 7}, {"veth-a": 8}}, ""},
		{"replaced before it was seen", 7, []links{{"veth-a": 8}}, ""},
		{"renamed", 0, []links{{"veth-a": 7}, {"other": 7}}, "other"},
		{"renamed, and another has its name", 7, []links{{"veth-a": 7}, {"other": 7, "veth-a": 8}}, "other"},
		{"of before the node was started: its index is another link's", 7, []links{{"cni0": 7}}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := record(id("default", "a", "uid"), 1)
			a.HostIfIndex = test.index
			i := inventory.New(false, runtimedir.Memory{}, nil, now)
			i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{a}}, now)
			for _, l := range test.seen {
				i.SetLinks(l)
			}
			got := ""
			for _, s := range i.Live(now) {
				got = s.HostInterface
			}
			if got != test.want {
				t.Errorf("the link is %q, want %q", got, test.want)
			}
		})
	}
}

// TestNextExpiry: the first end of a Grace that is still to come, of a record that the API lacks or of one that it has never had.
func TestNextExpiry(t *testing.T) {
	i := inventory.New(true, runtimedir.Memory{}, nil, now)
	i.SetNamespaces([]string{"default"})
	i.SetRecords(runtimedir.File{}, now)
	expiry := func(when string, at, want time.Duration) {
		t.Helper()
		if got := i.NextExpiry(now.Add(at)); got != want {
			t.Errorf("%s: the next Grace ends in %s, want %s", when, got, want)
		}
	}
	var records []runtimedir.Attachment
	var pods []inventory.Pod
	set := func(at time.Duration) {
		i.SetRecords(runtimedir.File{Attachments: records}, now.Add(at))
		i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now.Add(at))
	}
	const second = time.Second
	expiry("nothing", 0, 0)
	early, late, other := id("default", "early", "e"), id("default", "late", "l"), id("other", "other", "o")
	pods = []inventory.Pod{{PodID: early, IPs: addr(1)}, {PodID: late, IPs: addr(2)}}
	records = []runtimedir.Attachment{record(early, 1), record(late, 2), record(other, 3)}
	set(0)
	expiry("all are reported, or in a namespace of no interest", 0, 0)
	pods = pods[1:]
	set(2 * second)
	expiry("one has gone: of when it was seen", 3*second, inventory.Grace-3*second)
	pods = nil
	set(5 * second)
	expiry("the other has, too", 6*second, inventory.Grace-6*second)
	expiry("both have been seen for that long: of the first that has gone", inventory.Grace, 2*second)
	expiry("that has gone for that long, too", inventory.Grace+2*second, 3*second)
	expiry("and the other", inventory.Grace+5*second, 0)
	expiry("later", 2*inventory.Grace, 0)
	slices.Reverse(records)
	set(6 * second)
	expiry("in another order, both have been seen for that long", inventory.Grace, 2*second)
	expiry("in another order, the first has gone for that long, too", inventory.Grace+2*second, 3*second)
}

// TestLeft: pods of a namespace that is of no interest any more stand, as far as anybody knows, until a record or a pod has their address.
func TestLeft(t *testing.T) {
	pod := func(namespace, name string, n byte) inventory.Pod {
		return inventory.Pod{PodID: id(namespace, name, name), IPs: addr(n), HostNetwork: n == 9}
	}
	i := inventory.New(true, runtimedir.Memory{}, nil, now)
	i.SetRecords(runtimedir.File{}, now)
	i.SetLinks(map[string]int{})
	report := func(namespace string, pods ...inventory.Pod) {
		i.SetNamespaces([]string{namespace})
		i.SetPods(inventory.View{Pods: pods, Synced: []string{namespace}, Current: []string{namespace}}, now)
	}
	stand := func(when string, want ...byte) {
		t.Helper()
		var got []byte
		for _, ip := range i.Sandboxes(now) {
			got = append(got, ip.As4()[3])
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: the sandboxes of %v stand, want %v", when, got, want)
		}
	}
	report("before", pod("before", "one", 1), pod("before", "two", 2), pod("before", "host", 9))
	stand("reported", 1, 2, 9)
	report("after", pod("after", "three", 3), pod("after", "host", 9))
	stand("another namespace is of interest", 1, 2, 3, 9, 9)
	one := record(id("after", "four", "four"), 1)
	one.HostInterface = ""
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{one}}, now)
	stand("a record has one", 1, 2, 3, 9, 9)
	i.SetRecords(runtimedir.File{}, now)
	stand("that record has gone", 2, 3, 9, 9)
	report("after", pod("after", "five", 2))
	stand("another pod has one", 2, 9)
	report("after")
	stand("that pod has gone", 9)
	report("before", pod("before", "one", 1))
	stand("the namespace is of interest again", 1)
}
