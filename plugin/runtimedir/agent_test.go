package runtimedir_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

func frontend(port uint16) runtimedir.Frontend {
	return runtimedir.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: runtimedir.TCP, Port: port}
}

func podLabels(uid string, labels map[string]string) runtimedir.PodLabels {
	return runtimedir.PodLabels{PodID: runtimedir.PodID{Namespace: "default", Name: "pod-" + uid, UID: uid}, Labels: labels}
}

// TestLabelsOf: a UID alone says nothing of a pod of another name, except in what the version before has written.
func TestLabelsOf(t *testing.T) {
	pods := runtimedir.Pods{Labels: []runtimedir.PodLabels{podLabels("u", map[string]string{"app": "x"}), {PodID: runtimedir.PodID{UID: "old"}, Labels: map[string]string{}}}}
	for id, want := range map[runtimedir.PodID]bool{
		{Namespace: "default", Name: "pod-u", UID: "u"}:   true,
		{Namespace: "other", Name: "pod-u", UID: "u"}:     false,
		{Namespace: "default", Name: "pod-v", UID: "u"}:   false,
		{Namespace: "default", Name: "pod-u", UID: "v"}:   false,
		{Namespace: "default", Name: "any", UID: "old"}:   true,
		{Namespace: "default", Name: "pod-u", UID: "old"}: true,
	} {
		if got := pods.LabelsOf(id) != nil; got != want {
			t.Errorf("%+v: known %t, want %t", id, got, want)
		}
	}
}

func TestAgentFiles(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	agent := d.Agent("a")
	want := func(names ...string) {
		t.Helper()
		if got, err := d.Agents(); err != nil || !cmp.Equal(got, names, cmpopts.EquateEmpty()) {
			t.Errorf("Agents() = %v, %v, want %v", got, err, names)
		}
	}
	want()
	for _, read := range []func() error{
		func() error { _, err := agent.ReadStatus(); return err },
		func() error { _, err := agent.ReadClaims(); return err },
		func() error { _, err := agent.ReadPods(); return err },
		func() error { _, err := agent.ReadMemory(); return err },
		func() error { _, err := agent.Heartbeat(); return err },
		func() error { return agent.Renew(time.Now()) },
	} {
		if err := read(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("before anything is written: %v", err)
		}
	}
	lock, err := agent.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	want() // it has a directory with a lock, and has said nothing
	status := runtimedir.Status{Name: "a", PollInterval: "5s", MagicIPs: []runtimedir.MagicIP{{
		Frontend: frontend(80), Namespace: "default", Selector: "app=x", Action: "serve",
		Endpoints: []runtimedir.Endpoint{{Address: netip.MustParseAddrPort("10.0.0.1:8080"), Pod: "default/x", UID: "u", Recorded: true}},
	}, {Frontend: frontend(81), Reason: "claimed", Endpoints: []runtimedir.Endpoint{}}}}
	claims := []runtimedir.Claim{{Frontend: frontend(80), ClaimedAt: time.Unix(1, 0).UTC(), Served: true}, {Frontend: frontend(81)}}
	pods := runtimedir.Pods{Labels: []runtimedir.PodLabels{podLabels("u", map[string]string{"app": "x"}), podLabels("v", map[string]string{})}, Dead: []runtimedir.Key{{ContainerID: "c", IfName: "eth0"}}}
	memory := runtimedir.Memory{Servers: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Holds: []runtimedir.Hold{{Frontend: frontend(80), LostAt: 2 * time.Second}}, Records: []runtimedir.Attachment{attachment("c")}}
	dropped, err := agent.WritePods(pods)
	if err := errors.Join(err, agent.WriteStatus(status), agent.WriteClaims(claims), agent.WriteMemory(memory)); err != nil || dropped > 0 {
		t.Fatal(dropped, err)
	}
	want("a")
	status.Version, pods.Version, memory.Version = 1, 1, 1
	gotStatus, statusErr := agent.ReadStatus()
	gotClaims, claimsErr := agent.ReadClaims()
	gotPods, podsErr := agent.ReadPods()
	gotMemory, memoryErr := agent.ReadMemory()
	if err := errors.Join(statusErr, claimsErr, podsErr, memoryErr); err != nil {
		t.Fatal(err)
	}
	byValue := cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})
	for _, diff := range []string{
		cmp.Diff(&status, gotStatus, byValue), cmp.Diff(claims, gotClaims, byValue), cmp.Diff(&pods, gotPods), cmp.Diff(&memory, gotMemory, byValue),
	} {
		if diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
	}
	stamp := time.Now().Add(time.Hour).Truncate(time.Second)
	if err := agent.Renew(stamp); err != nil {
		t.Fatal(err)
	}
	if heartbeat, err := agent.Heartbeat(); err != nil || !heartbeat.Equal(stamp) {
		t.Errorf("heartbeat %v, want %v (%v)", heartbeat, stamp, err)
	}
	text, err := os.ReadFile(agent.StatusPath())
	if err != nil || !strings.Contains(string(text), `"ipAddress": "169.254.210.210",`) || strings.Contains(string(text), "Frontend") {
		t.Errorf("status.json (%v):\n%s", err, text)
	}
	if diff := cmp.Diff([]string{
		"agents/a/claims.json", "agents/a/live", "agents/a/lock", "agents/a/memory.json", "agents/a/pods.json", "agents/a/status.json",
	}, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	for _, name := range []string{"claims.json", "memory.json", "pods.json", "status.json"} {
		path := filepath.Join(dir, "agents/a", name)
		missing := func() bool {
			return os.Rename(path, path+".away") == nil && !agent.Complete() && os.Rename(path+".away", path) == nil
		}
		if !agent.Complete() || !missing() {
			t.Errorf("whether %s is there goes unnoticed", name)
		}
	}
	if err := agent.Leave(); err != nil {
		t.Fatal(err)
	}
	if agent.Complete() {
		t.Error("the files of an agent that has left are there")
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestReadRefuses(t *testing.T) {
	for name, data := range map[string]string{
		"garbage": "{", "no version": `{}`, "empty": "", "wrong type": `{"version":1,"magicIPs":3,"claims":3,"labels":3,"holds":3,"conflist":3,"attachments":3}`,
	} {
		for file := range readers("") {
			if strings.HasSuffix(file, ".log") {
				continue
			}
			dir := t.TempDir()
			put(t, filepath.Join(dir, file), data)
			var corrupt *runtimedir.CorruptError
			if err := readers(dir)[file](); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), filepath.Join(dir, file)) {
				t.Errorf("%s in %s: %v", name, file, err)
			}
			put(t, filepath.Join(dir, file), `{"attachments": 5, "magicIPs": "another shape", "version": 2}`)
			var newer *runtimedir.NewerVersionError
			if err := readers(dir)[file](); !errors.As(err, &newer) || newer.Version != 2 {
				t.Errorf("a newer version of %s: %v", file, err)
			}
		}
	}
}

