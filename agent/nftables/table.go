package nftables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// table is one family's table and what it is believed to hold.
type table struct {
	family     plan.Family
	name       string
	nft        knftables.Interface
	generation func() (uint32, error)
	// list reads the table, with the elements of these sets.
	list func(known []set) (*listing, error)
	// elements changes sets without nft, counters reads what one counts; nil where there is no kernel.
	elements func([]setChange) error
	counters func(set) ([]element, error)

	known bool       // false until the first sync, and after a failed one
	plan  *plan.Plan // nil: no table
	// structure is how the kernel encodes chains, rules and sets; seen, the generation at which the table was
	// last known to be as wanted.
	structure map[string]string
	seen      uint32
	siblings  []*table // all tables of the backend, this one included
	// restored is why a sync has loaded the table again: it was externally modified. Verify has yet to report it.
	restored error
	// counted is what elements had counted that have since been replaced.
	counted map[plan.Frontend]plan.Count
	// degraded is why elements cannot be changed by netlink, although nft can change them; nil while they can.
	degraded error
}

func (t *table) sync(ctx context.Context, p *plan.Plan) error {
	if !p.Has(t.family) {
		p = nil
	}
	if err := t.apply(ctx, p); err != nil {
		t.known = false
		return fmt.Errorf("nftables table %s %s: %w", t.family, t.name, err)
	}
	return nil
}

// apply brings the table to p; nil is no table at all.
func (t *table) apply(ctx context.Context, p *plan.Plan) error {
	switch {
	case p == nil:
		if t.known && t.plan == nil {
			return nil
		}
		if err := t.remove(ctx); err != nil {
			return err
		}
	case t.known && t.plan != nil:
		if d := changes(t.plan, p, t.family); !d.empty() {
			err := t.change(ctx, d)
			if externallyModified(err) {
				t.known = false
				if errLoad := t.loadAndRemember(ctx, p); errLoad != nil {
					return errors.Join(err, errLoad)
				}
				t.restored, err = err, nil
			}
			if err != nil {
				return err
			}
		}
	default:
		if err := t.loadAndRemember(ctx, p); err != nil {
			return err
		}
	}
	t.known, t.plan = true, p
	return nil
}

// externallyModified reports whether an error means that the table is not as it was loaded: an object that should be there is
// missing, or the opposite. Anything else (no memory, no permission, no answer) is a failure of our own.
func externallyModified(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) || knftables.IsNotFound(err) || knftables.IsAlreadyExists(err)
}

// errInterrupted: what a table lacks by its listings may be there all the same.
var errInterrupted = errors.New("rules of the node change so often that the table cannot be listed")

// listAgain lists a table again, up to five times, while a change has interrupted the listing, be it one of another table, and not all that
// is looked for is in it.
func listAgain(list func() (*listing, error), complete func(*listing) bool) (*listing, error) {
	for attempt := 1; ; attempt++ {
		listed, err := list()
		if err != nil || !listed.interrupted || complete(listed) || attempt == 5 {
			return listed, err
		}
	}
}

// change does d in one transaction: by netlink where only elements change, and by nft where netlink fails or chains change.
func (t *table) change(ctx context.Context, d diff) error {
	before, errGeneration := t.generation()
	kept := t.keptCounts(&d)
	byNFT := t.elements == nil || len(d.chains)+len(d.gone) > 0
	var errNetlink error
	if !byNFT {
		if errNetlink = t.elements(d.sets); externallyModified(errNetlink) {
			return errNetlink
		}
		if errNetlink == nil {
			t.degraded = nil
		}
	}
	if byNFT || errNetlink != nil {
		tx := t.nft.NewTransaction()
		d.write(tx)
		if tx.NumOperations() > 0 {
			if err := t.nft.Run(ctx, tx); err != nil {
				return errors.Join(errNetlink, err)
			}
		}
		if errNetlink != nil {
			t.degraded = errNetlink
		}
	}
	t.counted = kept
	if len(d.chains)+len(d.gone) > 0 {
		if err := t.rememberChains(d); err != nil {
			return err
		}
	}
	if errGeneration == nil { // else the next verify lists the table
		t.advance(before, 1)
	}
	return nil
}

// rememberChains takes down how the kernel encodes chains that have just been changed.
func (t *table) rememberChains(d diff) error {
	wanted := ruleset{chains: d.chains}
	listed, err := listAgain(func() (*listing, error) { return t.list(nil) }, func(l *listing) bool { return len(l.lacks(&wanted)) == 0 })
	if err != nil {
		return err
	}
	for _, c := range d.gone {
		delete(t.structure, "chain "+c.name)
		delete(t.structure, "rules "+c.name)
	}
	if missing := listed.lacks(&wanted); len(missing) > 0 {
		err := fmt.Errorf("not as loaded: %s", strings.Join(missing, "; "))
		if listed.interrupted {
			return fmt.Errorf("%w: %w", errInterrupted, err)
		}
		return fmt.Errorf("%w: %w", err, unix.ENOENT)
	}
	for _, c := range d.chains {
		for _, kind := range []string{"chain ", "rules "} {
			t.structure[kind+c.name] = listed.structure[kind+c.name]
		}
	}
	return nil
}

