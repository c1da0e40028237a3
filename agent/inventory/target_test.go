package inventory_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// targetsOf are the names of targets, the newest first, with their addresses.
func targetsOf(i *inventory.Inventory, at time.Time) string {
	targets := i.Targets(at)
	slices.SortStableFunc(targets, func(a, b inventory.Target) int { return inventory.Newer(&a, &b) })
	var names []string
	for _, t := range targets {
		name := t.Name
		for _, ip := range t.IPs {
			name += "=" + ip.String()
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func want(t *testing.T, when, want, got string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", when, got, want)
	}
}

// TestNewer: what the API has not reported yet is newer than what it has; the rest by its clock, and then by the order of ADD. Each
// record's own clock says the contrary.
func TestNewer(t *testing.T) {
	var records []runtimedir.Attachment
	for n, name := range []string{"old", "twin-1", "twin-2", "young", "added-1", "added-2"} {
		r := record(id("default", name, "uid-"+name), byte(n+1))
		r.AddedAt = now.Add(-time.Duration(n) * time.Hour)
		records = append(records, r)
	}
	pods := func(names ...string) (pods []inventory.Pod) {
		ages := map[string]time.Duration{"old": 3 * time.Hour, "twin-1": 2 * time.Hour, "twin-2": 2 * time.Hour, "young": time.Hour, "api-a": 2 * time.Hour, "api-b": 2 * time.Hour}
		for n, name := range names {
			pods = append(pods, inventory.Pod{PodID: id("default", name, "uid-"+name), CreatedAt: now.Add(-ages[name]), IPs: addr(byte(100 + n))})
		}
		return pods
	}
	i := inventory.New(true, runtimedir.Memory{}, nil, now)
	i.SetNamespaces(all)
	i.SetRecords(runtimedir.File{}, now)
	i.SetRecords(runtimedir.File{Attachments: records}, now)
	i.SetPods(inventory.View{Pods: pods("old", "twin-1", "twin-2", "young", "api-a", "api-b"), Synced: all, Current: all}, now)
	want(t, "two are not reported yet", "added-2=10.0.0.6 added-1=10.0.0.5 young=10.0.0.4 twin-2=10.0.0.3 twin-1=10.0.0.2 api-b=10.0.0.105 api-a=10.0.0.104 old=10.0.0.1", targetsOf(i, now))
	// After the grace, a record that stands although its pod is in the API no more is the oldest.
	links := map[string]int{}
	for n, r := range records {
		links[r.HostInterface] = n + 1
	}
	i.SetLinks(links)
	want(t, "and never are", "young=10.0.0.4 twin-2=10.0.0.3 twin-1=10.0.0.2 api-b=10.0.0.105 api-a=10.0.0.104 old=10.0.0.1 added-2=10.0.0.6 added-1=10.0.0.5", targetsOf(i, now.Add(inventory.Grace)))
	// Without the API, the order of ADD is all there is.
	i = inventory.New(false, runtimedir.Memory{}, nil, now)
	i.SetRecords(runtimedir.File{Attachments: records}, now)
	want(t, "without the API", "added-2=10.0.0.6 added-1=10.0.0.5 young=10.0.0.4 twin-2=10.0.0.3 twin-1=10.0.0.2 old=10.0.0.1", targetsOf(i, now.Add(time.Hour)))
}

// TestPrimary: a pod has the address of one interface of its last sandbox.
func TestPrimary(t *testing.T) {
	pod := id("default", "echo", "u")
	attach := func(container, ifName string, ips ...string) runtimedir.Attachment {
		r := runtimedir.Attachment{ContainerID: container, IfName: ifName, Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, AddedAt: now}
		for _, ip := range ips {
			r.IPs = append(r.IPs, netip.MustParseAddr(ip))
		}
		return r
	}
	anonymous := func(container, ip string) runtimedir.Attachment {
		r := attach(container, "eth0", ip)
		r.UID, r.Name = "", container
		return r
	}
	for _, tt := range []struct {
		name    string
		records []runtimedir.Attachment
		podIPs  []string
		want    string
	}{
		{"eth0", []runtimedir.Attachment{attach("c", "eth0", "10.0.0.1"), attach("c", "net1", "10.9.0.1")}, nil, "echo=10.0.0.1"},
		{"eth0, added later", []runtimedir.Attachment{attach("c", "net1", "10.9.0.1"), attach("c", "eth0", "10.0.0.1")}, nil, "echo=10.0.0.1"},
		{"no eth0", []runtimedir.Attachment{attach("c", "net1", "10.9.0.1")}, nil, ""},
		{"no eth0, and podIPs of another network", []runtimedir.Attachment{attach("c", "net1", "10.9.0.1")}, []string{"10.0.0.1"}, "echo=10.0.0.1"},
		{"the interface of podIPs", []runtimedir.Attachment{attach("c", "eth0", "10.0.0.1"), attach("c", "net1", "10.9.0.1")}, []string{"10.9.0.1"}, "echo=10.9.0.1"},
		{"the interface of podIPs, added first", []runtimedir.Attachment{attach("c", "net1", "10.9.0.1"), attach("c", "eth0", "10.0.0.1")}, []string{"10.9.0.1"}, "echo=10.9.0.1"},
		{"two interfaces of podIPs", []runtimedir.Attachment{attach("c", "net1", "10.9.0.1"), attach("c", "net2", "10.9.0.2")}, []string{"10.9.0.2", "10.9.0.1"}, "echo=10.9.0.1"},
		{"one address of each family", []runtimedir.Attachment{attach("c", "eth0", "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2")}, nil, "echo=10.0.0.1=fd00::1"},
		{"a second sandbox", []runtimedir.Attachment{attach("c1", "eth0", "10.0.0.1"), attach("c2", "eth0", "10.0.0.2")}, []string{"10.0.0.1"}, "echo=10.0.0.2"},
		{"a second sandbox without eth0 yet", []runtimedir.Attachment{attach("c1", "eth0", "10.0.0.1"), attach("c2", "net1", "10.9.0.2")}, nil, ""},
		{"pods without UID are sandboxes", []runtimedir.Attachment{anonymous("c1", "10.0.0.1"), anonymous("c2", "10.0.0.2")}, nil, "c2=10.0.0.2 c1=10.0.0.1"},
		{"one address on two interfaces", []runtimedir.Attachment{attach("c", "eth0", "10.0.0.1"), attach("c", "net1", "10.0.0.1")}, []string{"10.0.0.1"}, "echo=10.0.0.1"},
		{"an address that was given to a sandbox that is replaced by now", []runtimedir.Attachment{
			anonymous("old", "10.0.0.1"), attach("c1", "eth0", "10.0.0.1"), attach("c2", "eth0", "10.0.0.2"),
		}, nil, "echo=10.0.0.2 old"},
		{"an address that was given anew", []runtimedir.Attachment{anonymous("c1", "10.0.0.1"), anonymous("c2", "10.0.0.1")}, nil, "c2=10.0.0.1 c1"},
	} {
		i := synced(nil)
		if tt.podIPs != nil {
			p := inventory.Pod{PodID: pod, CreatedAt: now}
			for _, ip := range tt.podIPs {
				p.IPs = append(p.IPs, netip.MustParseAddr(ip))
			}
			i = synced(nil, p)
		}
		i.SetRecords(runtimedir.File{Attachments: tt.records}, now)
		want(t, tt.name, tt.want, targetsOf(i, now))
	}
}

// TestWithdrawn: what DEL has taken, or a link that is gone, is no address of a pod any more, until the API reports another one.
func TestWithdrawn(t *testing.T) {
	echo, static := id("default", "echo", "u"), id("default", "static", "hash")
	pods := []inventory.Pod{
		{PodID: echo, IPs: addr(1), CreatedAt: now}, {PodID: id("default", "static", "mirror"), StaticUID: "hash", IPs: addr(2), CreatedAt: now},
		{PodID: id("default", "other", "o"), IPs: addr(3), CreatedAt: now},
	}
	records := []runtimedir.Attachment{record(echo, 1), record(static, 2)}
	sandboxes := func(i *inventory.Inventory) string { return fmt.Sprint(i.Sandboxes(now)) }
	i := synced(records, pods...)
	want(t, "recorded", "static=10.0.0.2 echo=10.0.0.1 other=10.0.0.3", targetsOf(i, now))
	want(t, "recorded: sandboxes", "[10.0.0.1 10.0.0.2 10.0.0.1 10.0.0.2 10.0.0.3]", sandboxes(i))

	i.SetLinks(map[string]int{"veth-static": 2})
	want(t, "a link is gone", "static=10.0.0.2 echo other=10.0.0.3", targetsOf(i, now))
	want(t, "a link is gone: sandboxes", "[10.0.0.2 10.0.0.1 10.0.0.2 10.0.0.3]", sandboxes(i))
	if standing := i.Live(now); len(standing) != 1 || standing[0].HostInterface != "veth-static" || standing[0].Link != 2 {
		t.Errorf("standing %+v", standing)
	}

	i.SetRecords(runtimedir.File{}, now)
	want(t, "DEL", "echo other=10.0.0.3 static", targetsOf(i, now))
	want(t, "DEL: sandboxes", "[10.0.0.3]", sandboxes(i))
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	want(t, "the API reports it still", "echo other=10.0.0.3 static", targetsOf(i, now))
	var memory runtimedir.Memory
	i.Remember(&memory, func(netip.Addr) bool { return true }, nil)
	if diff := cmp.Diff([]runtimedir.Withdrawn{{PodID: static, Addresses: addr(2)}, {PodID: echo, Addresses: addr(1)}}, memory.Withdrawn, byValue); diff != "" {
		t.Errorf("remembered (-want +got):\n%s", diff)
	}

	pods[0].IPs = addr(4)
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	want(t, "another address", "echo=10.0.0.4 other=10.0.0.3 static", targetsOf(i, now))
	pods[0].IPs = addr(1)
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	want(t, "and the first one again", "echo=10.0.0.1 other=10.0.0.3 static", targetsOf(i, now))
	i.SetPods(inventory.View{Pods: pods[:1], Synced: all}, now)
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	want(t, "gone while the API cannot be asked", "echo=10.0.0.1 other=10.0.0.3 static", targetsOf(i, now))
	i.SetPods(inventory.View{Pods: pods[:1], Synced: all, Current: all}, now)
	i.SetPods(inventory.View{Pods: pods, Synced: all, Current: all}, now)
	want(t, "gone", "echo=10.0.0.1 other=10.0.0.3 static=10.0.0.2", targetsOf(i, now))

	// Without the API, no address is reported that could be stale.
	i = inventory.New(false, runtimedir.Memory{}, nil, now)
	i.SetRecords(runtimedir.File{Attachments: records}, now)
	i.SetRecords(runtimedir.File{}, now)
	memory = runtimedir.Memory{}
	if i.Remember(&memory, func(netip.Addr) bool { return true }, nil); len(memory.Withdrawn) > 0 {
		t.Errorf("remembered without the API: %+v", memory.Withdrawn)
	}
}

// TestMemoryOfTheVersionBefore names pods by their UID alone.
func TestMemoryOfTheVersionBefore(t *testing.T) {
	echo := id("default", "echo", "u")
	memory := runtimedir.Memory{
		Pods: []inventory.Pod{{PodID: inventory.PodID{UID: "u"}, Owners: []string{"DaemonSet/echo"}, Labels: map[string]string{"app": "echo"}}},
		Withdrawn: []runtimedir.Withdrawn{
			{PodID: inventory.PodID{UID: "o"}, Addresses: addr(2)}, {PodID: inventory.PodID{UID: "f"}, Addresses: addr(4)}, {PodID: inventory.PodID{UID: "gone"}, Addresses: addr(3)},
		},
	}
	i := inventory.New(true, memory, nil, now)
	i.SetNamespaces(all)
	r := record(echo, 1)
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{r}}, now)
	var got *inventory.Target
	for _, target := range i.Targets(now) {
		if target.PodID == echo {
			got = &target
		}
	}
	if got == nil || !slices.Contains(got.Owners, "DaemonSet/echo") || got.Labels["app"] != "echo" {
		t.Errorf("target %+v", got)
	}
	first := inventory.Pod{PodID: id("default", "first", "f"), IPs: addr(4), CreatedAt: now}
	other := inventory.Pod{PodID: id("default", "other", "o"), IPs: addr(2), CreatedAt: now}
	i.SetPods(inventory.View{Pods: []inventory.Pod{first, {PodID: echo, IPs: addr(1), CreatedAt: now}, other}, Synced: all, Current: all}, now)
	want(t, "withdrawn", "echo=10.0.0.1 other first", targetsOf(i, now))
}

