// Package agent keeps the node's rules in step with the pods that the magic IPs are for.
//
// Its sources are the CNI plugin's state file, its configuration, what other agents on the node have
// published and the node's network. Whenever one of them changes, the agent computes the whole desired
// state with the pure functions of packages endpoint and plan, brings the kernel to it, and publishes
// what it did.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// Backend brings rules into the kernel.
type Backend interface {
	Name() string
	// Sync makes the kernel's rules those of the plan. An error with InPlace() true is about other rules: those
	// of the plan are in the kernel.
	Sync(ctx context.Context, p *plan.Plan) error
	// Verify says what somebody else has changed since; the next Sync mends it.
	Verify(ctx context.Context) (differs []string, err error)
}

// Flows deletes conntrack entries that a plan has made stale.
type Flows interface {
	Sweep(ctx context.Context, p *plan.Plan, change plan.Change) (deleted int, err error)
}

// Node is the network of the node.
type Node interface {
	Read() (node.Network, error)
	EnableHairpin(hostInterface string) (switched bool, err error)
}

// API is the Kubernetes API.
type API interface {
	// Select makes these the namespaces whose pods are asked for.
	Select(namespaces []string)
	// View is what it said last.
	View() inventory.View
	// Poll asks again where that is needed. It does not wait for the answer.
	Poll(ctx context.Context)
}

// Source is what may have changed.
type Source uint32

// The sources that wake the agent.
const (
	Records    Source = 1 << iota // the plugin's state file
	Network                       // links, addresses, default routes
	Others                        // what other agents have published
	Settings                      // the configuration
	Rules                         // the kernel's rules: somebody else has changed ours
	Pods                          // the Kubernetes API
	Poll                          // time for the backstop: everything, and the kernel
	allSources = Records | Network | Others | Settings | Rules | Pods | Poll
)

// Watcher calls wake when a source may have changed, until ctx ends.
type Watcher func(ctx context.Context, wake func(Source)) error

// Options are the parts that an agent is made of.
type Options struct {
	RuntimeDir string
	// Load reads and validates the configuration.
	Load    func() (config.Config, error)
	Backend Backend
	// BackendNote is published: why it is this backend.
	BackendNote string
	Flows       Flows
	Node        Node
	API         API // nil: what the CNI plugin records is all that is known
	// ForeignRules names the rules of others that translate one of these addresses.
	ForeignRules func(context.Context, []netip.Addr) []string
	// Bypasses names what keeps packets of this node from the rules; nil: not looked for.
	Bypasses func() []string
	// Notes are published beside the agent's own; they are asked for each time.
	Notes []func() []string
	// Published are called with what the agent publishes whenever that changes, and with what it was before
	// (nil: nothing). They return at once.
	Published []func(before, now *published.Agent)
	Watchers  []Watcher
	Uninstall Uninstall
	Log       *slog.Logger
}

// Agent is one running agent. Its methods but wake are called by one goroutine only.
type Agent struct {
	Options
	pending atomic.Uint32 // the sources that have changed since they were last read
	woken   chan struct{}

	config    config.Config
	startedAt time.Time
	records   records
	pods      pods
	network   node.Network
	others    []*published.Agent
	// restored is what this agent had published before it was restarted.
	restored *published.Agent
	// restoredOf are its magic IPs by frontend.
	restoredOf map[plan.Frontend][]published.MagicIP
	// services are remembered by frontend; serving are those of config.Ports, in order: nil where another port before has the
	// frontend, and none at all until decide has looked.
	services map[plan.Frontend]*service
	serving  []*service

	applied  *plan.Plan // nil before the first sync; the last one was at syncedAt
	syncedAt time.Time
	// again is swept a second time with the next poll: a packet that was on its way through the old rules
	// while the table was dumped makes its entry after the dump.
	again     plan.Change
	mendedAt  time.Time
	foreign   foreign
	published *published.Agent
	errs      map[string]string // by what failed, what is wrong now
}

// foreign are the rules of others that translate our addresses, and what bypasses ours, as of the last look.
type foreign struct {
	at        time.Time
	addresses []netip.Addr
	rules     []string
	bypasses  []string
}

// service is what the agent remembers of a frontend.
type service struct {
	claimedAt time.Time
	lostAt    time.Time // when the last endpoint went; zero while there is one
	refused   string
	endpoints []endpoint.Chosen
}

// ErrStandby is not an error to report: the context ended while another process held the agent's name.
var ErrStandby = errors.New("ended while standing by")

