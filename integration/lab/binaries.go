package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Binaries are the programs that run in a node, by absolute path. What is empty is taken from bin/ of
// the module that the working directory is in, where `make build tools` puts them; the agent from the
// environment variable MAGIC_IP_AGENT first, where `make test` names one built with the race detector.
type Binaries struct {
	Plugin  string // magic-ip-address
	Agent   string // magic-ip-agent
	CNITool string
	CNIDir  string // the folder of the upstream plugins
}

func (b Binaries) resolve() (Binaries, error) {
	root, err := ModuleRoot()
	if err != nil {
		return b, err
	}
	fill := func(path *string, name string) {
		if *path == "" {
			*path = filepath.Join(root, "bin", name)
		}
	}
	if b.Agent == "" {
		b.Agent = os.Getenv("MAGIC_IP_AGENT")
	}
	fill(&b.Agent, "magic-ip-agent")
	fill(&b.Plugin, "magic-ip-address")
	fill(&b.CNITool, "cnitool")
	fill(&b.CNIDir, "cni")
	return b, nil
}

// present returns an error that says how to make path where it is missing. It is asked when a program
// is first needed: a node without an agent is of use too.
func present(path string) error {
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("lab: %w: run `make build tools`", err)
	}
	return nil
}

// ModuleRoot is the folder of the go.mod above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("lab: no go.mod above the working directory: run this inside the repository")
		}
		dir = filepath.Dir(dir)
	}
}