// TestAgents: claims are written before the first status, and other agents must see them; what can be no agent's directory is no error,
// and what cannot be looked into is one that keeps none of the others from being listed.
func TestAgents(t *testing.T) {
	dir := t.TempDir()
	d := runtimedir.New(dir)
	claims, status, closed := d.Agent("claims"), d.Agent("status"), filepath.Join(dir, "agents/closed")
	if err := errors.Join(
		claims.WriteClaims(nil), status.WriteStatus(runtimedir.Status{}), d.Agent("pods").WriteMemory(runtimedir.Memory{}),
		os.Symlink("claims", filepath.Join(dir, "agents/link")), os.WriteFile(filepath.Join(dir, "agents/file"), nil, 0o600),
		d.Agent("foreign").WriteClaims(nil), d.Agent("closed").WriteClaims(nil), os.Chmod(closed, 0),
	); err != nil {
		t.Fatal(err)
	}
	want := []string{"claims", "foreign", "status"}
	if os.Chown(filepath.Join(dir, "agents/foreign"), 4242, 4242) == nil { // takes root
		want = []string{"claims", "status"}
	}
	var got []string
	err := withoutOverride(func() (err error) {
		got, err = d.Agents()
		return err
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("agents (-want +got):\n%s", diff)
	}
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), closed) {
		t.Errorf("%v, want that %s cannot be opened", err, closed)
	}
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Agents(); err != nil || !slices.Contains(got, "closed") {
		t.Errorf("Agents() = %v, %v, want closed among them", got, err)
	}
}

