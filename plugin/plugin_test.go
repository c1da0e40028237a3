package plugin_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/magic-ip-address/magic-ip-address/plugin"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const asPlugin = "TEST_BINARY_IS_THE_PLUGIN"

// TestMain lets the test binary be the plugin, as main makes it: a runtime executes one process per command.
func TestMain(m *testing.M) {
	if os.Getenv(asPlugin) != "" {
		p := plugin.Plugin{Stdout: os.Stdout, Stderr: os.Stderr}
		skel.PluginMainFuncs(p.Funcs(), plugin.Versions(), "about")
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const (
	// podArgs is the CNI_ARGS of containerd for the pod kube-system/apm-x.
	podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=apm-x;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1"
	// otherArgs is of a pod in a namespace that no selector names.
	otherArgs = "K8S_POD_NAMESPACE=default;K8S_POD_NAME=shop-y;K8S_POD_UID=u2"
	// bridgeResult is what the bridge plugin returns at 1.0.0, with a field that no version knows.
	bridgeResult = `{"cniVersion": "1.0.0",  "interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/t"}],
		"ips": [{"interface": 2, "address": "10.244.1.7/24", "gateway": "10.244.1.1"}], "routes": [{"dst": "0.0.0.0/0"}], "later": {"x": 1e3}}`
)

// values are keys of a network configuration.
type values map[string]any

// command is one execution of the plugin.
type command struct {
	name        string
	containerID string // c1
	ifName      string // eth0
	netns       string
	args        string
	override    string // CNI_NETNS_OVERRIDE
	conf        values
}

// conf is a network configuration with its usual values, but for those given; nil leaves a key out.
func conf(dir string, given values) values {
	c := values{
		"cniVersion": "1.0.0",
		"name":       "pods",
		"type":       "magic-ip-address",
		"runtimeDir": dir,
		"selectors":  selectors("app=apm-server"),
		"prevResult": json.RawMessage(bridgeResult),
	}
	maps.Copy(c, given)
	maps.DeleteFunc(c, func(_ string, value any) bool { return value == nil })
	return c
}

// selectors is the value of the key for one agent in one namespace.
func selectors(selector string) values {
	return values{"kube-system.magic": []values{{"namespace": "kube-system", "selector": selector}}}
}

// encode is the configuration in JSON, with prevResult as it is: a runtime need not write it compactly.
func (v values) encode(t testing.TB) []byte {
	t.Helper()
	rest := maps.Clone(v)
	raw, verbatim := rest["prevResult"].(json.RawMessage)
	delete(rest, "prevResult")
	data, err := json.Marshal(rest)
	if err != nil {
		t.Fatal(err)
	}
	if verbatim {
		data = slices.Concat([]byte(`{"prevResult": `), raw, []byte(`, `), data[1:])
	} else if other, ok := v["prevResult"]; ok {
		value, err := json.Marshal(other)
		if err != nil {
			t.Fatal(err)
		}
		data = slices.Concat([]byte(`{"prevResult": `), value, []byte(`, `), data[1:])
	}
	return data
}

func (c command) cmd(t testing.TB) *exec.Cmd {
	t.Helper()
	if c.containerID == "" {
		c.containerID = "c1"
	}
	if c.ifName == "" {
		c.ifName = "eth0"
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{
		asPlugin + "=1", "CNI_COMMAND=" + c.name, "CNI_CONTAINERID=" + c.containerID, "CNI_NETNS=" + c.netns,
		"CNI_IFNAME=" + c.ifName, "CNI_ARGS=" + c.args, "CNI_PATH=/opt/cni/bin", "CNI_NETNS_OVERRIDE=" + c.override,
		"GORACE=atexit_sleep_ms=0", // by default, the race detector holds up each exit for a second
	}
	cmd.Stdin = bytes.NewReader(c.conf.encode(t))
	return cmd
}

// run returns what the runtime sees of the command: its standard output, or the error that it prints there. A command that ends
// because its time is over is executed again: a machine may have none for it.
func (c command) run(t testing.TB) (string, *types.Error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	var err error
	for range 10 {
		stdout.Reset()
		stderr.Reset()
		cmd := c.cmd(t)
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err = cmd.Run(); !strings.Contains(stderr.String(), "does not respond") {
			break
		}
	}
	if stderr.Len() > 0 {
		t.Logf("%s: stderr: %s", c.name, &stderr)
	}
	if err == nil {
		return stdout.String(), nil
	}
	var exit *exec.ExitError
	var failure types.Error
	if !errors.As(err, &exit) || json.Unmarshal(stdout.Bytes(), &failure) != nil {
		t.Fatalf("%s: %v, and prints %q", c.name, err, &stdout)
	}
	return "", &failure
}

// ok runs the command, which is to succeed.
func (c command) ok(t testing.TB) string {
	t.Helper()
	stdout, err := c.run(t)
	if err != nil {
		t.Fatalf("%s: code %d: %v", c.name, err.Code, err)
	}
	return stdout
}

func add(conf values) command {
	return command{name: "ADD", netns: "/run/netns/t", args: podArgs, conf: conf}
}

func del(conf values) command {
	return command{name: "DEL", netns: "/run/netns/t", args: podArgs, conf: conf}
}

func (c command) of(containerID string) command {
	c.containerID = containerID
	return c
}

func read(t testing.TB, dir string) []runtimedir.Attachment {
	t.Helper()
	file, err := runtimedir.New(dir).ReadState()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return file.Attachments
}

// recorded is the state file in one line per record, container and addresses.
func recorded(t testing.TB, dir string) []string {
	t.Helper()
	attachments := read(t, dir)
	var lines []string
	for _, a := range attachments {
		line := a.ContainerID
		for _, addr := range a.IPs {
			line += " " + addr.String()
		}
		lines = append(lines, line)
	}
	return lines
}

func wantRecorded(t testing.TB, dir string, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, recorded(t, dir)); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}

func wantLog(t testing.TB, dir string, want ...string) {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(dir, "plugin", "plugin.log"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, part := range want {
		if !strings.Contains(string(log), part) {
			t.Errorf("plugin.log does not have %q:\n%s", part, log)
		}
	}
	if len(want) == 0 && len(log) > 0 {
		t.Errorf("plugin.log is to be empty:\n%s", log)
	}
}

func wantNoDir(t testing.TB, dir string) {
	t.Helper()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v, want that it does not exist", dir, err)
	}
}

func put(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// agent is a live agent, or one that has stopped, and what it reports of pods.
func agent(t *testing.T, dir, name string, live bool, pods runtimedir.Pods) {
	t.Helper()
	agent := runtimedir.New(dir).Agent(name)
	lock, err := agent.Lock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lock.Close() })
	if _, err := agent.WritePods(pods); err != nil {
		t.Fatal(err)
	}
	if err := agent.WriteStatus(runtimedir.Status{}); err != nil {
		t.Fatal(err)
	}
	if !live {
		_ = lock.Close()
	}
}

// reported is what an agent reports that knows these labels of the pod of podArgs; nil: it does not know the pod.
func reported(labels map[string]string) (pods runtimedir.Pods) {
	if labels != nil {
		id := runtimedir.PodID{Namespace: "kube-system", Name: "apm-x", UID: "u1"}
		pods.Labels = []runtimedir.PodLabels{{PodID: id, Labels: labels}}
	}
	return pods
}

func TestVersion(t *testing.T) {
	got := command{name: "VERSION"}.ok(t)
	want := `{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("VERSION (-want +got):\n%s", diff)
	}
}

func TestLifeOfAPod(t *testing.T) {
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for _, pod := range []struct{ name, args string }{{"selected", podArgs}, {"not selected", otherArgs}} {
			t.Run(version+" "+pod.name, func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(t.TempDir(), "run")
				prevResult := strings.Replace(bridgeResult, "1.0.0", version, 1)
				c := conf(dir, values{"cniVersion": version, "prevResult": json.RawMessage(prevResult)})
				add := add(c)
				add.args = pod.args
				if diff := cmp.Diff(prevResult, add.ok(t)); diff != "" {
					t.Errorf("result (-want +got):\n%s", diff)
				}
				if pod.name == "selected" {
					wantRecorded(t, dir, "c1 10.244.1.7")
				} else {
					wantNoDir(t, dir)
				}
				if version >= "0.4.0" {
					check := add
					check.name = "CHECK"
					check.ok(t)
				}
				// The same DEL up to three times, the later ones with less.
				again := del(conf(dir, values{"cniVersion": version, "prevResult": nil}))
				again.netns = ""
				again.args = ""
				for _, del := range []command{del(c), again, again} {
					if out := del.ok(t); out != "" {
						t.Errorf("DEL prints %q", out)
					}
				}
				wantRecorded(t, dir)
				wantLog(t, dir)
				if pod.name != "selected" {
					wantNoDir(t, dir)
				}
			})
		}
	}
}

func TestAddConvertsAResultOfAnotherVersion(t *testing.T) {
	dir := t.TempDir()
	c := conf(dir, values{"cniVersion": "0.4.0"})
	var got struct {
		CNIVersion string
		IPs        []struct{ Version, Address string }
	}
	if err := json.Unmarshal([]byte(add(c).ok(t)), &got); err != nil {
		t.Fatal(err)
	}
	if got.CNIVersion != "0.4.0" || len(got.IPs) != 1 || got.IPs[0].Version != "4" || got.IPs[0].Address != "10.244.1.7/24" {
		t.Errorf("result is %+v, want one of version 0.4.0, whose ips say that they are of version 4", got)
	}
	wantRecorded(t, dir, "c1 10.244.1.7")

	c["prevResult"] = json.RawMessage(`{"cniVersion": "7.0.0"}`)
	if _, err := add(c).run(t); err == nil || err.Code != types.ErrIncompatibleCNIVersion {
		t.Errorf("a version that nobody knows: %v, want code 1", err)
	}
}

// Before 1.0.0 a result need not carry its version.
func TestAddPassesAResultWithoutVersion(t *testing.T) {
	dir := t.TempDir()
	const result = `{"ips": [{"version": "4", "address": "10.244.1.7/24"}], "dns": {}}`
	got := add(conf(dir, values{"cniVersion": "0.3.1", "prevResult": json.RawMessage(result)})).ok(t)
	if diff := cmp.Diff(result, got); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	wantRecorded(t, dir, "c1 10.244.1.7")
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	add(conf(dir, values{"runtimeConfig": values{"labels": values{"app": "apm-server", "tier": "back"}}})).ok(t)
	got := read(t, dir)
	if len(got) != 1 {
		t.Fatalf("records %v", got)
	}
	if got[0].AddedAt.IsZero() {
		t.Error("addedAt is missing")
	}
	got[0].AddedAt = runtimedir.Attachment{}.AddedAt
	want := runtimedir.Attachment{
		ContainerID: "c1", IfName: "eth0", Network: "pods", Namespace: "kube-system", Name: "apm-x", UID: "u1",
		Labels: map[string]string{"app": "apm-server"},
		IPs:    []netip.Addr{netip.MustParseAddr("10.244.1.7")},
		Netns:  "/run/netns/t", // and no host interface: there is no veth1 here
	}
	if diff := cmp.Diff(want, got[0], cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
}

func TestWhichPodsAreRecorded(t *testing.T) {
	type labels = map[string]string
	type list = []values
	label := func(key, value string) values { return values{"key": key, "value": value} }
	const (
		no      = "not recorded"
		unknown = "recorded without labels"
	)
	tests := []struct {
		name      string
		args      string // podArgs
		selectors any    // app=apm-server in kube-system
		conf      values
		agent     labels // what the live agent kube-system.magic knows of the pod
		stopped   bool   // the agent has stopped
		want      any    // no, unknown or the labels recorded
		log       string
	}{
		{name: "labels not known", want: unknown},
		{name: "labels not known, and a wrong selector", selectors: selectors("a in ("), want: unknown, log: "does not parse"},
		{name: "runtimeConfig matches", conf: values{"runtimeConfig": values{"labels": labels{"app": "apm-server"}}}, want: labels{"app": "apm-server"}},
		{name: "runtimeConfig does not match", conf: values{"runtimeConfig": values{"labels": labels{"app": "other"}}}, want: no},
		{name: "runtimeConfig says none", conf: values{"runtimeConfig": values{"labels": labels{}}}, want: no},
		{name: "none, and a selector for that", selectors: selectors("!app"), conf: values{"runtimeConfig": values{"labels": labels{}}}, want: labels{}},
		{name: "runtimeConfig of other capabilities", conf: values{"runtimeConfig": values{"portMappings": []int{}}}, want: unknown},
		{name: "runtimeConfig null", conf: values{"runtimeConfig": json.RawMessage("null")}, want: unknown},
		{name: "runtimeConfig of another shape", conf: values{"runtimeConfig": values{"labels": "app=other"}}, want: unknown, log: "ignored"},
		{name: "args match", conf: values{"args": values{"cni": values{"labels": list{label("app", "apm-server"), label("b", "")}}}}, want: labels{"app": "apm-server"}},
		{name: "args do not match", conf: values{"args": values{"cni": values{"labels": list{label("b", "c")}}}}, want: no},
		{name: "args of another shape", conf: values{"args": "odd"}, want: unknown, log: "ignored"},
		{name: "runtimeConfig comes before args", conf: values{
			"runtimeConfig": values{"labels": labels{"app": "apm-server"}},
			"args":          values{"cni": values{"labels": list{label("app", "other")}}},
		}, want: labels{"app": "apm-server"}},
		{name: "agent matches", agent: labels{"app": "apm-server"}, want: labels{"app": "apm-server"}},
		{name: "agent does not match", agent: labels{"app": "other"}, want: no},
		{name: "agent has stopped", agent: labels{"app": "other"}, stopped: true, want: unknown},
		{name: "agent without a selector here", selectors: values{"other": list{{"namespace": "kube-system"}}}, agent: labels{"app": "other"}, want: unknown},
		{name: "args come before the agent", agent: labels{"app": "other"}, conf: values{"args": values{"cni": values{"labels": list{label("app", "apm-server")}}}}, want: labels{"app": "apm-server"}},
		{name: "any of several selectors", selectors: values{
			"a": list{{"namespace": "kube-system", "selector": "app=x"}, {"namespace": "kube-system", "selector": "app in (y, z)"}},
			"b": list{{"namespace": "default", "selector": "app=apm-server"}, {"namespace": "kube-system", "selector": "app,app!=x"}},
		}, conf: values{"runtimeConfig": values{"labels": labels{"app": "q"}}}, want: labels{"app": "q"}},
		{name: "none of several selectors", selectors: values{
			"a": list{{"namespace": "kube-system", "selector": "app=x"}, {"namespace": "kube-system", "selector": "app in (y, z)"}},
			"b": list{{"namespace": "default", "selector": "app=q"}},
		}, conf: values{"runtimeConfig": values{"labels": labels{"app": "q"}}}, want: no},
		{name: "a wrong selector beside one that does not match", selectors: values{
			"a": list{{"namespace": "kube-system", "selector": "a in ("}},
			"b": list{{"namespace": "kube-system", "selector": "app=x"}},
		}, conf: values{"runtimeConfig": values{"labels": labels{"app": "q"}}}, want: labels{"app": "q"}, log: `agent=a selector="a in ("`},
		{name: "a wrong selector in another namespace", selectors: values{
			"a": list{{"namespace": "other", "selector": "a in ("}, {"namespace": "kube-system", "selector": "app=x"}},
		}, conf: values{"runtimeConfig": values{"labels": labels{"app": "q"}}}, want: no},
		{name: "every namespace", args: otherArgs, selectors: values{"a": list{{"namespace": "*", "selector": "app=x"}}}, want: unknown},
		{name: "every namespace, other labels", args: otherArgs, selectors: values{"a": list{{"namespace": "*", "selector": "app=x"}}}, conf: values{"runtimeConfig": values{"labels": labels{"app": "q"}}}, want: no},
		{name: "no identity", args: "IgnoreUnknown=1", want: no},
		{name: "no identity, every namespace", args: "IgnoreUnknown=1", selectors: values{"a": list{{"namespace": "*", "selector": ""}}}, want: unknown},
		{name: "no selectors", selectors: values{}, want: no},
		{name: "odd arguments", args: "K8S_POD_NAMESPACE=kube-system;;=;x;K8S_POD_NAME;a=b=c", want: unknown},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if test.agent != nil {
				agent(t, dir, "kube-system.magic", !test.stopped, reported(test.agent))
			}
			c := conf(dir, test.conf)
			if test.selectors != nil {
				c["selectors"] = test.selectors
			}
			add := add(c)
			if test.args != "" {
				add.args = test.args
			}
			if diff := cmp.Diff(bridgeResult, add.ok(t)); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
			attachments := read(t, dir)
			var got any = no
			if len(attachments) == 1 {
				got = attachments[0].Labels
				if attachments[0].Labels == nil {
					got = unknown
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("labels recorded (-want +got):\n%s", diff)
			}
			if test.log == "" {
				wantLog(t, dir)
			} else {
				wantLog(t, dir, test.log, "command=ADD", "containerID=c1")
			}
		})
	}
}

func TestUnusableConfiguration(t *testing.T) {
	namespace := func(namespace any) values { return values{"a": []values{{"namespace": namespace}}} }
	tests := []struct {
		name string
		conf values
		code uint
		want string
	}{
		{"runtimeDir of another type", values{"runtimeDir": 5}, types.ErrDecodingFailure, "runtimeDir: must be a string"},
		{"relative runtimeDir", values{"runtimeDir": "run"}, types.ErrInvalidNetworkConfig, `runtimeDir: "run" is not an absolute path`},
		{"empty runtimeDir", values{"runtimeDir": ""}, types.ErrInvalidNetworkConfig, `runtimeDir: "" is not an absolute path`},
		{"selectors of another type", values{"selectors": "app=x"}, types.ErrDecodingFailure, "selectors: must be an object"},
		{"selectors of an agent no list", values{"selectors": values{"a": "app=x"}}, types.ErrDecodingFailure, "selectors: must be an object"},
		{"selector of another type", values{"selectors": values{"a": []any{"app=x"}}}, types.ErrDecodingFailure, "selectors: must be an object"},
		{"namespace of another type", values{"selectors": namespace(5)}, types.ErrDecodingFailure, "selectors: must be an object"},
		{"empty namespace", values{"selectors": namespace("")}, types.ErrInvalidNetworkConfig, `selectors: "a"[0].namespace is empty: must be a namespace, or "*"`},
		{"no namespace", values{"selectors": namespace(nil)}, types.ErrInvalidNetworkConfig, `selectors: "a"[0].namespace is empty`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			add(conf(dir, nil)).of("before").ok(t)

			unusable := conf(dir, test.conf)
			unusable["cniVersion"] = "1.1.0"
			unusable["cni.dev/valid-attachments"] = []values{}
			for _, name := range []string{"ADD", "CHECK", "GC", "STATUS"} {
				_, err := command{name: name, netns: "/run/netns/t", args: podArgs, conf: unusable}.run(t)
				if err == nil || err.Code != test.code || !strings.Contains(err.Msg, test.want) {
					t.Errorf("%s: %v, want code %d, %q", name, err, test.code, test.want)
				}
			}
			wantRecorded(t, dir, "before 10.244.1.7")

			// DEL does what it still can.
			del(unusable).of("before").ok(t)
			if _, ok := test.conf["runtimeDir"]; !ok {
				wantRecorded(t, dir)
			}
		})
	}
}

// TestSkeletonRefuses: what fails before or after the plugin's own work, as with every plugin that is built on CNI's skeleton.
func TestSkeletonRefuses(t *testing.T) {
	const own = "/proc/self/ns/net"
	for name, test := range map[string]struct {
		change func(c *command)
		code   uint // of ADD
		del    uint // of DEL; 0: it succeeds
	}{
		"a version that the plugin does not speak": {func(c *command) { c.conf["cniVersion"] = "0.2.0" }, types.ErrIncompatibleCNIVersion, types.ErrIncompatibleCNIVersion},
		"no network name":                          {func(c *command) { delete(c.conf, "name") }, types.ErrInvalidNetworkConfig, types.ErrInvalidNetworkConfig},
		"network name":                             {func(c *command) { c.conf["name"] = "a/b" }, types.ErrInvalidNetworkConfig, types.ErrInvalidNetworkConfig},
		"container ID":                             {func(c *command) { c.containerID = "../c1" }, types.ErrInvalidEnvironmentVariables, types.ErrInvalidEnvironmentVariables},
		"interface name":                           {func(c *command) { c.ifName = "eth0:1" }, types.ErrInvalidEnvironmentVariables, types.ErrInvalidEnvironmentVariables},
		"no network namespace":                     {func(c *command) { c.netns = "" }, types.ErrInvalidEnvironmentVariables, 0},
		"the plugin's own network namespace":       {func(c *command) { c.netns = own }, types.ErrInvalidNetNS, types.ErrInvalidNetNS},
		"its own, and overridden":                  {func(c *command) { c.netns, c.override = own, "1" }, 0, 0},
		"a network namespace that is not there":    {func(c *command) { c.netns = "/nowhere" }, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, c := range []struct {
				command
				code uint
			}{{add(conf(t.TempDir(), nil)), test.code}, {del(conf(t.TempDir(), nil)), test.del}} {
				test.change(&c.command)
				out, err := c.cmd(t).Output()
				// Its own network namespace the skeleton looks at last: the result has been printed then.
				if (err != nil) != (c.code != 0) || err != nil && !strings.Contains(string(out), fmt.Sprintf(`"code": %d,`, c.code)) {
					t.Errorf("%s: %v, want code %d (0: success):\n%s", c.name, err, c.code, out)
				}
			}
		})
	}
}

func TestMissingPrevResult(t *testing.T) {
	for name, test := range map[string]struct {
		prevResult any
		code       uint
	}{
		"absent":          {nil, types.ErrInvalidNetworkConfig},
		"null":            {json.RawMessage("null"), types.ErrInvalidNetworkConfig},
		"of another type": {"10.0.0.1", types.ErrDecodingFailure},
	} {
		for _, args := range []string{podArgs, otherArgs} {
			for _, command := range []string{"ADD", "CHECK"} {
				t.Run(command+" "+name, func(t *testing.T) {
					dir := filepath.Join(t.TempDir(), "run")
					c := add(conf(dir, values{"prevResult": test.prevResult}))
					c.name, c.args = command, args
					_, err := c.run(t)
					if err == nil || err.Code != test.code || !strings.Contains(err.Msg, "prevResult") {
						t.Errorf("%v, want code %d that names prevResult", err, test.code)
					}
					wantNoDir(t, dir)
				})
			}
		}
	}
}

func TestDel(t *testing.T) {
	t.Run("before any ADD", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "run")
		del(conf(dir, nil)).ok(t)
		wantNoDir(t, dir)
	})
	t.Run("without a state file", func(t *testing.T) {
		dir := t.TempDir()
		del(conf(dir, nil)).ok(t)
		if diff := cmp.Diff(map[string]string{}, files(t, dir)); diff != "" {
			t.Errorf("files (-want +got):\n%s", diff)
		}
	})
	t.Run("of a pod never added", func(t *testing.T) {
		dir := t.TempDir()
		add(conf(dir, nil)).ok(t)
		if err := os.Remove(filepath.Join(dir, "plugin", "state.lock")); err != nil {
			t.Fatal(err)
		}
		del(conf(dir, nil)).of("c2").ok(t)
		second := del(conf(dir, nil))
		second.ifName = "net1"
		second.ok(t)
		wantRecorded(t, dir, "c1 10.244.1.7")
		if _, err := os.Stat(filepath.Join(dir, "plugin", "state.lock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the lock was taken: %v", err)
		}
	})
	t.Run("after the selectors are gone", func(t *testing.T) {
		dir := t.TempDir()
		add(conf(dir, nil)).ok(t)
		del(conf(dir, values{"selectors": nil})).ok(t)
		wantRecorded(t, dir)
	})
	t.Run("after its address went to another pod", func(t *testing.T) {
		dir := t.TempDir()
		add(conf(dir, nil)).of("a").ok(t)
		add(conf(dir, nil)).of("b").ok(t)
		wantRecorded(t, dir, "a 10.244.1.7", "b 10.244.1.7")
		del(conf(dir, nil)).of("a").ok(t)
		wantRecorded(t, dir, "b 10.244.1.7")
	})
}

func TestAddAgainReplaces(t *testing.T) {
	dir := t.TempDir()
	add(conf(dir, nil)).ok(t)
	add(conf(dir, nil)).of("c2").ok(t)
	second := add(conf(dir, values{"prevResult": values{"cniVersion": "1.0.0", "ips": []values{{"address": "10.244.1.8/24"}}}}))
	second.ok(t)
	wantRecorded(t, dir, "c2 10.244.1.7", "c1 10.244.1.8")
	second.ifName = "net1" // another interface of the same sandbox
	second.ok(t)
	wantRecorded(t, dir, "c2 10.244.1.7", "c1 10.244.1.8", "c1 10.244.1.8")
}

// A record that an agent reports as dead goes when something is written anyway: if its host interface is gone too, or
// another link has its name.
func TestDead(t *testing.T) {
	for _, test := range []struct {
		name string
		live bool
		run  func(conf values) command
		want []string
	}{
		{"ADD", true, func(c values) command { return add(c).of("new") }, []string{"c1", "standing", "unknown", "new"}},
		{"ADD of what was believed dead", true, func(c values) command { return add(c).of("dead") }, []string{"c1", "standing", "unknown", "dead"}},
		{"DEL", true, del, []string{"standing", "unknown"}},
		{"DEL of another pod", true, func(c values) command { return del(c).of("other") }, []string{"dead", "replaced", "c1", "standing", "unknown"}},
		{"GC", true, func(c values) command { return command{name: "GC", conf: c} }, []string{"c1", "standing", "unknown"}},
		{"ADD, the agent has stopped", false, func(c values) command { return add(c).of("new") }, []string{"dead", "replaced", "c1", "standing", "unknown", "new"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			valid := []values{{"containerID": "c1", "ifname": "eth0"}}
			var reported []runtimedir.Key
			record := func(id, link string, index int) {
				key := runtimedir.Key{ContainerID: id, IfName: "eth0"}
				_, err := runtimedir.New(dir).Update(time.Minute, nil, runtimedir.Attachment{ContainerID: id, IfName: "eth0", Network: "pods", HostInterface: link, HostIfIndex: index})
				if err != nil {
					t.Fatal(err)
				}
				reported = append(reported, key)
				valid = append(valid, values{"containerID": id, "ifname": "eth0"})
			}
			c := conf(dir, values{"cniVersion": "1.1.0"})
			record("dead", "no-such-link", 0)
			record("replaced", "lo", 4711)
			add(c).ok(t)
			record("standing", "lo", 1)
			record("unknown", "", 0)
			c["cni.dev/valid-attachments"] = valid
			agent(t, dir, "any", test.live, runtimedir.Pods{Dead: append(reported, runtimedir.Key{ContainerID: "c1", IfName: "net1"})})
			test.run(c).ok(t)
			var got []string
			for _, line := range recorded(t, dir) {
				id, _, _ := strings.Cut(line, " ")
				got = append(got, id)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
		})
	}
}

// An agent decides for itself alone: what it reports of a pod counts for its own selectors.
func TestAgentsSpeakForThemselves(t *testing.T) {
	type labels = map[string]string
	both := values{
		"a": []values{{"namespace": "kube-system", "selector": "app=apm-server"}},
		"b": []values{{"namespace": "kube-system", "selector": "app=apm-server,tier!=front"}},
	}
	for _, test := range []struct {
		name string
		a, b labels // nil: it does not know the pod
		want any
	}{
		{"neither knows", nil, nil, labels(nil)},
		{"one knows that it does not match", labels{"app": "x"}, nil, labels(nil)},
		{"both know", labels{"app": "apm-server", "tier": "back"}, labels{"app": "apm-server"}, labels{"app": "apm-server"}},
		{"both know that it does not match", labels{"app": "x"}, labels{"app": "x"}, "not recorded"},
		{"one keys of the other", labels{"app": "apm-server"}, labels{"app": "apm-server", "tier": "back"}, labels{"app": "apm-server", "tier": "back"}},
		{"they contradict each other", labels{"app": "apm-server"}, labels{"app": "x"}, labels(nil)},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, known := range map[string]labels{"a": test.a, "b": test.b} {
				agent(t, dir, name, true, reported(known))
			}
			add(conf(dir, values{"selectors": both})).ok(t)
			var got any = "not recorded"
			if attachments := read(t, dir); len(attachments) == 1 {
				got = attachments[0].Labels
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("labels recorded (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGC(t *testing.T) {
	valid := func(ids ...string) []values {
		list := []values{}
		for _, id := range ids {
			list = append(list, values{"containerID": id, "ifname": "eth0"})
		}
		return list
	}
	all := []string{"a 10.244.1.7", "b 10.244.1.7", "other 10.244.1.7"}
	for _, test := range []struct {
		name  string
		valid any
		code  uint
		want  []string
	}{
		{"some", valid("b", "unheard-of"), 0, []string{"b 10.244.1.7", "other 10.244.1.7"}},
		{"all", valid("a", "b"), 0, all},
		{"none", valid(), 0, []string{"other 10.244.1.7"}},
		{"null", json.RawMessage("null"), 0, []string{"other 10.244.1.7"}},
		{"another interface", []values{{"containerID": "a", "ifname": "net1"}}, 0, []string{"other 10.244.1.7"}},
		{"absent", nil, 0, all},
		{"of another type", "a", types.ErrDecodingFailure, all},
		{"without container", []values{{"ifname": "eth0"}}, types.ErrInvalidNetworkConfig, all},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			add(conf(dir, nil)).of("a").ok(t)
			add(conf(dir, nil)).of("b").ok(t)
			add(conf(dir, values{"name": "other-network"})).of("other").ok(t)

			gc := command{name: "GC", conf: conf(dir, values{"cniVersion": "1.1.0", "prevResult": nil, "cni.dev/valid-attachments": test.valid})}
			_, err := gc.run(t)
			if test.code == 0 && err != nil {
				t.Errorf("GC: %v", err)
			}
			if test.code != 0 && (err == nil || err.Code != test.code || !strings.Contains(err.Msg, "cni.dev/valid-attachments")) {
				t.Errorf("GC: %v, want code %d that names the key", err, test.code)
			}
			wantRecorded(t, dir, test.want...)
		})
	}
	t.Run("before any ADD", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "run")
		command{name: "GC", conf: conf(dir, values{"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid()})}.ok(t)
		wantNoDir(t, dir)
	})
	t.Run("after everything was removed", func(t *testing.T) {
		dir := t.TempDir()
		if err := runtimedir.New(dir).MakeState(); err != nil {
			t.Fatal(err)
		}
		c := conf(dir, values{"cniVersion": "1.1.0", "cni.dev/valid-attachments": valid()})
		command{name: "GC", conf: c}.ok(t)
		del(c).ok(t)
		if left := files(t, dir); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestCheck(t *testing.T) {
	other := values{"prevResult": json.RawMessage(strings.Replace(bridgeResult, "10.244.1.7", "10.244.1.8", 1))}
	for _, test := range []struct {
		name   string
		before func(t *testing.T, dir string)
		conf   values
		want   string // "" is: success
	}{
		{"recorded", func(t *testing.T, dir string) { add(conf(dir, nil)).ok(t) }, nil, ""},
		{"other address recorded", func(t *testing.T, dir string) { add(conf(dir, nil)).ok(t) }, other, "[10.244.1.7] recorded, and [10.244.1.8]"},
		{"only another container recorded", func(t *testing.T, dir string) { add(conf(dir, nil)).of("c2").ok(t) }, other, ""},
		{"nothing recorded", func(*testing.T, string) {}, nil, ""},
		{"corrupt", func(t *testing.T, dir string) { put(t, filepath.Join(dir, "plugin", "state.json"), "{") }, nil, ""},
		{"newer", func(t *testing.T, dir string) { put(t, filepath.Join(dir, "plugin", "state.json"), `{"version": 2}`) }, nil, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			test.before(t, dir)
			before := files(t, dir)
			check := add(conf(dir, test.conf))
			check.name = "CHECK"
			out, err := check.run(t)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Msg, test.want)) {
				t.Errorf("CHECK: %v, want %q", err, test.want)
			}
			if out != "" {
				t.Errorf("CHECK prints %q", out)
			}
			if diff := cmp.Diff(before, files(t, dir)); diff != "" {
				t.Errorf("CHECK changes nothing (-before +after):\n%s", diff)
			}
		})
	}
}

// files is the content of the files below a directory.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	content := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		content[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestStatus(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	// One agent's wrong selector, and a runtime dir that does not exist, leave the node ready.
	c := conf(dir, values{"cniVersion": "1.1.0", "prevResult": nil, "selectors": selectors("a in (")})
	if out := (command{name: "STATUS", conf: c}).ok(t); out != "" {
		t.Errorf("STATUS prints %q", out)
	}
	wantNoDir(t, dir)
}
