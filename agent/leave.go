package agent

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/install"
)

// Uninstall is how an agent is taken out of its node; the zero value is: never.
type Uninstall struct {
	// Wanted waits until the agent is to leave nothing behind, and returns true then; false when ctx has ended before.
	Wanted func(ctx context.Context) bool
	// Rules takes all rules of this agent out of the kernel, whichever backend they are of.
	Rules func(ctx context.Context) error
}

const (
	// installerPatience is how long to wait for the installer to take the agent's key out of the CNI configuration. A
	// pod that is added meanwhile may still be recorded.
	installerPatience = 15 * time.Second
	// leaveTime bounds all of it, should SIGTERM have come already: kubelet kills after 30 s.
	leaveTime  = 25 * time.Second
	leaveRetry = 100 * time.Millisecond
)

// errUninstall is the cause of the end of an agent that is to leave.
var errUninstall = errors.New("to be uninstalled")

// awaitUninstall ends the agent when it is to leave. It is asked from the start, standing by included. The function
// returned says, once the agent's context has ended, whether that is so.
func (a *Agent) awaitUninstall(ctx context.Context, stop context.CancelCauseFunc) (wanted func() bool) {
	if a.Uninstall.Wanted == nil {
		return func() bool { return false }
	}
	leave := make(chan bool, 1)
	go func() {
		wanted := a.Uninstall.Wanted(ctx)
		if wanted {
			stop(errUninstall)
		}
		leave <- wanted
	}()
	return func() bool { return <-leave }
}

// leave takes out what the agent has put on the node: after the installer has done so, the rules, the flows that
// they have translated, and the files. It holds the agent's name until then.
func (a *Agent) leave(ctx context.Context, lock interface{ Close() error }) error {
	a.Log.Info("our DaemonSet was deleted: taking out rules and files", "name", a.config.Name)
	hurried, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
	defer cancel()
	if !a.installerLeft(hurried) {
		a.Log.Warn("the installer has not finished; the entry may still be in the CNI configuration", "waited", installerPatience)
	}
	if err := a.removeRules(hurried); err != nil {
		return err
	}
	if err := published.Leave(a.RuntimeDir, a.config.Name); err != nil {
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
func (a *Agent) installerLeft(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, installerPatience)
	defer cancel()
	for {
		if _, err := os.Stat(install.RecordPath(a.RuntimeDir, a.config.Name)); err != nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(leaveRetry):
		}
	}
}

func (a *Agent) removeRules(ctx context.Context) error {
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
	if a.applied == nil {
		return nil
	}
	// A datagram must not find its old way for as long as somebody keeps it alive. Established TCP may finish.
	none := &plan.Plan{Sandboxes: a.applied.Sandboxes, HostAddresses: a.applied.HostAddresses, Settled: a.applied.Settled}
	_, err := a.Flows.Sweep(ctx, none, none.Since(a.applied))
	a.note("conntrack", err)
	return nil
}
