package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The pods of these tests are in "default" unless they say otherwise, which cni-conf/ has a selector for:
//
//	bridge      10.244.1.0/24                          app=echo in default
//	ptp         10.244.2.0/24                          the same
//	dual-stack  10.244.3.0/24, fd00:10:244:3::/64      the same

var (
	networks = map[string]string{"bridge": "10-bridge.conflist", "ptp": "20-ptp.conflist", "dual-stack": "30-dual-stack.conflist"}
	echo     = map[string]string{"app": "echo"}
)

func TestAddCheckDel(t *testing.T) {
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for network, file := range networks {
			t.Run(version+"/"+network, func(t *testing.T) {
				t.Parallel()
				node := newNode(t)
				addConf(t, node, file, withVersion(t, conflist(t, file), version))
				pod := lab.Pod{Name: "a", UID: "1-2-3", Labels: echo}
				attached := add(t, node, network, pod)

				link := hostInterface(t, node, "a")
				want := []runtimedir.Attachment{{
					ContainerID:   pod.ContainerID(),
					IfName:        "eth0",
					Network:       network,
					Namespace:     "default",
					Name:          "a",
					UID:           "1-2-3",
					Labels:        echo,
					IPs:           podAddresses(t, node, "a"),
					HostInterface: link.Name,
					HostIfIndex:   link.Index,
					Netns:         "/run/netns/a",
				}}
				if diff := cmp.Diff(want, records(t, node), ignoreAddedAt, compareAddrs); diff != "" {
					t.Errorf("records after ADD (-want +got):\n%s", diff)
				}
				if families := len(want[0].IPs); network == "dual-stack" && families != 2 || families == 0 {
					t.Errorf("the pod has %d addresses", families)
				}
				var result struct{ CNIVersion string }
				if err := json.Unmarshal(attached.Result, &result); err != nil || result.CNIVersion != version {
					t.Errorf("result has version %q, %v, want %q", result.CNIVersion, err, version)
				}
				if version != "0.3.1" { // CHECK came with 0.4.0
					if err := node.Check(t.Context(), network, pod); err != nil {
						t.Error(err)
					}
				}
				if version == "1.1.0" {
					if err := node.Status(t.Context(), network); err != nil {
						t.Error(err)
					}
				}
				del(t, node, network, pod)
				wantPods(t, node)
			})
		}
	}
}

// The result of a chain is that of the plugins before ours, to the byte.
func TestAddPassesTheResultThrough(t *testing.T) {
	t.Parallel()
	for network, file := range networks {
		node := newNode(t)
		addConf(t, node, file, conflist(t, file))
		with := add(t, node, network, lab.Pod{Name: "a", Labels: echo})
		del(t, node, network, lab.Pod{Name: "a"})

		var list map[string]any
		if err := json.Unmarshal(conflist(t, file), &list); err != nil {
			t.Fatal(err)
		}
		list["plugins"] = list["plugins"].([]any)[:1]
		alone, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		without := newNode(t)
		addConf(t, without, file, alone)
		want := add(t, without, network, lab.Pod{Name: "a", Labels: echo})
		if diff := cmp.Diff(normalised(t, want.Result), normalised(t, with.Result)); diff != "" {
			t.Errorf("%s: result (-without +with the plugin):\n%s", network, diff)
		}
	}
}

