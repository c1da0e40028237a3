package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/magic-ip-address/magic-ip-address/"

// floors are the rooms of the product, the ground first. A room imports rooms of lower floors only.
func floors() [][]string {
	return [][]string{
		{"plugin/runtimedir", "plugin/conflist/entry", "agent/quote", "agent/program"},
		{"plugin/conflist", "agent/inventory", "agent/plan", "agent/ask", "agent/screen"},
		{"agent/endpoint", "agent/conntrack", "agent/nftables", "agent/node", "agent/event", "agent/status", "agent/ruleset", "agent/dataplane"},
		{"plugin", "plugin/install", "agent/config", "agent/iptables", "agent/kube", "agent/kube/fleet", "agent/doctor/probe"},
		{"agent/backend", "agent/foreign", "agent/metrics"},
		{"agent", "agent/doctor"},
		{"cmd/magic-ip-address", "cmd/magic-ip-agent", "cmd/kubectl-magic_ip"},
	}
}

// processes are the three that run side by side: plugin, installer and agent. None imports a room of another.
func process(room string) string {
	switch {
	case strings.HasPrefix(room, "cmd/"), strings.HasPrefix(room, "plugin/runtimedir"), strings.HasPrefix(room, "plugin/conflist"):
		return ""
	case room == "plugin", room == "plugin/install":
		return room
	}
	return "agent"
}

// mostOfARoom is the greatest share of the product's lines that a room may have, in percent.
const mostOfARoom = 15

// TestHouse prints the rooms of the product, and fails on an import that runs upward or from one process into another, on a room
// that has no floor, and on one that is too large.
func TestHouse(t *testing.T) {
	command := exec.Command("go", "list", "-json=ImportPath,Dir,GoFiles,Imports", "./plugin/...", "./agent/...", "./cmd/...")
	command.Dir = ".."
	command.Stderr = os.Stderr
	out, err := command.Output()
	if err != nil {
		t.Fatal(err)
	}
	floorOf := map[string]int{}
	for floor, rooms := range floors() {
		for _, room := range rooms {
			floorOf[room] = floor
		}
	}
	type room struct {
		name    string
		lines   int
		imports []string
	}
	var rooms []room
	total := 0
	for decoder := json.NewDecoder(strings.NewReader(string(out))); decoder.More(); {
		var listed struct {
			ImportPath, Dir  string
			GoFiles, Imports []string
		}
		if err := decoder.Decode(&listed); err != nil {
			t.Fatal(err)
		}
		r := room{name: strings.TrimPrefix(listed.ImportPath, module)}
		if strings.HasSuffix(r.name, "test") {
			continue // it serves tests only
		}
		for _, file := range listed.GoFiles {
			data, err := os.ReadFile(filepath.Join(listed.Dir, file))
			if err != nil {
				t.Fatal(err)
			}
			r.lines += strings.Count(string(data), "\n")
		}
		floor, known := floorOf[r.name]
		if !known {
			t.Errorf("%s has no floor: name it in floors", r.name)
		}
		for _, path := range listed.Imports {
			imported, ours := strings.CutPrefix(path, module)
			if !ours {
				continue
			}
			r.imports = append(r.imports, imported)
			if floorOf[imported] >= floor {
				t.Errorf("%s imports %s, which is not below it", r.name, imported)
			}
			if from, to := process(r.name), process(imported); from != to && from != "" && to != "" {
				t.Errorf("%s imports %s: %s and %s are processes of their own", r.name, imported, from, to)
			}
		}
		rooms, total = append(rooms, r), total+r.lines
	}
	slices.SortFunc(rooms, func(a, b room) int { return b.lines - a.lines })
	var table strings.Builder
	fmt.Fprintf(&table, "%-24s %6s %6s  imports\n", "room", "lines", "share")
	for _, r := range rooms {
		share := 100 * float64(r.lines) / float64(total)
		fmt.Fprintf(&table, "%-24s %6d %5.1f%%  %s\n", r.name, r.lines, share, strings.Join(r.imports, " "))
		if share > mostOfARoom {
			t.Errorf("%s has %.1f %% of the product's lines, more than %d %%", r.name, share, mostOfARoom)
		}
	}
	fmt.Fprintf(&table, "%-24s %6d", "all", total)
	t.Log("\n" + table.String())
}