// TestDead: records whose pod and link are gone, after a minute.
func TestDead(t *testing.T) {
	var records []runtimedir.Attachment
	for n, name := range []string{"both", "pod", "link", "none", "bare", "foreign"} {
		records = append(records, record(id("default", name, "uid-"+name), byte(n+1)))
	}
	records[4].HostInterface, records[5].Namespace = "", "elsewhere"
	listed := []inventory.Pod{{PodID: id("default", "link", "uid-link")}, {PodID: id("default", "none", "uid-none")}}
	i := synced(nil, listed...)
	i.SetNamespaces([]string{"default"})
	i.SetRecords(runtimedir.File{Attachments: records}, now)
	dead := func(at time.Time) (names []string) {
		for _, key := range i.Dead(at) {
			names = append(names, key.ContainerID)
		}
		return names
	}
	links := map[string]int{"veth-pod": 1, "veth-none": 2}
	i.SetLinks(links)
	if got := dead(now.Add(inventory.Grace - 1)); len(got) > 0 {
		t.Errorf("dead before the time: %v", got)
	}
	if got := dead(now.Add(inventory.Grace)); !slices.Equal(got, []string{"c-defaultboth"}) {
		t.Errorf("dead %v", got)
	}
	i.SetPods(inventory.View{Pods: append(listed, inventory.Pod{PodID: id("default", "both", "uid-both")}), Synced: all, Current: all}, now.Add(time.Hour))
	i.SetPods(inventory.View{Pods: listed, Synced: all, Current: all}, now.Add(time.Hour))
	if got := dead(now.Add(time.Hour)); len(got) > 0 {
		t.Errorf("the pod was there a moment ago: %v", got)
	}
	// Without a link, the API is the only witness. The plugin drops no record because an agent alone says so.
	stands := func(at time.Time) bool { return slices.Contains(i.Sandboxes(at), addr(5)[0]) }
	at := now.Add(2 * time.Hour)
	if !stands(now.Add(inventory.Grace-1)) || stands(at) {
		t.Errorf("the sandbox of bare stands before the time: %t, after: %t", stands(now.Add(inventory.Grace-1)), stands(at))
	}
	i.SetPods(inventory.View{Pods: listed, Synced: all}, at)
	if !stands(at) {
		t.Error("gone while the API cannot be asked")
	}
	i.SetPods(inventory.View{Pods: append(listed, inventory.Pod{PodID: id("default", "bare", "uid-bare")}), Synced: all, Current: all}, at)
	if !stands(at) {
		t.Error("gone although the API has the pod again")
	}
	i.SetPods(inventory.View{Pods: append(listed, inventory.Pod{PodID: id("default", "heir", "uid-heir"), IPs: addr(5)}), Synced: all, Current: all}, at)
	if got := targetsOf(i, at.Add(inventory.Grace-1)); strings.Contains(got, "heir=") {
		t.Errorf("two pods have one address: %s", got)
	}
	if got := targetsOf(i, at.Add(inventory.Grace)); !strings.Contains(got, "heir=10.0.0.5") {
		t.Errorf("a dead record keeps the address from its heir: %s", got)
	}
	if i.Unlabelled() != 5 {
		t.Errorf("%d without labels", i.Unlabelled())
	}
}

