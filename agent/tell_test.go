package agent

import (
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/endpoint"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// TestTellsWhatIsPublished: each change is told once, with what was before; at first that is what an agent of this
// name had published before it was restarted. Also where the file cannot be written.
func TestTellsWhatIsPublished(t *testing.T) {
	t.Parallel()
	var told [][2]*published.Agent
	restored := &published.Agent{}
	note := ""
	a := &Agent{
		Options: Options{
			RuntimeDir: t.TempDir(), Backend: nftables.NewFake("a"), Log: slog.New(slog.DiscardHandler),
			Published: []func(before, now *published.Agent){func(before, now *published.Agent) { told = append(told, [2]*published.Agent{before, now}) }},
			Notes:     []func() []string{func() []string { return []string{note} }},
		},
		config: config.Config{Name: "a"}, restored: restored, applied: &plan.Plan{}, errs: map[string]string{},
	}
	now := time.Now()
	a.publish(now, false) // there is no folder to write to
	if len(told) != 1 || told[0][0] != restored || a.published != nil {
		t.Fatalf("without a folder: told %v", told)
	}
	if err := os.Mkdir(published.Dir(a.RuntimeDir), 0o755); err != nil {
		t.Fatal(err)
	}
	a.publish(now, false)
	a.publish(now, true)
	a.publish(now, true)
	told = told[1:]
	note = "changed"
	a.publish(now, true)
	a.publish(now, true)
	if len(told) == 0 || told[len(told)-1][1].Notes[0] != "changed" || told[len(told)-1][0] == restored {
		t.Fatalf("told %+v", told)
	}
	if last := told[len(told)-1]; last[1] != a.published || last[0].Notes[0] != "" {
		t.Errorf("told %+v at last", last)
	}
	if len(told) > 3 {
		t.Errorf("told %d times of two changes", len(told))
	}
}

// TestTellsOfUnknownLabels: without the API, pods whose labels the runtime has not passed are no targets, and look as if they
// should be.
func TestTellsOfUnknownLabels(t *testing.T) {
	t.Parallel()
	a := &Agent{
		config:  config.Config{Name: "a", Ports: []config.Port{{Selection: endpoint.Selection{Namespace: "default"}}}},
		applied: &plan.Plan{},
		records: records{list: []state.Attachment{
			{Namespace: "default", Name: "unknown"}, {Namespace: "default", Name: "known", Labels: map[string]string{}}, {Namespace: "other", Name: "elsewhere"},
		}},
	}
	if notes := a.notes(); len(notes) != 1 || !strings.HasPrefix(notes[0], "1 recorded pods have no labels that are known") {
		t.Errorf("notes %q", notes)
	}
	a.API = &kubeless{}
	if notes := a.notes(); len(notes) > 0 {
		t.Errorf("with the API: notes %q", notes)
	}
}

// kubeless is an API that is there and says nothing.
type kubeless struct{ API }