// withoutOverride runs f without the right of root to open what its mode closes.
func withoutOverride(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		header, sets := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
		err := unix.Capget(&header, &sets[0])
		if err == nil {
			sets[0].Effective &^= 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH
			err = unix.Capset(&header, &sets[0])
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// TestCorruptMemory is kept for whoever looks into it, and reported once.
func TestCorruptMemory(t *testing.T) {
	dir := t.TempDir()
	agent := runtimedir.New(dir).Agent("a")
	path := filepath.Join(dir, "agents/a/memory.json")
	put(t, path, "{")
	if _, err := agent.ReadMemory(); err == nil || !strings.Contains(err.Error(), "it is kept as "+path+".corrupt") {
		t.Errorf("%v", err)
	}
	if _, err := agent.ReadMemory(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the second time: %v", err)
	}
}

func TestPodsAreBounded(t *testing.T) {
	agent := runtimedir.New(t.TempDir()).Agent("a")
	many := map[string]string{}
	for i := range runtimedir.MaxLabels + 1 {
		many[fmt.Sprint(i)] = ""
	}
	large := map[string]string{"a": strings.Repeat("x", runtimedir.MaxLabelBytes)}
	keys := map[string]bool{"app": true, "a": true}
	for range many {
		for key := range many {
			keys[key] = true
		}
	}
	for _, labels := range []map[string]string{many, large} {
		if kept := runtimedir.KeepLabels(labels, keys); kept != nil {
			t.Errorf("%d labels are kept, want that they are not known", len(kept))
		}
	}
	if kept := runtimedir.KeepLabels(map[string]string{"app": "x", "b": "y"}, keys); !cmp.Equal(kept, map[string]string{"app": "x"}) {
		t.Errorf("kept %v", kept)
	}
	if kept := runtimedir.KeepLabels(map[string]string{"b": "y"}, keys); kept == nil || len(kept) > 0 {
		t.Errorf("kept %v, want that it is known to have none", kept)
	}
	if kept := runtimedir.KeepLabels(nil, keys); kept != nil {
		t.Errorf("kept %v of what is not known", kept)
	}

	pods := runtimedir.Pods{Labels: []runtimedir.PodLabels{podLabels("large", large), podLabels("many", many)}, Dead: make([]runtimedir.Key, 100_000)}
	for i := range 10_000 {
		pods.Labels = append(pods.Labels, podLabels(fmt.Sprintf("uid-%05d", i), map[string]string{"app.kubernetes.io/name": strings.Repeat("x", 63)}))
	}
	dropped, err := agent.WritePods(pods)
	if err != nil {
		t.Fatal(err)
	}
	got, err := agent.ReadPods()
	if err != nil {
		t.Fatal(err)
	}
	if got.LabelsOf(podLabels("many", nil).PodID) != nil || got.LabelsOf(podLabels("large", nil).PodID) != nil || got.LabelsOf(podLabels("uid-00000", nil).PodID) == nil || len(got.Labels)+dropped != 10_002 || len(got.Labels) < 1000 {
		t.Errorf("%d pods, %d dropped", len(got.Labels), dropped)
	}
	if len(got.Dead) != 4096 {
		t.Errorf("%d dead records", len(got.Dead))
	}
}

func FuzzAgent(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"a","magicIPs":[{"ipAddress":"10.0.0.1","protocol":"tcp","port":80,"endpoints":[{"address":"10.0.0.2:80"}]}],"claims":[{"port":1}],` +
		`"labels":{"u":{"a":"b"}},"dead":[{"containerID":"c"}],"records":[{"ips":["fe80::1%x"]}],"services":[{}],"notes":[""]}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		agent := runtimedir.New(dir).Agent("a")
		for _, name := range []string{"status", "claims", "pods", "memory"} {
			put(t, filepath.Join(dir, "agents/a", name+".json"), string(data))
		}
		status, statusErr := agent.ReadStatus()
		claims, claimsErr := agent.ReadClaims()
		pods, podsErr := agent.ReadPods()
		memory, memoryErr := agent.ReadMemory()
		// What can be read can be written.
		if statusErr == nil && agent.WriteStatus(*status) != nil || claimsErr == nil && agent.WriteClaims(claims) != nil || memoryErr == nil && agent.WriteMemory(*memory) != nil {
			t.Error("what was read is not written")
		}
		if podsErr == nil {
			if dropped, err := agent.WritePods(*pods); dropped > 0 || err != nil {
				t.Errorf("%d pods dropped, %v", dropped, err)
			}
		}
	})
}
