package plan_test

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// The addresses: .210 is served by 10.0.0.2, .211 has no endpoint, .212 passes what it cannot serve, the
// node is 192.0.2.2, the client 10.0.0.9, and 10.0.0.3 is a sandbox that stands and is no endpoint.
func example(settled bool) plan.Plan {
	service := func(address string, protocol plan.Protocol, without plan.Action, endpoints ...string) plan.Service {
		s := plan.Service{Frontend: frontend(address, protocol), WithoutEndpoint: without, HostClients: true}
		for _, e := range endpoints {
			s.Endpoints = append(s.Endpoints, netip.MustParseAddrPort(e))
		}
		return s
	}
	quiet := service("169.254.210.213", plan.TCP, plan.Reject, "10.0.0.2:8080")
	quiet.HostClients, quiet.ExcludeTarget = false, true
	return plan.Build(plan.Input{
		Services: []plan.Service{
			service("169.254.210.210", plan.TCP, plan.Reject, "10.0.0.2:8080"),
			service("169.254.210.210", plan.UDP, plan.Reject, "10.0.0.2:8080"),
			service("169.254.210.211", plan.TCP, plan.Reject),
			service("169.254.210.211", plan.UDP, plan.Reject),
			service("169.254.210.212", plan.UDP, plan.Pass),
			quiet,
			service("169.254.210.214", plan.SCTP, plan.Reject, "10.0.0.2:8080"),
		},
		HostAddresses: []netip.Addr{netip.MustParseAddr("192.0.2.2")},
		Sandboxes:     []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")},
		Synced:        settled,
	})
}

func frontend(address string, protocol plan.Protocol) plan.Frontend {
	return plan.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: 80}
}

