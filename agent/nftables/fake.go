package nftables

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"time"

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
		t := &fakeTable{added: map[string]time.Time{}, Fake: knftables.NewFake(knftables.Family(family), name)}
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

// Exists reports whether any of the tables is there.
func (f *Fake) Exists(context.Context) (bool, error) {
	return slices.ContainsFunc(f.tables, func(t *fakeTable) bool { return t.Table != nil }), nil
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
		if t.Table != nil {
			t.expire()
		}
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
	added      map[string]time.Time // elements with a timeout
	generation atomic.Uint32
}

func (t *fakeTable) Run(ctx context.Context, tx *knftables.Transaction) error {
	err := t.Fake.Run(ctx, tx)
	if err == nil {
		t.generation.Add(1)
		if t.Table != nil {
			t.expire()
		}
	}
	return err
}

func (t *fakeTable) list(known []set) (*listing, error) {
	l := &listing{structure: map[string]string{}, rules: map[string]int{}, elements: map[string]map[string]string{}}
	if t.Table == nil {
		return l, nil
	}
	t.expire()
	l.exists = true
	for _, s := range known {
		l.elements[s.name] = map[string]string{}
	}
	add := func(name string, elements []*knftables.Element) {
		for _, element := range elements {
			if all, ok := l.elements[name]; ok {
				key, _, _ := strings.Cut(strings.ReplaceAll(concat(element.Key...), `"`, ""), timeoutWord)
				all[key] = concat(element.Value...)
			}
		}
	}
	for name, c := range t.Table.Chains {
		l.objects = append(l.objects, object{"chain", name})
		l.structure["chain "+name] = ""
		l.rules[name] = len(c.Rules)
		for _, rule := range c.Rules {
			l.structure["rules "+name] += rule.Rule + "\n"
		}
	}
	for name, set := range t.Table.Sets {
		l.objects = append(l.objects, object{"set", name})
		l.structure["set "+name] = set.Type
		add(name, set.Elements)
	}
	for name, m := range t.Table.Maps {
		l.objects = append(l.objects, object{"map", name})
		l.structure["map "+name] = m.Type
		add(name, m.Elements)
	}
	return l, nil
}

// expire removes the elements whose time is over, as the kernel does.
func (t *fakeTable) expire() {
	for name, s := range t.Table.Sets {
		s.Elements = slices.DeleteFunc(s.Elements, func(e *knftables.Element) bool {
			_, timeout, has := strings.Cut(concat(e.Key...), timeoutWord)
			duration, err := time.ParseDuration(timeout)
			if !has || err != nil {
				return false
			}
			key := name + concat(e.Key...)
			since, known := t.added[key]
			switch {
			case !known:
				t.added[key] = time.Now()
			case time.Since(since) >= duration:
				delete(t.added, key)
				return true
			}
			return false
		})
	}
}
