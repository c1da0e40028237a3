package endpoint_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// pod makes a pod known to the API, older by age; its address is 10.0.0.<n>.
func pod(name string, n byte, age time.Duration, conditions string) inventory.Pod {
	has := func(c string) bool { return slices.Contains(strings.Fields(conditions), c) }
	return inventory.Pod{
		PodID: inventory.PodID{Namespace: "default", Name: name, UID: "uid-" + name}, Labels: map[string]string{"app": "echo"}, Owners: []string{"DaemonSet/echo"}, ServiceAccount: "echo",
		IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n})}, CreatedAt: now.Add(-age),
		Running: !has("pending"), Ready: has("ready"), Terminating: has("terminating"), Finished: has("finished"),
		Ports: []runtimedir.NamedPort{{Name: "http", Protocol: "tcp", Port: 8000 + uint16(n)}},
	}
}

func record(name string, n byte, age time.Duration) runtimedir.Attachment {
	return runtimedir.Attachment{
		ContainerID: "c-" + name, IfName: "eth0", Namespace: "default", Name: name, UID: "uid-" + name,
		Labels: map[string]string{"app": "echo"}, HostInterface: "veth-" + name,
		IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n})}, AddedAt: now.Add(-age),
	}
}

func withdrawn(uid string, address netip.Addr) []runtimedir.Withdrawn {
	return []runtimedir.Withdrawn{{PodID: inventory.PodID{Namespace: "default", Name: "a", UID: uid}, Addresses: []netip.Addr{address}}}
}

// sources are what an inventory is made of.
type sources struct {
	Records   []runtimedir.Attachment
	Pods      []inventory.Pod
	Forgotten []inventory.Pod // reported by the API before Pods
	Current   []string
	Withdrawn []runtimedir.Withdrawn
	Links     map[string]int
}

func (s sources) targets() []inventory.Target {
	api := len(s.Pods)+len(s.Current) > 0
	i := inventory.New(api, runtimedir.Memory{Withdrawn: s.Withdrawn}, nil, now)
	i.SetNamespaces([]string{inventory.AllNamespaces})
	i.SetRecords(runtimedir.File{Attachments: s.Records}, now)
	if s.Links != nil {
		i.SetLinks(s.Links)
	}
	all := []string{inventory.AllNamespaces}
	if s.Forgotten != nil {
		i.SetPods(inventory.View{Pods: s.Forgotten, Synced: all, Current: all}, now)
	}
	i.SetPods(inventory.View{Pods: s.Pods, Synced: all, Current: s.Current}, now)
	return i.Targets(now)
}

