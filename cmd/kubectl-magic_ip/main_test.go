package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/kube/fleet"
	"github.com/magic-ip-address/magic-ip-address/agent/screen"
)

// TestStatus: what a node says is in its rows; text of others is shown as text; whether all is well is the exit status.
func TestStatus(t *testing.T) {
	const endpoint = `{"ipAddress":"169.254.210.210","protocol":"tcp","port":80,"namespace":"default","selector":"app=echo","action":"serve","endpoints":[{"address":"10.244.1.2:8080","pod":"default/echo"}]}`
	agent := func(magicIPs string) []byte {
		return []byte(`{"agents":[{"version":1,"name":"a","live":true,"magicIPs":[` + magicIPs + `]}]}`)
	}
	for name, test := range map[string]struct {
		node fleet.Node
		row  string
		well bool
	}{
		"served":      {fleet.Node{Pod: "p/q", Output: agent(endpoint)}, "n a running 169.254.210.210 port 80 tcp 10.244.1.2:8080 default/echo", true},
		"no endpoint": {fleet.Node{Pod: "p/q", Output: agent(`{"ipAddress":"fd00::1","protocol":"udp","port":53,"action":"reject","endpoints":[]}`)}, "n a running fd00::1 port 53 udp none: reject", true},
		"unserved":    {fleet.Node{Pod: "p/q", Output: agent(`{"ipAddress":"fd00::1","protocol":"udp","port":53,"reason":"reserved","endpoints":[]}`)}, "n a running fd00::1 port 53 udp unserved: reserved", false},
		"stopped":     {fleet.Node{Pod: "p/q", ExitCode: 1, Output: []byte(`{"agents":[{"name":"a","live":false,"magicIPs":[]}]}`)}, "n a not running", false},
		"hung": {fleet.Node{Pod: "p/q", ExitCode: 1, Output: []byte(`{"agents":[{"name":"a","live":true,"failure":"has not polled for 1m0s, although it does so every 5s","magicIPs":[` + endpoint + `]}]}`)},
			"n a has not polled for 1m0s, although it does so every 5s 169.254.210.210 port 80 tcp 10.244.1.2:8080 default/echo", false},
		"no report": {fleet.Node{Pod: "p/q", ExitCode: 1, Output: []byte(`{"agents":[]}`)}, "n no agent has a status file", false},
		"error":     {fleet.Node{Pod: "p/q", Output: []byte(`{"agents":[{"name":"a","live":true,"lastError":"\u001b[2Jbad","magicIPs":[]}]}`)}, `n a error: \x1b[2Jbad`, false},
		"no agent":  {fleet.Node{Err: errors.New("no agent")}, "n no agent", false},
		"no JSON":   {fleet.Node{Pod: "p/q", Output: []byte("oops")}, "n the agent answered no JSON", false},
		"another":   {fleet.Node{Pod: "p/q", Output: []byte(`{"agents":1}`)}, "n the agent's answer has another format", false},
	} {
		test.node.Name = "n"
		var out strings.Builder
		table, well := statusTable([]answer{newAnswer(test.node)}, time.Now())
		writeTable(&out, table, 2)
		lines := strings.Split(out.String(), "\n")
		if row := strings.Join(strings.Fields(lines[1]), " "); row != test.row || well != test.well || len(lines) != 3 {
			t.Errorf("%s: %q, well %v; want %q, %v", name, row, well, test.row, test.well)
		}
	}
}

