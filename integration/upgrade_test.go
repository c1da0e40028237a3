package integration

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// asTheVersionBefore gives the runtime directory the layout of the version before, with what the agent would have published
// there, and makes the directories that kubelet makes for the containers of this version.
func (w *world) asTheVersionBefore(status *runtimedir.Status, memory *runtimedir.Memory) {
	w.t.Helper()
	old := map[string]any{"version": 1, "name": agentName, "startedAt": status.StartedAt, "pollInterval": status.PollInterval, "records": memory.Records, "recordsSince": memory.RecordsSince}
	var magicIPs []map[string]any
	for _, m := range status.MagicIPs {
		magicIPs = append(magicIPs, map[string]any{
			"ipAddress": m.Address, "port": m.Port, "protocol": m.Protocol, "namespace": m.Namespace, "selector": m.Selector,
			"claimedAt": status.StartedAt, "action": m.Action, "endpoints": m.Endpoints,
		})
	}
	old["magicIPs"] = magicIPs
	data, err := json.Marshal(old)
	if err != nil {
		w.t.Fatal(err)
	}
	w.run(`cd ` + lab.RuntimeDir + `
mv plugin/state.json .
: >state.lock
rm -r plugin agents
mkdir -p agents/` + agentName + ` install/` + agentName + ` plugin
: >agents/` + agentName + `.lock
chmod -R a+rX .`)
	if err := w.WriteFile(lab.RuntimeDir+"/agents/"+agentName+".json", data); err != nil {
		w.t.Fatal(err)
	}
}

// TestUpgradeOfTheRuntimeDirectory: the endpoint of the version before is one from the first moment, with its records and without
// them; the plugin moves the records, and nothing of the layout before is left.
func TestUpgradeOfTheRuntimeDirectory(t *testing.T) {
	for _, records := range []bool{true, false} {
		t.Run(map[bool]string{true: "with records", false: "without records"}[records], func(t *testing.T) {
			t.Parallel()
			w := serving(t, "nftables", "bridge", config())
			w.addClient()
			w.addTarget("echo")
			w.echo("echo")
			w.awaitEndpoint("echo")
			load := w.startLoad(plain)
			w.agent.Kill()
			dir := runtimedir.New(w.Path(lab.RuntimeDir))
			status, err := dir.Agent(agentName).ReadStatus()
			if err != nil {
				t.Fatal(err)
			}
			memory, err := dir.Agent(agentName).ReadMemory()
			if err != nil {
				t.Fatal(err)
			}
			w.asTheVersionBefore(status, memory)
			if !records {
				w.run("rm " + lab.RuntimeDir + "/state.json")
			}
			w.start(config())
			w.awaitEndpoint("echo")
			for probe := range load {
				if failed := probe.Stop().Failed(); len(failed) > 0 {
					t.Errorf("%d requests failed during the upgrade, the first: %+v", len(failed), failed[0])
				}
			}
			if claims, err := dir.Agent(agentName).ReadClaims(); err != nil || len(claims) == 0 || !claims[0].ClaimedAt.Equal(status.StartedAt) {
				t.Errorf("claims %v, %v; want them to be as old as before", claims, err)
			}
			w.addTarget("new")
			w.echo("new")
			w.awaitEndpoint("new")
			if records {
				wantPods(t, w.Node, "echo", "new")
			} else {
				wantPods(t, w.Node, "new")
			}
			entries, err := os.ReadDir(w.Path(lab.RuntimeDir))
			if err != nil {
				t.Fatal(err)
			}
			for _, entry := range entries {
				if !entry.IsDir() {
					t.Errorf("%s is left of the layout before", entry.Name())
				}
			}
			if left := w.run("ls " + lab.RuntimeDir + "/agents"); strings.TrimSpace(left) != agentName {
				t.Errorf("left in agents/: %s", left)
			}
		})
	}
}
