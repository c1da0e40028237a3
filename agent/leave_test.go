package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// leaving is an agent of a DaemonSet that can be deleted, with one target, 10.244.1.7.
type leaving struct {
	*testing.T
	dir     runtimedir.Dir
	backend *nftables.Fake
	deleted chan struct{}
	log     bytes.Buffer
	ended   chan error

	mu      sync.Mutex // the agent's goroutine writes what the test reads
	failing int        // how often the rules cannot be removed yet
	broken  string     // what fails: network, hairpin, route or flows
	swept   plan.Change
	hairpin bool
	routes  []node.LocalRoute
}

const leavingName = "default.magic-ip"

func newLeaving(t *testing.T) *leaving {
	l := &leaving{T: t, dir: runtimedir.New(t.TempDir()), backend: nftables.NewFake(leavingName), deleted: make(chan struct{})}
	_, err := l.dir.Update(time.Second, nil, runtimedir.Attachment{
		ContainerID: "c1", IfName: "eth0", Namespace: "default", Name: "echo", Labels: map[string]string{"app": "echo"},
		IPs: []netip.Addr{netip.MustParseAddr("10.244.1.7")}, HostInterface: "veth1", HostIfIndex: 4, AddedAt: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", &l.log)
		}
	})
	return l
}

func (l *leaving) Sweep(_ context.Context, _ *plan.Plan, change plan.Change) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.failure("flows"); err != nil {
		return 0, err
	}
	l.swept = change
	return 0, nil
}

// failure is the error of what fails; nil for all else.
func (l *leaving) failure(what string) error {
	if l.broken == what {
		return errors.New("broken " + what)
	}
	return nil
}

func (l *leaving) setBroken(what string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.broken = what
}

// run starts the agent; sigterm stops it and waits for its end.
func (l *leaving) run() (sigterm func()) {
	l.Helper()
	const text = `
name: default.magic-ip
magicIPs:
- {ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}
`
	ctx, cancel := context.WithCancel(context.Background())
	l.ended = make(chan error, 1)
	go func() {
		l.ended <- Run(ctx, Options{
			RuntimeDir: l.dir.Path(), Backend: l.backend, Flows: l, Node: l, Log: slog.New(slog.NewTextHandler(&l.log, nil)),
			Load:   func() (config.Config, error) { return config.Parse(strings.NewReader(text), true) },
			Uptime: func() time.Duration { return time.Hour },
			Cilium: func() (dataplane.Settings, error) { return dataplane.Settings{IPv4: true}, nil }, // BPF host routing
			Uninstall: Uninstall{
				Wanted: func(ctx context.Context) bool {
					select {
					case <-l.deleted:
						return true
					case <-ctx.Done():
						return false
					}
				},
				Rules: func(ctx context.Context) error {
					l.mu.Lock()
					defer l.mu.Unlock()
					if l.failing--; l.failing >= 0 {
						return errors.New("busy")
					}
					return l.backend.Remove(ctx)
				},
			},
		})
	}()
	synctest.Wait()
	return func() {
		l.Helper()
		cancel()
		if err := <-l.ended; err != nil && !errors.Is(err, ErrStandby) {
			l.Errorf("the agent ended with %v", err)
		}
	}
}

func (l *leaving) SnapshotWithoutLocalRoutes() (node.Snapshot, error) {
	snapshot, err := l.Snapshot()
	snapshot.LocalRoutes = nil
	return snapshot, err
}

// Snapshot and the rest make it the Node: cni0 with the target's link, a link where hairpin mode is on already, and Cilium.
func (l *leaving) Snapshot() (node.Snapshot, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.failure("network"); err != nil {
		return node.Snapshot{}, err
	}
	return node.Snapshot{LocalRoutes: slices.Clone(l.routes), Addresses: []node.Address{{Link: 2, Prefix: netip.MustParsePrefix("192.0.2.2/24")}}, Routes: []node.Route{
		{Link: 2, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 254},
	}, Links: []node.LinkState{
		{Index: 2, Name: "eth0"},
		{Index: 3, Name: "cni0", Kind: "bridge"},
		{Index: 4, Name: "veth1", Kind: "veth", Elsewhere: true, Master: 3, Hairpin: l.hairpin},
		{Index: 5, Name: "veth2", Kind: "veth", Elsewhere: true, Master: 3, Hairpin: true},
		{Index: 6, Name: "cilium_net", Kind: "veth", Lower: 7},
		{Index: 7, Name: "cilium_host", Kind: "veth", Lower: 6},
	}}, nil
}

func (l *leaving) SetHairpin(port int, on bool) error {
	if port != 4 {
		l.Errorf("hairpin mode of link %d switched to %v", port, on)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.failure("hairpin"); err != nil {
		return err
	}
	l.hairpin = on
	return nil
}

func (l *leaving) AddLocalRoute(route node.LocalRoute) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.routes = append(l.routes, route)
	return nil
}

