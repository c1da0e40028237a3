// Package iptables keeps an agent's rules in the kernel's iptables: chains of its own in the tables mangle, filter, nat and raw,
// one jump to them from each built-in chain that it needs, and nothing else. See render.
package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
)

// Name is the backend's name as in --backend.
const Name = "iptables"

// Backend keeps the chains of one agent.
type Backend struct {
	Variant  Variant
	families []*chains
}

// New makes the backend of the agent called agentName with one kind of iptables. It asks the kernel nothing.
func New(agentName string, v Variant) *Backend {
	b := &Backend{Variant: v}
	for _, family := range plan.Families() {
		b.families = append(b.families, &chains{
			generation: nftables.NewGeneration(), timeout: program.Timeout,
			family: family, variant: v, command: v.command(family), agent: agentName, prefix: Prefix(agentName),
			moved: map[string]time.Time{},
		})
	}
	return b
}

// Trial says which iptables this is, and why it cannot do what the rules need; nil where it can. noZones is why UDP flows cannot be put
// into zones of connection tracking, which the rules can do without. Nothing is loaded.
func (b *Backend) Trial(ctx context.Context) (version string, noZones, err error) {
	tool, err := iptables.New(iptables.Path("iptables" + b.Variant.suffix))
	if err != nil {
		return "", nil, err
	}
	// --random-fully came with iptables 1.6.2, and with it what we need: iptables-restore --wait.
	v1, v2, v3 := tool.GetIptablesVersion()
	version = fmt.Sprintf("iptables%s %d.%d.%d", b.Variant.suffix, v1, v2, v3)
	if !tool.HasRandomFully() {
		return version, nil, fmt.Errorf("%s is too old: 1.6.2 is the least", version)
	}
	trial := plan.Build(plan.Input{Zones: true, Services: []plan.Service{{
		Frontend: plan.Frontend{Address: netip.AddrFrom4([4]byte{192, 0, 2, 1}), Protocol: plan.TCP, Port: 1},
		Endpoints: []netip.AddrPort{
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 2}), 1),
			netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 3}), 1),
		},
	}, {
		Frontend:  plan.Frontend{Address: netip.AddrFrom4([4]byte{192, 0, 2, 1}), Protocol: plan.UDP, Port: 1},
		Endpoints: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 2}), 1)},
	}}, Bridges: []plan.Bridge{{Name: "bridge", Unfiltered4: true}}})
	f := b.families[0]
	for _, t := range render(&trial, plan.IPv4, f.agent) {
		err := f.restore(ctx, lockWaitAtEnd, t.write(&listing{}, f.prefix, nil), "--test")
		switch {
		case err != nil && t.name == rawTable && !program.Transient(err) && !errors.Is(err, errLocked):
			noZones = err
		case err != nil:
			return version, nil, fmt.Errorf("%s cannot load the rules: %w", version, err)
		}
	}
	return version, noZones, nil
}

// Name is the backend's name as in --backend.
func (b *Backend) Name() string { return Name }

// Sync brings the kernel to the plan: per family and table a transaction for what is added and one for what is deleted, where what is
// wanted differs from what was loaded before, none where it does not. Where the xtables lock is not to be had it gives up after a second: the
// caller has other work, and tries again.
func (b *Backend) Sync(ctx context.Context, p *plan.Plan) error {
	var err error
	for _, f := range b.families {
		if err = errors.Join(err, f.sync(ctx, p)); errors.Is(err, errLocked) {
			break
		}
	}
	return err
}

// Verify reports external modifications of our chains and jumps since they were loaded. The next
// Sync restores them. With iptables-nft it costs one small netlink message where nobody has changed any
// rule on the node; else iptables-save is run.
func (b *Backend) Verify(ctx context.Context) ([]string, error) {
	var differs []string
	var err error
	for _, f := range b.families {
		found, verifyErr := f.verify(ctx)
		differs, err = append(differs, found...), errors.Join(err, verifyErr)
	}
	return differs, err
}

