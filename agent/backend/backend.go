// Package backend selects what an agent's rules are made with, and removes the rules that the other kinds have left behind.
//
// These ways to speak netfilter stay, each for one job:
//
//   - The nft command, started by knftables, loads the tables of package nftables: there rules are text.
//   - nftables netlink changes elements of sets without starting a process (google/nftables), and lists and watches tables
//     (mdlayher/netlink: google/nftables does not say when a change has interrupted a dump, nor which table the elements of an
//     event belong to).
//   - iptables-restore and iptables-save make and read the rules of package iptables, one transaction for each table.
//     coreos/go-iptables has no transactions: it finds the version.
//   - ctnetlink (vishvananda/netlink/nl) deletes flows in package conntrack. Its conntrack functions cannot have the kernel
//     filter a dump.
package backend

import (
	"context"
	"errors"
	"fmt"

	"github.com/magic-ip-address/magic-ip-address/agent/iptables"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/program"
)

// Names, as in --backend. Auto takes nftables where it can be used, else iptables.
const (
	Auto     = "auto"
	NFTables = nftables.Name
	IPTables = iptables.Name
)

// Selected is the backend to use. Once its rules are in place for the first time, it removes those that
// the agent of this name has left behind in any other kind of table.
type Selected struct {
	backend
	// Reason is why it is this one, in a few words for people; empty where nothing was to be decided.
	Reason string
	// NoZones is why UDP flows are not kept apart by zones of connection tracking; nil where they are.
	NoZones error
	// Fallback is why it is not nftables although it might be; empty where that was not wanted, or is.
	Fallback  string
	leftovers []backend
	// Unread is why it is not known whether another backend has left rules of this agent; empty where that is known. They stay then.
	Unread string
}

// Note is what people should know of the backend: why it is this one, and what it cannot do. Empty where there is nothing to say.
func (s *Selected) Note() string {
	if s.NoZones == nil {
		return s.Reason
	}
	note := "a datagram that the old server has not answered when a UDP flow moves is lost, since flows cannot be put into zones of connection tracking: " + s.NoZones.Error()
	if s.Reason != "" {
		return s.Reason + "; " + note
	}
	return note
}

type backend interface {
	Name() string
	Sync(ctx context.Context, p *plan.Plan) error
	Verify(ctx context.Context) (differs []string, err error)
	// Counts is how often each frontend was asked for since the agent started; nil where that is not counted.
	Counts() (map[plan.Frontend]plan.Count, error)
	// ModifiedBy names the processes that have changed the rules since Verify last found them as wanted, where the kernel said it.
	ModifiedBy() string
	Remove(ctx context.Context) error
	Exists(ctx context.Context) (bool, error)
}

// Select makes the backend of this name for the agent called agentName. Trial loads decide what can be used: one that fails for a reason
// that may pass is made again.
func Select(ctx context.Context, name, agentName string) (*Selected, error) {
	if name != Auto && name != NFTables && name != IPTables {
		return nil, fmt.Errorf("backend %q is not allowed; allowed: %s, %s, %s", name, Auto, NFTables, IPTables)
	}
	var noZones error
	var nft *nftables.Backend
	unusable := program.Retry(ctx, func() (err error) { nft, err = nftables.New(agentName); return err })
	var leftovers []backend
	if nft != nil {
		leftovers = append(leftovers, nft)
	}
	if name != IPTables {
		if unusable == nil {
			unusable = program.Retry(ctx, func() (err error) { noZones, err = nft.Trial(ctx); return err })
		}
		if unusable == nil {
			others, unread := otherIPTables(ctx, agentName, nil)
			return &Selected{backend: nft, NoZones: noZones, leftovers: others, Unread: unread}, nil
		}
		if name == NFTables {
			return nil, fmt.Errorf("backend nftables: %w", unusable)
		}
	}
	variant, err := iptables.InUse(ctx)
	if err == nil {
		ipt := iptables.New(agentName, variant)
		var version string
		if err = program.Retry(ctx, func() (err error) { version, noZones, err = ipt.Trial(ctx); return err }); err == nil {
			others, unread := otherIPTables(ctx, agentName, &variant)
			s := &Selected{backend: ipt, NoZones: noZones, Reason: version + ", " + variant.Reason, leftovers: append(others, leftovers...), Unread: unread}
			if name == Auto {
				s.Fallback = fmt.Sprintf("nftables cannot be used: %v", unusable)
				s.Reason += "; " + s.Fallback
			}
			return s, nil
		}
	}
	if name == Auto {
		return nil, fmt.Errorf("neither backend can be used on this node: nftables: %w; iptables: %w", unusable, err)
	}
	return nil, fmt.Errorf("backend iptables: %w", err)
}

