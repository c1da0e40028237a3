package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/status"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// cniNode is a node with one network, whose list has an entry with these selectors (none where they are empty), and one agent.
func cniNode(t *testing.T, selectors string) *examination {
	t.Helper()
	e := &examination{stateRead: true}
	e.RuntimeDir, e.ConfDir, e.BinDir = t.TempDir(), t.TempDir(), t.TempDir()
	e.agents = []status.Agent{{Status: runtimedir.Status{Name: "a"}, MagicIPs: []status.MagicIP{magicIPOf("169.254.210.210", "app=echo")}}}
	ours := ""
	if selectors != "" {
		ours = fmt.Sprintf(`, {"type": %q, "runtimeDir": %q, "selectors": %s}`, entry.Type, e.RuntimeDir, selectors)
	}
	list := `{"cniVersion": "1.0.0", "name": "n", "plugins": [{"type": "bridge"}` + ours + `]}`
	if err := os.WriteFile(filepath.Join(e.ConfDir, "10-n.conflist"), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	return e
}

func magicIPOf(address, selector string) status.MagicIP {
	return status.MagicIP{MagicIP: runtimedir.MagicIP{
		Frontend: plan.Frontend{Address: netip.MustParseAddr(address), Protocol: plan.TCP, Port: 80}, Namespace: "default", Selector: selector,
	}}
}

func (e *examination) lines() string {
	var lines strings.Builder
	for _, f := range e.found {
		fmt.Fprintf(&lines, "%s %s: %s → %s\n", f.Level.mark(), f.Check, f.Text, f.Next)
	}
	return lines.String()
}

// TestWithoutPlugin: where pods are known by the API alone, as with the chart's cni.enabled=false, there is nothing to install; where
// they cannot be, or something was installed, there is.
func TestWithoutPlugin(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*examination)
		failed string // words of the first failure; empty where nothing has failed
	}{
		"pods are known by the API": {func(*examination) {}, ""},
		"no network":                {func(e *examination) { _ = os.Remove(filepath.Join(e.ConfDir, "10-n.conflist")) }, ""},
		"the agent does without the API": {func(e *examination) { e.agents[0].NoAPI = true },
			"plugin binary"},
		"the plugin has recorded a pod": {func(e *examination) { e.records = []runtimedir.Attachment{{Name: "echo"}} },
			"plugin binary"},
		"it is not known what the plugin has recorded": {func(e *examination) { e.stateRead = false },
			"plugin binary"},
		"an installer is at work": {func(e *examination) { install(t, e, runtimedir.Record{}) },
			"plugin binary"},
	} {
		t.Run(name, func(t *testing.T) {
			e := cniNode(t, "")
			test.change(e)
			e.cni()
			r := reportOf(e.found...)
			if test.failed == "" && (len(e.found) != 1 || r.Verdict.Level != OK || !strings.Contains(e.lines(), "no plugin is installed")) ||
				test.failed != "" && (r.Verdict.Level != Fail || !strings.HasPrefix(r.Verdict.Text, test.failed)) {
				t.Errorf("want a failure of %q:\n%s", test.failed, e.lines())
			}
		})
	}
}

func install(t *testing.T, e *examination, record runtimedir.Record) {
	t.Helper()
	installer := runtimedir.New(e.RuntimeDir).Installer("a")
	lock, err := installer.Lock()
	if err == nil {
		err = errors.Join(installer.WriteRecord(record), lock.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRecordedDirectories: the installer knows where the runtime of the node looks; flags outweigh it.
func TestRecordedDirectories(t *testing.T) {
	for name, test := range map[string]struct {
		conf, bin, conflist, binary string
		wantConf, wantBin           string
	}{
		"no installer":               {wantConf: "/etc/cni/net.d", wantBin: "/opt/cni/bin"},
		"k3s":                        {conflist: "/k3s/net.d/10-flannel.conflist", binary: "/k3s/cni/magic-ip-address", wantConf: "/k3s/net.d", wantBin: "/k3s/cni"},
		"a folder of a network":      {conflist: "/k3s/net.d/net/zz-magic-ip-address.conf", binary: "/k3s/cni/magic-ip-address", wantConf: "/k3s/net.d", wantBin: "/k3s/cni"},
		"no network yet":             {binary: "/k3s/cni/magic-ip-address", wantConf: "/etc/cni/net.d", wantBin: "/k3s/cni"},
		"directories that are given": {conf: "/conf", bin: "/bin", conflist: "/k3s/net.d/10-flannel.conflist", binary: "/k3s/cni/magic-ip-address", wantConf: "/conf", wantBin: "/bin"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &examination{Options: Options{RuntimeDir: t.TempDir(), ConfDir: test.conf, BinDir: test.bin}}
			if test.binary != "" {
				install(t, e, runtimedir.Record{Conflist: test.conflist, Binary: test.binary})
			}
			e.installed()
			if e.ConfDir != test.wantConf || e.BinDir != test.wantBin {
				t.Errorf("%s and %s, want %s and %s", e.ConfDir, e.BinDir, test.wantConf, test.wantBin)
			}
		})
	}
}

// TestUnservedSelectors: the installer leaves out what the configuration itself keeps from being served, and with the last selector the
// agent's key. That is not what is wrong then.
func TestUnservedSelectors(t *testing.T) {
	served, reserved, claimed := magicIPOf("169.254.210.210", "app=echo"), magicIPOf("169.254.169.254", "app=metadata"), magicIPOf("169.254.210.211", "app=echo")
	reserved.Reason, reserved.UnservedBy = "169.254.169.254 belongs to the instance metadata service", runtimedir.ByConfiguration
	claimed.Reason, claimed.UnservedBy = "169.254.210.211:80/tcp is claimed by agent b", runtimedir.ByAgent
	const echo, other = `[{"namespace": "default", "selector": "app=echo"}]`, `[{"namespace": "default", "selector": "app=other"}]`
	for name, test := range map[string]struct {
		selectors string
		magicIPs  []status.MagicIP
		failed    string
	}{
		"all are unserved, and no entry":           {"", []status.MagicIP{reserved}, ""},
		"all are unserved, and another's entry":    {`{"b": ` + echo + `}`, []status.MagicIP{reserved}, ""},
		"one is unserved":                          {`{"a": ` + echo + `}`, []status.MagicIP{served, reserved}, ""},
		"one is unserved, and a selector is amiss": {`{"a": ` + other + `}`, []status.MagicIP{served, reserved}, `it should be {"a":[{"namespace":"default","selector":"app=echo"}]}`},
		"one is unserved, and the key is missing":  {`{"b": ` + echo + `}`, []status.MagicIP{served, reserved}, `→ add {"a":[{"namespace":"default","selector":"app=echo"}]}`},
		"another agent has it":                     {`{"b": ` + echo + `}`, []status.MagicIP{claimed}, `has no key "a"`},
	} {
		t.Run(name, func(t *testing.T) {
			e := cniNode(t, test.selectors)
			e.agents[0].NoAPI, e.agents[0].MagicIPs = true, test.magicIPs
			install(t, e, runtimedir.Record{})
			if err := os.WriteFile(filepath.Join(e.BinDir, entry.Type), []byte("plugin"), 0o700); err != nil {
				t.Fatal(err)
			}
			e.cni()
			if failed := strings.Contains(e.lines(), "FAIL"); failed != (test.failed != "") || !strings.Contains(e.lines(), test.failed) {
				t.Errorf("want a failure of %q:\n%s", test.failed, e.lines())
			}
		})
	}
}
