package integration

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// load is clients of every kind that must not lose one request.
type load map[*lab.Probe]bool // to whether it is IPv6

func (w *world) startLoad(magicIP int) load {
	w.t.Helper()
	l := load{}
	for _, six := range []bool{false, true} {
		for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
			probe := w.StartProbe(lab.Client{Kind: kind, From: "client", To: magicAt(magicIP, six), Timeout: 3 * time.Second}, 10*time.Millisecond)
			w.t.Cleanup(func() { probe.Stop() })
			if _, err := probe.Await(patience(w.t), lab.AnsweredBy("echo")); err != nil {
				w.t.Fatal(err)
			}
			l[probe] = six
		}
	}
	return l
}

// noteLoad ends the clients.
func (w *world) noteLoad(row string, l load) {
	w.t.Helper()
	for probe, six := range l {
		var err error
		outcomes := probe.Stop()
		if failed := outcomes.Failed(); len(failed) > 0 || len(outcomes) == 0 {
			err = fmt.Errorf("%d of %d requests failed: %+v", len(failed), len(outcomes), failed[:min(len(failed), 3)])
		}
		w.note(row, six, err)
	}
}

// TestAgentRestart stops, kills and starts the agent under load: not one request is lost.
func TestAgentRestart(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		w.addClient()
		w.addTarget("echo")
		w.echo("echo")
		load := w.startLoad(plain)
		for i := range 6 {
			if i%2 == 0 {
				if err := w.agent.Stop(patience(t)); err != nil {
					t.Fatalf("SIGTERM: %v", err)
				}
			} else {
				w.agent.Kill()
			}
			w.start(config())
		}
		w.noteLoad(restarts, load)
	})
}

// TestRestartMeetsChanges: what happened while the agent was away is caught up with.
func TestRestartMeetsChanges(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		w.addClient()
		w.addTarget("old")
		w.echo("old")
		probes := map[bool]*lab.Probe{}
		for _, six := range []bool{false, true} {
			probes[six] = w.StartProbe(lab.Client{Kind: lab.KeepAlive, From: "client", To: magic(six), Timeout: 10 * time.Second}, 3*time.Millisecond)
			defer probes[six].Stop()
			if _, err := probes[six].Await(patience(t), lab.AnsweredBy("old")); err != nil {
				t.Fatal(err)
			}
		}
		w.agent.Kill()
		w.delTarget("old")
		w.addPod("bridge", target("new"))
		w.echo("new")
		w.start(config())
		w.awaitEndpoint("new")
		for six, probe := range probes {
			_, err := probe.Await(patience(t), lab.AnsweredBy("new"))
			w.note(whileAway, six, err)
			probe.Stop()
		}
		// A state file that is gone is a source that is silent: the endpoint stays.
		w.agent.Kill()
		if err := os.Remove(w.Path(lab.RuntimeDir + "/plugin/state.json")); err != nil {
			t.Fatal(err)
		}
		w.start(config())
		w.awaitEndpoint("new")
		bothFamilies(func(six bool) { w.note(whileAway, six, w.want("client", magic(six), "answered by new")) })
	})
}

// TestTwoAgentsUnderLoad: whatever becomes of one agent, the clients of the other do not lose a request.
func TestTwoAgentsUnderLoad(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		w.addClient()
		w.addTarget("echo")
		w.echo("echo")
		agents := []struct {
			name  string
			magic int
		}{{agentName, plain}, {"default.other", unassigned}}
		conf := func(i int) []byte { return configOf(agents[i].name, entry(agents[i].magic, "")) }

		processes := []*lab.Agent{w.agent, nil}
		restart := func(i int, conf []byte) {
			processes[i] = w.startAs(agents[i].name, conf)
			w.awaitOf(agents[i].name, "to have its endpoint", func(a *runtimedir.Status) bool { return hasEndpoint(a, "echo") })
		}
		load := w.startLoad(agents[0].magic)
		restart(1, conf(1))
		w.noteLoad(twoAgents, load)
		for i, agent := range agents {
			load := w.startLoad(agents[1-i].magic)
			if err := processes[i].Stop(patience(t)); err != nil {
				t.Fatal(err)
			}
			// One family's rules are removed, then the other's; then they come back.
			for _, six := range []bool{true, false} {
				restart(i, configOf(agent.name, entryOf(agent.magic, six, "")))
				processes[i].Kill()
			}
			restart(i, conf(i))
			w.noteLoad(twoAgents, load)
		}
		for _, agent := range agents {
			bothFamilies(func(six bool) {
				w.note(twoAgents, six, w.want("client", magicAt(agent.magic, six), "answered by echo, seen as client"))
			})
		}
	})
}
