package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
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
	file   string // that it logs to instead
	killed atomic.Bool
	exited chan struct{}
	err    error // of the process, once exited is closed
}

// Start starts a program of the machine inside the node.
func (n *Node) Start(name string, args ...string) (*Process, error) {
	p := &Process{}
	return p, n.start(p, &p.log, name, args)
}

// StartLogging is Start for a program whose log is appended to a file of the machine.
func (n *Node) StartLogging(file, name string, args ...string) (*Process, error) {
	log, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	p := &Process{file: file}
	return p, n.start(p, log, name, args)
}

func (n *Node) start(p *Process, log io.Writer, name string, args []string) error {
	if filepath.IsAbs(name) {
		if err := present(name); err != nil {
			return err
		}
	}
	p.name, p.exited = filepath.Base(name), make(chan struct{})
	p.cmd = n.Command(context.Background(), name, args...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return nil
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

// Log is what the process has printed so far; all that is in its file, where it has one.
func (p *Process) Log() string {
	if p.file == "" {
		return p.log.String()
	}
	data, err := os.ReadFile(p.file)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

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
