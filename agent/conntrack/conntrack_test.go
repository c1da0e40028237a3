package conntrack

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/node/nodetest"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

func frontend(address string, protocol plan.Protocol, port uint16) plan.Frontend {
	return plan.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: port}
}

// addFlows makes conntrack entries, as if clients had been at work for a while.
func addFlows(t *testing.T) {
	t.Helper()
	for _, flow := range []struct{ protocol, source, destination, server string }{ // protocol: with a state, if it is not ESTABLISHED
		// To the frontends of the test: the client ports tell them apart.
		{"udp", "10.0.0.9:1001", "169.254.210.210:80", "10.0.0.2:8080"},              // the endpoint
		{"udp", "10.0.0.9:1002", "169.254.210.210:80", "10.0.0.3:8080"},              // stale
		{"udp", "10.0.0.9:1003", "169.254.210.210:80", ""},                           // stale: from before the rule
		{"udp", "10.0.0.9:1004", "169.254.210.210:81", "10.0.0.3:8080"},              // another port
		{"udp", "10.0.0.9:1005", "169.254.210.211:80", "10.0.0.3:8080"},              // another address
		{"udp", "10.0.0.9:1006", "10.0.0.3:80", ""},                                  // straight to the pod
		{"tcp", "10.0.0.9:1007", "169.254.210.210:80", "10.0.0.4:8080"},              // stale: the sandbox is gone
		{"tcp", "10.0.0.9:1008", "169.254.210.210:80", "10.0.0.3:8080"},              // the sandbox stands
		{"tcp", "10.0.0.9:1009", "10.96.0.1:443", "10.0.0.4:8080"},                   // another service on the gone sandbox
		{"udp", "169.254.210.210:80", "10.0.0.9:1010", ""},                           // stale: begun by a late reply
		{"udp", "169.254.210.211:80", "10.0.0.9:1011", ""},                           // the same of another address
		{"tcp SYN_SENT", "10.0.0.9:1012", "169.254.210.210:80", "10.0.0.3:8080"},     // stale: half-open
		{"tcp SYN_SENT", "10.0.0.9:1013", "169.254.210.210:80", "10.0.0.2:8080"},     // half-open, to the endpoint
		{"tcp TIME_WAIT", "10.0.0.9:1014", "169.254.210.210:80", "10.0.0.4:8080"},    // closed
		{"udp zone 2", "10.0.0.9:1015", "169.254.210.210:80", "10.0.0.2:8080"},       // in the zone of the endpoint
		{"udp zone 2", "10.0.0.9:1016", "169.254.210.210:80", "10.0.9.2:8080"},       // in it, and stale
		{"udp zone 3", "10.0.0.9:1017", "169.254.210.210:80", "10.0.0.3:8080"},       // in that of one before
		{"udp zone 4", "10.0.0.9:1018", "169.254.210.210:80", "10.0.0.4:8080"},       // in that of one whose sandbox is gone
		{"tcp SYN_SENT", "10.0.0.9:1019", "10.96.0.1:443", "10.0.0.3:8080"},          // half-open, to another service
		{"sctp", "10.0.0.9:1020", "169.254.210.210:80", "10.0.0.3:8080"},             // an association, and the sandbox stands
		{"sctp", "10.0.0.9:1021", "169.254.210.210:80", "10.0.0.4:8080"},             // stale: the sandbox is gone
		{"sctp COOKIE_WAIT", "10.0.0.9:1022", "169.254.210.210:80", "10.0.0.3:8080"}, // stale: half-open
		{"sctp CLOSED", "10.0.0.9:1023", "169.254.210.210:80", "10.0.0.3:8080"},      // stale: over
		{"udp", "[fd00::9]:2001", "[fd00:a::1]:80", "[fd00::2]:8080"},                // the endpoint
		{"udp", "[fd00::9]:2002", "[fd00:a::1]:80", "[fd00::3]:8080"},                // stale
		{"udp", "[fd00::9]:2003", "[fd00:a::1]:80", ""},                              // stale: from before the rule
		{"udp", "[fd00::9]:2004", "[fd00:a::2]:80", "[fd00::3]:8080"},                // another address
		{"tcp", "[fd00::9]:2005", "[fd00:a::1]:80", "[fd00::4]:8080"},                // stale: the sandbox is gone
		{"tcp", "[fd00::9]:2006", "[fd00:b::1]:443", "[fd00::4]:8080"},               // another service on the gone sandbox
		{"tcp", "[fd00::9]:2007", "[fd00:a::1]:80", "[fd00::3]:8080"},                // the sandbox stands
		{"udp", "[fd00:a::1]:80", "[fd00::9]:2008", ""},                              // stale: begun by a late reply
		{"tcp SYN_SENT", "[fd00::9]:2009", "[fd00:a::1]:80", "[fd00::3]:8080"},       // stale: half-open
		{"udp zone 2", "[fd00::9]:2010", "[fd00:a::1]:80", "[fd00::9:2]:8080"},       // in the zone of the endpoint, and stale
		{"udp zone 3", "[fd00::9]:2011", "[fd00:a::1]:80", "[fd00::3]:8080"},         // in that of one before
	} {
		source, destination := netip.MustParseAddrPort(flow.source), netip.MustParseAddrPort(flow.destination)
		protocol, state, _ := strings.Cut(flow.protocol, " ")
		args := []string{"-I", "-t", "1000", "-p", protocol, "-s", source.Addr().String(), "-d", destination.Addr().String(),
			"--sport", fmt.Sprint(source.Port()), "--dport", fmt.Sprint(destination.Port())}
		if protocol == "sctp" {
			args = append(args, "--orig-vtag", "1", "--reply-vtag", "2")
		}
		zone, zoned := strings.CutPrefix(state, "zone ")
		switch {
		case zoned:
			args = append(args, "--orig-zone", zone)
		case protocol == "udp":
		case state == "SYN_SENT", state == "COOKIE_WAIT":
			args = append(args, "--state", state)
		case state == "":
			args = append(args, "--state", "ESTABLISHED", "-u", "SEEN_REPLY,ASSURED")
		default:
			args = append(args, "--state", state, "-u", "SEEN_REPLY,ASSURED")
		}
		if flow.server != "" {
			args = append(args, "--dst-nat", flow.server)
		}
		nodetest.Run(t, "conntrack", args...)
	}
}