// Counts is nil: each change of a chain sets its counters to zero.
func (b *Backend) Counts() (map[plan.Frontend]plan.Count, error) { return nil, nil }

// ModifiedBy is empty: the kernel does not say who changes rules of iptables.
func (b *Backend) ModifiedBy() string { return "" }

// Remove takes our jumps and chains out.
func (b *Backend) Remove(ctx context.Context) error {
	var err error
	for _, f := range b.families {
		err = errors.Join(err, f.remove(ctx, lockWaitAtEnd))
	}
	return err
}

// Exists reports whether any of the chains or jumps is there. Where the tools or the part of the kernel are missing, none is.
func (b *Backend) Exists(ctx context.Context) (bool, error) {
	if !b.Variant.Legacy && !nftables.Supported() {
		return false, nil
	}
	for _, f := range b.families {
		if !present(f.command) {
			continue
		}
		for _, table := range []string{"nat", "filter", "mangle", rawTable} {
			if !b.Variant.Legacy { // there are no jumps without the chain
				if exists, err := nftables.HasChain(f.family, table, f.prefix); err != nil || exists {
					return exists, err
				}
				continue
			}
			if there, err := f.list(ctx, table); err != nil || !there[table].empty(f.prefix) {
				return err == nil, err
			}
		}
	}
	return false, nil
}

// chains is one address family's chains and what we believe is in them.
type chains struct {
	family  plan.Family
	variant Variant
	command string // iptables-nft, say
	agent   string
	prefix  string
	timeout time.Duration // of each process

	known  bool // false until the first sync, and after a failed one
	tables []table
	// listed is how iptables-save shows our chains, for each of tables; seen, the generation of the
	// kernel's nftables rules at which all was last known to be as wanted, 0 where that is not known.
	listed     [][]chain
	seen       uint32
	generation func() (uint32, error)
	// restored is why a sync has loaded chains anew that were externally modified. Verify has yet to report it.
	restored error
	rules    []plan.Rule // that were loaded last
	// served are the frontends that have an endpoint in the kernel.
	served map[plan.Frontend]bool
	// moved is when a jump was last put before those of others, by table and hook.
	moved map[string]time.Time
}

func (f *chains) sync(ctx context.Context, p *plan.Plan) error {
	var wanted []table
	if p.Has(f.family) {
		wanted = render(p, f.family, f.agent)
	}
	served := f.endpointsOf(p)
	if err := f.apply(ctx, wanted, f.order(served)); err != nil {
		return fmt.Errorf("%s: %w", f.command, err)
	}
	f.served, f.rules = served, p.Rules
	return nil
}

// order is that in which the tables of render are changed. Where frontends gain an endpoint, and none loses its own, nat comes before
// filter: in the other order a SYN between the two would be held, and sent again a second later. Where all that are served stay so, new
// connections move first, with nat, and datagrams next, with raw: into a zone that has no flow yet.
func (f *chains) order(served map[plan.Frontend]bool) []int {
	gains, loses := false, false
	for frontend := range served {
		gains = gains || !f.served[frontend]
	}
	for frontend := range f.served {
		loses = loses || !served[frontend]
	}
	switch {
	case gains && !loses:
		return []int{0, 2, 1, 3}
	case !gains && !loses:
		return []int{2, 3, 0, 1}
	}
	return []int{0, 1, 2, 3}
}

// endpointsOf are the frontends that have an endpoint by a plan.
func (f *chains) endpointsOf(p *plan.Plan) map[plan.Frontend]bool {
	served := map[plan.Frontend]bool{}
	for _, rule := range p.Rules {
		if plan.FamilyOf(rule.Address) == f.family && len(rule.Endpoints) > 0 {
			served[rule.Frontend] = true
		}
	}
	return served
}