// Run serves until ctx ends, and then leaves the rules in place. It first waits for its name to be free.
func Run(ctx context.Context, options Options) error {
	a := &Agent{Options: options, woken: make(chan struct{}, 1), services: map[plan.Frontend]*service{}, errs: map[string]string{}, pods: pods{withdrawn: map[string][]netip.Addr{}}}
	var err error
	if a.config, err = a.Load(); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	parent := ctx
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	uninstall := a.awaitUninstall(ctx, stop)
	lock, err := a.lock(parent)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()

	watching := make(chan struct{})
	running := atomic.Int32{}
	running.Store(int32(len(a.Watchers)))
	for _, watch := range a.Watchers {
		go func() {
			if err := watch(ctx, a.wake); err != nil {
				stop(err)
			}
			if running.Add(-1) == 0 {
				close(watching)
			}
		}()
	}
	a.restore()
	a.serve(ctx)
	stop(nil)
	if len(a.Watchers) > 0 {
		<-watching
	}
	if uninstall() {
		return a.leave(parent, lock)
	}
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	a.Log.Info("stopped; the rules stay in place")
	return nil
}

// lock waits until no other process runs under this agent's name.
func (a *Agent) lock(ctx context.Context) (interface{ Close() error }, error) {
	const retry = 200 * time.Millisecond
	for first := true; ; first = false {
		lock, err := published.Lock(a.RuntimeDir, a.config.Name)
		if err == nil {
			return lock, nil
		}
		if !errors.Is(err, published.ErrLocked) {
			return nil, fmt.Errorf("agent %s: %w", a.config.Name, err)
		}
		if first {
			a.Log.Info("standing by: another process runs under this name", "name", a.config.Name)
		}
		select {
		case <-ctx.Done():
			return nil, ErrStandby
		case <-time.After(retry):
		}
	}
}

// wake notes that sources have changed. Any goroutine may call it; it never blocks.
func (a *Agent) wake(sources Source) {
	a.pending.Or(uint32(sources))
	select {
	case a.woken <- struct{}{}:
	default:
	}
}

// serve is the loop: changes that come while a sync is under way are taken together in the next one.
func (a *Agent) serve(ctx context.Context) {
	a.startedAt = time.Now()
	poll := time.NewTicker(a.config.PollInterval)
	defer poll.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	backoff := minBackoff
	a.wake(allSources)
	for {
		select {
		case <-ctx.Done():
			return
		case <-poll.C:
			a.wake(Poll)
			continue
		case <-retry.C:
		case <-a.woken:
		}
		interval := a.config.PollInterval
		next, ok := a.sync(ctx, Source(a.pending.Swap(0)))
		if !ok {
			next = backoff
			backoff = min(2*backoff, a.config.PollInterval)
		} else {
			backoff = minBackoff
		}
		if next > 0 {
			retry.Reset(next)
		}
		if a.config.PollInterval != interval {
			poll.Reset(a.config.PollInterval)
		}
	}
}

const (
	minBackoff = 100 * time.Millisecond
	// mendPause keeps the agent from fighting with somebody who changes its rules again and again.
	mendPause       = time.Second
	foreignInterval = 10 * time.Minute
)

// sync reads what has changed and brings kernel and published file to the state that follows. next is
// when to look again although nothing happens (0: never); ok is false where something is to be retried.
func (a *Agent) sync(ctx context.Context, changed Source) (next time.Duration, ok bool) {
	now := time.Now()
	if news := a.read(ctx, changed); ctx.Err() != nil || !news && a.applied != nil && len(a.errs) == 0 {
		return 0, true
	}
	if a.published == nil {
		// Claims are made known before they are acted on: of two agents that start at once the younger
		// sees the older in time.
		a.decide(now)
		a.publish(now, false)
		a.read(ctx, Others)
	}
	next = a.decide(now)
	p := a.plan(now)
	fresh := a.applied == nil || !p.Equal(a.applied)
	damaged := false
	pause := a.mendedAt.Add(mendPause).Sub(now)
	if changed&Poll != 0 || changed&Rules != 0 && pause <= 0 {
		differs, err := a.Backend.Verify(ctx)
		a.note(a.Backend.Name()+" verify", err)
		if len(differs) > 0 {
			a.Log.Warn("somebody else has changed our rules; mending them", "backend", a.Backend.Name(), "differs", differs)
			fresh, damaged, a.mendedAt = true, true, now
		}
	} else if changed&Rules != 0 {
		a.pending.Or(uint32(Rules)) // for the next look, below
		if next == 0 || pause < next {
			next = pause
		}
	}
	if changed&Poll != 0 {
		if !a.again.Empty() {
			_, err := a.Flows.Sweep(ctx, a.applied, a.again)
			a.note("conntrack", err)
			a.again = plan.Change{}
		}
	}
	ok = true
	if fresh || a.errs[a.Backend.Name()] != "" {
		started := time.Now()
		err := a.Backend.Sync(ctx, &p)
		a.note(a.Backend.Name(), err)
		ok = err == nil
		if ok || inPlace(err) {
			a.Log.Debug("rules in place", "backend", a.Backend.Name(), "took", time.Since(started))
			a.sweep(ctx, &p, damaged)
			a.applied, a.syncedAt = &p, now
		}
	}
	a.hairpin()
	if changed&Poll != 0 {
		a.lookForForeign(ctx, now) // last: rules of ours do not wait for a look at everybody's
	}
	a.publish(now, changed&Poll != 0)
	return next, ok
}

