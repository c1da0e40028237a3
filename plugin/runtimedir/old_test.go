package runtimedir_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const name = "default.magic-ip"

// before is a runtime directory that the version before has written (testdata/before is what its code wrote), as an upgrade
// finds it: kubelet has made the directories of the new containers.
func before(t *testing.T) (dir string, d runtimedir.Dir) {
	t.Helper()
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("testdata/before")); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{"plugin", "agents/" + name, "install/" + name} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, folder), 0o755); err != nil { // the umask
			t.Fatal(err)
		}
	}
	return dir, runtimedir.New(dir)
}

// knowledge is all that can be read of the agent.
type knowledge struct {
	Status  *runtimedir.Status
	Claims  []runtimedir.Claim
	Pods    *runtimedir.Pods
	Memory  *runtimedir.Memory
	Record  *runtimedir.Record
	Records []string
}

func know(t *testing.T, d runtimedir.Dir) knowledge {
	t.Helper()
	var k knowledge
	var errs [6]error
	k.Status, errs[0] = d.Agent(name).ReadStatus()
	k.Claims, errs[1] = d.Agent(name).ReadClaims()
	k.Pods, errs[2] = d.Agent(name).ReadPods()
	k.Memory, errs[3] = d.Agent(name).ReadMemory()
	k.Record, errs[4] = d.Installer(name).ReadRecord()
	file, err := d.ReadState()
	errs[5] = err
	for _, attachment := range file.Attachments {
		k.Records = append(k.Records, attachment.ContainerID)
	}
	for _, err := range errs {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	return k
}

func asWritten() knowledge {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	one, two := netip.MustParseAddr("169.254.210.210"), netip.MustParseAddr("169.254.210.211")
	endpoints := []runtimedir.Endpoint{{Address: netip.MustParseAddrPort("10.244.1.7:8080"), Pod: "default/echo-1", UID: "u1", Recorded: true}}
	frontends := []runtimedir.Frontend{{Address: one, Protocol: "tcp", Port: 80}, {Address: one, Protocol: "udp", Port: 81}, {Address: two, Protocol: "tcp", Port: 80}}
	labels := map[string]map[string]string{"u1": {"app": "echo", "tier": "back"}, "u2": {}}
	record := func(n string, ip string, labels map[string]string) runtimedir.Attachment {
		return runtimedir.Attachment{
			ContainerID: "c" + n, IfName: "eth0", Network: "pods", Namespace: "default", Name: "echo-" + n, UID: "u" + n, Labels: labels,
			IPs: []netip.Addr{netip.MustParseAddr(ip)}, HostInterface: "veth" + n, Netns: "/run/netns/c" + n, AddedAt: at,
		}
	}
	return knowledge{
		Status: &runtimedir.Status{
			Version: 1, Name: name, StartedAt: at, LastSync: at, LastError: "conntrack: permission denied", Backend: "nftables", BackendNote: "note", PollInterval: "5s",
			MagicIPs: []runtimedir.MagicIP{
				{Frontend: frontends[0], Namespace: "default", Selector: "app=echo", Action: "serve", Endpoints: endpoints},
				{Frontend: frontends[1], Namespace: "*", Selector: "app=none", Action: "reject"},
				{Frontend: frontends[2], Namespace: "default", Selector: "app=echo", Reason: "169.254.210.211 is an address of this node"},
			},
			Notes: []string{"a note"},
		},
		Claims: []runtimedir.Claim{
			{Frontend: frontends[0], ClaimedAt: at, Served: true}, {Frontend: frontends[1], ClaimedAt: at, Served: true}, {Frontend: frontends[2], ClaimedAt: at},
		},
		Pods: &runtimedir.Pods{Version: 1, Labels: []runtimedir.PodLabels{
			{PodID: runtimedir.PodID{UID: "u1"}, Labels: labels["u1"]}, {PodID: runtimedir.PodID{UID: "u2"}, Labels: labels["u2"]},
		}, Dead: []runtimedir.Key{{ContainerID: "c9", IfName: "eth0"}}},
		Memory: &runtimedir.Memory{
			Version: 1,
			Records: []runtimedir.Attachment{record("1", "10.244.1.7", labels["u1"])}, RecordsSince: time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC),
			Lost: []runtimedir.Attachment{record("0", "10.244.1.6", nil)},
			Pods: []runtimedir.Pod{
				{
					PodID: runtimedir.PodID{Namespace: "default", Name: "echo-1", UID: "u1"}, Labels: labels["u1"], Owners: []string{"DaemonSet/echo"},
					IPs: []netip.Addr{netip.MustParseAddr("10.244.1.7")}, CreatedAt: at, Running: true, Ready: true,
					Ports: []runtimedir.NamedPort{{Name: "http", Protocol: "tcp", Port: 8080}, {Name: "http", Protocol: "udp", Port: 8080}, {Name: "http", Protocol: "sctp", Port: 8080}},
				},
				{PodID: runtimedir.PodID{UID: "u2"}},
			},
			Withdrawn: []runtimedir.Withdrawn{{PodID: runtimedir.PodID{UID: "u3"}, Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.9")}}},
		},
		Record: &runtimedir.Record{
			Version: 1, Conflist: "/host/cni/net.d/10-bridge.conflist", Binary: "/host/cni/bin/magic-ip-address", PluginVersion: "v0.1.0",
			PluginSHA256: "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03", InstalledAt: at,
		},
		Records: []string{"c1", "c2"},
	}
}

func wantKnown(t *testing.T, when string, want, got knowledge) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Errorf("%s (-want +got):\n%s", when, diff)
	}
}