func TestChoose(t *testing.T) {
	old, fresh := time.Hour, time.Minute
	api := func(s sources) sources {
		s.Current = []string{"default"}
		return s
	}
	static := func(n byte) inventory.Pod {
		p := pod("a", n, old, "ready")
		p.StaticUID = "hash"
		return p
	}
	unlabelled := record("a", 1, fresh)
	unlabelled.Labels = nil
	for _, tt := range []struct {
		name    string
		sources sources
		edit    func(*endpoint.Selection)
		want    string
	}{
		{"ready beats newer and not ready", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready"), pod("b", 2, fresh, "")}}), nil, "10.0.0.1:80"},
		{"ready beats ready and terminating", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready"), pod("b", 2, fresh, "ready terminating")}}), nil, "10.0.0.1:80"},
		{"serving while it terminates beats not ready", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready terminating"), pod("b", 2, fresh, "")}}), nil, "10.0.0.1:80"},
		{"not ready beats terminating", api(sources{Pods: []inventory.Pod{pod("a", 1, old, ""), pod("b", 2, fresh, "terminating")}}), nil, "10.0.0.1:80"},
		{"terminating is better than nothing", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "terminating")}}), nil, "10.0.0.1:80"},
		{"finished is never chosen", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready finished")}}), nil, ""},
		{"pending without a record is not there yet", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "pending")}}), nil, ""},
		{"pending with a record counts", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "pending")}, Records: []runtimedir.Attachment{record("a", 1, fresh)}}), nil, "10.0.0.1:80"},
		{"of equals the newest", api(sources{Pods: []inventory.Pod{pod("b", 2, fresh, "ready"), pod("a", 1, old, "ready")}}), nil, "10.0.0.2:80"},
		{"of twins the greater UID", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready"), pod("b", 2, old, "ready")}}), nil, "10.0.0.2:80"},
		{"require: not ready does not count", api(sources{Pods: []inventory.Pod{pod("a", 1, old, ""), pod("b", 2, old, "terminating")}}), func(s *endpoint.Selection) { s.Readiness = endpoint.Require }, ""},
		{"require: serving while it terminates counts", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready terminating")}}), func(s *endpoint.Selection) { s.Readiness = endpoint.Require }, "10.0.0.1:80"},
		{"ignore: newer and not ready beats ready", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready"), pod("b", 2, fresh, "")}}), func(s *endpoint.Selection) { s.Readiness = endpoint.Ignore }, "10.0.0.2:80"},
		{"spread: all of the best rank", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready"), pod("b", 2, fresh, "ready"), pod("c", 3, fresh, "")}}), func(s *endpoint.Selection) { s.Spread = true }, "10.0.0.2:80 10.0.0.1:80"},
		{"owner", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.Owner = "DaemonSet/other" }, ""},
		{"the owner that is asked for", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.Owner = "DaemonSet/echo" }, "10.0.0.1:80"},
		{"service account", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.ServiceAccount = "other" }, ""},
		{"the service account that is asked for", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.ServiceAccount = "echo" }, "10.0.0.1:80"},
		{"named port", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "http", "tcp" }, "10.0.0.1:8001"},
		{"named port of another protocol", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "http", "udp" }, ""},
		{"a port name that the pod lacks", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "grpc", "tcp" }, ""},
		{"a port name without the API", sources{Records: []runtimedir.Attachment{record("a", 1, old)}}, func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "http", "tcp" }, ""},
		{"the other family", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}}), func(s *endpoint.Selection) { s.IPv6 = true }, ""},
		{"all namespaces", sources{Records: []runtimedir.Attachment{record("a", 1, old)}}, func(s *endpoint.Selection) { s.Namespace = inventory.AllNamespaces }, "10.0.0.1:80"},
		{"another namespace", sources{Records: []runtimedir.Attachment{record("a", 1, old)}}, func(s *endpoint.Selection) { s.Namespace = "other" }, ""},

		{"a record alone counts", sources{Records: []runtimedir.Attachment{record("a", 1, old)}}, nil, "10.0.0.1:80"},
		{"the later of two records in the file, whatever the clock was", sources{Records: []runtimedir.Attachment{record("a", 1, fresh), record("b", 2, old)}}, nil, "10.0.0.2:80"},
		{"a record beats podIP", api(sources{Pods: []inventory.Pod{pod("a", 9, old, "ready")}, Records: []runtimedir.Attachment{record("a", 1, fresh)}}), nil, "10.0.0.1:80"},
		{"a podIP in another pod's record is stale", api(sources{Pods: []inventory.Pod{pod("a", 2, old, "ready"), func() inventory.Pod {
			p := pod("b", 2, fresh, "ready")
			p.Labels = nil
			return p
		}()}, Records: []runtimedir.Attachment{record("b", 2, fresh)}}), nil, ""},
		{"a withdrawn podIP counts no more", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}, Withdrawn: withdrawn("uid-a", netip.MustParseAddr("10.0.0.1"))}), nil, ""},
		{"another podIP after that does", api(sources{Pods: []inventory.Pod{pod("a", 2, old, "ready")}, Withdrawn: withdrawn("uid-a", netip.MustParseAddr("10.0.0.1"))}), nil, "10.0.0.2:80"},
		{"labels of the API are the truth", api(sources{Pods: []inventory.Pod{func() inventory.Pod {
			p := pod("a", 1, old, "ready")
			p.Labels = map[string]string{"app": "other"}
			return p
		}()}, Records: []runtimedir.Attachment{record("a", 1, fresh)}}), nil, ""},
		{"a static pod is joined by its config hash", api(sources{Pods: []inventory.Pod{static(9)}, Records: []runtimedir.Attachment{func() runtimedir.Attachment {
			r := record("a", 1, fresh)
			r.UID, r.Labels = "hash", nil
			return r
		}()}}), nil, "10.0.0.1:80"},
		{"an address that DEL has taken from it", api(sources{Pods: []inventory.Pod{static(1)}, Withdrawn: withdrawn("hash", netip.AddrFrom4([4]byte{10, 0, 0, 1}))}), nil, ""},
		{"a pod that the API has forgotten", api(sources{Links: map[string]int{"veth-a": 7}, Records: []runtimedir.Attachment{unlabelled}, Forgotten: []inventory.Pod{pod("a", 1, old, "ready")}}), nil, "10.0.0.1:80"},
		{"a pod that it has forgotten after it had finished", api(sources{Links: map[string]int{"veth-a": 7}, Records: []runtimedir.Attachment{record("a", 1, fresh)}, Forgotten: []inventory.Pod{pod("a", 1, old, "finished")}}), nil, ""},

		{"the host interface of the record is gone", sources{Records: []runtimedir.Attachment{record("a", 1, old)}, Links: map[string]int{}}, nil, ""},
		{"and with it the podIP", api(sources{Pods: []inventory.Pod{pod("a", 1, old, "ready")}, Records: []runtimedir.Attachment{record("a", 1, old)}, Links: map[string]int{}}), nil, ""},
		{"but not another pod's with that address", api(sources{Pods: []inventory.Pod{pod("b", 1, fresh, "ready")}, Records: []runtimedir.Attachment{record("a", 1, old)}, Links: map[string]int{}}), nil, "10.0.0.1:80"},
		{"a record that the API does not know yet", api(sources{Records: []runtimedir.Attachment{record("a", 1, 59*time.Second)}}), nil, "10.0.0.1:80"},
		{"the same after a minute", api(sources{Records: []runtimedir.Attachment{record("a", 1, time.Minute)}}), nil, ""},
		{"the same while its host interface stands", api(sources{Records: []runtimedir.Attachment{record("a", 1, time.Hour)}, Links: map[string]int{"veth-a": 7}}), nil, "10.0.0.1:80"},
		{"the same while the API is unreachable", sources{Current: []string{"other"}, Records: []runtimedir.Attachment{record("a", 1, time.Hour)}}, nil, "10.0.0.1:80"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			selector, err := endpoint.ParseSelector("app=echo")
			if err != nil {
				t.Fatal(err)
			}
			selection := endpoint.Selection{Namespace: "default", Selector: selector, Readiness: endpoint.Prefer, TargetPort: 80}
			if tt.edit != nil {
				tt.edit(&selection)
			}
			choose := func() string {
				var got []string
				for _, c := range endpoint.NewIndex(tt.sources.targets()).Choose(&selection) {
					got = append(got, c.Address.String())
				}
				return strings.Join(got, " ")
			}
			got := choose()
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("endpoints (-want +got):\n%s", diff)
			}
			slices.Reverse(tt.sources.Pods)
			if again := choose(); again != got {
				t.Errorf("with the pods in another order: %q, before %q", again, got)
			}
		})
	}
}

