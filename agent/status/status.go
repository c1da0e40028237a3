// Package status reads what a node's agents and installers report, and shows it to people.
package status

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Status is what a node's agents report, and whether they run.
type Status struct {
	Agents []Agent `json:"agents"`
}

// Agent is one agent of the node.
type Agent struct {
	runtimedir.Status
	// Live: its lock is held. Heartbeat is when it last polled.
	Live      bool      `json:"live"`
	Heartbeat time.Time `json:"heartbeat"`
	// Unreadable is why its status file cannot be read; empty where it can.
	Unreadable string `json:"unreadable,omitempty"`
	// Installed is what its installer has put on the node; nil where it has none.
	Installed *runtimedir.Record `json:"installed,omitempty"`
}

// Read reads the status of all agents of a node, or of the one called name.
func Read(dir runtimedir.Dir, name string) (Status, error) {
	names := []string{name}
	if name == "" {
		var err error
		if names, err = dir.Agents(); err != nil {
			return Status{}, err
		}
	}
	status := Status{Agents: []Agent{}}
	for _, name := range names {
		files := dir.Agent(name)
		a := Agent{Status: runtimedir.Status{Name: name}, Live: files.Live()}
		read, err := files.ReadStatus()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return Status{}, fmt.Errorf("no agent called %s has a status file in %s", name, dir.Path())
		case err != nil:
			a.Unreadable = err.Error()
		default:
			a.Status = *read
		}
		a.fillLists()
		if a.Installed, err = dir.Installer(name).ReadRecord(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.Installed = &runtimedir.Record{LastError: err.Error()}
		} else if err != nil {
			a.Installed = nil
		}
		if a.Heartbeat, err = files.Heartbeat(); err != nil && a.Unreadable == "" {
			a.Unreadable = err.Error()
		}
		status.Agents = append(status.Agents, a)
	}
	return status, nil
}

// fillLists makes lists of those that are nil, which JSON has as null.
func (a *Agent) fillLists() {
	if a.MagicIPs == nil {
		a.MagicIPs = []runtimedir.MagicIP{}
	}
	for i := range a.MagicIPs {
		if a.MagicIPs[i].Endpoints == nil {
			a.MagicIPs[i].Endpoints = []runtimedir.Endpoint{}
		}
	}
}

// Unhealthy is an error where an agent of the node does not do its work, or where there is none.
func (s Status) Unhealthy(now time.Time) error {
	if len(s.Agents) == 0 {
		return errors.New("no agent has a status file")
	}
	for _, a := range s.Agents {
		if reason := a.Unhealthy(now); reason != "" {
			return fmt.Errorf("agent %s: %s", a.Name, reason)
		}
	}
	return nil
}

// Unhealthy is why an agent is not doing its work: it does not run, or has not polled for three poll
// intervals. Empty where it is.
func (a Agent) Unhealthy(now time.Time) string {
	interval, err := time.ParseDuration(a.PollInterval)
	if err != nil {
		interval = 5 * time.Second
	}
	switch age := now.Sub(a.Heartbeat); {
	case a.Unreadable != "":
		return a.Unreadable
	case !a.Live:
		return "not running; its rules stay as they were at " + a.Heartbeat.Format(time.RFC3339)
	case age > 3*interval:
		return fmt.Sprintf("has not polled for %s, although it does so every %s", age.Round(time.Second), interval)
	}
	return ""
}

func (a Agent) writeInstalled(out *bytes.Buffer, labelled func(colour quote.Colour, label, text string)) {
	if a.Installed == nil {
		return
	}
	if a.Installed.Conflist != "" {
		fmt.Fprintf(out, "installed: %s since %s\n", quote.Terminal(a.Installed.Conflist), a.Installed.InstalledAt.Format(time.RFC3339))
	}
	if a.Installed.LastError != "" {
		labelled(quote.Red, "installer's error", a.Installed.LastError)
	}
	for _, note := range a.Installed.Notes {
		labelled(quote.Yellow, "installer's note", note)
	}
}

// Write prints the status as a table for people, with colours if wanted.
func (s Status) Write(w io.Writer, now time.Time, colours bool) error {
	var out bytes.Buffer
	if len(s.Agents) == 0 {
		out.WriteString("no agent has a status file\n")
	}
	for i, a := range s.Agents {
		if i > 0 {
			out.WriteByte('\n')
		}
		health, colour := a.Unhealthy(now), quote.Red
		if health == "" {
			health, colour = fmt.Sprintf("running since %s, backend %s", a.StartedAt.Format(time.RFC3339), a.Backend), quote.Green
		}
		fmt.Fprintf(&out, "agent %s: %s\n", quote.Terminal(a.Name), colour.Paint(colours, quote.Terminal(health)))
		labelled := func(colour quote.Colour, label, text string) {
			fmt.Fprintf(&out, "%s %s\n", colour.Paint(colours, label+":"), quote.Terminal(text))
		}
		if a.DataPlane.Name != "" {
			fmt.Fprintf(&out, "data plane: %s\n", quote.Terminal(dataPlane(a.DataPlane)))
		}
		if a.LastError != "" {
			labelled(quote.Red, "error", a.LastError)
		}
		for _, note := range a.Notes {
			labelled(quote.Yellow, "note", note)
		}
		a.writeInstalled(&out, labelled)
		table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
		row := func(cells ...string) {
			for i, cell := range cells {
				cells[i] = quote.Terminal(cell)
			}
			_, _ = io.WriteString(table, strings.Join(cells, "\t")+"\n")
		}
		row("MAGIC IP", "PROTOCOL", "NAMESPACE", "SELECTOR", "ENDPOINT", "POD")
		for _, m := range a.MagicIPs {
			var addresses, pods []string
			for _, e := range m.Endpoints {
				addresses, pods = append(addresses, e.Address.String()), append(pods, e.Pod)
			}
			endpoint := strings.Join(addresses, ",")
			switch {
			case m.Reason != "":
				endpoint = "unserved: " + m.Reason
			case len(addresses) == 0 && m.Action != "":
				endpoint = "none: " + m.Action
			}
			row(m.AddrPort().String(), string(m.Protocol), m.Namespace, m.Selector, endpoint, strings.Join(pods, ","))
		}
		if err := table.Flush(); err != nil {
			return err
		}
		for _, m := range a.MagicIPs {
			if len(m.Why) > 0 {
				fmt.Fprintf(&out, "%s has no endpoint: %s\n", m.Frontend, quote.Terminal(strings.Join(m.Why, "; ")))
			}
		}
		if len(a.Links) > 0 {
			row("LINK", "KIND", "ROLE", "REASON")
		}
		for _, l := range a.Links {
			row(few(l.Names), l.Kind, l.Role, l.Reason)
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	_, err := out.WriteTo(w)
	return err
}

// dataPlane is how packets of pods are brought to the rules, in one line.
func dataPlane(d runtimedir.DataPlane) string {
	text := d.Name + " (" + d.Reason + ")"
	if len(d.LocalRoutes) > 0 {
		addresses := make([]string, len(d.LocalRoutes))
		for i, a := range d.LocalRoutes {
			addresses[i] = a.String()
		}
		text += "; local routes for " + few(addresses)
	}
	if len(d.Masquerade) > 0 {
		text += "; flows of pods are masqueraded (" + strings.Join(d.Masquerade, ", ") + ")"
	}
	return text
}

// few are the names, or the first of many.
func few(names []string) string {
	const most = 5
	if more := len(names) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ","), more)
	}
	return strings.Join(names, ",")
}