// TestLive: a live screen has age, connections and counts beside them, and a change is one of state, endpoint or pod.
func TestLive(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	at := func(connections int) screen.Table {
		table, _ := statusTable([]answer{newAnswer(fleet.Node{Name: "n", Pod: "p/q", Output: fmt.Appendf(nil, `{"agents":[{"name":"a","live":true,"magicIPs":[
			{"ipAddress":"169.254.210.210","protocol":"tcp","port":80,"action":"serve","since":"2026-01-31T11:58:30Z","connections":%d,"count":{"opened":8,"refused":2},"endpoints":[{"address":"10.244.1.2:8080","pod":"default/echo"}]}]}]}`, connections)})}, now)
		return table
	}
	before, after := at(3), at(4)
	if row := after.Rows[0]; len(after.Columns) != len(row.Cells) || strings.Join(row.Cells[7:], " ") != "1m30s 4 8 2" || row.Key != "n a 169.254.210.210 port 80/tcp" {
		t.Errorf("%+v", after)
	}
	if before.Rows[0].State != after.Rows[0].State || after.Rows[0].State != "running, 10.244.1.2:8080 default/echo" {
		t.Errorf("the state is %q, and then %q", before.Rows[0].State, after.Rows[0].State)
	}
}

// TestHungLive: a live screen does not mark a hung agent anew with each second that it hangs.
func TestHungLive(t *testing.T) {
	at := func(age string) string {
		table, _ := statusTable([]answer{newAnswer(fleet.Node{Name: "n", Pod: "p/q", ExitCode: 1, Output: fmt.Appendf(nil, `{"agents":[{"name":"a","live":true,"failure":"has not polled for %s","magicIPs":[]}]}`, age)})}, time.Now())
		return table.Rows[0].State
	}
	if before, after := at("20s"), at("22s"); before != after || before == "" {
		t.Errorf("the state is %q, and then %q", before, after)
	}
}

func TestDoctor(t *testing.T) {
	var out strings.Builder
	table, well := doctorTable([]answer{
		newAnswer(fleet.Node{Name: "n1", Err: errors.New("no agent")}),
		newAnswer(fleet.Node{Name: "n2", Pod: "p/q", ExitCode: 3, Output: []byte(`{"verdict":{"level":"hidden","text":"nothing failed"}}`)}),
	}, time.Now())
	writeTable(&out, table, 0)
	const want = "NODE  VERDICT  FIRST CAUSE\nn1    fail     no agent\nn2    hidden   nothing failed\n"
	if out.String() != want || well {
		t.Errorf("well %v:\n%s", well, &out)
	}
	if _, well := doctorTable([]answer{newAnswer(fleet.Node{Name: "n2", Pod: "p/q", Output: []byte(`{"verdict":{"level":"hidden"}}`)})}, time.Now()); !well {
		t.Error("what cannot be seen is taken for a fault")
	}
	if _, well := doctorTable([]answer{newAnswer(fleet.Node{Name: "n2", Pod: "p/q", Output: []byte(`{}`)})}, time.Now()); well {
		t.Error("no verdict is taken for a good one")
	}
}

// TestCommandLine: what is wrong with a command line is said as it is, and what was meant.
func TestCommandLine(t *testing.T) {
	for line, want := range map[string]string{
		"statu": "unknown command \"statu\" for \"kubectl magic-ip\"\n\nDid you mean this?\n    status\n", "status --nope": "unknown flag: --nope",
		"status -o yaml": `--output "yaml" is not allowed; allowed: table, json`, "doctor extra": `unknown command "extra" for "kubectl magic-ip doctor"`,
	} {
		root, _ := rootCommand()
		root.SetArgs(strings.Fields(line))
		if err := root.ExecuteContext(t.Context()); err == nil || message(err) != want {
			t.Errorf("%s: %q, want %q", line, message(err), want)
		}
	}
}

func TestJSON(t *testing.T) {
	var out strings.Builder
	if err := writeJSON(&out, []answer{newAnswer(fleet.Node{Name: "n", Pod: "p/q", Output: []byte(`{"agents":[]}`)})}); err != nil {
		t.Fatal(err)
	}
	var read struct{ Nodes []answer }
	if err := json.Unmarshal([]byte(out.String()), &read); err != nil || len(read.Nodes) != 1 || read.Nodes[0].Node != "n" || read.Nodes[0].Pod != "p/q" {
		t.Errorf("%v: %s", err, &out)
	}
}
