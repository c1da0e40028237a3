package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Uninstall is how an agent is taken out of its node; the zero value is: never.
type Uninstall struct {
	// Wanted waits until the agent is to leave nothing behind, and returns true then; false when ctx has ended before.
	Wanted func(ctx context.Context) bool
	// Rules takes all rules of this agent out of the kernel, whichever backend they are of.
	Rules func(ctx context.Context) error
}

const (
	// installerTimeout bounds the wait for the installer to take the agent's key out of the CNI configuration. A
	// pod that is added meanwhile may still be recorded.
	installerTimeout = 15 * time.Second
	// leaveTimeout bounds all of it, should SIGTERM have come already: kubelet kills after 30 s.
	leaveTimeout = 25 * time.Second
	leaveRetry   = 100 * time.Millisecond
)

// errUninstall is the cause of the end of an agent that is to leave.
var errUninstall = errors.New("to be uninstalled")

// leave takes out what the agent has put on the node: after the installer has done so, what is in the kernel, and the files. It holds the
// agent's name until then. Where something stays in the kernel, so do the files, and the next attempt knows of it.
func (a *agent) leave(ctx context.Context, lock *runtimedir.Lock) error {
	a.Log.Info("our DaemonSet was deleted: taking out rules and files", "name", a.config.Name)
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	if !a.installerLeft(bounded) {
		a.Log.Warn("the installer has not finished; the entry may still be in the CNI configuration", "waited", installerTimeout)
	}
	if err := a.takeOut(bounded); err != nil {
		return fmt.Errorf("not uninstalled: %w; to try again, run as root on the node: magic-ip-agent uninstall --name %s", err, a.config.Name)
	}
	if err := a.own.Leave(); err != nil {
		return err
	}
	if err := lock.Close(); err != nil {
		return err
	}
	a.Log.Info("uninstalled; waiting to be stopped")
	<-ctx.Done() // a container of a DaemonSet that ends is started again, and would put all of it back
	return nil
}

// installerLeft waits for the installer of this agent.
func (a *agent) installerLeft(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, installerTimeout)
	defer cancel()
	for {
		if _, err := a.dir.Installer(a.config.Name).ReadRecord(); errors.Is(err, fs.ErrNotExist) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(leaveRetry):
		}
	}
}

// takeOut takes out of the kernel what this agent has put there, and tries again until ctx ends. The rules are first: without them nothing
// translates any more.
func (a *agent) takeOut(ctx context.Context) error {
	err := a.untilDone(ctx, func() error {
		if err := a.Uninstall.Rules(ctx); err != nil {
			return fmt.Errorf("the rules are still there: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	var stays error // what the files of the agent are needed for
	err = a.untilDone(ctx, func() error {
		stays = a.endNetwork()
		return errors.Join(stays, a.endFlows(ctx))
	})
	if stays == nil && err != nil {
		a.Log.Warn("going on without that", "error", err)
	}
	return stays
}

// untilDone calls remove until it succeeds or ctx ends, and returns its last error.
func (a *agent) untilDone(ctx context.Context, remove func() error) error {
	logged := ""
	for {
		err := remove()
		if err == nil {
			return nil
		}
		if text := err.Error(); text != logged {
			a.Log.Error("cannot be taken out yet; it is tried again", "error", err)
			logged = text
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * leaveRetry):
		}
	}
}

// endNetwork switches hairpin mode off where this agent has switched it on, and removes the local routes that no other agent wants.
func (a *agent) endNetwork() error {
	if a.readNetwork(true); a.sources.networkErr != nil {
		return fmt.Errorf("local routes and hairpin mode stay, as the node's network cannot be read: %w", a.sources.networkErr)
	}
	return errors.Join(a.endHairpins(), a.endRoutes())
}

func (a *agent) endHairpins() error {
	var errs []error
	a.kernel.hairpins = slices.DeleteFunc(a.kernel.hairpins, func(port int) bool {
		err := a.Node.SetHairpin(port, false)
		errs = append(errs, err)
		return err == nil
	})
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("hairpin mode stays on, which has no effect on other traffic than a pod's to itself: %w", err)
	}
	return nil
}

func (a *agent) endRoutes() error {
	const consequence = "local routes stay: pods are refused at these addresses"
	if a.readOthers(); len(a.sources.othersErrs) > 0 {
		unread := a.sources.othersErrs[0] // that agent may want any of them
		return fmt.Errorf("%s: %s: %w", consequence, unread.about, unread.err)
	}
	a.kernel.routeErrs = nil
	a.kernel.removeRoutes(a.sources.snapshot.LocalRoutes, map[netip.Addr]bool{})
	if err := a.kernel.routeErr(); err != nil {
		return fmt.Errorf("%s: %w", consequence, err)
	}
	return nil
}

// endFlows deletes the flows that the rules have translated: a datagram must not find its old way for as long as its client keeps the flow
// alive. Established connections and associations may finish.
func (a *agent) endFlows(ctx context.Context) error {
	k := &a.kernel
	none, change := &plan.Plan{}, plan.Change{Removed: k.restored} // which sandboxes are live is not known
	if k.applied != nil {
		none = &plan.Plan{Sandboxes: k.applied.Sandboxes, HostAddresses: k.applied.HostAddresses, Synced: k.applied.Synced}
		change = none.Since(k.applied).Plus(k.due)
	}
	if change.Empty() {
		return nil
	}
	if _, err := a.Flows.Sweep(ctx, none, change); err != nil {
		return fmt.Errorf("flows that the rules translated are still there: a UDP client that goes on sending reaches the endpoint of before: %w", err)
	}
	k.applied, k.restored = nil, nil
	return nil
}
