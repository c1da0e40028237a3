// Command kubectl-magic_ip is a plugin of kubectl: `kubectl magic-ip status` and `kubectl magic-ip doctor` show what the agents of
// all nodes say, with the credentials that kubectl has.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/magic-ip-address/magic-ip-address/agent/kube/fleet"
	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/agent/screen"
)

// version is set by the linker.
var version = "devel" //nolint:gochecknoglobals // -X needs a variable

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root, failed := rootCommand()
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "kubectl magic-ip:", message(err))
		return 2
	}
	if *failed {
		return 1
	}
	return 0
}

// message is what an error says, safe for a terminal; lists in it are indented by spaces.
func message(err error) string { return quote.Lines(strings.ReplaceAll(err.Error(), "\n\t", "\n    ")) }

func rootCommand() (root *cobra.Command, failed *bool) {
	failed = new(bool)
	var options fleet.Options
	root = &cobra.Command{
		Use:   "kubectl-magic_ip",
		Short: "Show what the agents of all nodes say about magic IPs",
		Long: `Show what the agents of all nodes say about magic IPs, nodes without an agent first.

It needs the rights to list nodes and pods, and to create pods/exec in the namespaces of the agents.
Exit status: 0 all is well on all nodes, 1 it is not, 2 the cluster could not be asked.`,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl magic-ip"},
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := root.PersistentFlags()
	f.StringVar(&options.Kubeconfig, "kubeconfig", "", "`FILE` with credentials; without it as kubectl has them")
	f.StringVar(&options.Context, "context", "", "`NAME` of the context in it")
	f.StringVarP(&options.Namespace, "namespace", "n", "", "`NAMESPACE` of the agents; all where empty")
	f.StringVarP(&options.Selector, "selector", "l", "app.kubernetes.io/name=magic-ip-address", "label `SELECTOR` of the agents' pods")
	f.DurationVar(&options.Timeout, "timeout", 30*time.Second, "how long a node may take to answer")
	root.AddCommand(
		command("status", "Show the magic IPs of all nodes, and whether the agents run", &options, failed, 4, statusTable),
		command("doctor", "Have the agents of all nodes look at their nodes, and show the verdicts", &options, failed, 0, doctorTable),
	)
	return root, failed
}

// command shows what a command of the agent says on all nodes. tabled makes a table of the answers, whose last columns (watched of them) are for
// a live screen only, and returns whether all is well.
func command(name, short string, options *fleet.Options, failed *bool, watched int, tabled func([]answer, time.Time) (screen.Table, bool)) *cobra.Command {
	const interval = 2 * time.Second
	var output string
	var watch bool
	c := &cobra.Command{
		Use: name, Short: short, Args: cobra.NoArgs,
		Example: fmt.Sprintf("  kubectl magic-ip %[1]s\n  kubectl magic-ip %[1]s --watch\n  kubectl magic-ip %[1]s -o json", name),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("--output %q is not allowed; allowed: table, json", output)
			}
			agents, err := fleet.Connect(*options)
			if err != nil {
				return err
			}
			look := func(ctx context.Context) ([]answer, error) {
				nodes, err := agents.Run(ctx, []string{"magic-ip-agent", name, "-o", "json"})
				answers := make([]answer, len(nodes))
				for i, n := range nodes {
					answers[i] = newAnswer(n)
				}
				return answers, err
			}
			frame := func(ctx context.Context) (screen.Frame, error) {
				answers, err := look(ctx)
				if err != nil {
					return screen.Frame{}, err
				}
				var out strings.Builder
				table, well := tabled(answers, time.Now())
				*failed = !well
				writeTable(&out, table, watched)
				return screen.Frame{Tables: []screen.Table{table}, Text: out.String()}, nil
			}
			out := cmd.OutOrStdout()
			switch {
			case output == "table" && watch:
				return screen.Watch(cmd.Context(), out, "kubectl magic-ip "+name, interval, frame)
			case output == "table":
				shown, err := frame(cmd.Context())
				fmt.Fprint(out, shown.Text)
				return err
			}
			for {
				answers, err := look(cmd.Context())
				if err == nil {
					err = writeJSON(out, answers)
				}
				if err != nil {
					return err
				}
				_, well := tabled(answers, time.Now())
				*failed = !well
				if !watch {
					return nil
				}
				select {
				case <-cmd.Context().Done():
					return nil
				case <-time.After(interval):
				}
			}
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "table", "`FORMAT`: table or json")
	c.Flags().BoolVar(&watch, "watch", false, "again every two seconds, until Ctrl-C; on a terminal one screen, with marks at what has changed")
	return c
}

// answer is what a node has said.
type answer struct {
	Node string `json:"node"`
	// Pod is the agent's that was asked, namespace/name.
	Pod string `json:"pod,omitempty"`
	// Error is why there is no report.
	Error    string `json:"error,omitempty"`
	ExitCode int    `json:"exitCode"`
	// Report is what the command has printed on the node as JSON.
	Report json.RawMessage `json:"report,omitempty"`
}

