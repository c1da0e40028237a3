package endpoint_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func TestWhy(t *testing.T) {
	of := func(conditions string, change ...func(*inventory.Pod)) sources {
		p := pod("a", 1, time.Hour, conditions)
		for _, c := range change {
			c(&p)
		}
		return sources{Pods: []inventory.Pod{p}}
	}
	namespace := func(ns string) func(*inventory.Pod) { return func(p *inventory.Pod) { p.Namespace = ns } }
	unlabelled := record("b", 2, time.Hour)
	unlabelled.Labels = nil
	recorded := record("a", 1, time.Hour)
	gone := of("ready")
	gone.Records, gone.Links = []runtimedir.Attachment{recorded}, map[string]int{"lo": 1}
	deleted := of("ready")
	deleted.Withdrawn = withdrawn("uid-a", netip.MustParseAddr("10.0.0.1"))
	other := record("other", 1, time.Minute)
	other.Labels = nil
	later := of("ready")
	later.Records = []runtimedir.Attachment{recorded, other}
	unrecorded := of("ready")
	unrecorded.Records = []runtimedir.Attachment{other}
	var many sources
	for n := range byte(8) {
		many.Pods = append(many.Pods, pod(string(rune('a'+n)), n+1, time.Hour, "finished"))
	}
	for name, test := range map[string]struct {
		sources
		change func(*endpoint.Selection)
		want   []string
	}{
		"nothing known":           {sources{}, nil, []string{"no pod of namespace default is known on this node"}},
		"no pod matches":          {of("ready", func(p *inventory.Pod) { p.Labels = map[string]string{"app": "other"} }), nil, []string{"1 pod of namespace default on this node, and none matches the selector"}},
		"another namespace":       {of("ready", namespace("other")), nil, []string{"pod other/a is in another namespace than default"}},
		"in no namespace":         {sources{}, func(s *endpoint.Selection) { s.Namespace = inventory.AllNamespaces }, []string{"no pod of any namespace is known on this node"}},
		"labels not known":        {sources{Records: []runtimedir.Attachment{unlabelled}}, nil, []string{"the labels of 1 pod of namespace default on this node are not known"}},
		"not ready":               {of(""), func(s *endpoint.Selection) { s.Readiness = endpoint.Require }, []string{"pod default/a is not ready, and readiness is require"}},
		"terminating":             {of("terminating"), func(s *endpoint.Selection) { s.Readiness = endpoint.Require }, []string{"pod default/a is terminating and not ready, and readiness is require"}},
		"pending":                 {of("pending"), nil, []string{"pod default/a does not run yet"}},
		"finished":                {of("finished"), nil, []string{"pod default/a has finished"}},
		"another owner":           {of("ready"), func(s *endpoint.Selection) { s.Owner = "DaemonSet/other" }, []string{"pod default/a is not controlled by DaemonSet/other"}},
		"another service account": {of("ready"), func(s *endpoint.Selection) { s.ServiceAccount = "agent" }, []string{`pod default/a has service account "echo", and serviceAccount is agent`}},
		"no such port":            {of("ready"), func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "metrics", "tcp" }, []string{"pod default/a has no container port named metrics for TCP"}},
		"a port of another kind":  {of("ready"), func(s *endpoint.Selection) { s.PortName, s.PortProtocol = "http", "udp" }, []string{"pod default/a has no container port named http for UDP, only for TCP"}},
		"only the other family":   {of("ready"), func(s *endpoint.Selection) { s.IPv6 = true }, []string{"pod default/a has no IPv6 address, only 10.0.0.1"}},
		"no address yet":          {of("ready", func(p *inventory.Pod) { p.IPs = nil }), nil, []string{"pod default/a has no address"}},
		"a special address":       {of("ready", func(p *inventory.Pod) { p.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1")} }), nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 127.0.0.1 is loopback"}},
		"a special address beside one of the other family": {of("ready", func(p *inventory.Pod) {
			p.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("fd00::1")}
		}),
			nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 127.0.0.1 is loopback"}},
		"a special address of the other family": {of("ready", func(p *inventory.Pod) { p.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1")} }),
			func(s *endpoint.Selection) { s.IPv6 = true }, []string{"pod default/a has no IPv6 address, and 127.0.0.1 is loopback"}},
		"the link is gone":     {gone, nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 10.0.0.1 is of a sandbox whose link is gone"}},
		"DEL, and still Ready": {deleted, nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 10.0.0.1 is of a sandbox that was deleted"}},
		"a later record of another pod": {later, nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 10.0.0.1 is recorded for pod default/other, which has it now",
			"the labels of 1 pod of namespace default on this node are not known"}},
		"no record, and one of another pod": {unrecorded, nil, []string{"pod default/a has no IPv4 address that can be an endpoint: 10.0.0.1 is recorded for pod default/other, which has it now",
			"the labels of 1 pod of namespace default on this node are not known"}},
		"a selector with no label": {of("finished"), func(s *endpoint.Selection) { s.Selector, _ = endpoint.ParseSelector("app") }, []string{"pod default/a has finished"}},
		"as many as are named": {sources{Pods: many.Pods[:5]}, nil, []string{"pod default/a has finished", "pod default/b has finished", "pod default/c has finished",
			"pod default/d has finished", "pod default/e has finished"}},
		"many": {many, nil, []string{"pod default/a has finished", "pod default/b has finished", "pod default/c has finished", "pod default/d has finished", "pod default/e has finished",
			"excluded as well: 3 more that the selector matches"}},
	} {
		t.Run(name, func(t *testing.T) {
			selector, err := endpoint.ParseSelector("app=echo")
			if err != nil {
				t.Fatal(err)
			}
			s := endpoint.Selection{Namespace: "default", Selector: selector, Readiness: endpoint.Prefer, TargetPort: 80}
			if test.change != nil {
				test.change(&s)
			}
			index := endpoint.NewIndex(test.targets())
			if chosen := index.Choose(&s); len(chosen) > 0 {
				t.Fatalf("there is an endpoint: %v", chosen)
			}
			if diff := cmp.Diff(test.want, index.Why(&s)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