// flowPorts are the client ports of all flows.
func flowPorts(t *testing.T) []string {
	t.Helper()
	var ports []string
	for _, family := range []string{"ipv4", "ipv6"} {
		for line := range strings.Lines(nodetest.Run(t, "conntrack", "-L", "-f", family)) {
			if _, rest, found := strings.Cut(line, "sport="); found {
				port := strings.Fields(rest)[0]
				if port == "80" { // begun by the server's side
					port = strings.TrimPrefix(strings.Fields(rest)[1], "dport=")
				}
				ports = append(ports, port)
			}
		}
	}
	slices.Sort(ports)
	return ports
}

func TestSweep(t *testing.T) {
	addr := netip.MustParseAddr
	p := plan.Build(plan.Input{
		Services: []plan.Service{
			{Frontend: frontend("169.254.210.210", plan.UDP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:8080")}},
			{Frontend: frontend("169.254.210.210", plan.TCP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:8080")}},
			{Frontend: frontend("169.254.210.210", plan.SCTP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:8080")}},
			{Frontend: frontend("fd00:a::1", plan.UDP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00::2]:8080")}},
			{Frontend: frontend("fd00:a::1", plan.TCP, 80), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[fd00::2]:8080")}},
		},
		Sandboxes: []netip.Addr{addr("10.0.0.2"), addr("10.0.0.3"), addr("fd00::2"), addr("fd00::3")},
		Synced:    true,
	})
	zoned := p // the same where flows are put into zones: that of an endpoint is 2 here
	zoned.Zones, zoned.Rules = true, slices.Clone(p.Rules)
	for i := range zoned.Rules {
		if zoned.Rules[i].Protocol == plan.UDP {
			zoned.Rules[i].Zoned, zoned.Rules[i].Zone = true, 2
		}
	}
	all := []string{"1001", "1002", "1003", "1004", "1005", "1006", "1007", "1008", "1009", "1010", "1011", "1012", "1013", "1014", "1015", "1016", "1017", "1018", "1019", "1020", "1021", "1022", "1023", "2001", "2002", "2003", "2004", "2005", "2006", "2007", "2008", "2009", "2010", "2011"}
	without := func(gone ...string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(port string) bool { return slices.Contains(gone, port) })
	}
	tcp := []plan.Frontend{frontend("169.254.210.210", plan.TCP, 80)}
	// More changes than are worth a filtered dump each.
	many := plan.Change{Gone: []netip.Addr{addr("10.0.0.4"), addr("fd00::4")}}
	for i := range mostFilteredDumps {
		many.Removed = append(many.Removed, frontend("192.0.2.9", plan.UDP, uint16(1+i)))
	}
	connections := plan.Change{Frontends: append(tcp, connectionFrontends()...)}
	for _, tt := range []struct {
		name   string
		change plan.Change
		want   []string
	}{
		{"zones: UDP frontend", plan.Change{Moved: []plan.Frontend{frontend("169.254.210.210", plan.UDP, 80)}}, without("1003", "1016", "1018")},
		{"zones: IPv6 UDP frontend", plan.Change{Moved: []plan.Frontend{frontend("fd00:a::1", plan.UDP, 80)}}, without("2003", "2010")},
		{"zones: gone sandbox", plan.Change{Gone: []netip.Addr{addr("10.0.0.4")}}, without("1007", "1018", "1021")},
		{"nothing changed", plan.Change{}, all},
		{"UDP frontend", plan.Change{Frontends: []plan.Frontend{frontend("169.254.210.210", plan.UDP, 80)}}, without("1002", "1003", "1016", "1017", "1018")},
		{"SCTP frontend", plan.Change{Frontends: []plan.Frontend{frontend("169.254.210.210", plan.SCTP, 80)}}, without("1021", "1022", "1023")},
		{"flows the wrong way round", plan.Change{Untranslated: []plan.Frontend{frontend("169.254.210.210", plan.UDP, 80)}}, without("1010")},
		{"IPv6 flows the wrong way round", plan.Change{Untranslated: []plan.Frontend{frontend("fd00:a::1", plan.UDP, 80)}}, without("2008")},
		{"TCP frontend", plan.Change{Frontends: tcp}, without("1012")},
		{"TCP frontend of which nothing was known", plan.Change{Frontends: tcp, Untranslated: tcp}, without("1007", "1012")},
		{"IPv6 TCP frontend", plan.Change{Frontends: []plan.Frontend{frontend("fd00:a::1", plan.TCP, 80)}}, without("2009")},
		{"gone sandbox", plan.Change{Gone: []netip.Addr{addr("10.0.0.4")}}, without("1007", "1018", "1021")},
		{"removed frontend", plan.Change{Removed: []plan.Frontend{frontend("169.254.210.211", plan.UDP, 80)}}, without("1005")},
		{"IPv6 UDP frontend", plan.Change{Frontends: []plan.Frontend{frontend("fd00:a::1", plan.UDP, 80)}}, without("2002", "2003", "2010", "2011")},
		{"IPv6 gone sandbox", plan.Change{Gone: []netip.Addr{addr("fd00::4")}}, without("2002", "2005", "2009", "2010", "2011")},
		{"many TCP frontends", connections, without("1012")},
		{"many", many, without("1002", "1003", "1007", "1010", "1012", "1016", "1017", "1018", "1021", "1022", "1023", "2002", "2003", "2005", "2008", "2009", "2010", "2011")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nodetest.Namespace(t, "link set lo up")
			addFlows(t)
			if diff := cmp.Diff(all, flowPorts(t)); diff != "" {
				t.Fatalf("flows at the start (-want +got):\n%s", diff)
			}
			of := &p
			if strings.HasPrefix(tt.name, "zones: ") {
				of = &zoned
			}
			deleted, err := Table{}.Sweep(t.Context(), of, tt.change)
			if err != nil {
				t.Fatal(err)
			}
			got := flowPorts(t)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("flows (-want +got):\n%s", diff)
			}
			if deleted != len(all)-len(got) {
				t.Errorf("said that %d flows were deleted, %d are", deleted, len(all)-len(got))
			}
		})
	}
}

// connectionFrontends are more than are worth a filtered dump each.
func connectionFrontends() (frontends []plan.Frontend) {
	for i := range 1 + mostFilteredDumps {
		frontends = append(frontends, frontend("192.0.2.9", plan.TCP, uint16(1+i)))
	}
	return frontends
}

// TestKernelFilters: the kernel sends what was asked for, and not the whole table.
func TestKernelFilters(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	addFlows(t)
	for _, tt := range []struct {
		name   string
		dump   func(*sweep) error
		atMost int
	}{
		{"frontend", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET, frontendFilter(frontend("169.254.210.210", plan.UDP, 80))...)
		}, 7},
		{"late reply", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET, reversedFilter(frontend("169.254.210.210", plan.UDP, 80))...)
		}, 1},
		{"IPv6 late reply", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET6, reversedFilter(frontend("fd00:a::1", plan.UDP, 80))...)
		}, 1},
		{"half-open", func(s *sweep) error {
			s.change.Frontends = []plan.Frontend{frontend("169.254.210.210", plan.TCP, 80)}
			return s.run(t.Context())
		}, 2},
		{"IPv6 half-open", func(s *sweep) error {
			s.change.Frontends = []plan.Frontend{frontend("fd00:a::1", plan.TCP, 80)}
			return s.run(t.Context())
		}, 1},
		{"half-open, many frontends", func(s *sweep) error {
			s.change.Frontends = connectionFrontends()
			return s.run(t.Context())
		}, 3},
		{"server", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET, serverFilter(netip.MustParseAddr("10.0.0.4"))...)
		}, 5},
		{"IPv6 frontend", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET6, frontendFilter(frontend("fd00:a::1", plan.UDP, 80))...)
		}, 6},
		{"IPv6 server", func(s *sweep) error {
			return s.dump(t.Context(), unix.AF_INET6, serverFilter(netip.MustParseAddr("fd00::4"))...)
		}, 9},
	} {
		s := &sweep{plan: &plan.Plan{}}
		if err := tt.dump(s); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if s.seen > tt.atMost || s.seen == 0 {
			t.Errorf("%s: the kernel sent %d flows, want 1 to %d", tt.name, s.seen, tt.atMost)
		}
	}
}

// TestCount: flows that are translated and open count for their frontend.
func TestCount(t *testing.T) {
	nodetest.Namespace(t, "link set lo up")
	addFlows(t)
	want := map[plan.Frontend]int{
		frontend("169.254.210.210", plan.UDP, 80): 6, frontend("169.254.210.210", plan.TCP, 80): 2, frontend("169.254.210.211", plan.UDP, 80): 1,
		frontend("169.254.210.211", plan.TCP, 80): 0, frontend("fd00:a::1", plan.UDP, 80): 4, frontend("fd00:a::1", plan.TCP, 80): 2,
	}
	got, err := Table{}.Count(slices.Collect(maps.Keys(want)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
