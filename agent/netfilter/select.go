package netfilter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// Backend names, as in --backend. Auto takes nftables where it can be used, else iptables.
const (
	Auto            = "auto"
	BackendNFTables = "nftables"
	BackendIPTables = "iptables"
)

// Selected is the backend to use. Once its rules are in place for the first time, it removes those that
// the agent of this name has left behind in any other kind of table.
type Selected struct {
	backend
	// Reason is why it is this one, in a few words for people; empty where nothing was to be decided.
	Reason string
	// Fallback is why it is not nftables although it might be; empty where that was not wanted, or is.
	Fallback  string
	leftovers []leftover
}

type backend interface {
	Name() string
	Sync(ctx context.Context, p *plan.Plan) error
	Verify(ctx context.Context) (differs []string, err error)
	Remove(ctx context.Context) error
}

// leftover is a backend that is not in use.
type leftover interface {
	backend
	// exists says whether any rule of it is there. Where that cannot be told, its tools or its part of
	// the kernel are missing, and so are its rules.
	exists(ctx context.Context) bool
}

// Select makes the backend of this name for the agent called agentName. Trial loads decide what can be used.
func Select(ctx context.Context, name, agentName string) (*Selected, error) {
	if name != Auto && name != BackendNFTables && name != BackendIPTables {
		return nil, fmt.Errorf("backend %q is not allowed; allowed: %s, %s, %s", name, Auto, BackendNFTables, BackendIPTables)
	}
	var unusable error
	if name != BackendIPTables {
		nft, err := NewNFTables(ctx, agentName)
		if err == nil {
			return &Selected{backend: nft, leftovers: otherIPTables(agentName, nil)}, nil
		}
		if name == BackendNFTables {
			return nil, fmt.Errorf("backend nftables: %w", err)
		}
		unusable = err
	}
	ipt, err := NewIPTables(ctx, agentName)
	if err != nil {
		if unusable != nil {
			return nil, fmt.Errorf("neither backend can be used on this node: nftables: %w; iptables: %w", unusable, err)
		}
		return nil, fmt.Errorf("backend iptables: %w", err)
	}
	s := &Selected{backend: ipt, Reason: ipt.version + ", " + ipt.variant.reason, leftovers: otherIPTables(agentName, &ipt.variant)}
	if unusable != nil {
		s.Fallback = fmt.Sprintf("nftables cannot be used: %v", unusable)
		s.Reason += "; " + s.Fallback
	}
	if nft, err := newNFTables(agentName); err == nil {
		s.leftovers = append(s.leftovers, nft)
	}
	return s, nil
}

// Sync brings the kernel to the plan, and then removes leftovers: a LeftoverError where only that has failed.
func (s *Selected) Sync(ctx context.Context, p *plan.Plan) error {
	if err := s.backend.Sync(ctx, p); err != nil {
		return err
	}
	if err := s.removeLeftovers(ctx); err != nil {
		return &LeftoverError{err}
	}
	s.leftovers = nil
	return nil
}

// LeftoverError says that rules of another backend are still there, beside those that were wanted.
type LeftoverError struct{ err error }

func (e *LeftoverError) Error() string { return e.err.Error() }
func (e *LeftoverError) Unwrap() error { return e.err }

// InPlace says that the rules of the plan are in the kernel.
func (e *LeftoverError) InPlace() bool { return true }

// Watch calls changed whenever the kernel tells that somebody has changed our rules, until ctx ends. It
// tells that of nftables only; the rules of iptables are looked at with every poll.
func (s *Selected) Watch(ctx context.Context, changed func()) error {
	if nft, ok := s.backend.(*NFTables); ok {
		return watchTable(ctx, nft.tables[0].name, changed)
	}
	<-ctx.Done()
	return nil
}

// Remove takes the rules of the agent out, whichever backend they are of.
func (s *Selected) Remove(ctx context.Context) error {
	return errors.Join(s.backend.Remove(ctx), s.removeLeftovers(ctx))
}

func (s *Selected) removeLeftovers(ctx context.Context) error {
	var err error
	for _, other := range s.leftovers {
		if !other.exists(ctx) {
			continue
		}
		if removeErr := other.Remove(ctx); removeErr != nil {
			err = errors.Join(err, fmt.Errorf("rules left behind by backend %s: %w", other.Name(), removeErr))
		}
	}
	return err
}

// otherIPTables are the kinds of iptables that are not in use: one for each kind.
func otherIPTables(agentName string, inUse *variant) []leftover {
	var others []leftover
	seen := map[bool]bool{}
	if inUse != nil {
		seen[inUse.legacy] = true
	}
	for _, v := range variants() {
		if !seen[v.legacy] {
			seen[v.legacy] = true
			others = append(others, newIPTables(agentName, v))
		}
	}
	return others
}

func (n *NFTables) exists(ctx context.Context) bool {
	return slices.ContainsFunc(n.tables, func(t *table) bool {
		listed, err := t.list(ctx)
		return err == nil && listed.exists
	})
}

func (i *IPTables) exists(ctx context.Context) bool {
	for _, f := range i.families {
		for _, table := range []string{"nat", "filter", "mangle"} {
			if there, err := f.list(ctx, table); err == nil && !there.empty(f.prefix) {
				return true
			}
		}
	}
	return false
}