func TestWhichPodsAreRecorded(t *testing.T) {
	t.Parallel()
	everywhere := bytes.ReplaceAll(conflist(t, "10-bridge.conflist"), []byte(`"namespace": "default"`), []byte(`"namespace": "*"`))
	for name, test := range map[string]struct {
		conflist []byte
		pod      lab.Pod
		recorded bool
		labels   map[string]string
	}{
		"labels match":                  {pod: lab.Pod{Name: "a", Labels: echo}, recorded: true, labels: echo},
		"labels differ":                 {pod: lab.Pod{Name: "a", Labels: map[string]string{"app": "other"}}},
		"no labels":                     {pod: lab.Pod{Name: "a", Labels: map[string]string{}}},
		"labels unknown":                {pod: lab.Pod{Name: "a"}, recorded: true},
		"other namespace":               {pod: lab.Pod{Name: "a", Namespace: "other", Labels: echo}},
		"other namespace, all selected": {conflist: everywhere, pod: lab.Pod{Name: "a", Namespace: "other", Labels: echo}, recorded: true, labels: echo},
		"no identity":                   {pod: lab.Pod{NetNS: "a", Labels: echo}},
		"no identity, all selected":     {conflist: everywhere, pod: lab.Pod{NetNS: "a", Labels: echo}, recorded: true, labels: echo},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := newNode(t, "10-bridge.conflist")
			if test.conflist != nil {
				addConf(t, node, "10-bridge.conflist", test.conflist)
			}
			attached := add(t, node, "bridge", test.pod)
			var want []runtimedir.Attachment
			if test.recorded {
				want = []runtimedir.Attachment{{ContainerID: attached.ContainerID, Labels: test.labels}}
			}
			onlyLabels := cmpopts.IgnoreFields(runtimedir.Attachment{}, "IfName", "Network", "Namespace", "Name", "UID", "IPs", "HostInterface", "HostIfIndex", "Netns")
			if diff := cmp.Diff(want, records(t, node), onlyLabels, ignoreAddedAt); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNothingIsTouchedForOtherNamespaces(t *testing.T) {
	t.Parallel()
	node := newNode(t, "10-bridge.conflist")
	pod := lab.Pod{Name: "a", Namespace: "other", Labels: echo}
	add(t, node, "bridge", pod)
	del(t, node, "bridge", pod)
	wantNoRuntimeDir(t, node)
}

func TestDel(t *testing.T) {
	t.Parallel()
	pod := lab.Pod{Name: "a", Labels: echo}
	// What a runtime sends that has lost everything but the container's name.
	bare := pluginConfig(t, "10-bridge.conflist", nil)

	t.Run("repeated", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		add(t, node, "bridge", pod)
		for range 3 {
			del(t, node, "bridge", pod)
			wantPods(t, node)
		}
	})
	t.Run("before any ADD", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		del(t, node, "bridge", pod)
		wantNoRuntimeDir(t, node)
	})
	t.Run("before any ADD, without prevResult and netns", func(t *testing.T) {
		t.Parallel()
		node := newNode(t)
		if _, err := node.ExecPlugin(t.Context(), bare, "CNI_COMMAND=DEL", "CNI_CONTAINERID=x", "CNI_IFNAME=eth0"); err != nil {
			t.Error(err)
		}
		wantNoRuntimeDir(t, node)
	})
	t.Run("of a pod never added", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		add(t, node, "bridge", pod)
		del(t, node, "bridge", lab.Pod{Name: "b"})
		wantPods(t, node, "a")
	})
	t.Run("of another interface", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist", "20-ptp.conflist")
		second := lab.Pod{Name: "a", IfName: "net1", Labels: echo}
		add(t, node, "bridge", pod)
		add(t, node, "ptp", second)
		wantPods(t, node, "a", "a")
		del(t, node, "ptp", second)
		wantPods(t, node, "a")
	})
	t.Run("without prevResult and netns", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		attached := add(t, node, "bridge", pod)
		for range 2 {
			if _, err := node.ExecPlugin(t.Context(), bare, "CNI_COMMAND=DEL", "CNI_NETNS=", "CNI_IFNAME=eth0",
				"CNI_CONTAINERID="+attached.ContainerID); err != nil {
				t.Error(err)
			}
			wantPods(t, node)
		}
	})
	t.Run("after the netns has gone", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		add(t, node, "bridge", pod)
		if _, err := node.Run(t.Context(), "ip", "netns", "delete", "a"); err != nil {
			t.Fatal(err)
		}
		del(t, node, "bridge", pod)
		wantPods(t, node)
	})
}

// An address may be given to the next pod while the DEL of its former owner is still to come.
func TestDelOfFormerOwnerOfAnAddress(t *testing.T) {
	t.Parallel()
	node := newNode(t, "10-bridge.conflist")
	former := add(t, node, "bridge", lab.Pod{Name: "former", Labels: echo})
	if _, err := node.Run(t.Context(), "rm", "-r", "/var/lib/cni/networks/bridge"); err != nil {
		t.Fatal(err)
	}
	owner := add(t, node, "bridge", lab.Pod{Name: "owner", Labels: echo})
	if !slices.Equal(former.IPs, owner.IPs) {
		t.Fatalf("addresses %v and %v, the test needs one for both", former.IPs, owner.IPs)
	}
	wantPods(t, node, "former", "owner")
	del(t, node, "bridge", lab.Pod{Name: "former"})
	wantPods(t, node, "owner")
}

