package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// table is one family's table and what we believe is in it.
type table struct {
	family     plan.Family
	name       string
	nft        knftables.Interface
	generation func() (uint32, error)
	list       func(context.Context) (*listing, error)
	// elements does changes without nft; nil where there is no kernel.
	elements func([]setChange) error

	known bool       // false until the first sync, and after a failed one
	plan  *plan.Plan // nil: no table
	// structure is how nft lists our chains and sets; seen, the generation at which the table was
	// last known to be as wanted.
	structure string
	seen      uint32
	siblings  []*table // all tables of the backend, this one included
	// mended: a sync has found the table changed by somebody else and loaded it anew. Verify has yet to say so.
	mended bool
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
	case t.known && t.plan != nil && sameChains(p, t.plan, t.family):
		if changes := changes(t.plan, p, t.family); len(changes) > 0 {
			before, err := t.generation()
			if err != nil {
				return err
			}
			if err := t.change(ctx, changes); err != nil {
				// Somebody has changed the table since we looked: put all of it in place.
				t.known, t.mended = false, true
				return t.apply(ctx, p)
			}
			t.advance(before, 1)
		}
	default:
		rules := render(p, t.family)
		if err := t.loadAndRemember(ctx, &rules); err != nil {
			return err
		}
	}
	t.known, t.plan = true, p
	return nil
}

// change does these changes in one transaction: by netlink, and where the kernel does not take that, by nft.
func (t *table) change(ctx context.Context, changes []setChange) error {
	var err error
	if t.elements != nil {
		if err = t.elements(changes); err == nil {
			return nil
		}
	}
	tx := t.nft.NewTransaction()
	writeChanges(tx, changes)
	if errNFT := t.nft.Run(ctx, tx); errNFT != nil {
		return errors.Join(err, errNFT)
	}
	return nil
}

// advance says that so many transactions of ours followed the generation before. A table that was as wanted by
// then still is; at the others somebody else has been at work, so they are looked at next time.
func (t *table) advance(before, transactions uint32) {
	for _, sibling := range t.siblings {
		if sibling.seen == before {
			sibling.seen += transactions
		}
	}
}

// loadAndRemember puts all of wanted in place of whatever is there, and takes down how nft lists the structure
// of it, to compare with later. It is not to take down what somebody else has changed in between: then it begins
// again.
func (t *table) loadAndRemember(ctx context.Context, wanted *ruleset) error {
	for range 5 {
		before, err := t.generation()
		if err != nil {
			return err
		}
		transactions, err := t.load(ctx, wanted)
		if err != nil {
			return err
		}
		listed, err := t.list(ctx)
		if err != nil {
			return err
		}
		after, err := t.generation()
		if err != nil {
			return err
		}
		if after != before+transactions {
			continue
		}
		if missing := listed.compare(wanted, listed.structure); len(missing) > 0 {
			return fmt.Errorf("not as loaded: %s", strings.Join(missing, "; "))
		}
		t.advance(before, transactions)
		t.structure, t.seen = listed.structure, after
		return nil
	}
	// Rules change all the time here; the next verify has ours loaded anew.
	t.structure, t.seen = "", 0
	return nil
}

// load puts all of wanted in place of whatever is there, in so many transactions.
func (t *table) load(ctx context.Context, wanted *ruleset) (transactions uint32, err error) {
	there, err := t.list(ctx)
	if err != nil {
		return 0, err
	}
	tx := t.nft.NewTransaction()
	wanted.write(tx, comment)
	if err := t.nft.Run(ctx, tx); err != nil {
		// Another version may have made a set of the same name with another type. Then it has to be the
		// hard way, which can reject a packet that is just on its way.
		if !there.exists || t.remove(ctx) != nil || t.nft.Run(ctx, tx) != nil {
			return 0, err
		}
		return 2, nil
	}
	tx = t.nft.NewTransaction()
	wanted.tidy(tx, there.objects)
	if tx.NumOperations() == 0 {
		return 1, nil
	}
	return 2, t.nft.Run(ctx, tx)
}

// verify looks at the table where anybody has changed any rule since it was last seen as wanted, and
// says what differs.
func (t *table) verify(ctx context.Context) ([]string, error) {
	if t.mended {
		t.mended = false
		return []string{fmt.Sprintf("table %s %s: found out when an endpoint changed", t.family, t.name)}, nil
	}
	if !t.known {
		return nil, nil
	}
	now, err := t.generation()
	if err != nil || now == t.seen {
		return nil, err
	}
	listed, err := t.list(ctx)
	if err != nil {
		return nil, err
	}
	var differs []string
	switch {
	case t.plan == nil && !listed.exists:
	case t.plan == nil:
		differs = []string{"a table that is not wanted any more"}
	case !listed.exists:
		differs = []string{"the whole table"}
	default:
		rules := render(t.plan, t.family)
		differs = listed.compare(&rules, t.structure)
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

func (t *table) remove(ctx context.Context) error {
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	if err := t.nft.Run(ctx, tx); err != nil {
		return err
	}
	t.known, t.plan, t.seen = true, nil, 0
	return nil
}

// listTable asks nft for one table.
func listTable(ctx context.Context, family plan.Family, name string) (*listing, error) {
	command := exec.CommandContext(ctx, "nft", "--json", "list", "table", string(family), name)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		if strings.Contains(stderr.String(), "No such file or directory") {
			return &listing{}, nil
		}
		return nil, fmt.Errorf("%s: %w: %s", command, err, strings.TrimSpace(stderr.String()))
	}
	return parseListing(out)
}
