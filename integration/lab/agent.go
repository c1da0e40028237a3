package lab

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
)

// Agent is an agent process of a node.
type Agent struct {
	cmd    *exec.Cmd
	log    logBuffer
	killed atomic.Bool
	exited chan struct{}
	err    error // of the process, once exited is closed
}

// StartAgent starts `magic-ip-agent run --no-api` with this configuration (YAML). Later flags override
// the ones given here. The process lives until it is told to stop or the node is closed.
func (n *Node) StartAgent(config []byte, flags ...string) (*Agent, error) {
	if err := present(n.binaries.Agent); err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.agents++
	file := fmt.Sprintf("/run/agent-%d.yaml", n.agents)
	n.mu.Unlock()
	if err := n.WriteFile(file, config); err != nil {
		return nil, err
	}

	args := []string{"run", "--no-api", "--config", file, "--node-name", n.Name, "--runtime-dir", RuntimeDir}
	agent := &Agent{exited: make(chan struct{})}
	agent.cmd = n.Command(context.Background(), n.binaries.Agent, append(args, flags...)...)
	agent.cmd.Stdout, agent.cmd.Stderr = &agent.log, &agent.log
	if err := agent.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		agent.err = agent.cmd.Wait()
		close(agent.exited)
	}()
	return agent, nil
}

// Stop sends SIGTERM and waits for the end of the process, whose failure it returns.
func (a *Agent) Stop(ctx context.Context) error {
	select {
	case <-a.exited:
		return a.exitError()
	default:
	}
	if err := signal(a.cmd.Process, syscall.SIGTERM); err != nil {
		return fmt.Errorf("lab: stopping the agent: %w", err)
	}
	select {
	case <-a.exited:
		return a.exitError()
	case <-ctx.Done():
		return fmt.Errorf("lab: the agent did not stop: %w\n%s", context.Cause(ctx), a.Log())
	}
}

// Kill ends the process at once, as a crash would. A later Stop finds nothing wrong with that.
func (a *Agent) Kill() {
	a.killed.Store(true)
	_ = signal(a.cmd.Process, syscall.SIGKILL)
	<-a.exited
}

// Exited is closed when the process has ended.
func (a *Agent) Exited() <-chan struct{} { return a.exited }

// Log is what the agent has printed so far.
func (a *Agent) Log() string { return a.log.String() }

func (a *Agent) exitError() error {
	if a.err != nil && !a.killed.Load() {
		return fmt.Errorf("lab: agent: %w\n%s", a.err, a.Log())
	}
	return nil
}

// logBuffer is a buffer that may be read while it is written.
type logBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

// RunAgent runs another command of the agent's binary inside the node and returns what it printed.
func (n *Node) RunAgent(ctx context.Context, args ...string) (string, error) {
	if err := present(n.binaries.Agent); err != nil {
		return "", err
	}
	return n.Run(ctx, n.binaries.Agent, args...)
}