// TestUpgrade: whatever the order in which agent, installer and plugin are replaced, all that is known is known all the time.
func TestUpgrade(t *testing.T) {
	dir, d := before(t)
	want := asWritten()
	untaken := want
	untaken.Memory = nil // only the agent reads it, and it takes over first
	wantKnown(t, "before", untaken, know(t, d))
	for what, list := range map[string]func() ([]string, error){"agents": d.Agents, "installers": d.Installers} {
		if names, err := list(); err != nil || !cmp.Equal(names, []string{name}) {
			t.Errorf("%s: %v, %v", what, names, err)
		}
	}

	lock, err := d.Agent(name).Lock()
	if err != nil || lock.Lost != nil {
		t.Fatal(err, lock)
	}
	wantKnown(t, "the agent has started", want, know(t, d))
	installer, err := d.Installer(name).Lock()
	if err != nil || installer.Lost != nil {
		t.Fatal(err, installer)
	}
	wantKnown(t, "the installer has started", want, know(t, d))

	// It has written something newer, and is restarted.
	if err := errors.Join(d.Agent(name).WriteClaims(nil), lock.Close()); err != nil {
		t.Fatal(err)
	}
	if lock, err = d.Agent(name).Lock(); err != nil {
		t.Fatal(err)
	}
	want.Claims = nil
	wantKnown(t, "the agent has been restarted", want, know(t, d))

	update(t, dir, []runtimedir.Key{{ContainerID: "c2", IfName: "eth0"}}, attachment("c3"))
	want.Records = []string{"c1", "c3"}
	wantKnown(t, "the plugin has moved the records", want, know(t, d))
	if file, err := d.ReadState(); err != nil || !file.Since.Equal(want.Memory.RecordsSince) {
		t.Errorf("since %v (%v), want %v: it is the same list", file.Since, err, want.Memory.RecordsSince)
	}
	if log, err := d.ReadLog(); err != nil || !strings.Contains(string(log), "a selector does not parse") {
		t.Errorf("log %q, %v", log, err)
	}
	for _, file := range names(t, dir) {
		if strings.Count(file, "/") != 2 && !strings.HasPrefix(file, "plugin/") {
			t.Errorf("%s is left of the layout before", file)
		}
	}

	if err := errors.Join(d.Agent(name).Leave(), d.Installer(name).Leave(), d.RemoveState(generous), lock.Close(), installer.Close()); err != nil {
		t.Fatal(err)
	}
	if left := names(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// oldWriter holds a lock as a process of the version before does.
func oldWriter(t *testing.T, path string) *os.File {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestUpgradeOfOneOfTwo: while a process of the version before runs, its files count and stay.
func TestUpgradeBesideTheVersionBefore(t *testing.T) {
	dir, d := before(t)
	old := oldWriter(t, filepath.Join(dir, "agents", name+".lock"))
	if !d.Agent(name).Live() {
		t.Error("it is not live")
	}
	if _, err := d.Agent(name).Lock(); !errors.Is(err, runtimedir.ErrLocked) {
		t.Errorf("Lock: %v, want ErrLocked", err)
	}
	update(t, dir, nil, attachment("c3"))
	want := asWritten()
	want.Memory, want.Records = nil, []string{"c1", "c2", "c3"}
	wantKnown(t, "beside it", want, know(t, d))

	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	lock, err := d.Agent(name).Lock()
	if err != nil {
		t.Fatal(err)
	}
	want.Memory = asWritten().Memory
	wantKnown(t, "after it", want, know(t, d))

	// A downgrade: it goes on with its own file, and so does the upgrade after it.
	if err := errors.Join(d.Agent(name).WriteClaims(nil), lock.Close()); err != nil {
		t.Fatal(err)
	}
	old = oldWriter(t, filepath.Join(dir, "agents", name+".lock"))
	data, err := os.ReadFile("testdata/before/agents/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "agents", name+".json")
	put(t, path, string(data))
	put(t, filepath.Join(dir, "state.json"), `{"version": 1, "attachments": [`+
		`{"containerID": "c4", "ifName": "eth0", "network": "pods", "ips": ["10.244.1.4"], "addedAt": "2026-01-02T03:04:05Z"}]}`)
	want.Records = []string{"c1", "c2", "c3", "c4"}
	wantKnown(t, "a downgrade", want, know(t, d))
	later := time.Now().Add(time.Minute)
	if err := errors.Join(os.Chtimes(path, later, later), old.Close()); err != nil {
		t.Fatal(err)
	}
	if lock, err = d.Agent(name).Lock(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	update(t, dir, []runtimedir.Key{attachment("c3").Key()})
	want.Records = []string{"c1", "c2", "c4"}
	wantKnown(t, "the upgrade after it", want, know(t, d))
}

// TestAgentThatLeftBeforeThePlugin: where the top cannot be written, the files of the version before stay when an agent is
// uninstalled. They say nothing of it any more.
func TestAgentThatLeftBeforeThePluginCameBy(t *testing.T) {
	dir, d := before(t)
	lock, err := d.Agent(name).Lock()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "agents", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Agent(name).Leave(), lock.Close()); err != nil {
		t.Fatal(err)
	}
	for _, ext := range []string{".json", ".lock"} { // where the top can be written
		if _, err := os.Lstat(filepath.Join(dir, "agents", name+ext)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s of the version before is left: %v", name+ext, err)
		}
	}
	// In a container the directory is a mount, and its parent is read-only.
	if err := os.Mkdir(filepath.Join(dir, "agents", name), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "agents", name+".json"), string(data))
	if agents, err := d.Agents(); err != nil || len(agents) > 0 {
		t.Errorf("agents %v, %v", agents, err)
	}
	if claims, err := d.Agent(name).ReadClaims(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("claims %v, %v", claims, err)
	}
}

// TestRemovalAfterTheVersionBefore: a DEL of a pod that the version before has recorded finds the record, before any ADD of this version.
func TestRemovalAfterTheVersionBefore(t *testing.T) {
	dir, d := before(t)
	if err := os.Remove(filepath.Join(dir, "plugin")); err != nil {
		t.Fatal(err)
	}
	update(t, dir, []runtimedir.Key{{ContainerID: "c2", IfName: "eth0"}})
	if got := know(t, d).Records; !cmp.Equal(got, []string{"c1"}) {
		t.Errorf("records %v", got)
	}
}

// TestUnusableFilesOfTheVersionBefore: nothing that is in their place keeps an agent or a pod from starting.
func TestUnusableFilesOfTheVersionBefore(t *testing.T) {
	for _, damage := range []func(path string) error{
		func(path string) error { return os.WriteFile(path, []byte("{"), 0o600) },
		func(path string) error { return errors.Join(os.Remove(path), os.Symlink("/dev/zero", path)) },
		func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
		func(path string) error { return os.Truncate(path, 1<<40) },
	} {
		dir, d := before(t)
		for _, file := range []string{"state.json", "agents/" + name + ".json", "agents/" + name + ".install"} {
			if err := damage(filepath.Join(dir, file)); err != nil {
				t.Fatal(err)
			}
		}
		for _, lock := range []func() (*runtimedir.Lock, error){d.Agent(name).Lock, d.Installer(name).Lock} {
			lock, err := lock()
			if err != nil || lock.Lost == nil {
				t.Fatalf("Lock: %v, lost %v", err, lock)
			}
			defer func() { _ = lock.Close() }()
		}
		warning, err := d.Update(generous, nil, attachment("c3"))
		if err != nil || warning == nil || !strings.Contains(warning.Error(), "its records are not taken over") {
			t.Errorf("warning %v, error %v", warning, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, "state.json")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is still there: %v", err)
		}
		if warning, err := d.Update(generous, nil, attachment("c4")); err != nil || warning != nil {
			t.Errorf("the second time: warning %v, error %v", warning, err)
		}
	}
}

// TestKeptOfTheVersionBefore: what an operator may want to read is moved, but for what the plugin has one of already; nothing is left behind.
func TestKeptOfTheVersionBefore(t *testing.T) {
	dir, d := before(t)
	for file, content := range map[string]string{
		"plugin.log": "old", "plugin.log.1": "older", "state.json.corrupt": "{", "state.json.tmp": "half", "plugin/plugin.log": "new",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if warning, err := d.Update(generous, nil, attachment("c3")); err != nil || warning != nil {
		t.Fatalf("warning %v, error %v", warning, err)
	}
	for file, want := range map[string]string{"plugin.log": "new", "plugin.log.1": "older", "state.json.corrupt": "{"} {
		if got, err := os.ReadFile(filepath.Join(dir, "plugin", file)); err != nil || string(got) != want {
			t.Errorf("plugin/%s: %q, %v, want %q", file, got, err, want)
		}
	}
	for _, file := range names(t, dir) {
		if !strings.Contains(file, "/") || file == "plugin/state.json.tmp" {
			t.Errorf("%s is left", file)
		}
	}
}

// TestOldLockHeldForGood: the lock of the version before can be taken by any process of the node. It delays the first
// update shortly, and no other.
func TestOldLockHeldForGood(t *testing.T) {
	dir, d := before(t)
	lock, err := os.Open(filepath.Join(dir, "state.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	const given = 100 * time.Millisecond // to a plugin of the version before that is writing
	begun := time.Now()
	for _, id := range []string{"c3", "c4"} {
		if warning, err := d.Update(generous, nil, attachment(id)); err != nil || warning != nil {
			t.Errorf("warning %v, error %v", warning, err)
		}
		if waited := time.Since(begun); waited < given {
			t.Errorf("the holder was waited for for %s, want at least %s", waited, given)
		}
	}
	if _, err := os.Stat(lock.Name()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	// An agent is not taken for one that runs because its lock is held by a process that may only read it.
	agent, err := os.Open(filepath.Join(dir, "agents", name+".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = agent.Close() }()
	if err := unix.FcntlFlock(agent.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK}); err != nil {
		t.Fatal(err)
	}
	taken, err := d.Agent(name).Lock()
	if err != nil {
		t.Fatal(err)
	}
	_ = taken.Close()
}

// TestOldLockIsReleased: a plugin of the version before that waits for the lock gets it after the update, not when this process ends.
func TestOldLockIsReleased(t *testing.T) {
	dir, d := before(t)
	waiting, err := os.Open(filepath.Join(dir, "state.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = waiting.Close() }()
	if warning, err := d.Update(generous, nil, attachment("c3")); err != nil || warning != nil {
		t.Fatalf("warning %v, error %v", warning, err)
	}
	if err := unix.Flock(int(waiting.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("it is still held: %v", err)
	}
}

// TestReadersDuringTheTakeover: at no moment a record is seen in neither of the two files.
func TestReadersDuringTheTakeover(t *testing.T) {
	key := runtimedir.Key{ContainerID: "c1", IfName: "eth0"}
	for range 30 {
		_, d := before(t)
		done := make(chan error, 1)
		go func() {
			_, err := d.Update(generous, nil, attachment("c3"))
			done <- err
		}()
		for taken := false; !taken; {
			select {
			case err := <-done:
				if err != nil {
					t.Fatal(err)
				}
				taken = true
			default:
			}
			recorded, err := d.Recorded(key)
			file, readErr := d.ReadState()
			if !recorded || err != nil || readErr != nil || len(file.Attachments) < 2 {
				t.Fatalf("Recorded is %t, %v; ReadState %v, %v", recorded, err, file.Attachments, readErr)
			}
		}
	}
}
