package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
)

// procNet is a sysctl below /proc/sys/net of the calling thread's network namespace.
func procNet(path ...string) (int, error) {
	data, err := os.ReadFile(filepath.Join(append([]string{"/proc/sys/net"}, path...)...))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// families are those that the agents have magic IPs of.
func (e *examination) families() (all []plan.Family) {
	for _, family := range plan.Families() {
		if slices.ContainsFunc(e.addresses(), func(a netip.Addr) bool { return plan.FamilyOf(a) == family }) {
			all = append(all, family)
		}
	}
	return all
}

// forwarding sees that the kernel forwards packets that come in by the links of pods (Documentation/networking/ip-sysctl.rst:
// for IPv4 each link has a switch of its own, for IPv6 the one of all links decides).
func (e *examination) forwarding() {
	const check = "forwarding"
	const cost = "packets of pods to an endpoint, and its answers, are dropped in silence"
	looked := 0
	for _, family := range e.families() {
		if family == plan.IPv6 {
			on, err := procNet("ipv6", "conf", "all", "forwarding")
			switch {
			case err != nil:
				e.add(Hidden, check, "IPv6: "+err.Error(), "run this as root in the network namespace of the node")
			case on == 0:
				e.add(Fail, check, "net.ipv6.conf.all.forwarding is 0: IPv6 "+cost, "sysctl net.ipv6.conf.all.forwarding=1, and see what sets it to 0")
			default:
				looked++
			}
			continue
		}
		all, err := procNet("ipv4", "ip_forward")
		switch {
		case err != nil:
			e.add(Hidden, check, "IPv4: "+err.Error(), "run this as root in the network namespace of the node")
			continue
		case all == 0:
			e.add(Fail, check, "net.ipv4.ip_forward is 0: "+cost, "sysctl net.ipv4.ip_forward=1, and see what sets it to 0")
			continue
		}
		var off []string
		for _, link := range e.clientLinks() {
			on, err := procNet("ipv4", "conf", link, "forwarding")
			switch {
			case errors.Is(err, fs.ErrNotExist): // the link has gone
			case err != nil:
				e.add(Hidden, check, link+": "+err.Error(), "")
			case on == 0:
				off = append(off, link)
			default:
				looked++
			}
		}
		if len(off) > 0 {
			e.add(Fail, check, fmt.Sprintf("forwarding of IPv4 is off on %s: %s", few(off), cost),
				setOf(off[0], "forwarding", 1)+", and see what sets it to 0")
		}
	}
	if looked > 0 && !e.failed(check) {
		e.add(OK, check, "the kernel forwards what comes in by the links of pods", "")
	}
}

// setOf is the command that sets a link's IPv4 sysctl. In the names of sysctl(8) a dot in a link's name is a slash.
func setOf(link, key string, value int) string {
	return quote.Shell("sysctl", fmt.Sprintf("net.ipv4.conf.%s.%s=%d", strings.ReplaceAll(link, ".", "/"), key, value))
}

// failed reports whether a check has failed.
func (e *examination) failed(check string) bool {
	return slices.ContainsFunc(e.found, func(f Finding) bool { return f.Check == check && f.Level == Fail })
}

// connections sees that the kernel's connection table has room: where it is full, new connections are dropped.
func (e *examination) connections() {
	const check = "conntrack"
	count, err := procNet("netfilter", "nf_conntrack_count")
	limit, limitErr := procNet("netfilter", "nf_conntrack_max")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		e.add(Hidden, check, "the kernel shows no connection table here", "")
	case err != nil || limitErr != nil:
		e.add(Hidden, check, errors.Join(err, limitErr).Error(), "run this as root in the network namespace of the node")
	case limit > 0 && count >= limit-limit/1000: // an entry that expires makes room for a moment
		e.add(Fail, check, fmt.Sprintf("the connection table is full (%d of %d entries): new connections are dropped in silence", count, limit),
			"sysctl net.netfilter.nf_conntrack_max, and see what opens them: conntrack -S; conntrack -L")
	case limit > 0 && count >= limit/10*9:
		e.add(Warn, check, fmt.Sprintf("the connection table is nearly full (%d of %d entries): when it is, new connections are dropped", count, limit), "sysctl net.netfilter.nf_conntrack_max")
	default:
		e.add(OK, check, fmt.Sprintf("%d of %d entries", count, limit), "")
	}
}