// TestNewLink: a record may come before its link, and before the link of its name that was there before is gone.
func TestNewLink(t *testing.T) {
	r := record(id("default", "echo", "u"), 1)
	bare := record(id("default", "bare", "b"), 2)
	bare.HostInterface = ""
	i := synced([]runtimedir.Attachment{bare})
	if i.HasNewLink() {
		t.Error("a record without a link has a new one")
	}
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{bare, r}}, now)
	if !i.HasNewLink() {
		t.Error("the link is new")
	}
	i.SetLinks(map[string]int{"veth-echo": 7})
	if i.HasNewLink() {
		t.Error("the link is there")
	}
	want(t, "the link is there", "echo=10.0.0.1 bare=10.0.0.2", targetsOf(i, now))
	sooner := record(id("default", "sooner", "s"), 3)
	sooner.HostIfIndex = 7
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{bare, r, sooner}}, now)
	if i.HasNewLink() {
		t.Error("the link that the record names by its index was there before")
	}
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{bare, r}}, now)
	i.SetLinks(map[string]int{"renamed": 7, "veth-echo": 8})
	want(t, "renamed, and another one has its name", "echo=10.0.0.1 bare=10.0.0.2", targetsOf(i, now))
	if standing := i.Live(now); standing[1].HostInterface != "renamed" {
		t.Errorf("standing %+v", standing)
	}
	i.SetLinks(map[string]int{"veth-echo": 8})
	want(t, "gone", "bare=10.0.0.2", targetsOf(i, now))
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{bare, r}}, now)
	if i.HasNewLink() {
		t.Error("the link is missing, which the links have told")
	}
	r.HostIfIndex = 9
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{bare, r}}, now)
	if !i.HasNewLink() {
		t.Error("the record has another link")
	}
}

