package agent

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
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

// leave takes out what the agent has put on the node: after the installer has done so, the rules, the flows that
// they have translated, and the files. It holds the agent's name until then.
func (a *agent) leave(ctx context.Context, lock *runtimedir.Lock) error {
	a.Log.Info("our DaemonSet was deleted: taking out rules and files", "name", a.config.Name)
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	if !a.installerLeft(bounded) {
		a.Log.Warn("the installer has not finished; the entry may still be in the CNI configuration", "waited", installerTimeout)
	}
	if err := a.removeRules(bounded); err != nil {
		return err
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

// endRoutes removes the local routes that no other agent wants.
func (a *agent) endRoutes() {
	a.readNetwork(true)
	a.readOthers()
	a.kernel.routeErrs = nil
	a.kernel.removeRoutes(a.sources.snapshot.LocalRoutes, map[netip.Addr]bool{})
	if err := a.kernel.routeErr(); err != nil {
		a.Log.Warn("local routes stay: pods are refused at these addresses", "error", err)
	}
}

func (a *agent) removeRules(ctx context.Context) error {
	for {
		err := a.Uninstall.Rules(ctx)
		if err == nil {
			break
		}
		a.Log.Error("the rules are still there", "error", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * leaveRetry):
		}
	}
	a.kernel.endHairpins()
	a.endRoutes()
	applied := a.kernel.applied
	if applied == nil {
		return nil
	}
	// A datagram must not find its old way for as long as its client keeps the flow alive. Established TCP may finish.
	none := &plan.Plan{Sandboxes: applied.Sandboxes, HostAddresses: applied.HostAddresses, Synced: applied.Synced}
	if _, err := a.Flows.Sweep(ctx, none, none.Since(applied).Plus(a.kernel.due)); err != nil {
		a.Log.Warn("flows that the rules translated are still there: a UDP client that goes on sending reaches the endpoint of before", "error", err)
	}
	return nil
}