func (l *leaving) RemoveLocalRoute(route node.LocalRoute) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.failure("route"); err != nil {
		return err
	}
	l.routes = slices.DeleteFunc(l.routes, func(r node.LocalRoute) bool { return r == route })
	return nil
}

func (l *leaving) hairpinOn() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hairpin
}

func (l *leaving) rules() bool { return strings.Contains(l.backend.Dump(), "10.244.1.7") }

// files are all that is in the runtime dir.
func (l *leaving) files() (files []string) {
	l.Helper()
	err := filepath.WalkDir(l.dir.Path(), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != l.dir.Path() {
			name, _ := filepath.Rel(l.dir.Path(), path)
			files = append(files, name)
		}
		return err
	})
	if err != nil {
		l.Fatal(err)
	}
	return files
}

func (l *leaving) want(when string, rules bool, files ...string) {
	l.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rules() != rules {
		l.Errorf("%s: rules there: %t, want %t", when, !rules, rules)
	}
	if (len(l.routes) > 0) != rules {
		l.Errorf("%s: the local routes are %v, want any: %t", when, l.routes, rules)
	}
	if diff := cmp.Diff(files, l.files()); diff != "" {
		l.Errorf("%s: runtime dir (-want +got):\n%s", when, diff)
	}
}

const (
	agentFiles = "agents agents/default.magic-ip agents/default.magic-ip/claims.json agents/default.magic-ip/live agents/default.magic-ip/lock " +
		"agents/default.magic-ip/memory.json agents/default.magic-ip/pods.json agents/default.magic-ip/status.json"
	pluginFiles = "plugin plugin/state.json plugin/state.lock"
)

func all(lists ...string) []string { return strings.Fields(strings.Join(lists, " ")) }

// TestLeave: the installer first, then rules and files; and then it waits, because a container that ends is started again.
func TestLeave(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		installer := l.dir.Installer(leavingName)
		if err := installer.WriteRecord(runtimedir.Record{}); err != nil {
			t.Fatal(err)
		}
		sigterm := l.run()
		if !l.rules() || !l.hairpinOn() {
			t.Fatalf("rules %v, hairpin %v", l.rules(), l.hairpinOn())
		}
		// Over a restart it knows what it has switched on.
		sigterm()
		if sigterm = l.run(); !l.hairpinOn() {
			t.Error("hairpin mode is off after a restart")
		}
		close(l.deleted)
		time.Sleep(5 * time.Second)
		if !l.rules() || !l.dir.Agent(leavingName).Live() {
			t.Error("gone before the installer")
		}
		if err := installer.Leave(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		l.want("left", false, all(pluginFiles)...)
		if l.hairpinOn() {
			t.Error("hairpin mode is still on")
		}
		l.wantSwept()
		time.Sleep(time.Hour)
		l.want("an hour later", false, all(pluginFiles)...)
		if len(l.ended) > 0 {
			t.Error("it has ended")
		}
		sigterm()
		l.want("stopped", false, all(pluginFiles)...)
	})
}

// TestLeaveWithoutTheInstaller: it is not waited for without end, nor does an error count as that it has left.
func TestLeaveWithoutTheInstaller(t *testing.T) {
	t.Parallel()
	for name, record := range map[string]func(runtimedir.Installer, string) error{
		"stuck": func(installer runtimedir.Installer, _ string) error {
			return installer.WriteRecord(runtimedir.Record{})
		},
		"unreadable": func(_ runtimedir.Installer, folder string) error {
			return errors.Join(os.MkdirAll(folder+"/record.json", 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLeaving(t)
				if err := record(l.dir.Installer(leavingName), filepath.Join(l.dir.Path(), "install", leavingName)); err != nil {
					t.Fatal(err)
				}
				sigterm := l.run()
				close(l.deleted)
				time.Sleep(installerTimeout - time.Second)
				synctest.Wait()
				if !l.rules() {
					t.Error("gone before the time")
				}
				time.Sleep(2 * time.Second)
				synctest.Wait()
				l.want("left", false, all("install install/default.magic-ip install/default.magic-ip/record.json", pluginFiles)...)
				sigterm()
			})
		})
	}
}

// TestLeaveBesideOthers.
func TestLeaveBesideOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		if err := l.dir.Agent("other").WriteClaims(nil); err != nil {
			t.Fatal(err)
		}
		sigterm := l.run()
		close(l.deleted)
		time.Sleep(time.Second)
		synctest.Wait()
		l.want("left", false, all("agents agents/other agents/other/claims.json", pluginFiles)...)
		sigterm()
	})
}

