package lab

import (
	"context"
	"fmt"
	"slices"
)

// Agent is an agent process of a node.
type Agent struct{ *Process }

// StartAgent starts `magic-ip-agent run` with this configuration (YAML); it does without the Kubernetes API
// unless --kubeconfig is among the flags. Later flags override the ones given here. The process lives until it is
// told to stop or the node is closed.
func (n *Node) StartAgent(config []byte, flags ...string) (*Agent, error) {
	n.mu.Lock()
	n.agents++
	file := fmt.Sprintf("/run/agent-%d.yaml", n.agents)
	n.mu.Unlock()
	if err := n.WriteFile(file, config); err != nil {
		return nil, err
	}
	args := []string{"run"}
	if !slices.Contains(flags, "--kubeconfig") {
		args = append(args, "--no-api")
	}
	args = append(args, "--config", file, "--node-name", n.Name, "--runtime-dir", RuntimeDir)
	command := append(slices.Concat(n.AgentPrefix, []string{n.binaries.Agent}, args), flags...)
	process, err := n.Start(command[0], command[1:]...)
	if err != nil {
		return nil, err
	}
	return &Agent{process}, nil
}

// RunAgent runs another command of the agent's binary inside the node and returns what it printed.
func (n *Node) RunAgent(ctx context.Context, args ...string) (string, error) {
	if err := present(n.binaries.Agent); err != nil {
		return "", err
	}
	return n.Run(ctx, n.binaries.Agent, args...)
}

// StartCommand starts another command of the agent's binary inside the node.
func (n *Node) StartCommand(args ...string) (*Process, error) {
	return n.Start(n.binaries.Agent, args...)
}