func TestStale(t *testing.T) {
	removed := plan.Change{
		Removed: []plan.Frontend{frontend("169.254.210.219", plan.UDP)},
		Gone:    []netip.Addr{netip.MustParseAddr("10.0.0.5")},
	}
	for _, tt := range []struct {
		name        string
		protocol    plan.Protocol
		source      string
		destination string
		server      string
		halfOpen    bool
		closed      bool
		unsettled   bool
		want        bool
	}{
		{name: "UDP to the endpoint", protocol: plan.UDP, destination: "169.254.210.210:80", server: "10.0.0.2:8080"},
		{name: "UDP to another port of the endpoint", protocol: plan.UDP, destination: "169.254.210.210:80", server: "10.0.0.2:8081", want: true},
		{name: "UDP to a former endpoint that stands", protocol: plan.UDP, destination: "169.254.210.210:80", server: "10.0.0.3:8080", want: true},
		{name: "UDP that was not translated", protocol: plan.UDP, destination: "169.254.210.210:80", server: "169.254.210.210:80", want: true},
		{name: "UDP begun by a late reply", protocol: plan.UDP, source: "169.254.210.210:80", destination: "10.0.0.9:40000", server: "10.0.0.9:40000", want: true},
		{name: "TCP begun by a late reply", protocol: plan.TCP, source: "169.254.210.210:80", destination: "10.0.0.9:40000", server: "10.0.0.9:40000", want: true},
		{name: "UDP begun by a late reply from where packets pass", protocol: plan.UDP, source: "169.254.210.212:80", destination: "10.0.0.9:40000", server: "10.0.0.9:40000"},
		{name: "TCP begun by a late reply to a host client that is left alone", protocol: plan.TCP, source: "169.254.210.213:80", destination: "192.0.2.2:40000", server: "192.0.2.2:40000"},
		{name: "UDP from a port that is not ours", protocol: plan.UDP, source: "169.254.210.210:81", destination: "10.0.0.9:40000", server: "10.0.0.9:40000"},
		{name: "UDP without an endpoint", protocol: plan.UDP, destination: "169.254.210.211:80", server: "10.0.0.3:8080", want: true},
		{name: "UDP that passes", protocol: plan.UDP, destination: "169.254.210.212:80", server: "169.254.210.212:80"},
		{name: "UDP to nobody's port", protocol: plan.UDP, destination: "169.254.210.210:81", server: "10.0.0.3:8080"},
		{name: "UDP to the endpoint's own address", protocol: plan.UDP, destination: "10.0.0.3:8080", server: "10.0.0.3:8080"},
		{name: "half-open TCP to a former endpoint", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.3:8080", halfOpen: true, want: true},
		{name: "half-open TCP to the endpoint", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.2:8080", halfOpen: true},
		{name: "established TCP, the sandbox stands", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.3:8080"},
		{name: "established TCP, the sandbox is gone", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.4:8080", want: true},
		{name: "the same without an endpoint", protocol: plan.TCP, destination: "169.254.210.211:80", server: "10.0.0.4:8080", want: true},
		{name: "the same, but not every source has spoken", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.4:8080", unsettled: true},
		{name: "nor has it to, where the sandbox was seen to go", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.5:8080", unsettled: true, want: true},
		{name: "established SCTP to the endpoint", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.2:8080"},
		{name: "established SCTP, the sandbox stands", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.3:8080"},
		{name: "established SCTP, the sandbox is gone", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.4:8080", want: true},
		{name: "established SCTP, not every source is synced", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.4:8080", unsettled: true},
		{name: "half-open SCTP to a former endpoint", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.3:8080", halfOpen: true, want: true},
		{name: "half-open SCTP to the endpoint", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "10.0.0.2:8080", halfOpen: true},
		{name: "SCTP that was not translated", protocol: plan.SCTP, destination: "169.254.210.214:80", server: "169.254.210.214:80", want: true},
		{name: "closed TCP, the sandbox is gone", protocol: plan.TCP, destination: "169.254.210.210:80", server: "10.0.0.4:8080", closed: true},
		{name: "TCP that was not translated", protocol: plan.TCP, destination: "169.254.210.210:80", server: "169.254.210.210:80", want: true},
		{name: "the host's, where it is no client", protocol: plan.TCP, source: "192.0.2.2:999", destination: "169.254.210.213:80", server: "169.254.210.213:80"},
		{name: "the host's, where it is no client, by another tool", protocol: plan.TCP, source: "192.0.2.2:999", destination: "169.254.210.213:80", server: "10.9.9.9:80"},
		{name: "the same half-open", protocol: plan.TCP, source: "192.0.2.2:999", destination: "169.254.210.213:80", server: "10.9.9.9:80", halfOpen: true},
		{name: "the same to a sandbox that is gone", protocol: plan.TCP, source: "192.0.2.2:999", destination: "169.254.210.213:80", server: "10.0.0.5:80", want: true},
		{name: "the target's own, by another tool", protocol: plan.TCP, source: "10.0.0.2:999", destination: "169.254.210.213:80", server: "10.9.9.9:80"},
		{name: "a client's, by another tool", protocol: plan.TCP, destination: "169.254.210.213:80", server: "10.9.9.9:80", want: true},
		{name: "the target's own, left alone", protocol: plan.TCP, source: "10.0.0.2:999", destination: "169.254.210.213:80", server: "169.254.210.213:80"},
		{name: "a client's, not translated there", protocol: plan.TCP, destination: "169.254.210.213:80", server: "169.254.210.213:80", want: true},
		{name: "an answer on its way made a flow", protocol: plan.UDP, source: "169.254.210.211:80", destination: "10.0.0.9:999", server: "10.0.0.9:999", want: true},
		{name: "the same by TCP", protocol: plan.TCP, source: "169.254.210.211:80", destination: "10.0.0.9:999", server: "10.0.0.9:999", want: true},
		{name: "the same where packets pass", protocol: plan.UDP, source: "169.254.210.212:80", destination: "10.0.0.9:999", server: "10.0.0.9:999"},
		{name: "the same to a target left alone", protocol: plan.TCP, source: "169.254.210.213:80", destination: "10.0.0.2:999", server: "10.0.0.2:999"},
		{name: "removed frontend, translated", protocol: plan.UDP, destination: "169.254.210.219:80", server: "10.0.0.2:8080", want: true},
		{name: "removed frontend, not translated", protocol: plan.UDP, destination: "169.254.210.219:80", server: "169.254.210.219:80"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := example(!tt.unsettled)
			if tt.source == "" {
				tt.source = "10.0.0.9:999"
			}
			flow := plan.Flow{
				Protocol: tt.protocol, HalfOpen: tt.halfOpen, Closed: tt.closed, Source: netip.MustParseAddrPort(tt.source),
				Destination: netip.MustParseAddrPort(tt.destination), Server: netip.MustParseAddrPort(tt.server),
			}
			if got := p.Stale(flow, removed); got != tt.want {
				t.Errorf("Stale(%+v) = %v, want %v", flow, got, tt.want)
			}
		})
	}
}

func TestSince(t *testing.T) {
	settled, unsettled := example(true), example(false)
	all := []plan.Frontend{
		frontend("169.254.210.210", plan.TCP), frontend("169.254.210.210", plan.UDP), frontend("169.254.210.211", plan.TCP),
		frontend("169.254.210.211", plan.UDP), frontend("169.254.210.212", plan.UDP), frontend("169.254.210.213", plan.TCP),
		frontend("169.254.210.214", plan.SCTP),
	}
	nothing := plan.Build(plan.Input{Synced: true})
	for _, tt := range []struct {
		name        string
		now, before *plan.Plan
		want        plan.Change
	}{
		{"the first plan", &settled, nil, plan.Change{Frontends: all, Untranslated: all}},
		{"no change", &settled, &settled, plan.Change{}},
		{"every source has spoken now", &settled, &unsettled, plan.Change{Frontends: all, Untranslated: all}},
		{"everything removed", &nothing, &settled, plan.Change{Removed: all, Gone: settled.Sandboxes}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.now.Since(tt.before)
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("Since (-want +got):\n%s", diff)
			}
			if got.Empty() != (tt.name == "no change") {
				t.Errorf("Empty() = %v of %+v", got.Empty(), got)
			}
		})
	}
}

// TestBypassed: frames of bridge cni0 (10.0.0.0/24) have ceased to pass netfilter. Flows between its pods end unless they are
// masqueraded; those of other clients go on.
func TestBypassed(t *testing.T) {
	before := example(true)
	in := plan.Bridge{Name: "cni0", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
	in.Unfiltered4 = true
	now := example(true)
	now.Bridges = []plan.Bridge{in}
	change := now.Since(&before)
	if len(change.Bridges) != 1 || change.Empty() {
		t.Fatalf("change %+v, want the bridge", change)
	}
	if again := now.Since(&now); !again.Empty() {
		t.Errorf("change without one: %+v", again)
	}
	if back := before.Since(&now); !back.Empty() {
		t.Errorf("frames pass netfilter again, and flows change: %+v", back)
	}
	for _, tt := range []struct {
		name                    string
		protocol                plan.Protocol
		source, replyTo, server string
		want                    bool
	}{
		{"UDP between pods of the bridge", plan.UDP, "10.0.0.9:999", "10.0.0.9", "10.0.0.2:8080", true},
		{"TCP between pods of the bridge", plan.TCP, "10.0.0.9:999", "10.0.0.9", "10.0.0.2:8080", true},
		{"TCP to a former endpoint on the bridge", plan.TCP, "10.0.0.9:999", "10.0.0.9", "10.0.0.3:8080", true},
		{"masqueraded", plan.TCP, "10.0.0.9:999", "10.0.0.1", "10.0.0.2:8080", false},
		{"a client elsewhere", plan.UDP, "10.0.1.9:999", "10.0.1.9", "10.0.0.2:8080", false},
		{"the node itself", plan.UDP, "192.0.2.2:999", "192.0.2.2", "10.0.0.2:8080", false},
	} {
		flow := plan.Flow{
			Protocol: tt.protocol, Source: netip.MustParseAddrPort(tt.source), Destination: netip.MustParseAddrPort("169.254.210.210:80"),
			Server: netip.MustParseAddrPort(tt.server), ReplyTo: netip.MustParseAddr(tt.replyTo),
		}
		if got := now.Stale(flow, change); got != tt.want {
			t.Errorf("%s: stale %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestExemptBefore: a flow of a client that is exempt by now, and that the rules of before have translated, ends as those of others do.
func TestExemptBefore(t *testing.T) {
	before, now := example(true), example(true)
	before.Servers = []netip.Addr{netip.MustParseAddr("10.0.0.3")}
	now.Inherit(before.Servers)
	flow := plan.Flow{
		Protocol: plan.TCP, Source: netip.MustParseAddrPort("192.0.2.2:999"), Destination: netip.MustParseAddrPort("169.254.210.213:80"),
		Server: netip.MustParseAddrPort("10.0.0.3:8080"), HalfOpen: true,
	}
	if !now.Stale(flow, plan.Change{}) {
		t.Error("a half-open flow to a former endpoint stays")
	}
}

// TestInherit: a former endpoint is a server for as long as its sandbox is live, and no longer.
func TestInherit(t *testing.T) {
	addr := netip.MustParseAddr
	now := example(true)
	now.Inherit(nil)
	if want := []netip.Addr{addr("10.0.0.2")}; !slices.Equal(now.Servers, want) {
		t.Errorf("servers %v, want %v", now.Servers, want)
	}
	now.Inherit([]netip.Addr{addr("10.0.0.3"), addr("10.0.0.4")}) // .3 is live and .4 is not
	if want := []netip.Addr{addr("10.0.0.2"), addr("10.0.0.3")}; !slices.Equal(now.Servers, want) {
		t.Errorf("servers %v, want %v", now.Servers, want)
	}
}

// TestEqual changes every field of a plan and of a rule, by reflection: one that Equal forgot would go unnoticed.
func TestEqual(t *testing.T) {
	p, q := example(true), example(true)
	if !p.Equal(&q) {
		t.Error("the same plan twice is not equal")
	}
	differs := func(what string, value reflect.Value) {
		t.Helper()
		for i := range value.NumField() {
			field := value.Field(i)
			before := reflect.New(field.Type()).Elem()
			before.Set(field)
			switch {
			case field.Type() == reflect.TypeFor[time.Time]():
				field.Set(reflect.ValueOf(time.Unix(1, 0)))
			case field.Type() == reflect.TypeFor[plan.Detour]():
				field.Set(reflect.ValueOf(plan.Detour{Masquerade6: true}))
			case field.Kind() == reflect.Slice:
				field.Set(reflect.MakeSlice(field.Type(), field.Len()+1, field.Len()+1))
			case field.IsZero() && field.Kind() == reflect.Bool:
				field.SetBool(true)
			case field.IsZero() && field.CanUint():
				field.SetUint(1)
			case field.IsZero():
				field.SetInt(1)
			default:
				field.SetZero()
			}
			if p.Equal(&q) {
				t.Errorf("another %s of %s goes unnoticed", value.Type().Field(i).Name, what)
			}
			field.Set(before)
		}
	}
	differs("a plan", reflect.ValueOf(&p).Elem())
	differs("a rule", reflect.ValueOf(&p.Rules[0]).Elem())
}

// TestZones: a flow of datagrams that its client has left for the zone of another endpoint stays while it can still be answered, and
// only what zones cannot tell apart is looked for at once.
func TestZones(t *testing.T) {
	build := func(spread bool, endpoints ...string) plan.Plan {
		udp := plan.Service{Frontend: frontend("169.254.210.210", plan.UDP), WithoutEndpoint: plan.Reject, HostClients: true, ExcludeTarget: true, Spread: spread}
		tcp := plan.Service{Frontend: frontend("169.254.210.210", plan.TCP), WithoutEndpoint: plan.Reject, HostClients: true}
		for _, e := range endpoints {
			udp.Endpoints = append(udp.Endpoints, netip.MustParseAddrPort(e))
		}
		tcp.Endpoints = udp.Endpoints
		return plan.Build(plan.Input{
			Services: []plan.Service{udp, tcp}, Zones: true, Synced: true,
			Sandboxes: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.1.0.2")},
		})
	}
	const a, b, likeA = "10.0.0.2:8080", "10.0.0.3:8080", "10.1.0.2:8080"
	zone := func(endpoint string) uint16 { return plan.ZoneOf(netip.MustParseAddrPort(endpoint).Addr()) }
	if zone(a) == zone(b) || zone(a) != zone(likeA) || zone("0.0.0.0:1") == 0 || zone("[fd00::1]:1") == zone("[fd00::2]:1") {
		t.Fatal("the zones of this test are not as it needs them")
	}
	for _, tt := range []struct {
		name      string
		endpoint  string // empty: none
		server    string
		zone      uint16
		gone      bool // the sandbox of the server
		otherZone bool
		want      bool
	}{
		{name: "to the endpoint", endpoint: a, server: a, zone: zone(a)},
		{name: "to the one before", endpoint: b, server: a, zone: zone(a)},
		{name: "to one that had the same zone", endpoint: likeA, server: a, zone: zone(a), want: true},
		{name: "to one whose sandbox is gone", endpoint: b, server: "10.0.0.9:8080", zone: 9, gone: true, want: true},
		{name: "no endpoint any more", server: a, zone: zone(a)},
		{name: "from before there were zones", endpoint: b, server: a},
		{name: "not translated", endpoint: a, server: "169.254.210.210:80", want: true},
		{name: "in a zone of others", endpoint: b, server: a, otherZone: true, want: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var endpoints []string
			if tt.endpoint != "" {
				endpoints = []string{tt.endpoint}
			}
			p := build(false, endpoints...)
			flow := plan.Flow{
				Protocol: plan.UDP, Source: netip.MustParseAddrPort("10.0.0.8:999"), Destination: netip.MustParseAddrPort("169.254.210.210:80"),
				Server: netip.MustParseAddrPort(tt.server), Zone: tt.zone, OtherZone: tt.otherZone,
			}
			if got := p.Stale(flow, plan.Change{}); got != tt.want {
				t.Errorf("Stale(%+v) = %v, want %v", flow, got, tt.want)
			}
		})
	}
	udp, tcp := frontend("169.254.210.210", plan.UDP), frontend("169.254.210.210", plan.TCP)
	for _, tt := range []struct {
		name        string
		before, now plan.Plan
		want        plan.Change
	}{
		{"moved", build(false, a), build(false, b), plan.Change{Moved: []plan.Frontend{tcp, udp}}},
		{"lost", build(false, a), build(false), plan.Change{Moved: []plan.Frontend{tcp, udp}}},
		{"the same zone", build(false, a), build(false, likeA), plan.Change{Moved: []plan.Frontend{tcp}, Frontends: []plan.Frontend{udp}, Untranslated: []plan.Frontend{udp}}},
		{"spread", build(true, a), build(true, a, b), plan.Change{Moved: []plan.Frontend{tcp}, Frontends: []plan.Frontend{udp}, Untranslated: []plan.Frontend{udp}}},
	} {
		if diff := cmp.Diff(tt.want, tt.now.Since(&tt.before), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}
