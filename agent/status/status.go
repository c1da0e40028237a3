// Package status reads what a node's agents and installers report, and shows it to people.
package status

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/screen"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// Status is what a node's agents report, and whether they run.
type Status struct {
	Agents []Agent `json:"agents"`
	// uncounted is why connections could not be counted; nil where they were, or nobody asked.
	uncounted error
}

// Agent is one agent of the node.
type Agent struct {
	runtimedir.Status
	// MagicIPs are those of the status.
	MagicIPs []MagicIP `json:"magicIPs"`
	// Live: its lock is held. Heartbeat is when it last polled.
	Live      bool      `json:"live"`
	Heartbeat time.Time `json:"heartbeat"`
	// Unreadable is why its status file cannot be read; empty where it can.
	Unreadable string `json:"unreadable,omitempty"`
	// Failure is what Unhealthy has said when Judge was called.
	Failure string `json:"failure,omitempty"`
	// Installed is what its installer has put on the node; nil where it has none.
	Installed *runtimedir.Record `json:"installed,omitempty"`
}

// MagicIP is a magic IP of an agent.
type MagicIP struct {
	runtimedir.MagicIP
	// Connections are the flows that the kernel translates for it now; nil where they have not been counted.
	Connections *int `json:"connections,omitempty"`
}

const noAgent = "no agent has a status file"