// Sync brings the kernel to the plan, and then removes leftovers: a LeftoverError where only that has failed.
func (s *Selected) Sync(ctx context.Context, p *plan.Plan) error {
	err := s.backend.Sync(ctx, p)
	if degraded := new(nftables.DegradedError); err != nil && !errors.As(err, &degraded) {
		return err
	}
	// A sync gives up after a second where the xtables lock is held. Remove waits for longer.
	nothing := func(b backend) error { return b.Sync(ctx, &plan.Plan{}) }
	if err := s.removeLeftovers(ctx, nothing); err != nil {
		return &LeftoverError{err}
	}
	s.leftovers = nil
	return err
}

// LeftoverError says that rules of another backend are still there, beside those that were wanted.
type LeftoverError struct{ err error }

func (e *LeftoverError) Error() string { return e.err.Error() }
func (e *LeftoverError) Unwrap() error { return e.err }

// InPlace says that the rules of the plan are in the kernel.
func (e *LeftoverError) InPlace() bool { return true }

// Watch calls changed after each change of our rules, and whenever they may have changed unseen, until ctx ends. It reports errors, and
// goes on. The kernel reports only changes of nftables; Verify compares the rules of iptables.
func (s *Selected) Watch(ctx context.Context, changed func(), report func(error)) {
	if nft, ok := s.backend.(*nftables.Backend); ok {
		nft.Watch(ctx, changed, report)
	}
}

// Exists reports whether any rule of the agent is there, whichever backend it is of.
func (s *Selected) Exists(ctx context.Context) (bool, error) {
	var err error
	for _, b := range append([]backend{s.backend}, s.leftovers...) {
		exists, existsErr := b.Exists(ctx)
		if exists {
			return true, nil
		}
		err = errors.Join(err, existsErr)
	}
	return false, err
}

// Remove takes the rules of the agent out, whichever backend they are of.
func (s *Selected) Remove(ctx context.Context) error {
	return errors.Join(s.backend.Remove(ctx), s.removeLeftovers(ctx, func(b backend) error { return b.Remove(ctx) }))
}

func (s *Selected) removeLeftovers(ctx context.Context, remove func(backend) error) error {
	var err error
	for _, other := range s.leftovers {
		exists, otherErr := other.Exists(ctx)
		if exists {
			otherErr = remove(other)
		}
		if otherErr != nil {
			err = errors.Join(err, fmt.Errorf("rules left behind by backend %s: %w", other.Name(), otherErr))
		}
	}
	return err
}

// otherIPTables are the kinds of iptables that are not in use: one for each kind.
func otherIPTables(ctx context.Context, agentName string, inUse *iptables.Variant) (others []backend, unread string) {
	seen := map[bool]bool{}
	if inUse != nil {
		seen[inUse.Legacy] = true
	}
	for _, v := range iptables.Variants(ctx) {
		if seen[v.Legacy] {
			continue
		}
		seen[v.Legacy] = true
		if why := v.Unreadable(); why != "" {
			unread = why
			continue
		}
		others = append(others, iptables.New(agentName, v))
	}
	return others, unread
}

// Leftovers are the backends, other than the one in use, that have rules of an agent, by name. unread is why it is not known of one.
func Leftovers(ctx context.Context, inUse, agentName string) (names []string, unread string, err error) {
	var others []backend
	if inUse == NFTables {
		others, unread = otherIPTables(ctx, agentName, nil)
	} else if nft, err := nftables.New(agentName); err == nil {
		others = append(others, nft)
	} else {
		unread = err.Error()
	}
	for _, other := range others {
		exists, existsErr := other.Exists(ctx)
		if exists {
			names = append(names, other.Name())
		}
		err = errors.Join(err, existsErr)
	}
	return names, unread, err
}
