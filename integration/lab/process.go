package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
)

// Process is a program that runs in a node until it is told to stop or the node is closed.
type Process struct {
	name   string
	cmd    *exec.Cmd
	log    logBuffer
	killed atomic.Bool
	exited chan struct{}
	err    error // of the process, once exited is closed
}

// Start starts a program of the machine inside the node.
func (n *Node) Start(name string, args ...string) (*Process, error) {
	if filepath.IsAbs(name) {
		if err := present(name); err != nil {
			return nil, err
		}
	}
	p := &Process{name: filepath.Base(name), exited: make(chan struct{})}
	p.cmd = n.Command(context.Background(), name, args...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// Stop sends SIGTERM and waits for the end of the process, whose failure it returns.
func (p *Process) Stop(ctx context.Context) error {
	select {
	case <-p.exited:
		return p.exitError()
	default:
	}
	if err := signal(p.cmd.Process, syscall.SIGTERM); err != nil {
		return fmt.Errorf("lab: stopping %s: %w", p.name, err)
	}
	select {
	case <-p.exited:
		return p.exitError()
	case <-ctx.Done():
		return fmt.Errorf("lab: %s did not stop: %w\n%s", p.name, context.Cause(ctx), p.Log())
	}
}

// Kill ends the process at once, as a crash would. A later Stop finds nothing wrong with that.
func (p *Process) Kill() {
	p.killed.Store(true)
	_ = signal(p.cmd.Process, syscall.SIGKILL)
	_ = p.cmd.Process.Signal(syscall.SIGCONT)
	<-p.exited
}

// Freeze stops the process where it is, with all of its connections open; Thaw lets it go on.
func (p *Process) Freeze() error { return signal(p.cmd.Process, syscall.SIGSTOP) }

// Thaw lets a frozen process go on; and nsenter, which stops itself when its child is stopped.
func (p *Process) Thaw() error {
	return errors.Join(signal(p.cmd.Process, syscall.SIGCONT), p.cmd.Process.Signal(syscall.SIGCONT))
}

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Log is what the process has printed so far.
func (p *Process) Log() string { return p.log.String() }

func (p *Process) exitError() error {
	if p.err != nil && !p.killed.Load() {
		return fmt.Errorf("lab: %s: %w\n%s", p.name, p.err, p.Log())
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
