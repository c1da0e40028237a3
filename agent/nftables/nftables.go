// Package nftables keeps an agent's rules in the kernel's nftables: the tables magic-ip-<agent name>, one per
// address family, and nothing else.
//
// Chains are loaded as text by the nft command (Linux 5.9 and nft 1.0.1 are the minimum), elements of sets
// are changed by netlink. Bridges whose frames bypass netfilter are masqueraded, see plan.Bridge.
package nftables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
)

// Name is the backend's name as in --backend.
const Name = "nftables"

// TablePrefix begins the name of every agent's tables.
const TablePrefix = "magic-ip-"

const tableComment = "rules of magic-ip-agent: changes made by hand are undone"

// Backend keeps the tables of one agent. One goroutine may call Watch, and another one the other methods.
type Backend struct {
	tables []*table

	mu sync.Mutex
	// processes have changed our tables since they were last verified, as far as the kernel reported.
	processes []string
}

// New makes the backend of the agent called agentName. It asks the kernel nothing.
func New(agentName string) (*Backend, error) {
	b := &Backend{}
	var elements elementSocket
	var r reader
	for _, family := range plan.Families() {
		name := TablePrefix + agentName
		nft, err := knftables.New(knftables.Family(family), name)
		if err != nil {
			return nil, err
		}
		b.tables = append(b.tables, &table{
			family: family, name: name, nft: bounded{nft, program.Timeout}, generation: NewGeneration(),
			list:     func(known []set) (*listing, error) { return r.listTable(family, name, known) },
			elements: func(changes []setChange) error { return elements.apply(family, name, changes) },
			counters: func(s set) ([]element, error) { return r.listCounters(family, name, s) },
		})
	}
	for _, t := range b.tables {
		t.siblings = b.tables
	}
	return b, nil
}

// bounded kills an nft process that does not end within timeout.
type bounded struct {
	knftables.Interface
	timeout time.Duration
}

// Run is part of knftables.Interface.
func (b bounded) Run(ctx context.Context, tx *knftables.Transaction) error {
	return program.Within(ctx, b.timeout, func(ctx context.Context) error { return b.Interface.Run(ctx, tx) })
}

// Check is part of knftables.Interface.
func (b bounded) Check(ctx context.Context, tx *knftables.Transaction) error {
	return program.Within(ctx, b.timeout, func(ctx context.Context) error { return b.Interface.Check(ctx, tx) })
}

// Trial says why nft or the kernel cannot do what the rules need; nil where they can. noZones is why UDP flows cannot be put into zones
// of connection tracking, which the rules can do without; nil where they can. Nothing is loaded.
func (b *Backend) Trial(ctx context.Context) (noZones, err error) {
	trial := func(zones bool) error {
		p := plan.Build(plan.Input{Zones: zones, Services: []plan.Service{{
			Frontend: plan.Frontend{Address: netip.AddrFrom4([4]byte{192, 0, 2, 1}), Protocol: plan.UDP, Port: 1}, HostClients: true,
			Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 2}), 1)},
		}}})
		tx := b.tables[0].nft.NewTransaction()
		rules := render(&p, plan.IPv4)
		rules.replace(tx) // what is in the table decides nothing
		return b.tables[0].nft.Check(ctx, tx)
	}
	if noZones = trial(true); noZones == nil || program.Transient(noZones) {
		return nil, noZones
	}
	if err := trial(false); err != nil {
		return nil, fmt.Errorf("nft or the kernel cannot load the rules (Linux 5.9 and nft 1.0.1 are the least): %w", err)
	}
	return noZones, nil
}

// Name is the backend's name as in --backend.
func (b *Backend) Name() string { return Name }

// Sync brings the kernel to the plan: one transaction per family where the plan differs from what was
// loaded before, none where it does not.
func (b *Backend) Sync(ctx context.Context, p *plan.Plan) error {
	var err error
	for _, t := range b.tables {
		err = errors.Join(err, t.sync(ctx, p))
	}
	if err != nil {
		return err
	}
	for _, t := range b.tables {
		if t.degraded != nil {
			return &DegradedError{t.degraded}
		}
	}
	return nil
}

// DegradedError says that the rules are those of the plan, and that a change takes longer than it should.
type DegradedError struct{ err error }

func (e *DegradedError) Error() string {
	return "elements cannot be changed by netlink, so that each change starts an nft process: " + e.err.Error()
}
func (e *DegradedError) Unwrap() error { return e.err }

// InPlace says that the rules of the plan are in the kernel.
func (e *DegradedError) InPlace() bool { return true }

// Verify says what in our tables was externally modified since they were loaded. The next Sync then
// loads them anew. It costs one small netlink message where nobody has changed any rule on the node.
func (b *Backend) Verify(ctx context.Context) ([]string, error) {
	var differs []string
	var err error
	for _, t := range b.tables {
		found, verifyErr := t.verify(ctx)
		differs, err = append(differs, found...), errors.Join(err, verifyErr)
	}
	if len(differs) == 0 {
		b.mu.Lock()
		b.processes = nil
		b.mu.Unlock()
	}
	return differs, err
}

// ModifiedBy names the processes that have changed our tables since Verify last found them as wanted, where the kernel said it.
func (b *Backend) ModifiedBy() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Join(b.processes, ", ")
}

// Remove takes our tables out.
func (b *Backend) Remove(ctx context.Context) error {
	var err error
	for _, t := range b.tables {
		err = errors.Join(err, t.remove(ctx))
	}
	return err
}

// Exists reports whether any of the tables is there.
func (b *Backend) Exists(context.Context) (bool, error) {
	if !Supported() {
		return false, nil
	}
	for _, t := range b.tables {
		if listed, err := t.list(nil); err != nil || listed.exists {
			return err == nil, err
		}
	}
	return false, nil
}

// Watch calls changed after each change of our tables, until ctx ends, and whenever it has subscribed or has lost events: they may have
// changed then. An error does not end it: Watch reports the error and subscribes again.
func (b *Backend) Watch(ctx context.Context, changed func(), report func(error)) {
	self := ownProcess()
	keepWatching(ctx, subscribe, b.tables[0].name, func(process string) {
		b.mu.Lock()
		if process != "" && process != self && !slices.Contains(b.processes, process) {
			b.processes = append(b.processes, process)
		}
		b.mu.Unlock()
		changed()
	}, report)
}

// ownProcess is this process's name as the kernel has it.
func ownProcess() string {
	name, _ := os.ReadFile("/proc/self/comm")
	return strings.TrimSpace(string(name))
}
