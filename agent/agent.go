// Package agent keeps the node's rules in step with the pods that the magic IPs are for.
//
// Its sources are the CNI plugin's state file, the Kubernetes API, its configuration, the claims of other agents on the node
// and the node's network. Whenever one of them changes, the agent computes the whole desired state with the pure packages
// inventory, endpoint and plan, brings the kernel to it, and writes what it did into the runtime directory.
//
// Until the sources that a decision needs are synced, the decision is not made, and what the kernel has stays.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Backend brings rules into the kernel.
type Backend interface {
	Name() string
	// Sync makes the kernel's rules those of the plan. An error with InPlace() true is about other rules: those
	// of the plan are in the kernel.
	Sync(ctx context.Context, p *plan.Plan) error
	// Verify returns what differs from the last Sync: externally modified rules. The next Sync restores them.
	Verify(ctx context.Context) (differs []string, err error)
	// Counts is how often each frontend was asked for since the agent started; nil where that is not counted.
	Counts() (map[plan.Frontend]plan.Count, error)
	// ModifiedBy names the processes that made what Verify found, where the kernel said it.
	ModifiedBy() string
	// Exists reports whether the kernel has rules of this agent.
	Exists(ctx context.Context) (bool, error)
}

// Flows deletes conntrack entries that a plan has made stale.
type Flows interface {
	Sweep(ctx context.Context, p *plan.Plan, change plan.Change) (deleted int, err error)
}

// Node is the network of the node.
type Node interface {
	Snapshot() (node.Snapshot, error)
	// SnapshotWithoutLocalRoutes is Snapshot without what there may be thousands of.
	SnapshotWithoutLocalRoutes() (node.Snapshot, error)
	// SetHairpin switches hairpin mode of a bridge port, by its ifindex; a port that is gone is not an error.
	SetHairpin(port int, on bool) error
	// AddLocalRoute adds a local route, or gives it another source.
	AddLocalRoute(route node.LocalRoute) error
	// RemoveLocalRoute removes one; one that is gone is not an error.
	RemoveLocalRoute(route node.LocalRoute) error
}

// API is the Kubernetes API.
type API interface {
	// Select sets what is asked for.
	Select(query inventory.Query)
	// View is what it reported last.
	View() inventory.View
	// Poll asks again where that is needed. It does not wait for the answer.
	Poll(ctx context.Context)
}

// Meter counts what the loop does.
type Meter interface {
	Synced(took time.Duration, err error) // the rules, or that has failed
	Restored()                            // externally modified rules
	Swept(flows int)
	Polled()
	// Configured: the configuration has been read. hash is that of the one in force.
	Configured(hash string, err error)
}

type noMeter struct{}

func (noMeter) Synced(time.Duration, error) {}
func (noMeter) Restored()                   {}
func (noMeter) Swept(int)                   {}
func (noMeter) Polled()                     {}
func (noMeter) Configured(string, error)    {}

// Source is what may have changed.
type Source uint32

// The sources that wake the agent.
const (
	Records     Source = 1 << iota // the plugin's state file
	Network                        // links, addresses, routes
	Others                         // the claims of other agents
	Settings                       // the configuration
	Rules                          // the kernel's rules were externally modified
	Pods                           // the Kubernetes API
	Notes                          // Options.Notes
	DataPlane                      // Cilium's settings
	LocalRoutes                    // local routes of agents
	Poll                           // time for the backstop: everything, and the kernel
	allSources  = Records | Network | Others | Settings | Rules | Pods | Notes | DataPlane | LocalRoutes | Poll
)

// Task runs beside the loop until ctx ends; an error ends the agent. wake tells the loop that a source may have changed.
type Task func(ctx context.Context, wake func(Source)) error

// Options are the parts that an agent is made of.
type Options struct {
	RuntimeDir string
	// Load reads and validates the configuration.
	Load    func() (config.Config, error)
	Backend Backend
	// BackendNote is the reason for this backend, for people.
	BackendNote string
	// Zones: the backend can put flows into zones of connection tracking.
	Zones bool
	Flows Flows
	Node  Node
	// Cilium reads Cilium's settings: fs.ErrNotExist where it has written none.
	Cilium func() (dataplane.Settings, error)
	API    API // nil: what the CNI plugin records is all that is known
	// Uptime is the time since the node was started (CLOCK_BOOTTIME): what is measured over a restart of the agent.
	Uptime func() time.Duration
	// Notes are shown in the status beside the agent's own; they are asked for each time.
	Notes []func() []Note
	// Meter counts what the loop does; nil: it is not counted.
	Meter Meter
	// Observers are called with the status whenever that changes, and with what it was before (nil: none). They return at once.
	Observers []func(before, now *runtimedir.Status)
	Tasks     []Task
	Uninstall Uninstall
	Log       *slog.Logger
}

