package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/install"
)

// Status is what a node's agents have published, and whether they live.
type Status struct {
	Agents []NodeAgent `json:"agents"`
}

// NodeAgent is one agent of the node.
type NodeAgent struct {
	published.Agent
	// Live: its lock is held. Heartbeat is when it last polled.
	Live      bool      `json:"live"`
	Heartbeat time.Time `json:"heartbeat"`
	// Unreadable is why its file cannot be read; empty where it can.
	Unreadable string `json:"unreadable,omitempty"`
	// Installed is what its installer has put on the node; nil where it has none.
	Installed *install.Record `json:"installed,omitempty"`
}

// ReadStatus reads the status of all agents of a node, or of the one called name.
func ReadStatus(runtimeDir, name string) (Status, error) {
	names := []string{name}
	if name == "" {
		var err error
		if names, err = published.Names(runtimeDir); err != nil {
			return Status{}, err
		}
	}
	status := Status{Agents: []NodeAgent{}}
	for _, name := range names {
		s := NodeAgent{Agent: published.Agent{Name: name}, Live: published.Live(runtimeDir, name)}
		agent, err := published.Read(runtimeDir, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return Status{}, fmt.Errorf("no agent called %s has published anything in %s", name, runtimeDir)
		case err != nil:
			s.Unreadable = err.Error()
		default:
			s.Agent = *agent
		}
		if s.Installed, err = install.ReadRecord(runtimeDir, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.Installed = &install.Record{LastError: err.Error()}
		}
		if info, err := os.Stat(published.Path(runtimeDir, name)); err == nil {
			s.Heartbeat = info.ModTime()
		}
		status.Agents = append(status.Agents, s)
	}
	return status, nil
}

// Unhealthy says why an agent is not doing its work: it does not run, or has not polled for three poll
// intervals. Empty where it is.
func (s NodeAgent) Unhealthy(now time.Time) string {
	interval, err := time.ParseDuration(s.PollInterval)
	if err != nil {
		interval = 5 * time.Second
	}
	switch age := now.Sub(s.Heartbeat); {
	case s.Unreadable != "":
		return s.Unreadable
	case !s.Live:
		return "not running; its rules stay as they were at " + s.Heartbeat.Format(time.RFC3339)
	case age > 3*interval:
		return fmt.Sprintf("has not polled for %s, although it does so every %s", age.Round(time.Second), interval)
	}
	return ""
}

func (s NodeAgent) writeInstalled(out *bytes.Buffer) {
	if s.Installed == nil {
		return
	}
	if s.Installed.Conflist != "" {
		fmt.Fprintf(out, "installed: %s since %s\n", s.Installed.Conflist, s.Installed.InstalledAt.Format(time.RFC3339))
	}
	if s.Installed.LastError != "" {
		fmt.Fprintf(out, "installer's error: %s\n", s.Installed.LastError)
	}
	for _, note := range s.Installed.Notes {
		fmt.Fprintf(out, "installer's note: %s\n", note)
	}
}

// Write prints the status as a table for people.
func (s Status) Write(w io.Writer, now time.Time) error {
	var out bytes.Buffer
	if len(s.Agents) == 0 {
		out.WriteString("no agent has published anything\n")
	}
	for i, agent := range s.Agents {
		if i > 0 {
			out.WriteByte('\n')
		}
		health := agent.Unhealthy(now)
		if health == "" {
			health = fmt.Sprintf("running since %s, backend %s", agent.StartedAt.Format(time.RFC3339), agent.Backend)
		}
		fmt.Fprintf(&out, "agent %s: %s\n", agent.Name, health)
		if agent.LastError != "" {
			fmt.Fprintf(&out, "error: %s\n", agent.LastError)
		}
		for _, note := range agent.Notes {
			fmt.Fprintf(&out, "note: %s\n", note)
		}
		agent.writeInstalled(&out)
		table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
		row := func(cells ...string) { _, _ = io.WriteString(table, strings.Join(cells, "\t")+"\n") }
		row("MAGIC IP", "PROTOCOL", "NAMESPACE", "SELECTOR", "ENDPOINT", "POD")
		for _, m := range agent.MagicIPs {
			var addresses, pods []string
			for _, e := range m.Endpoints {
				addresses, pods = append(addresses, e.Address.String()), append(pods, e.Pod)
			}
			endpoint := strings.Join(addresses, ",")
			switch {
			case m.Refused != "":
				endpoint = "not served: " + m.Refused
			case len(addresses) == 0:
				endpoint = "none: " + m.Action
			}
			row(frontendOf(m).AddrPort().String(), m.Protocol, m.Namespace, m.Selector, endpoint, strings.Join(pods, ","))
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	_, err := out.WriteTo(w)
	return err
}