func TestParallelAdds(t *testing.T) {
	t.Parallel()
	const pods = 20
	node := newNode(t, "30-dual-stack.conflist")
	var names []string
	inParallel := func(f func(pod lab.Pod) error) {
		t.Helper()
		var group sync.WaitGroup
		for _, name := range names {
			group.Go(func() {
				if err := f(lab.Pod{Name: name, Labels: echo}); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
	}
	for i := range pods {
		names = append(names, fmt.Sprintf("pod-%02d", i))
	}

	inParallel(func(pod lab.Pod) error {
		_, err := node.Add(t.Context(), "dual-stack", pod)
		return err
	})
	wantPods(t, node, names...)
	owners := map[netip.Addr]string{}
	for _, record := range records(t, node) {
		for _, ip := range record.IPs {
			if other, taken := owners[ip]; taken {
				t.Errorf("%s is recorded for %s and %s", ip, other, record.Name)
			}
			owners[ip] = record.Name
		}
	}
	if len(owners) != 2*pods {
		t.Errorf("%d addresses recorded, want %d", len(owners), 2*pods)
	}

	inParallel(func(pod lab.Pod) error { return node.Del(t.Context(), "dual-stack", pod) })
	wantPods(t, node)
}

func TestGC(t *testing.T) {
	t.Parallel()
	setUp := func(t *testing.T) *lab.Node {
		t.Helper()
		node := newNode(t, "10-bridge.conflist", "20-ptp.conflist")
		add(t, node, "bridge", lab.Pod{Name: "a", Labels: echo})
		add(t, node, "bridge", lab.Pod{Name: "b", Labels: echo})
		add(t, node, "ptp", lab.Pod{Name: "other-network", Labels: echo})
		return node
	}
	t.Run("cnitool", func(t *testing.T) {
		t.Parallel()
		node := setUp(t)
		if err := node.GC(t.Context(), "bridge"); err != nil {
			t.Fatal(err)
		}
		wantPods(t, node, "other-network")
	})
	// cnitool passes no list: libcni sends a DEL for what it remembers instead. CRI-O passes one.
	for name, test := range map[string]struct {
		valid []types.GCAttachment
		want  []string
	}{
		"nothing is valid": {valid: []types.GCAttachment{}, want: []string{"other-network"}},
		"one is valid": {
			valid: []types.GCAttachment{{ContainerID: lab.Pod{Name: "b"}.ContainerID(), IfName: "eth0"}},
			want:  []string{"b", "other-network"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node := setUp(t)
			config := pluginConfig(t, "10-bridge.conflist", map[string]any{"cni.dev/valid-attachments": test.valid})
			if _, err := node.ExecPlugin(t.Context(), config, "CNI_COMMAND=GC"); err != nil {
				t.Fatal(err)
			}
			wantPods(t, node, test.want...)
		})
	}
	t.Run("before any ADD", func(t *testing.T) {
		t.Parallel()
		node := newNode(t, "10-bridge.conflist")
		if err := node.GC(t.Context(), "bridge"); err != nil {
			t.Fatal(err)
		}
		wantNoRuntimeDir(t, node)
	})
}

func TestUnusableConfiguration(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	broken := bytes.Replace(conflist(t, "10-bridge.conflist"), []byte(`"/run/magic-ip-address"`), []byte("7"), 1)
	addConf(t, node, "10-bridge.conflist", broken)
	if err := node.Status(t.Context(), "bridge"); err == nil {
		t.Error("STATUS accepts a number for runtimeDir")
	}
	_, err := node.Add(t.Context(), "bridge", lab.Pod{Name: "a", Labels: echo})
	if err == nil || !strings.Contains(err.Error(), "runtimeDir") {
		t.Errorf("ADD: %v, want an error that names runtimeDir", err)
	}
}

// No fault of the plugin's own keeps a pod from starting or going.
func TestAddFailsOpen(t *testing.T) {
	t.Parallel()
	for name, content := range map[string]string{
		path.Join(lab.RuntimeDir, "plugin", "state.json"): "{",
		lab.RuntimeDir: "a file where the folder should be",
	} {
		node := newNode(t, "10-bridge.conflist")
		if err := node.WriteFile(name, []byte(content)); err != nil {
			t.Fatal(err)
		}
		pod := lab.Pod{Name: "a", Labels: echo}
		add(t, node, "bridge", pod)
		del(t, node, "bridge", pod)
	}
}

var (
	ignoreAddedAt = cmpopts.IgnoreFields(runtimedir.Attachment{}, "AddedAt")
	compareAddrs  = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
)

// records are those of the node's state file, in the order of the pods' names.
func records(t *testing.T, node *lab.Node) []runtimedir.Attachment {
	t.Helper()
	file, err := runtimedir.New(node.Path(lab.RuntimeDir)).ReadState()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	slices.SortFunc(file.Attachments, func(a, b runtimedir.Attachment) int { return strings.Compare(a.Name, b.Name) })
	return file.Attachments
}

// wantPods fails the test unless the records are of pods with these names.
func wantPods(t *testing.T, node *lab.Node, want ...string) {
	t.Helper()
	var got []string
	for _, record := range records(t, node) {
		got = append(got, record.Name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pods with a record (-want +got):\n%s", diff)
	}
}

func wantNoRuntimeDir(t *testing.T, node *lab.Node) {
	t.Helper()
	if _, err := os.Stat(node.Path(lab.RuntimeDir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v, want it not to exist", lab.RuntimeDir, err)
	}
}

// podAddresses are the addresses that the kernel has on eth0 of a pod, IPv4 first.
func podAddresses(t *testing.T, node *lab.Node, namespace string) []netip.Addr {
	t.Helper()
	var addrs []netip.Addr
	err := node.In(namespace, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		for _, entry := range list {
			if addr, ok := netip.AddrFromSlice(entry.IP); ok && !addr.IsLinkLocalUnicast() {
				addrs = append(addrs, addr.Unmap())
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs
}

// hostInterface is the node's link at the other end of a pod's eth0.
func hostInterface(t *testing.T, node *lab.Node, namespace string) *netlink.LinkAttrs {
	t.Helper()
	var peer int
	err := node.In(namespace, func() error {
		link, err := netlink.LinkByName("eth0")
		if err == nil {
			peer = link.Attrs().ParentIndex
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var host *netlink.LinkAttrs
	err = node.In(lab.Host, func() error {
		link, err := netlink.LinkByIndex(peer)
		if err == nil {
			host = link.Attrs()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func withVersion(t *testing.T, conflist []byte, version string) []byte {
	t.Helper()
	const current = `"cniVersion": "1.1.0"`
	if bytes.Count(conflist, []byte(current)) != 1 {
		t.Fatalf("want one %s in:\n%s", current, conflist)
	}
	return bytes.Replace(conflist, []byte(current), fmt.Appendf(nil, `"cniVersion": %q`, version), 1)
}

// pluginConfig is the configuration that a runtime makes for our plugin out of a conflist, without
// prevResult and with more keys.
func pluginConfig(t *testing.T, file string, more map[string]any) []byte {
	t.Helper()
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal(conflist(t, file), &list); err != nil {
		t.Fatal(err)
	}
	config := list.Plugins[len(list.Plugins)-1]
	config["cniVersion"], config["name"] = list.CNIVersion, list.Name
	maps.Copy(config, more)
	data, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// normalised is a CNI result without what differs from ADD to ADD: hardware addresses and random names.
func normalised(t *testing.T, result []byte) map[string]any {
	t.Helper()
	var fields map[string]any
	if err := json.Unmarshal(result, &fields); err != nil {
		t.Fatal(err)
	}
	for _, entry := range fields["interfaces"].([]any) {
		link := entry.(map[string]any)
		delete(link, "mac")
		if strings.HasPrefix(link["name"].(string), "veth") {
			link["name"] = "veth"
		}
	}
	return fields
}