// advance notes that so many transactions of ours followed the generation before. A table that was as wanted at that
// generation still is; the others have been externally modified since, so the next verify lists them.
func (t *table) advance(before, transactions uint32) {
	for _, sibling := range t.siblings {
		if sibling.seen == before {
			sibling.seen += transactions
		}
	}
}

// loadAndRemember puts all of p in place of whatever is there, and takes down how the kernel encodes the structure of it, to
// compare with later.
//
// The generation shows whether rules were externally modified meanwhile. Beside a busy writer it always does. The listing is then
// repeated, and the table not loaded again: two equal listings which have all that was loaded count.
func (t *table) loadAndRemember(ctx context.Context, p *plan.Plan) error {
	wanted := render(p, t.family)
	before, err := t.generation()
	if err != nil {
		return err
	}
	kept := t.keptCounts(nil)
	transactions, err := t.load(ctx, &wanted)
	if err != nil {
		return err
	}
	t.counted = kept
	unlisted := errors.New("the table is externally modified while it is loaded")
	var last *listing
	for range 5 {
		began, err := t.generation()
		if err != nil {
			return err
		}
		listed, err := t.list(wanted.sets)
		if err != nil {
			return err
		}
		if missing := append(listed.lacks(&wanted), listed.differs(&wanted, listed.structure)...); len(missing) > 0 {
			err := fmt.Errorf("not as loaded: %s", strings.Join(missing, "; "))
			if !listed.interrupted {
				return err
			}
			unlisted = fmt.Errorf("%w: %w", errInterrupted, err)
			continue
		}
		now, err := t.generation()
		if err != nil {
			return err
		}
		certain := now == before+transactions
		if certain || last != nil && maps.Equal(last.structure, listed.structure) {
			t.structure = listed.structure
			if certain {
				t.advance(before, transactions)
			}
			t.seen = began
			return nil
		}
		last = listed
	}
	return unlisted
}

// load puts all of wanted in place of whatever is there, in so many transactions.
func (t *table) load(ctx context.Context, wanted *ruleset) (transactions uint32, err error) {
	complete := func(*listing) bool { return false } // what it may lack would not be deleted
	there, err := listAgain(func() (*listing, error) { return t.list(nil) }, complete)
	if err != nil {
		return 0, err
	}
	tx := t.nft.NewTransaction()
	wanted.write(tx)
	if err := t.nft.Run(ctx, tx); err != nil {
		// Another version may have made a set of the same name with another type. Then the table has to be deleted first,
		// which can reject a packet that is just on its way. Where that fails too, the table stays as it is.
		if !there.exists || errors.Is(err, context.DeadlineExceeded) {
			return 0, err
		}
		anew := t.nft.NewTransaction()
		wanted.replace(anew)
		if t.nft.Run(ctx, anew) != nil {
			return 0, err
		}
		return 1, nil
	}
	tx = t.nft.NewTransaction()
	wanted.prune(tx, there.objects)
	if tx.NumOperations() == 0 {
		return 1, nil
	}
	return 2, t.nft.Run(ctx, tx)
}

// verify lists the table where anybody has changed any rule since it was last seen as wanted, and says what differs.
func (t *table) verify(ctx context.Context) ([]string, error) {
	if err := t.restored; err != nil {
		t.restored = nil
		return []string{fmt.Sprintf("table %s %s: found when an endpoint changed: %v", t.family, t.name, err)}, nil
	}
	if !t.known {
		return nil, nil
	}
	now, err := t.generation()
	if err != nil || now == t.seen {
		return nil, err
	}
	differs, err := t.look(ctx)
	if err != nil {
		return nil, err
	}
	if len(differs) == 0 {
		t.seen = now
		return nil, nil
	}
	t.known = false
	for i := range differs {
		differs[i] = fmt.Sprintf("table %s %s: %s", t.family, t.name, differs[i])
	}
	return differs, nil
}

// look says in which respects the table is not as wanted. What an interrupted listing lacks may be there all the same, so
// only what each of several says counts.
func (t *table) look(ctx context.Context) (differs []string, err error) {
	var sets []set
	var rules ruleset
	if t.plan != nil {
		rules = render(t.plan, t.family)
		sets = rules.sets
	}
	for attempt := range 3 {
		listed, err := t.list(sets)
		if err != nil {
			return nil, err
		}
		var found []string
		switch {
		case t.plan == nil && !listed.exists:
		case t.plan == nil:
			found = []string{"a table that is no longer wanted"}
		case !listed.exists:
			found = []string{"the whole table"}
		default:
			found = listed.differs(&rules, t.structure)
		}
		if attempt > 0 {
			found = slices.DeleteFunc(found, func(difference string) bool { return !slices.Contains(differs, difference) })
		}
		if differs = found; len(differs) == 0 || !listed.interrupted || ctx.Err() != nil {
			break
		}
	}
	return differs, nil
}

func (t *table) remove(ctx context.Context) error {
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := t.nft.Run(ctx, tx); err != nil {
		return err
	}
	t.known, t.plan, t.structure, t.seen = true, nil, nil, 0
	return nil
}