// TestLeaveTriesAgain: rules that cannot be removed at once; until then it holds its name.
func TestLeaveTriesAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		l.failing = 3
		sigterm := l.run()
		close(l.deleted)
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		l.want("in between", true, all(agentFiles, pluginFiles)...)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		l.want("left", false, all(pluginFiles)...)
		sigterm()
	})
}

// TestLeaveTakesAllOut: what is in the kernel beside the rules is tried again too. Where it stays the files do, so that the next attempt knows
// of it; flows are in no file.
func TestLeaveTakesAllOut(t *testing.T) {
	t.Parallel()
	for broken, says := range map[string]string{
		"network": "broken network", "hairpin": "hairpin mode stays on", "route": "local routes stay: pods are refused at these addresses: broken route",
		"claims": "local routes stay: pods are refused at these addresses: agent other", "flows": "",
	} {
		for _, heals := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s heals %t", broken, heals), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					l := newLeaving(t)
					if err := l.dir.Agent("other").WriteClaims(nil); err != nil {
						t.Fatal(err)
					}
					sigterm := l.run()
					claims := filepath.Join(l.dir.Path(), "agents/other/claims.json")
					if broken == "claims" {
						if err := os.WriteFile(claims, []byte("{"), 0o600); err != nil {
							t.Fatal(err)
						}
					}
					l.setBroken(broken)
					close(l.deleted)
					time.Sleep(5 * time.Second)
					synctest.Wait()
					if l.rules() || !l.dir.Agent(leavingName).Live() || len(l.ended) > 0 {
						t.Errorf("rules there: %t, ended: %d; want that it tries again", l.rules(), len(l.ended))
					}
					if heals {
						l.setBroken("")
						if err := l.dir.Agent("other").WriteClaims(nil); err != nil {
							t.Fatal(err)
						}
					}
					time.Sleep(leaveTimeout)
					synctest.Wait()
					if heals || says == "" {
						l.want("left", false, all("agents agents/other agents/other/claims.json", pluginFiles)...)
						if l.hairpinOn() || heals == (len(l.swept.Removed) == 0) {
							t.Errorf("hairpin mode is on: %t, swept %v", l.hairpinOn(), l.swept)
						}
						sigterm()
						return
					}
					if len(l.ended) == 0 {
						t.Error("it has not ended")
						sigterm()
						return
					}
					if err := <-l.ended; err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), "magic-ip-agent uninstall --name "+leavingName) {
						t.Errorf("it ended with %v, want %q", err, says)
					}
					if _, err := l.dir.Agent(leavingName).ReadMemory(); err != nil {
						t.Errorf("nothing knows of what stays: %v", err)
					}
					if hairpin := broken == "hairpin" || broken == "network"; l.hairpinOn() != hairpin || (len(l.routes) > 0) == (broken == "hairpin") {
						t.Errorf("hairpin mode is on: %t; local routes: %v", l.hairpinOn(), l.routes)
					}
				})
			})
		}
	}
}

// wantSwept: the flows to the frontend are, and no others.
func (l *leaving) wantSwept() {
	l.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	frontend := plan.Frontend{Address: netip.MustParseAddr("169.254.210.210"), Protocol: plan.TCP, Port: 80}
	if diff := cmp.Diff(plan.Change{Removed: []plan.Frontend{frontend}}, l.swept, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		l.Errorf("swept (-want +got):\n%s", diff)
	}
}

// TestSIGTERMIsNotUninstall.
func TestSIGTERMIsNotUninstall(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		l.run()()
		l.want("stopped", true, all(agentFiles, pluginFiles)...)
	})
}

// TestLeaveWhileStandingBy: a process that was only waiting for the name puts nothing back.
func TestLeaveWhileStandingBy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		lock, err := l.dir.Agent(leavingName).Lock()
		if err != nil {
			t.Fatal(err)
		}
		sigterm := l.run()
		close(l.deleted)
		time.Sleep(time.Minute)
		if l.rules() {
			t.Error("rules although another has the name")
		}
		if err := lock.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		l.want("left", false, all(pluginFiles)...)
		if n := l.backend.Transactions(); n > 2 { // one of each family removes
			t.Errorf("%d transactions", n)
		}
		sigterm()
	})
}

// TestLeaveBeforeTheFirstRules: the DaemonSet was deleted while the agent was down. The flows are those of the process before.
func TestLeaveBeforeTheFirstRules(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLeaving(t)
		l.run()()
		l.swept = plan.Change{}
		close(l.deleted)
		l.setBroken("network")
		sigterm := l.run()
		time.Sleep(time.Second)
		l.setBroken("")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		l.want("left", false, all(pluginFiles)...)
		l.wantSwept()
		sigterm()
	})
}
