// Package netfilter brings a plan into the kernel: nftables rules, and the conntrack entries that
// outlive a change of rules.
package netfilter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// NFTables keeps the tables magic-ip-<agent name>, one per address family, and nothing else.
type NFTables struct {
	tables []*table
}

// NewNFTables checks by a trial load that nft and the kernel can do what the rules need.
func NewNFTables(ctx context.Context, agentName string) (*NFTables, error) {
	n, err := newNFTables(agentName)
	if err != nil {
		return nil, err
	}
	trial := plan.Build(plan.Input{Services: []plan.Service{{
		Frontend: plan.Frontend{Address: netip.AddrFrom4([4]byte{192, 0, 2, 1}), Protocol: plan.TCP, Port: 1}, WithoutEndpoint: plan.Refuse,
	}}})
	tx := n.tables[0].nft.NewTransaction()
	rules := render(&trial, knftables.IPv4Family)
	rules.write(tx, comment)
	if err := n.tables[0].nft.Check(ctx, tx); err != nil {
		return nil, fmt.Errorf("nft or the kernel cannot load the rules (Linux 5.9 and nft 1.0.1 are the least): %w", err)
	}
	return n, nil
}

func newNFTables(agentName string) (*NFTables, error) {
	n := &NFTables{}
	var socket elementSocket
	for _, family := range []knftables.Family{knftables.IPv4Family, knftables.IPv6Family} {
		name := tablePrefix + agentName
		nft, err := knftables.New(family, name)
		if err != nil {
			return nil, err
		}
		n.tables = append(n.tables, &table{
			family: family, name: name, nft: nft, generation: newGeneration(),
			list:     func(ctx context.Context) (*listing, error) { return listTable(ctx, family, name) },
			elements: func(changes []setChange) error { return socket.apply(family, name, changes) },
		})
	}
	for _, t := range n.tables {
		t.siblings = n.tables
	}
	return n, nil
}

// Name is the backend's name as in --backend.
func (n *NFTables) Name() string { return "nftables" }

// Sync brings the kernel to the plan: one transaction per family where the plan differs from what was
// loaded before, none where it does not.
func (n *NFTables) Sync(ctx context.Context, p *plan.Plan) error {
	var err error
	for _, t := range n.tables {
		err = errors.Join(err, t.sync(ctx, p))
	}
	return err
}

// Verify says what somebody else has changed in our tables since they were loaded. The next Sync then
// loads them anew. It costs one small netlink message where nobody has changed any rule on the node.
func (n *NFTables) Verify(ctx context.Context) ([]string, error) {
	var differs []string
	var err error
	for _, t := range n.tables {
		found, verifyErr := t.verify(ctx)
		differs, err = append(differs, found...), errors.Join(err, verifyErr)
	}
	return differs, err
}

// Remove takes our tables out.
func (n *NFTables) Remove(ctx context.Context) error {
	var err error
	for _, t := range n.tables {
		err = errors.Join(err, t.remove(ctx))
	}
	return err
}

// tablePrefix begins the name of every agent's tables.
const tablePrefix = "magic-ip-"

const comment = "rules of magic-ip-agent: changes made by hand are mended"

// table is one family's table and what we believe is in it.
type table struct {
	family     knftables.Family
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
	if !slices.ContainsFunc(p.Rules, func(r plan.Rule) bool { return familyOf(r.Address) == t.family }) {
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
		// hard way, which can refuse a packet that is just on its way.
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
func listTable(ctx context.Context, family knftables.Family, name string) (*listing, error) {
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