// TestSelected: pods are counted that match or can be chosen; those that are pending too, those that have finished not.
func TestSelected(t *testing.T) {
	other := pod("other", 9, time.Hour, "ready")
	other.Labels = nil
	selector, err := endpoint.ParseSelector("app=echo")
	if err != nil {
		t.Fatal(err)
	}
	index := endpoint.NewIndex(sources{Current: []string{"default"}, Pods: []inventory.Pod{
		pod("a", 1, time.Hour, "ready"), pod("b", 2, time.Hour, "ready"), pod("c", 3, time.Hour, "ready"),
		pod("d", 4, time.Hour, ""), pod("e", 5, time.Hour, "pending"),
		pod("f", 6, time.Hour, "ready terminating"),
		pod("g", 7, time.Hour, "finished"), other,
	}}.targets())
	for range 2 { // a pod that two magic IPs select is one
		index.Choose(&endpoint.Selection{Namespace: "default", Selector: selector, Readiness: endpoint.Prefer, TargetPort: 80})
	}
	if diff := cmp.Diff(runtimedir.Targets{Ready: 3, NotReady: 2, Terminating: 1}, index.Selected()); diff != "" {
		t.Errorf("selected (-want +got):\n%s", diff)
	}
}

// TestSelectors: whatever a selector asks for first, the targets that it finds are those that it matches.
func TestSelectors(t *testing.T) {
	for _, tt := range []struct{ selector, want string }{
		{"app=echo", "10.0.0.1:80 10.0.0.2:80"},
		{"app==echo,tier=front", "10.0.0.1:80"},
		{"tier in (back,front)", "10.0.0.1:80 10.0.0.2:80 10.0.0.3:80"},
		{"tier in (none)", ""},
		{"tier", "10.0.0.1:80 10.0.0.2:80 10.0.0.3:80"},
		{"!tier", "10.0.0.4:80"},
		{"app!=echo", "10.0.0.3:80 10.0.0.4:80"},
		{"tier,app=echo,tier notin (back)", "10.0.0.1:80"},
		{"weight>5", "10.0.0.3:80"},
	} {
		selector, err := endpoint.ParseSelector(tt.selector)
		if err != nil {
			t.Fatal(err)
		}
		s := endpoint.Selection{Namespace: "default", Selector: selector, Readiness: endpoint.Prefer, TargetPort: 80, Spread: true}
		var sources sources
		for i, set := range []map[string]string{{"app": "echo", "tier": "front"}, {"app": "echo", "tier": "back"}, {"app": "other", "tier": "back", "weight": "6"}, {"weight": "5"}} {
			p := pod(string(rune('a'+i)), byte(i+1), 0, "ready")
			p.Labels = set
			sources.Pods = append(sources.Pods, p)
		}
		var got []string
		for _, c := range endpoint.NewIndex(sources.targets()).Choose(&s) {
			got = append(got, c.Address.String())
		}
		slices.Sort(got)
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.selector, diff)
		}
	}
	if _, err := endpoint.ParseSelector("app=(echo"); err == nil {
		t.Error("app=(echo is taken for a selector")
	}
}