// apply loads wanted, and changes its tables in this order; nil is nothing at all.
func (f *chains) apply(ctx context.Context, wanted []table, order []int) error {
	switch {
	case wanted == nil && f.known && f.tables == nil:
		return nil
	case wanted == nil:
		f.known = false
		return f.remove(ctx, lockWait)
	case f.known && f.tables != nil:
		err := f.update(ctx, wanted, order)
		if err == nil || ownFailure(err) {
			return err
		}
		// Our chains were externally modified.
		if errLoad := f.loadAll(ctx, wanted); errLoad != nil {
			return errors.Join(err, errLoad)
		}
		f.restored = err
		return nil
	default:
		return f.loadAll(ctx, wanted)
	}
}

// update changes the chains that differ, in this order of tables, all by one process, because each reads the rules of the node when it
// starts. After a failure it is not known which of the changes are in the kernel.
//
// What is added is added first, in all tables, and what it replaces is deleted then: a rule of iptables-nft that is made while a deleted
// one is being destroyed waits for that, which takes a grace period of the kernel (nf_tables_trans_destroy_flush_work, called by nft_compat), and all who change
// rules of the node wait with it. iptables-legacy loads a whole table each time, so that it has one transaction for both.
func (f *chains) update(ctx context.Context, wanted []table, order []int) error {
	var otherJumps []string
	for i, t := range wanted {
		if !slices.Equal(t.jumps, f.tables[i].jumps) {
			otherJumps = append(otherJumps, t.name)
		}
	}
	there, err := f.list(ctx, otherJumps...)
	if err != nil {
		return err
	}
	f.known = false
	var additions, deletions strings.Builder
	var changed []int
	transaction := func(w *strings.Builder, t table, lines string) {
		if lines != "" {
			fmt.Fprintf(w, "*%s\n%sCOMMIT\n", t.name, lines)
		}
	}
	for _, i := range order {
		t, length := wanted[i], additions.Len()+deletions.Len()
		if l := there[t.name]; l != nil {
			additions.WriteString(f.replacing(t, l))
		} else if added, deleted := t.changes(f.tables[i]); f.variant.Legacy {
			transaction(&additions, t, added+deleted)
		} else {
			transaction(&additions, t, added)
			transaction(&deletions, t, deleted)
		}
		if additions.Len()+deletions.Len() > length {
			changed = append(changed, i)
		}
	}
	if err := f.restore(ctx, lockWait, additions.String()+deletions.String()); err != nil {
		return err
	}
	f.noteMoved(wanted, there)
	before := slices.Clone(f.tables)
	for i, t := range wanted {
		if there[t.name] != nil {
			before[i] = table{} // all of it is new
		}
	}
	f.tables = slices.Clone(wanted)
	if err := f.remember(ctx, changed, before); err != nil {
		return err
	}
	f.known = true
	return nil
}

// loadAll puts all tables in place of whatever is there. Where others change them meanwhile, it looks again.
func (f *chains) loadAll(ctx context.Context, wanted []table) (err error) {
	f.known = false
	for range 3 {
		var there map[string]*listing
		if there, err = f.list(ctx, names(wanted)...); err != nil {
			return err
		}
		var input strings.Builder
		for _, t := range wanted {
			input.WriteString(f.replacing(t, there[t.name]))
		}
		if err = f.restore(ctx, lockWait, input.String()); err == nil {
			f.noteMoved(wanted, there)
			break
		}
		if ownFailure(err) {
			break
		}
	}
	if err != nil {
		return err
	}
	var all []int
	for i := range wanted {
		all = append(all, i)
	}
	f.tables, f.listed = slices.Clone(wanted), make([][]chain, len(wanted))
	if err := f.remember(ctx, all, make([]table, len(wanted))); err != nil {
		return err
	}
	f.known = true
	return nil
}

func names(tables []table) (all []string) {
	for _, t := range tables {
		all = append(all, t.name)
	}
	return all
}

// replacing is the input of iptables-restore that puts a table in place of what is there; empty where that is nothing and shall be: the
// table may not be in use.
func (f *chains) replacing(t table, there *listing) string {
	if len(t.jumps) == 0 && there.empty(f.prefix) {
		return ""
	}
	return t.write(there, f.prefix, func(hook string) bool { return f.mayMove(t.name, hook) })
}

