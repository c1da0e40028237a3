package main

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent"
	"github.com/magic-ip-address/magic-ip-address/agent/foreign"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	bypassInterval = time.Minute
	// ruleInterval is longer: to look for foreign rules lists all rules of the node with three commands, and kube-proxy alone may have
	// made tens of thousands. New magic IPs are looked for at once.
	ruleInterval = 10 * time.Minute
)

// lookout looks again and again for what keeps packets from the rules of this agent: data planes that bypass them, and rules of other programs
// that translate a magic IP.
type lookout struct {
	bypasses func() ([]string, error)
	rules    func(context.Context, []plan.Frontend) (found []foreign.Rule, hidden []string)
	log      *slog.Logger
	changed  chan struct{} // the magic IPs are others

	mu        sync.Mutex
	frontends []plan.Frontend // that the agent serves
	notes     []agent.Note
}

func newLookout(log *slog.Logger) *lookout {
	return &lookout{bypasses: node.Bypasses, rules: foreign.Rules, log: log, changed: make(chan struct{}, 1)}
}

// join has the agent report what is found.
func (l *lookout) join(options *agent.Options) {
	options.Observers = append(options.Observers, l.observe)
	options.Notes = append(options.Notes, l.found)
	options.Tasks = append(options.Tasks, l.run)
}

// found is what was found last.
func (l *lookout) found() []agent.Note {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.notes
}

// observe takes down the magic IPs that are served: a rule of another program for one that is not is where its packets should go.
func (l *lookout) observe(_, now *runtimedir.Status) {
	served := make([]plan.Frontend, 0, len(now.MagicIPs)) // a look may still use the one before
	for i := range now.MagicIPs {
		if m := &now.MagicIPs[i]; m.Reason == "" {
			served = append(served, m.Frontend)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Equal(l.frontends, served) {
		return
	}
	l.frontends = served
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

func (l *lookout) run(ctx context.Context, wake func(agent.Source)) error {
	bypassTicker, ruleTicker := time.NewTicker(bypassInterval), time.NewTicker(ruleInterval)
	defer bypassTicker.Stop()
	defer ruleTicker.Stop()
	bypasses := l.lookForBypasses(nil)
	var rules []agent.Note
	for ctx.Err() == nil {
		if l.report(slices.Concat(bypasses, rules)) {
			wake(agent.Notes)
		}
		select {
		case <-ctx.Done():
		case <-bypassTicker.C:
			bypasses = l.lookForBypasses(bypasses)
		case <-ruleTicker.C:
			rules = l.lookForRules(ctx)
		case <-l.changed:
			rules = l.lookForRules(ctx)
		}
	}
	return nil
}

// lookForBypasses returns what there is now. Where that cannot be seen, what was found before counts.
func (l *lookout) lookForBypasses(before []agent.Note) (notes []agent.Note) {
	found, err := l.bypasses()
	if err != nil {
		before = slices.DeleteFunc(slices.Clone(before), func(n agent.Note) bool { return n.Kind == "unseen" })
		return append(before, agent.Note{Kind: "unseen", Text: "it cannot be seen whether packets of pods bypass the rules: " + err.Error()})
	}
	for _, text := range found {
		notes = append(notes, agent.Note{Kind: "bypass", Text: text})
	}
	return notes
}

func (l *lookout) lookForRules(ctx context.Context) (notes []agent.Note) {
	l.mu.Lock()
	frontends := l.frontends
	l.mu.Unlock()
	found, hidden := l.rules(ctx, frontends)
	for _, rule := range found {
		notes = append(notes, agent.Note{Kind: "foreign_rule", Text: "another program translates a magic IP too; remove the rule: " + rule.Text})
	}
	for _, reason := range hidden {
		notes = append(notes, agent.Note{Kind: "unseen", Text: "it cannot be seen whether another program translates a magic IP: " + reason})
	}
	return notes
}

// report replaces what was found before, and reports whether it differs.
func (l *lookout) report(notes []agent.Note) bool {
	l.mu.Lock()
	before := l.notes
	l.notes = notes
	l.mu.Unlock()
	isBypass := func(n agent.Note) bool { return n.Kind == "bypass" }
	for _, note := range notes {
		// The text of a bypass names links of pods: with each new pod it may be another.
		if !slices.Contains(before, note) && !(isBypass(note) && slices.ContainsFunc(before, isBypass)) {
			l.log.Warn(runtimedir.ProblemKinds()[note.Kind], "reason", note.Text)
		}
	}
	for _, note := range before {
		if !slices.Contains(notes, note) && !(isBypass(note) && slices.ContainsFunc(notes, isBypass)) {
			l.log.Info("recovered", "what", note.Text)
		}
	}
	return !slices.Equal(notes, before)
}