// TestAddedAgain: an attachment that is added again by another link stands by that one.
func TestAddedAgain(t *testing.T) {
	r := record(id("default", "echo", "u"), 1)
	i := synced([]runtimedir.Attachment{r})
	r.HostInterface, r.IPs = "veth-new", addr(2)
	i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{r}}, now)
	i.SetLinks(map[string]int{"veth-new": 2})
	want(t, "added again", "echo=10.0.0.2", targetsOf(i, now))
	i.SetLinks(map[string]int{"veth-echo": 1})
	want(t, "its link is gone", "", targetsOf(i, now))
}

func TestParseOwner(t *testing.T) {
	for text, want := range map[string]inventory.Owner{
		"DaemonSet/apm-server":               {Group: "apps", Version: "v1", Kind: "DaemonSet", Name: "apm-server"},
		"Job/a":                              {Group: "batch", Version: "v1", Kind: "Job", Name: "a"},
		"ReplicationController/a.b":          {Version: "v1", Kind: "ReplicationController", Name: "a.b"},
		"apps.kruise.io/v1alpha1/CloneSet/a": {Group: "apps.kruise.io", Version: "v1alpha1", Kind: "CloneSet", Name: "a"},
		"CloneSet/a":                         {}, "daemonset/a": {}, "DaemonSet/": {}, "DaemonSet/A": {}, "apps/v1/DaemonSet/a": {}, "": {},
	} {
		got, err := inventory.ParseOwner(text)
		if got != want || (err == nil) != (want != inventory.Owner{}) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
		if err == nil && got.String() != text {
			t.Errorf("%q is written as %q", text, got)
		}
		if err != nil && !strings.Contains(err.Error(), "allowed: Kind/name such as DaemonSet/apm-server") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestLabelsOfBeforeTheRestart count until the API has reported the pods of the namespace, for a record that has none itself.
func TestLabelsOfBeforeTheRestart(t *testing.T) {
	before, recorded := map[string]string{"app": "before"}, map[string]string{"app": "recorded"}
	for _, tt := range []struct {
		name               string
		remembered, record map[string]string
		synced             []string
		want               map[string]string
	}{
		{"remembered", before, nil, nil, before},
		{"recorded", nil, recorded, nil, recorded},
		{"remembered and recorded", before, recorded, nil, recorded},
		{"neither", nil, nil, nil, nil},
		{"another namespace is synced", before, nil, []string{"other"}, before},
		{"its namespace is synced", before, nil, []string{"default"}, nil},
	} {
		r := record(id("default", "echo", "u"), 1)
		r.Labels = tt.record
		var labels []runtimedir.PodLabels
		if tt.remembered != nil {
			labels = append(labels, runtimedir.PodLabels{PodID: id("default", "echo", "u"), Labels: tt.remembered})
		}
		i := inventory.New(true, runtimedir.Memory{}, labels, now)
		i.SetNamespaces(all)
		i.SetRecords(runtimedir.File{Attachments: []runtimedir.Attachment{r}}, now)
		i.SetPods(inventory.View{Synced: tt.synced}, now)
		targets := i.Targets(now)
		if len(targets) != 1 {
			t.Fatalf("%s: targets %+v", tt.name, targets)
		}
		if diff := cmp.Diff(tt.want, targets[0].Labels); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// TestOwnerResolved: an owner is resolved unless the API has left open whose it is, in that namespace.
func TestOwnerResolved(t *testing.T) {
	open := inventory.OwnerQuery{Namespace: "default", Owner: inventory.Owner{Group: "apps", Version: "v1", Kind: "DaemonSet", Name: "echo"}}
	i := inventory.New(true, runtimedir.Memory{}, nil, now)
	i.SetPods(inventory.View{Synced: all, Current: all, Unresolved: []inventory.OwnerQuery{open}}, now)
	for _, tt := range []struct {
		namespace, owner string
		want             bool
	}{
		{"default", "DaemonSet/echo", false}, {"default", "DaemonSet/other", true}, {"other", "DaemonSet/echo", true}, {"other", "DaemonSet/other", true},
		{"default", "", true},
	} {
		if got := i.OwnerResolved(tt.namespace, tt.owner); got != tt.want {
			t.Errorf("owner %q in namespace %s is resolved: %t", tt.owner, tt.namespace, got)
		}
	}
	i.SetPods(inventory.View{Synced: all, Current: all}, now)
	if !i.OwnerResolved("default", "DaemonSet/echo") {
		t.Error("an owner that the API has resolved is not")
	}
}

// TestRecordedFor: where a pod has no part in an address that the API reports of it, the pod that has it is named, or it is said to be
// of the pod's sandbox before.
func TestRecordedFor(t *testing.T) {
	pod, other := id("default", "pod", "p"), id("default", "other", "o")
	first, next := record(pod, 1), record(pod, 2)
	next.ContainerID, next.IfName = "next", "net1" // its eth0 is to come
	for want, records := range map[string][]runtimedir.Attachment{
		"recorded for pod default/other, which has it now": {record(other, 1)},
		"of another interface or sandbox of the pod":       {first, next},
	} {
		i := synced(records, inventory.Pod{PodID: pod, IPs: addr(1), Ready: true})
		n := slices.IndexFunc(i.Targets(now), func(t inventory.Target) bool { return t.PodID == pod })
		if n < 0 {
			t.Fatalf("%q: the pod is no target", want)
		}
		if unusable := i.Targets(now)[n].Unusable; len(unusable) != 1 || unusable[0].Reason != want {
			t.Errorf("unusable %+v, want %q", unusable, want)
		}
	}
}