// noteMoved notes which jumps have been put before rules of others that were there.
func (f *chains) noteMoved(tables []table, there map[string]*listing) {
	for _, t := range tables {
		if there[t.name] == nil {
			continue
		}
		for _, j := range t.jumps {
			if count, behind := there[t.name].jump(j); count > 0 && behind > 0 && f.mayMove(t.name, j.hook) {
				f.moved[t.name+" "+j.hook] = time.Now()
			}
		}
	}
}

// remember takes down how iptables-save shows the chains that were just loaded, to compare with later. before are the tables as they
// were, empty ones where all was loaded.
func (f *chains) remember(ctx context.Context, changed []int, before []table) error {
	if len(changed) > 0 {
		f.seen = 0
	}
	var tables []string
	for _, i := range changed {
		tables = append(tables, f.tables[i].name)
	}
	listings, err := f.list(ctx, tables...)
	if err != nil {
		return err
	}
	for _, i := range changed {
		t := f.tables[i]
		there := listings[t.name]
		if missing := t.missing(there); len(missing) > 0 {
			// Most of all: never add a jump again and again because the listing does not show it.
			f.unjump(ctx, t, there)
			return fmt.Errorf("table %s is not as loaded: %s", t.name, strings.Join(missing, "; "))
		}
		if strayed := t.strayed(before[i], f.listed[i], there.chains); len(strayed) > 0 {
			return fmt.Errorf("table %s is not as loaded: %s have other rules than before", t.name, strings.Join(strayed, ", "))
		}
		f.listed[i] = there.chains
	}
	return nil
}

// unjump takes back the jumps that the listing does not show although they have been added. It fails where they are not there.
func (f *chains) unjump(ctx context.Context, t table, there *listing) {
	for _, j := range t.jumps {
		if count, _ := there.jump(j); count == 0 {
			_ = f.restore(ctx, lockWait, fmt.Sprintf("*%s\n-D %s\nCOMMIT\n", t.name, j))
		}
	}
}

// moveAgainAfter is the backoff against others that want to be first as well.
const moveAgainAfter = time.Minute

// mayMove reports whether a jump may be put first again.
func (f *chains) mayMove(table, hook string) bool {
	moved, ever := f.moved[table+" "+hook]
	return !ever || time.Since(moved) > moveAgainAfter
}

// verify looks at our chains and jumps, and says what differs from when they were loaded.
func (f *chains) verify(ctx context.Context) ([]string, error) {
	if err := f.restored; err != nil {
		f.restored = nil
		return []string{fmt.Sprintf("%s: found when an endpoint changed: %v", f.command, err)}, nil
	}
	if !f.known || f.tables == nil {
		return nil, nil
	}
	now := uint32(0)
	if !f.variant.Legacy {
		var err error
		if now, err = f.generation(); err != nil {
			return nil, err
		}
		if now == f.seen {
			return nil, nil
		}
	}
	used := slices.DeleteFunc(slices.Clone(f.tables), func(t table) bool { return len(t.jumps) == 0 })
	listings, err := f.list(ctx, names(used)...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.command, err)
	}
	var differs []string
	var waiting error // for a jump that may not move yet
	for i, t := range f.tables {
		if len(t.jumps) == 0 {
			continue
		}
		there := listings[t.name]
		found := there.compareChains(f.listed[i])
		for _, j := range t.jumps {
			switch count, behind := there.jump(j); {
			case count != 1:
				found = append(found, fmt.Sprintf("%d jumps from %s", count, j.hook))
			case behind > 0 && f.mayMove(t.name, j.hook):
				found = append(found, fmt.Sprintf("%d rules of others before ours in %s", behind, j.hook))
			case behind > 0:
				now = 0 // look again with the next poll
				if waiting == nil {
					waiting = f.taken(t.name, j, there, f.rules)
				}
			}
		}
		if len(found) == 0 && len(there.leadingTo(f.prefix)) != len(t.jumps) {
			found = []string{"foreign rules that lead to our chains"}
		}
		for _, difference := range found {
			differs = append(differs, fmt.Sprintf("%s table %s: %s", f.command, t.name, difference))
		}
	}
	if len(differs) > 0 {
		f.known = false
		return differs, nil
	}
	f.seen = now
	if waiting != nil {
		return nil, fmt.Errorf("%w; another program put it there a second time, so ours are put first again only after a minute", waiting)
	}
	return nil, nil
}

