package event

import (
	"slices"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// frontend is the state of one frontend, and what of it was reported last.
type frontend struct {
	runtimedir.MagicIP
	pods  string    // its endpoints, by podsOf; empty without one
	since time.Time // of pods
	last  string    // the endpoints that it had last, these included

	reported     string // the pods that were reported last
	reportedNone bool   // that there are none was
	unserved     string // the reason why it is not served that was reported
	unservedAt   time.Time
	// changes of pods since the last report, the first of them at changedAt.
	changes   int
	changedAt time.Time
}

// update makes m the state from now on.
func (f *frontend) update(m runtimedir.MagicIP, now time.Time) {
	if m.Reason != f.Reason {
		f.unservedAt = now
	}
	if m.Reason == "" {
		f.unserved = ""
	}
	same := slices.Equal(m.Endpoints, f.Endpoints)
	f.MagicIP = m
	if same {
		return // before any text is made: there may be thousands
	}
	pods := podsOf(m)
	if pods == f.pods {
		return
	}
	if f.pods == f.reported && now.Sub(f.since) >= NoneFor {
		f.changes = 0 // it returned to what was reported, and that lasted
	}
	if f.changes++; f.changes == 1 {
		f.changedAt = now
	}
	f.pods, f.since = pods, now
	if pods != "" {
		f.last = pods
	}
}

// due returns what there is to report and when; an empty reason for nothing.
func (f *frontend) due() (reason string, at time.Time) {
	settled := f.since.Add(Settle)
	if f.changes > 0 && f.changedAt.Add(NoneFor).Before(settled) {
		settled = f.changedAt.Add(NoneFor)
	}
	switch {
	case f.Reason != "" && f.Reason == f.unserved:
		return "", time.Time{}
	case f.Reason != "":
		return Unserved, f.unservedAt
	case f.changes >= unstable:
		return EndpointUnstable, settled
	case f.pods == "" && f.reportedNone, f.pods != "" && f.pods == f.reported:
		return "", time.Time{}
	case f.pods == "" && f.last != "":
		return EndpointLost, f.since.Add(NoneFor)
	case f.pods == "":
		return NoEndpoint, f.since.Add(NoneFor)
	}
	return EndpointGained, settled
}

// groupKey is what frontends that one Event is about have in common.
func (f *frontend) groupKey(reason string) string {
	if reason == Unserved {
		return ""
	}
	return strings.Join([]string{f.Namespace, f.Selector, f.pods, f.last, f.reported, f.Action}, "\n")
}

func (f *frontend) setReported(reason string) {
	if reason == Unserved {
		f.unserved = f.Reason
		return
	}
	f.reported, f.changes = f.pods, 0
	f.reportedNone = reason == EndpointLost || reason == NoEndpoint
}