// Note is a condition that an operator should know of.
type Note struct {
	Kind string // one of runtimedir.ProblemKinds
	Text string
}

// agent is one running agent. Its methods but wake are called by one goroutine only.
type agent struct {
	Options
	dir     runtimedir.Dir
	own     runtimedir.Agent
	pending atomic.Uint32 // the sources that have changed since they were last read
	woken   chan struct{}

	config    config.Config
	query     inventory.Query // what it needs of the Kubernetes API
	startedAt time.Time
	sources   sources
	pods      *inventory.Inventory
	services  services
	plane     dataplane.Choice
	wanted    plan.Plan // what follows from the last decisions
	kernel    kernel
	files     files
	// keep: the kernel has rules of this agent, of which it remembers nothing. They stay until all sources are synced.
	keep bool
	// logged are the problems of the last pass, by what they are about.
	logged map[string]string
	// kinds are the kinds of them.
	kinds []string
	// decideAt is when a decision changes by time; zero: never.
	decideAt time.Time
}

// ErrStandby is not an error to report: the context ended while another process held the agent's name.
var ErrStandby = errors.New("ended while standing by")

// Run serves until ctx ends, and then leaves the rules in place. It first waits for its name to be free.
func Run(ctx context.Context, options Options) error {
	a, err := newAgent(options)
	if err != nil {
		return err
	}
	stoppable, stop := context.WithCancel(ctx)
	defer stop()
	tasks, running := errgroup.WithContext(stoppable)
	if a.Uninstall.Wanted != nil {
		tasks.Go(func() error { // asked from the start, standing by included
			if a.Uninstall.Wanted(running) {
				return errUninstall
			}
			return nil
		})
	}
	lock, err := a.lock(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	for _, task := range a.Tasks {
		tasks.Go(func() error { return task(running, a.wake) })
	}
	a.restore(running)
	tasks.Go(func() error {
		a.serve(running)
		return nil
	})
	switch err := tasks.Wait(); {
	case errors.Is(err, errUninstall):
		return a.leave(ctx, lock)
	case err != nil:
		return err
	}
	a.Log.Info("stopped; the rules stay in place")
	return nil
}

func newAgent(options Options) (*agent, error) {
	if options.Meter == nil {
		options.Meter = noMeter{}
	}
	a := &agent{Options: options, dir: runtimedir.New(options.RuntimeDir), woken: make(chan struct{}, 1)}
	a.kernel.agent, a.files.agent = a, a
	var err error
	if a.config, err = a.Load(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	a.own = a.dir.Agent(a.config.Name)
	a.files.writer = a.own.StatusWriter()
	return a, nil
}

// lock waits until no other process runs under this agent's name.
func (a *agent) lock(ctx context.Context) (*runtimedir.Lock, error) {
	const retry = 200 * time.Millisecond
	for first := true; ; first = false {
		lock, err := a.own.Lock()
		if err == nil {
			if lock.Lost != nil {
				a.Log.Warn("files of the version before cannot be taken over; starting without them", "error", lock.Lost)
			}
			return lock, nil
		}
		if !errors.Is(err, runtimedir.ErrLocked) {
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
func (a *agent) wake(sources Source) {
	a.pending.Or(uint32(sources))
	select {
	case a.woken <- struct{}{}:
	default:
	}
}

const minBackoff = 100 * time.Millisecond

// serve is the loop: changes that come while a pass is under way are taken together in the next one.
func (a *agent) serve(ctx context.Context) {
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
			backoff = min(2*backoff, a.config.PollInterval)
		case <-a.woken:
		}
		interval := a.config.PollInterval
		next, ok := a.pass(ctx, Source(a.pending.Swap(0)))
		if !ok {
			next = soonest(next, backoff) // what is due by time does not wait for what has failed
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

// pass reads what has changed and brings kernel and runtime directory to the state that follows. next is
// when to look again although nothing happens (0: never); ok is false where something is to be retried. Where nothing has changed, it
// only sweeps: all else costs as much as there are magic IPs.
func (a *agent) pass(ctx context.Context, changed Source) (next time.Duration, ok bool) {
	now := time.Now()
	if changed == 0 && a.decided(now) {
		if next = a.kernel.sweepDue(ctx, now); a.kernel.sweepErr == nil {
			return soonest(next, max(0, a.decideAt.Sub(now))), true
		}
	}
	news := a.read(ctx, changed, now)
	if ctx.Err() != nil || !news && a.kernel.applied != nil && len(a.logged) == 0 {
		return 0, true
	}
	waits := a.waits()
	if len(waits) == 0 {
		damaged, pause := a.kernel.check(ctx, changed, now)
		if changed == Rules && !damaged && pause == 0 && a.kernel.verifyErr == nil && a.kernel.applied != nil && len(a.logged) == 0 {
			return 0, true // the agent's own change wakes it too
		}
		a.decideAt = time.Time{}
		next = a.decide(now)
		if a.files.claims.written == nil {
			// Claims are made known before they are acted on: of two agents that start at once the younger
			// sees the older in time.
			a.wanted = a.plan(now)
			a.files.publishClaims()
			a.readOthers()
			next = a.decide(now)
		}
		if next > 0 {
			a.decideAt = now.Add(next)
		}
		a.wanted = a.plan(now)
		next = soonest(soonest(next, pause), a.kernel.apply(ctx, a.wanted, changed, damaged, now))
	}
	a.report(append(a.problems(), waits...))
	failing := len(a.files.problems())
	a.files.publish(now, changed&Poll != 0, waits)
	if len(a.files.problems()) < failing {
		next = soonest(next, minBackoff) // the status that was just written reports one that is over
	}
	if changed&Poll != 0 {
		a.Meter.Polled()
	}
	return next, len(waits) == 0 && a.kernel.synced() && !a.sources.failing() && len(a.files.problems()) == 0
}

// decided reports whether a pass comes to what the last one did, while no source changes: nothing is wrong, or was.
func (a *agent) decided(now time.Time) bool {
	return a.kernel.applied != nil && len(a.waits()) == 0 && len(a.problems()) == 0 && len(a.logged) == 0 &&
		(a.decideAt.IsZero() || now.Before(a.decideAt))
}

// waits are why nothing can be decided yet; none where it can.
func (a *agent) waits() (waits []problem) {
	const consequence = "; until then the rules in the kernel stay as they are, and new pods are not served"
	if !a.sources.networkSynced {
		waits = append(waits, problem{"waiting", "start", errors.New("waiting for the node's network to be read" + consequence)})
	}
	if !a.sources.othersSynced {
		waits = append(waits, problem{"waiting", "start", errors.New("waiting for the claims of the other agents to be read" + consequence)})
	}
	if unread := a.sources.unread(); len(unread) > 0 && a.kernel.applied == nil {
		waits = append(waits, problem{"waiting", "start", fmt.Errorf("waiting for the claims of agent %s to be read (uninstall it if it is no more)%s", strings.Join(unread, ", "), consequence)})
	}
	if a.keep && a.pods.AllSynced() {
		a.keep = false
	}
	if a.keep {
		waits = append(waits, problem{"waiting", "start", errors.New("waiting for the state file and the Kubernetes API: this agent remembers nothing of the rules in the kernel" + consequence)})
	}
	return waits
}

func soonest(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// problem is an error that is true now, and what it is about.
type problem struct {
	kind  string // one of runtimedir.ProblemKinds
	about string
	err   error
}

// failed are those of problems that have an error.
func failed(problems ...problem) []problem {
	return slices.DeleteFunc(problems, func(p problem) bool { return p.err == nil })
}

// problems are computed anew in each pass from the sources and the kernel, so that none outlives its cause.
func (a *agent) problems() []problem {
	return append(append(a.sources.problems(), a.kernel.problems()...), a.files.problems()...)
}

// report logs each problem once for as long as it stays the same, and its end.
func (a *agent) report(problems []problem) {
	logged := map[string]string{}
	a.kinds = nil
	for _, p := range problems {
		a.kinds = append(a.kinds, p.kind)
		text := p.err.Error()
		if before := logged[p.about]; before != "" {
			text = before + "; " + text
		}
		logged[p.about] = text
	}
	for about, text := range logged {
		if a.logged[about] != text {
			a.Log.Error("failed; it is tried again", "what", about, "error", text)
		}
	}
	for about := range a.logged {
		if _, still := logged[about]; !still {
			a.Log.Info("recovered", "what", about)
		}
	}
	a.logged = logged
}