// taken is an error where a rule of others before a jump takes packets to these frontends.
func (f *chains) taken(table string, j jump, there *listing, rules []plan.Rule) error {
	if rule := there.taken(j, rules, f.family); rule != "" {
		return fmt.Errorf("%s table %s: a rule of others before ours takes packets to magic IPs: %s", f.command, table, rule)
	}
	return nil
}

// remove takes jumps and chains out: filter before nat, so that nothing is held or rejected that is not
// translated any more.
func (f *chains) remove(ctx context.Context, wait int) error {
	if present(f.command) {
		all := []string{"filter", "nat", "mangle", rawTable}
		there, err := f.list(ctx, all...)
		if err != nil {
			return err
		}
		var input strings.Builder
		for _, name := range all {
			input.WriteString(f.replacing(table{name: name}, there[name]))
		}
		if err := f.restore(ctx, wait, input.String()); err != nil {
			return err
		}
	}
	f.known, f.tables, f.listed, f.seen = true, nil, nil, 0
	return nil
}

// list asks iptables-save for tables: by one process, which lists all that there are where these are several.
func (f *chains) list(ctx context.Context, tables ...string) (map[string]*listing, error) {
	asked := tables
	if f.variant.Legacy {
		asked = nil
		for _, table := range tables {
			inUse, err := LegacyTable(f.family, table)
			if err != nil {
				return nil, err
			}
			if inUse {
				asked = append(asked, table)
			}
		}
	}
	out := ""
	if len(asked) > 0 {
		var args []string
		if len(asked) == 1 {
			args = []string{"-t", asked[0]}
		}
		var err error
		if out, err = program.Output(ctx, f.timeout, "", f.command+"-save", args...); err != nil {
			return nil, err
		}
	}
	return parseListing(out, f.prefix, tables)
}

// For how many seconds iptables-restore waits for the xtables lock. The agent's loop must not stand still for longer than its
// heartbeat is due, a command at the beginning or the end may.
const (
	lockWait      = 1
	lockWaitAtEnd = 10
)

// errLocked: another program holds the xtables lock.
var errLocked = errors.New("another program holds the xtables lock (/run/xtables.lock), so that the rules stay as they are until it releases it")

// ownFailure reports whether an error is about this process or its machine, and does not mean that rules were externally modified.
func ownFailure(err error) bool {
	if err == nil {
		return false
	}
	if program.Says(err, syscall.EBUSY) { // of a chain that foreign rules lead to
		return false
	}
	return errors.Is(err, errLocked) || errors.Is(err, exec.ErrNotFound) || errors.Is(err, context.Canceled) ||
		program.Transient(err) || program.Says(err, syscall.EPERM, syscall.EACCES)
}

// restore runs iptables-restore, which makes one transaction of each table in the input, in order.
func (f *chains) restore(ctx context.Context, wait int, input string, flags ...string) error {
	if input == "" {
		return nil
	}
	args := append([]string{"--noflush", "--wait", fmt.Sprint(wait)}, flags...)
	_, err := program.Output(ctx, f.timeout, input, f.command+"-restore", args...)
	return locked(err)
}

// locked is errLocked where iptables says so in err, else err.
func locked(err error) error {
	if err != nil && strings.Contains(err.Error(), "holding the xtables lock") {
		return errLocked
	}
	return err
}