func newAnswer(n fleet.Node) answer {
	a := answer{Node: n.Name, Pod: n.Pod, ExitCode: n.ExitCode}
	switch {
	case n.Err != nil:
		a.Error = n.Err.Error()
	case !json.Valid(n.Output):
		a.Error = "the agent answered no JSON"
	default:
		a.Report = n.Output
	}
	return a
}

func writeJSON(out io.Writer, answers []answer) error {
	data, err := json.MarshalIndent(map[string]any{"nodes": answers}, "", "  ")
	if err != nil {
		return err
	}
	_, err = out.Write(append(quote.JSON(data), '\n'))
	return err
}

// writeTable prints a table without its last columns, leaving out of them as many as left says.
func writeTable(out io.Writer, t screen.Table, left int) {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(cells []string) {
		quoted := make([]string, max(len(cells)-left, 0))
		for i := range quoted {
			quoted[i] = quote.Terminal(cells[i])
		}
		fmt.Fprintln(table, strings.Join(quoted, "\t"))
	}
	row(t.Columns)
	for _, r := range t.Rows {
		row(r.Cells)
	}
	_ = table.Flush() // into memory
}

// report is what is shown of docs/status.schema.json. It is not the agent's own type, which needs Linux.
type report struct {
	Agents []struct {
		Name, LastError, Unreadable, Failure string
		Live                                 bool
		MagicIPs                             []magicIP
	}
}

type magicIP struct {
	IPAddress, Protocol, Namespace, Selector, Reason, Action string

	Port        int
	Since       time.Time
	Connections *int
	Count       *struct{ Opened, Refused uint64 }
	Endpoints   []struct{ Address, Pod string }
}

func statusTable(answers []answer, now time.Time) (table screen.Table, well bool) {
	table.Columns = []string{"NODE", "AGENT", "STATE", "MAGIC IP", "PROTOCOL", "ENDPOINT", "POD", "AGE", "CONNECTIONS", "OPENED", "REFUSED"}
	well = true
	add := func(key, state string, cells ...string) {
		cells = append(cells, make([]string, len(table.Columns)-len(cells))...)
		table.Rows = append(table.Rows, screen.Row{Key: key, State: state, Cells: cells})
	}
	for _, a := range answers {
		var r report
		if a.Error == "" && json.Unmarshal(a.Report, &r) != nil {
			a.Error = "the agent's answer has another format"
		}
		if a.Error != "" {
			add(a.Node, a.Error, a.Node, "", a.Error)
			well = false
			continue
		}
		well = well && a.ExitCode == 0
		if len(r.Agents) == 0 {
			const nothing = "no agent has a status file"
			add(a.Node, nothing, a.Node, "", nothing)
			well = false
		}
		for _, agent := range r.Agents {
			state := "running"
			switch {
			case agent.Unreadable != "":
				state = agent.Unreadable
			case !agent.Live:
				state = "not running"
			case agent.Failure != "":
				state = agent.Failure
			case agent.LastError != "":
				state, well = "error: "+agent.LastError, false
			}
			mark := state
			if state == agent.Failure { // which says for how long
				mark = "hung"
			}
			key := a.Node + " " + agent.Name
			if len(agent.MagicIPs) == 0 {
				add(key, mark, a.Node, agent.Name, state)
			}
			for _, m := range agent.MagicIPs {
				endpoint, pods := m.traffic()
				well = well && m.Reason == ""
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
				add(fmt.Sprintf("%s %s port %d/%s", key, m.IPAddress, m.Port, m.Protocol), strings.TrimSpace(mark+", "+endpoint+" "+pods),
					a.Node, agent.Name, state, fmt.Sprintf("%s port %d", m.IPAddress, m.Port), m.Protocol, endpoint, pods, age, connections, opened, refused)
			}
		}
	}
	return table, well
}

// traffic is where the traffic to a magic IP goes.
func (m magicIP) traffic() (endpoint, pod string) {
	var addresses, pods []string
	for _, e := range m.Endpoints {
		addresses, pods = append(addresses, e.Address), append(pods, e.Pod)
	}
	endpoint = strings.Join(addresses, ",")
	switch {
	case m.Reason != "":
		endpoint = "unserved: " + m.Reason
	case len(addresses) == 0:
		endpoint = "none: " + m.Action
	}
	return endpoint, strings.Join(pods, ",")
}

func doctorTable(answers []answer, _ time.Time) (table screen.Table, well bool) {
	table.Columns = []string{"NODE", "VERDICT", "FIRST CAUSE"}
	well = true
	for _, a := range answers {
		var r struct{ Verdict struct{ Level, Text string } }
		if a.Error == "" && (json.Unmarshal(a.Report, &r) != nil || r.Verdict.Level == "") {
			a.Error = "the agent's answer has another format"
		}
		if a.Error != "" {
			r.Verdict.Level, r.Verdict.Text = "fail", a.Error
		}
		well = well && r.Verdict.Level != "fail"
		table.Rows = append(table.Rows, screen.Row{
			Key: a.Node, State: r.Verdict.Level + ": " + r.Verdict.Text, Cells: []string{a.Node, r.Verdict.Level, r.Verdict.Text},
		})
	}
	return table, well
}