func inPlace(err error) bool {
	var sync interface{ InPlace() bool }
	return errors.As(err, &sync) && sync.InPlace()
}

// lookForForeign names rules of others that translate our addresses, and what bypasses ours. It is a look at all rules of the
// node, so it is done seldom: at the start, when the addresses change, and every foreignInterval.
func (a *Agent) lookForForeign(ctx context.Context, now time.Time) {
	var addresses []netip.Addr
	for _, port := range a.config.Ports {
		addresses = append(addresses, port.Address)
	}
	if slices.Equal(addresses, a.foreign.addresses) && now.Sub(a.foreign.at) < foreignInterval {
		return
	}
	a.foreign.addresses, a.foreign.at = addresses, now
	found := a.ForeignRules(ctx, addresses)
	for _, rule := range found {
		if !slices.Contains(a.foreign.rules, rule) {
			a.Log.Warn("somebody else translates a magic IP too; remove the rule", "rule", rule)
		}
	}
	a.foreign.rules = found
	if a.Bypasses == nil {
		return
	}
	bypasses := a.Bypasses()
	for _, bypass := range bypasses {
		if !slices.Contains(a.foreign.bypasses, bypass) {
			a.Log.Warn(bypass)
		}
	}
	a.foreign.bypasses = bypasses
}

// sweep deletes the flows that the plan now in the kernel has made stale. While rules were damaged, new flows
// of any frontend may have gone anywhere.
func (a *Agent) sweep(ctx context.Context, p *plan.Plan, damaged bool) {
	change := p.Since(a.applied)
	if damaged {
		anew := p.Since(nil)
		change.Frontends, change.Untranslated = anew.Frontends, anew.Untranslated
	}
	deleted, err := a.Flows.Sweep(ctx, p, change)
	a.note("conntrack", err)
	if deleted > 0 {
		a.Log.Info("flows ended whose endpoint is gone", "flows", deleted)
	}
	a.again.Frontends = append(a.again.Frontends, change.Frontends...)
	a.again.Untranslated = append(a.again.Untranslated, change.Untranslated...)
	a.again.Removed = append(a.again.Removed, change.Removed...)
	a.again.Gone = append(a.again.Gone, change.Gone...)
}

// hairpin lets endpoints behind a bridge port talk to themselves through their magic IP.
func (a *Agent) hairpin() {
	done := map[netip.Addr]bool{} // many magic IPs may lead to one pod
	for i, port := range a.config.Ports {
		s := a.serving[i]
		if s == nil || port.ExcludeTarget {
			continue
		}
		for _, chosen := range s.endpoints {
			if done[chosen.Address.Addr()] {
				continue
			}
			done[chosen.Address.Addr()] = true
			i := slices.IndexFunc(a.records.list, func(r state.Attachment) bool { return slices.Contains(r.IPs, chosen.Address.Addr()) })
			if i < 0 || a.records.list[i].HostInterface == "" {
				continue
			}
			switched, err := a.Node.EnableHairpin(a.records.list[i].HostInterface)
			a.note("hairpin of "+a.records.list[i].HostInterface, err)
			if switched {
				a.Log.Info("hairpin switched on, so that the pod reaches itself", "interface", a.records.list[i].HostInterface, "pod", podName(chosen))
			}
		}
	}
}

// note remembers and logs an error, once for as long as it stays the same.
func (a *Agent) note(what string, err error) {
	switch {
	case err == nil:
		if a.errs[what] != "" {
			a.Log.Info("mended", "what", what)
		}
		delete(a.errs, what)
	case a.errs[what] != err.Error():
		a.Log.Error(err.Error(), "what", what)
		a.errs[what] = err.Error()
	}
}

// lastError is what is wrong now, in one line; empty where nothing is.
func (a *Agent) lastError() string {
	var all []string
	for what, err := range a.errs {
		all = append(all, what+": "+err)
	}
	slices.Sort(all)
	return strings.ReplaceAll(strings.Join(all, "; "), "\n", "; ")
}

func podName(c endpoint.Chosen) string { return c.Namespace + "/" + c.Name }
