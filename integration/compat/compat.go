// Package compat has what tests have observed of the networks that pods may be in. Below results is a file for each row of the table in
// docs/compatibility.md and each test that stands for it; rows.yaml names the rows, and has those that were only read about. The table
// is written from both, and a test that observes something else than what is committed fails.
//
// With COMPATIBILITY=write in the environment, tests write what they observe instead.
package compat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The clients of Observed.Served.
const (
	Pod     = "pods"
	Process = "processes of the node"
	Itself  = "the endpoint itself"
)

// When clients are refused, and when nothing leaves the node.
const (
	NoEndpoint   = "without an endpoint"
	Traffic      = "traffic"
	Rollout      = "a rollout"
	AgentKilled  = "the agent killed"
	PlaneRestart = "the data plane restarted"
	RulesFlushed = "the rules flushed without an agent"
)

// What a server sees a pod as.
const (
	Client = "the client"
	Node   = "the node"
)

// Observed is what a test has seen. The tests of a row may see different things.
type Observed struct {
	// Served are the clients that the endpoint has answered, by TCP and UDP.
	Served []string `json:"served,omitempty"`
	// Seen is whose address the server has seen of a pod: Client or Node.
	Seen string `json:"seen,omitempty"`
	// Refused is when every client was refused at once.
	Refused []string `json:"refused,omitempty"`
	// StaysIn is when nothing about a magic IP was heard outside of the node.
	StaysIn []string `json:"staysIn,omitempty"`
	// Ingress and Egress are what network policies of servers and clients have let pass.
	Ingress string `json:"ingress,omitempty"`
	Egress  string `json:"egress,omitempty"`
	// Advice is the setting that doctor says avoids a price.
	Advice string `json:"advice,omitempty"`
}

// Row is a kind of network with a setting.
type Row struct {
	Name    string `yaml:"name"`
	Network string `yaml:"network"`
	Setting string `yaml:"setting"`
	// Tests have observed it; Simulated: with links and files like those of the product, but without it.
	Tests     []string `yaml:"tests"`
	Simulated bool     `yaml:"simulated"`
	// Links are tests of how its links are classified or detected.
	Links []string `yaml:"links"`
	// Documents are what is linked where there is no test, and for what the tests do not see.
	Documents []string `yaml:"documents"`
	// Works, Seen, Policies and Refused are from the documents, for what no test of the row has observed.
	Works    string `yaml:"works"`
	Seen     string `yaml:"seen"`
	Policies string `yaml:"policies"`
	Refused  string `yaml:"refused"`
	// Set is the setting with which it works, or works better.
	Set string `yaml:"set"`

	Observed Observed `yaml:"-"`
}

// Record compares what a test has observed of a row with what is committed.
func Record(t testing.TB, row string, got Observed) {
	t.Helper()
	test, _, _ := strings.Cut(t.Name(), "/")
	dir, err := dir()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "results", row, test+".json")
	for _, list := range [][]string{got.Served, got.Refused, got.StaysIn} {
		slices.Sort(list)
	}
	data, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, '\n')
	if os.Getenv("COMPATIBILITY") == "write" {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
			t.Fatal(err)
		}
		return
	}
	committed, err := os.ReadFile(file)
	if err != nil {
		t.Errorf("compatibility: nothing is committed for row %s: %v: run make compatibility", row, err)
	} else if !bytes.Equal(committed, data) {
		t.Errorf("compatibility of %s: observed\n%s\nand committed is\n%s\nIf that is right: make compatibility", row, data, committed)
	}
}

func dir() (string, error) {
	root, err := lab.ModuleRoot()
	return filepath.Join(root, "integration", "compat"), err
}

// Rows are all rows, in the order of rows.yaml. It is an error where a row and the results do not belong to each other.
func Rows() ([]Row, error) {
	dir, err := dir()
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(dir, "rows.yaml"))
	if err != nil {
		return nil, err
	}
	var rows []Row
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	decoder.KnownFields(true)
	if err := decoder.Decode(&rows); err != nil {
		return nil, fmt.Errorf("rows.yaml: %w", err)
	}
	unused := map[string]bool{}
	err = filepath.WalkDir(filepath.Join(dir, "results"), func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			unused[path] = true
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for i := range rows {
		r := &rows[i]
		for _, test := range r.Tests {
			file := filepath.Join(dir, "results", r.Name, test+".json")
			data, readErr := os.ReadFile(file)
			if readErr == nil {
				readErr = json.Unmarshal(data, &r.Observed) // what one test has not observed stays
			}
			err = errors.Join(err, readErr)
			delete(unused, file)
		}
		if len(r.Tests)+len(r.Documents) == 0 {
			err = errors.Join(err, fmt.Errorf("rows.yaml: %s %s has neither a test nor a document", r.Network, r.Setting))
		}
	}
	for file := range unused {
		err = errors.Join(err, fmt.Errorf("%s: no row of rows.yaml names it", file))
	}
	return rows, err
}
