package chart

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestOutput: what status and doctor print as JSON is as docs/*.schema.json say, has no property that they do not, and lacks none.
// It is in this module, since Helm brings the validator along.
func TestOutput(t *testing.T) {
	dir := runtimedir.New(t.TempDir())
	at := time.Now().UTC().Truncate(time.Second)
	full, empty := dir.Agent("full"), dir.Agent("empty")
	for _, lock := range []func() (*runtimedir.Lock, error){full.Lock, empty.Lock, dir.Agent("unreadable").Lock, dir.Installer("full").Lock} {
		held, err := lock()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = held.Close() }()
	}
	frontend := func(address string, protocol runtimedir.Protocol) runtimedir.Frontend {
		return runtimedir.Frontend{Address: netip.MustParseAddr(address), Protocol: protocol, Port: 80}
	}
	err := errors.Join(
		full.WriteStatus(runtimedir.Status{
			StartedAt: at, LastSync: at, LastError: "broken", Backend: "iptables", BackendNote: "a reason", PollInterval: "5s", NoAPI: true, Notes: []string{"a note"},
			Problems: slices.Sorted(maps.Keys(runtimedir.ProblemKinds())), Targets: runtimedir.Targets{Ready: 1, NotReady: 2, Terminating: 3},
			DataPlane: runtimedir.DataPlane{
				Configured: "auto", Name: "cilium", Reason: "a reason", LocalRoutes: []netip.Addr{netip.MustParseAddr("169.254.210.210")}, Masquerade: []string{"ip"},
			},
			Links: []runtimedir.Links{{Names: []string{"eth0"}, Kind: "device", Role: "uplink", Reason: "a default route goes by it"}},
			MagicIPs: []runtimedir.MagicIP{
				{Frontend: frontend("169.254.210.210", runtimedir.TCP), Namespace: "default", Selector: "app=echo", Action: "serve", Since: at, Count: &runtimedir.Count{Opened: 1}, HostInterface: []string{"cni0"}, HostClients: true, ExcludeTarget: true, Endpoints: []runtimedir.Endpoint{
					{Address: netip.MustParseAddrPort("10.244.1.2:8080"), Pod: "default/echo", UID: "1", Recorded: true, AddedAt: at},
				}},
				{Frontend: frontend("fd00:a9fe:d2d2::1", runtimedir.UDP), Namespace: "*", Selector: "app=none", Action: "hold", Why: []string{"no pod"}},
				{Frontend: frontend("169.254.169.254", runtimedir.TCP), Namespace: "default", Selector: "app=echo", Reason: "reserved", UnservedBy: runtimedir.ByConfiguration},
			},
		}),
		full.Renew(at),
		empty.WriteStatus(runtimedir.Status{PollInterval: "5s"}),
		dir.Agent("unreadable").WriteStatus(runtimedir.Status{}),
		os.WriteFile(dir.Agent("unreadable").StatusPath(), []byte("{"), 0o600),
		dir.Installer("full").WriteRecord(runtimedir.Record{
			Conflist: "/etc/cni/net.d/10-a.conflist", Binary: "/opt/cni/bin/magic-ip-address", PluginVersion: "1", PluginSHA256: "2", Restored: 1, InstalledAt: at, LastError: "read-only", Notes: []string{"a note"},
		}),
	)
	if err != nil {
		t.Fatal(err)
	}
	for command, runs := range map[string][][]string{
		"status": {{"--runtime-dir", dir.Path()}, {"--runtime-dir", t.TempDir()}, {"--runtime-dir", dir.Path(), "--name", "empty"}},
		"doctor": {{"--runtime-dir", dir.Path()}, {"--runtime-dir", t.TempDir(), "--cni-conf-dir", t.TempDir(), "--cni-bin-dir", t.TempDir()}},
	} {
		t.Run(command, func(t *testing.T) {
			closed, properties := closedSchema(t, command)
			for _, arguments := range runs {
				run := exec.CommandContext(t.Context(), root+"/bin/magic-ip-agent", append([]string{command, "-o", "json"}, arguments...)...)
				out, err := run.Output()
				if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
					t.Fatal(err)
				}
				printed, err := jsonschema.UnmarshalJSON(bytes.NewReader(out))
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				if err := closed.Validate(printed); err != nil {
					t.Errorf("%s %s: %v\n%s", command, arguments, err, out)
				}
				remove(properties, printed)
			}
			if len(properties) > 0 {
				t.Errorf("docs/%s.schema.json has properties that are in no output: %s", command, slices.Sorted(maps.Keys(properties)))
			}
		})
	}
}

// closedSchema is the documented schema without the leave to have more properties, and the names of its properties.
func closedSchema(t *testing.T, command string) (*jsonschema.Schema, map[string]bool) {
	t.Helper()
	path := fmt.Sprintf("%s/docs/%s.schema.json", root, command)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	document, err := jsonschema.UnmarshalJSON(strings.NewReader(string(data)))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	names := map[string]bool{}
	var walk func(value any)
	walk = func(value any) {
		object, isObject := value.(map[string]any)
		if !isObject {
			return
		}
		if properties, has := object["properties"].(map[string]any); has {
			object["additionalProperties"] = false
			for name := range properties {
				names[name] = true
			}
		}
		for _, below := range object {
			walk(below)
		}
	}
	walk(document)
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	if err := compiler.AddResource(path, document); err != nil {
		t.Fatal(err)
	}
	schema, err := compiler.Compile(path)
	if err != nil {
		t.Fatal(err)
	}
	return schema, names
}

// remove takes out the names that value has.
func remove(names map[string]bool, value any) {
	switch v := value.(type) {
	case map[string]any:
		for name, below := range v {
			delete(names, name)
			remove(names, below)
		}
	case []any:
		for _, below := range v {
			remove(names, below)
		}
	}
}
