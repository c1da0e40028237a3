// Package doctor looks at a node and says what is wrong with its magic IPs, and what to do next. It changes nothing.
package doctor

import (
	"context"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Options say where to look.
type Options struct {
	RuntimeDir string
	Name       string // only this agent; empty for all of the node
	// ConfDir has the CNI configuration, BinDir the plugins; empty: where an installer has put its own, or the usual ones.
	ConfDir, BinDir string
	Runtime         conflist.Runtime
	Version         string
	// CiliumStateDir is where Cilium's agent keeps its state.
	CiliumStateDir string
	// FromPod ("namespace/name") and NetNS (a path) say which network namespace to probe from; without them it is one that
	// is made for it.
	FromPod, NetNS string
}

// examination is what the checks look at, read once.
type examination struct {
	Options
	now     time.Time
	agents  []status.Agent
	records []runtimedir.Attachment
	found   []Finding

	// stateRead: records are all that the plugin has recorded.
	stateRead bool

	// unread is why snapshot could not be read; network is empty then.
	snapshot node.Snapshot
	network  node.Network
	unread   error
	// bypassed: packets of pods certainly pass no rules.
	bypassed bool
}

func (e *examination) add(level Level, check, text, next string) {
	// What nft and the like have to say comes in several lines.
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' }), "; ")
	e.found = append(e.found, Finding{Level: level, Check: check, Text: text, Next: next})
}

// Examine runs all checks.
func Examine(ctx context.Context, options Options) *Report {
	e := &examination{Options: options, now: time.Now()}
	e.rights()
	e.versions(ctx)
	e.files()
	e.readNetwork()
	e.cni()
	if NetAdmin() {
		e.backend(ctx)
		e.rules(ctx)
		e.foreignRules(ctx)
		e.dataPlane()
	} else {
		e.add(Hidden, "rules", "they, and eBPF programs, cannot be looked at without CAP_NET_ADMIN", "run this as root, or in the agent's container")
	}
	e.nodeNetwork(ctx)
	e.magicIPs()
	e.endpoints(ctx)
	e.probe(ctx)
	report := &Report{Version: ReportVersion, ExaminedAt: e.now.UTC(), DoctorVersion: options.Version, Findings: e.found}
	report.judge()
	return report
}