// Read reads the status of all agents of a node, or of the one called name, which must have one.
func Read(dir runtimedir.Dir, name string) (Status, error) {
	names, all := []string{name}, name == ""
	if all {
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
		case errors.Is(err, fs.ErrNotExist) && all: // it starts, or has been uninstalled since
			continue
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

// fillLists makes the lists, none of them nil, which JSON has as null.
func (a *Agent) fillLists() {
	a.MagicIPs = make([]MagicIP, len(a.Status.MagicIPs))
	for i, m := range a.Status.MagicIPs {
		if m.Endpoints == nil {
			m.Endpoints = []runtimedir.Endpoint{}
		}
		a.MagicIPs[i].MagicIP = m
	}
}

// Count has count say how many connections each magic IP has. Where it cannot, the status is without, and its Frame says why.
func (s *Status) Count(count func([]runtimedir.Frontend) (map[runtimedir.Frontend]int, error)) {
	var frontends []runtimedir.Frontend
	for _, a := range s.Agents {
		for _, m := range a.MagicIPs {
			frontends = append(frontends, m.Frontend)
		}
	}
	counts, err := count(frontends)
	if s.uncounted = err; err != nil {
		return
	}
	for _, a := range s.Agents {
		for i := range a.MagicIPs {
			if m := &a.MagicIPs[i]; m.Reason == "" {
				connections := counts[m.Frontend]
				m.Connections = &connections
			}
		}
	}
}

// Unhealthy is an error where an agent of the node does not do its work, or where there is none.
func (s Status) Unhealthy(now time.Time) error {
	if len(s.Agents) == 0 {
		return errors.New(noAgent)
	}
	for _, a := range s.Agents {
		if reason := a.Unhealthy(now); reason != "" {
			return fmt.Errorf("agent %s: %s", a.Name, reason)
		}
	}
	return nil
}

// Judge notes in each agent whether it does its work, for readers elsewhere: the heartbeat is by the clock of this node.
func (s *Status) Judge(now time.Time) {
	for i := range s.Agents {
		s.Agents[i].Failure = s.Agents[i].Unhealthy(now)
	}
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

// above are the lines about an agent that stand above its table.
func (a Agent) above(now time.Time) []screen.Line {
	health, colour := a.Unhealthy(now), quote.Red
	if health == "" {
		health, colour = fmt.Sprintf("running since %s, backend %s", a.StartedAt.Format(time.RFC3339), a.Backend), quote.Green
	}
	lines := []screen.Line{{Label: "agent " + a.Name, Text: health, Colour: colour}}
	add := func(colour quote.Colour, label, text string) {
		lines = append(lines, screen.Line{Label: label, Text: text, Colour: colour})
	}
	if a.DataPlane.Name != "" {
		add("", "data plane", dataPlane(a.DataPlane))
	}
	if a.LastError != "" {
		add(quote.Red, "error", a.LastError)
	}
	for _, note := range a.Notes {
		add(quote.Yellow, "note", note)
	}
	if a.Installed == nil {
		return lines
	}
	if a.Installed.Conflist != "" {
		add("", "installed", a.Installed.Conflist+" since "+a.Installed.InstalledAt.Format(time.RFC3339))
	}
	if a.Installed.LastError != "" {
		add(quote.Red, "installer's error", a.Installed.LastError)
	}
	for _, note := range a.Installed.Notes {
		add(quote.Yellow, "installer's note", note)
	}
	return lines
}

// below are the lines that stand below its table: why magic IPs have no endpoint.
func (a Agent) below() (lines []screen.Line) {
	for _, m := range a.MagicIPs {
		if len(m.Why) > 0 {
			lines = append(lines, screen.Line{Text: fmt.Sprintf("%s has no endpoint: %s", m.Frontend, strings.Join(m.Why, "; "))})
		}
	}
	return lines
}

// traffic is where the traffic to a magic IP goes.
func traffic(m runtimedir.MagicIP) (endpoint, pod string) {
	var addresses, pods []string
	for _, e := range m.Endpoints {
		addresses, pods = append(addresses, e.Address.String()), append(pods, e.Pod)
	}
	endpoint = strings.Join(addresses, ",")
	switch {
	case m.Reason != "":
		endpoint = "unserved: " + m.Reason
	case len(addresses) == 0 && m.Action != "":
		endpoint = "none: " + m.Action
	}
	return endpoint, strings.Join(pods, ",")
}

// Write prints the status as a table for people, with colours if wanted.
func (s Status) Write(w io.Writer, now time.Time, colours bool) error {
	var out bytes.Buffer
	if len(s.Agents) == 0 {
		out.WriteString(noAgent + "\n")
	}
	for i, a := range s.Agents {
		if i > 0 {
			out.WriteByte('\n')
		}
		for _, line := range a.above(now) {
			fmt.Fprintln(&out, line.Paint(colours))
		}
		table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
		row := func(cells ...string) {
			for i, cell := range cells {
				cells[i] = quote.Terminal(cell)
			}
			_, _ = io.WriteString(table, strings.Join(cells, "\t")+"\n")
		}
		row("MAGIC IP", "PROTOCOL", "NAMESPACE", "SELECTOR", "ENDPOINT", "POD")
		for _, m := range a.MagicIPs {
			endpoint, pod := traffic(m.MagicIP)
			row(m.AddrPort().String(), string(m.Protocol), m.Namespace, m.Selector, endpoint, pod)
		}
		if err := table.Flush(); err != nil {
			return err
		}
		for _, line := range a.below() {
			fmt.Fprintln(&out, line.Paint(colours))
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

// Frame is the status as a live screen shows it.
func (s Status) Frame(now time.Time) (screen.Frame, error) {
	var text strings.Builder
	if err := s.Write(&text, now, false); err != nil {
		return screen.Frame{}, err
	}
	frame := screen.Frame{Text: text.String()}
	if len(s.Agents) == 0 {
		frame.Tables = []screen.Table{{Above: []screen.Line{{Text: noAgent, Colour: quote.Red}}}}
	}
	if s.uncounted != nil {
		frame.Tables = append(frame.Tables, screen.Table{Above: []screen.Line{{Label: "connections are not counted", Text: s.uncounted.Error(), Colour: quote.Yellow}}})
	}
	for _, a := range s.Agents {
		table := screen.Table{
			Above: a.above(now), Below: a.below(),
			Columns: []string{"MAGIC IP", "PROTOCOL", "ENDPOINT", "POD", "AGE", "CONNECTIONS", "OPENED", "REFUSED"},
		}
		for _, m := range a.MagicIPs {
			endpoint, pod := traffic(m.MagicIP)
			age, connections, opened, refused := "", "", "", ""
			if !m.Since.IsZero() {
				age = screen.Age(now.Sub(m.Since))
			}
			if m.Connections != nil {
				connections = strconv.Itoa(*m.Connections)
			}
			if m.Count != nil {
				opened, refused = strconv.FormatUint(m.Count.Opened, 10), strconv.FormatUint(m.Count.Refused, 10)
			}
			row := screen.Row{Key: m.Frontend.String(), Cells: []string{m.AddrPort().String(), string(m.Protocol), endpoint, pod, age, connections, opened, refused}}
			row.State = strings.TrimSpace(endpoint + " " + pod)
			if len(s.Agents) > 1 {
				row.Key = a.Name + " " + row.Key
			}
			table.Rows = append(table.Rows, row)
		}
		frame.Tables = append(frame.Tables, table)
	}
	return frame, nil
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
