package nftables

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"

	"sigs.k8s.io/knftables"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Fake is the nftables backend over tables in memory, for tests of what is decided above it: the real
// rules, loaded by the real code into knftables' model of nft.
type Fake struct {
	*Backend
	tables []*fakeTable
}

// NewFake makes a backend whose kernel is empty.
func NewFake(agentName string) *Fake {
	fake := &Fake{Backend: &Backend{}}
	for _, family := range plan.Families() {
		name := TablePrefix + agentName
		t := &fakeTable{Fake: knftables.NewFake(knftables.Family(family), name)}
		fake.tables = append(fake.tables, t)
		fake.Backend.tables = append(fake.Backend.tables, &table{
			family: family, name: name, nft: t, list: t.list,
			generation: func() (uint32, error) { return t.generation.Load(), nil },
		})
	}
	for _, t := range fake.Backend.tables {
		t.siblings = fake.Backend.tables
	}
	return fake
}

// Transactions is how many transactions have been run so far.
func (f *Fake) Transactions() int {
	sum := 0
	for _, t := range f.tables {
		sum += int(t.generation.Load())
	}
	return sum
}

// Dump is all that is in the tables, as nft commands.
func (f *Fake) Dump() string {
	var dump strings.Builder
	for _, t := range f.tables {
		dump.WriteString(t.Dump())
	}
	return dump.String()
}

// Flush is what `nft flush ruleset` does.
func (f *Fake) Flush() error {
	var err error
	for _, t := range f.tables {
		tx := t.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		err = errors.Join(err, t.Run(context.Background(), tx))
	}
	return err
}

type fakeTable struct {
	*knftables.Fake
	generation atomic.Uint32
}

func (t *fakeTable) Run(ctx context.Context, tx *knftables.Transaction) error {
	err := t.Fake.Run(ctx, tx)
	if err == nil {
		t.generation.Add(1)
	}
	return err
}

func (t *fakeTable) list(context.Context) (*listing, error) {
	if t.Table == nil {
		return &listing{}, nil
	}
	l := &listing{exists: true, elements: map[string]map[string]string{}}
	add := func(name string, elements []*knftables.Element) {
		l.elements[name] = map[string]string{}
		for _, element := range elements {
			key := strings.ReplaceAll(concat(element.Key...), `"`, "")
			l.elements[name][key] = concat(element.Value...)
		}
	}
	for name := range t.Table.Chains {
		l.objects = append(l.objects, object{"chain", name})
	}
	for name, set := range t.Table.Sets {
		l.objects = append(l.objects, object{"set", name})
		add(name, set.Elements)
	}
	for name, m := range t.Table.Maps {
		l.objects = append(l.objects, object{"map", name})
		add(name, m.Elements)
	}
	for line := range strings.Lines(t.Dump()) {
		if !strings.HasPrefix(line, "add element ") {
			l.structure += line
		}
	}
	return l, nil
}
