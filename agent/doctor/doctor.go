// Package doctor looks at a node and says what is wrong with its magic IPs, and what to do next. It changes nothing.
package doctor

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// Level is how bad a finding is.
type Level string

// The levels.
const (
	OK     Level = "ok"
	Hidden Level = "--" // it cannot be seen from here: neither good nor bad
	Warn   Level = "warn"
	Fail   Level = "FAIL"
)

// Finding is the result of one check.
type Finding struct {
	Level Level
	Check string
	Text  string
	// Next is what to do; empty where there is nothing to do.
	Next string
}

// Options say where to look.
type Options struct {
	RuntimeDir string
	Name       string // only this agent; empty for all of the node
	ConfDir    string // of the CNI configuration
	BinDir     string // of the CNI plugins
	Version    string
}

// examination is what the checks look at, read once.
type examination struct {
	Options
	now     time.Time
	agents  []agent.NodeAgent
	records []state.Attachment
	found   []Finding
}

func (e *examination) add(level Level, check, text, next string) {
	// What nft and the like have to say comes in several lines.
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' }), "; ")
	e.found = append(e.found, Finding{Level: level, Check: check, Text: text, Next: next})
}

// Examine runs all checks.
func Examine(ctx context.Context, options Options) []Finding {
	e := &examination{Options: options, now: time.Now()}
	e.versions(ctx)
	e.runtimeDir()
	e.stateFile()
	e.liveAgents()
	e.magicIPs()
	e.pluginLog()
	e.cni()
	if mayLook() {
		e.backend(ctx)
		e.rules(ctx)
		e.foreignRules(ctx)
		e.bypasses()
	} else {
		e.add(Hidden, "rules", "they, and eBPF programs, cannot be looked at without CAP_NET_ADMIN", "run this as root, or in the agent's container")
	}
	e.bridges()
	e.reversePath()
	e.hostRoutes()
	return e.found
}

// Write prints findings for people, and says how many have failed.
func Write(w io.Writer, findings []Finding) (failed int, err error) {
	var out strings.Builder
	count := map[Level]int{}
	for _, f := range findings {
		count[f.Level]++
		fmt.Fprintf(&out, "%-4s  %s: %s\n", f.Level, f.Check, f.Text)
		if f.Next != "" {
			fmt.Fprintf(&out, "      → %s\n", f.Next)
		}
	}
	fmt.Fprintf(&out, "%d ok, %d warnings, %d failed, %d not visible from here\n", count[OK], count[Warn], count[Fail], count[Hidden])
	_, err = io.WriteString(w, out.String())
	return count[Fail], err
}
