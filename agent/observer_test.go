package agent

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// observed is an agent without pods, and what its observers see.
type observed struct {
	dir  runtimedir.Dir
	note atomic.Pointer[string]
	mu   sync.Mutex // of what is seen
	seen seen
	wake func(Source)
	stop func() error
	// config is what is loaded, and rules are what is in the kernel.
	config atomic.Pointer[string]
	rules  *nftables.Fake
	// pollInterval is 5s where empty.
	pollInterval string
}

type seen struct {
	statuses [][2]*runtimedir.Status
	polls    int
	flows    int
	syncs    []error
	restored int

	hash      string // of the configuration
	configErr error
}

func (o *observed) see(what func(*seen)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	what(&o.seen)
}

// take is all that was seen since the last take.
func (o *observed) take() (all seen) {
	synctest.Wait()
	o.see(func(s *seen) { all, *s = *s, seen{} })
	return all
}

func (o *observed) Synced(_ time.Duration, err error) {
	o.see(func(s *seen) { s.syncs = append(s.syncs, err) })
}
func (o *observed) Swept(flows int) { o.see(func(s *seen) { s.flows += flows }) }
func (o *observed) Polled()         { o.see(func(s *seen) { s.polls++ }) }
func (o *observed) Restored()       { o.see(func(s *seen) { s.restored++ }) }
func (o *observed) Configured(hash string, err error) {
	o.see(func(s *seen) { s.hash, s.configErr = hash, err })
}

func (o *observed) Sweep(context.Context, *plan.Plan, plan.Change) (int, error) { return 2, nil }

// noNode is a node without links.
type noNode struct{}

func (noNode) Snapshot() (node.Snapshot, error)                     { return node.Snapshot{}, nil }
func (n noNode) SnapshotWithoutLocalRoutes() (node.Snapshot, error) { return n.Snapshot() }
func (noNode) SetHairpin(int, bool) error                           { return nil }
func (noNode) AddLocalRoute(node.LocalRoute) error                  { return nil }
func (noNode) RemoveLocalRoute(node.LocalRoute) error               { return nil }

func (o *observed) start() {
	text := "name: a\npollInterval: " + cmp.Or(o.pollInterval, "5s") + "\nmagicIPs:\n- {ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}\n"
	o.config.Store(&text)
	o.rules = nftables.NewFake("a")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- Run(ctx, Options{
			RuntimeDir: o.dir.Path(), Backend: o.rules, Flows: o, Node: noNode{}, Meter: o,
			Load: func() (config.Config, error) {
				c, err := config.Parse(strings.NewReader(*o.config.Load()), true)
				c.Hash = "3f9c0a71d2be"
				return c, err
			},
			Uptime: func() time.Duration { return time.Hour },
			Notes:  []func() []Note{func() []Note { return []Note{{"bypass", *o.note.Load()}} }},
			Observers: []func(before, now *runtimedir.Status){func(before, now *runtimedir.Status) {
				o.see(func(s *seen) { s.statuses = append(s.statuses, [2]*runtimedir.Status{before, now}) })
			}},
			Tasks: []Task{func(ctx context.Context, wake func(Source)) error {
				o.wake = wake
				<-ctx.Done()
				return nil
			}},
			Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		})
	}()
	synctest.Wait()
	o.stop = func() error {
		cancel()
		return <-ended
	}
}

func (o *observed) setNote(note string) {
	o.note.Store(&note)
	if o.wake != nil {
		o.wake(Notes)
		synctest.Wait()
	}
}

// TestObservers see each change of the status once, with what was before, also where it cannot be written; and after a restart
// first what the process before has written.
func TestObservers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &observed{dir: runtimedir.New(t.TempDir())}
		o.setNote("one")
		o.start()
		began := o.take()
		if len(began.statuses) == 0 || began.statuses[0][0] != nil || began.statuses[len(began.statuses)-1][1].Notes[0] != "one" {
			t.Fatalf("observed %+v", began.statuses)
		}
		if began.flows != 2 || len(began.syncs) != 1 || began.syncs[0] != nil || began.polls == 0 {
			t.Errorf("counted %d flows, syncs %v, %d polls", began.flows, began.syncs, began.polls)
		}
		time.Sleep(time.Minute)
		if idle := o.take(); len(idle.statuses) != 0 || idle.polls < 10 {
			t.Errorf("%d times without a change, %d polls", len(idle.statuses), idle.polls)
		}
		// A directory in place of the file keeps it from being written.
		path := o.dir.Agent("a").StatusPath()
		if err := errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "full"), 0o700)); err != nil {
			t.Fatal(err)
		}
		o.setNote("two")
		time.Sleep(time.Minute)
		changed := o.take().statuses
		last := changed[len(changed)-1]
		if last[1].Notes[0] != "two" || !strings.Contains(last[1].LastError, "status file") || len(changed) > 2 {
			t.Errorf("observed %d times, the last: %+v", len(changed), last[1])
		}
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		status, err := o.dir.Agent("a").ReadStatus()
		if err != nil || status.Notes[0] != "two" || status.LastError != "" {
			t.Errorf("the status file: %+v, %v", status, err)
		}
		if err := o.stop(); err != nil {
			t.Fatal(err)
		}
		o.take()
		o.start()
		if again := o.take().statuses; len(again) == 0 || again[0][0] == nil || again[0][0].Notes[0] != "two" {
			t.Errorf("after a restart: %+v", again)
		}
		if err := o.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestErrorBetweenPolls: an error of files stands in the status for as long as it is true, whatever the poll interval is.
func TestErrorBetweenPolls(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &observed{dir: runtimedir.New(t.TempDir()), pollInterval: "1h"}
		o.setNote("one")
		o.start()
		lastError := func() string {
			t.Helper()
			synctest.Wait()
			status, err := o.dir.Agent("a").ReadStatus()
			if err != nil {
				t.Fatal(err)
			}
			return status.LastError
		}
		other := o.dir.Agent("other")
		if err := other.WriteClaims(nil); err != nil {
			t.Fatal(err)
		}
		o.wake(Others)
		synctest.Wait()
		claims := filepath.Join(filepath.Dir(other.StatusPath()), "claims.json")
		if err := os.WriteFile(claims, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		o.wake(Others)
		if text := lastError(); !strings.Contains(text, "agent other") {
			t.Errorf("claims that cannot be read: the error is %q", text)
		}
		if err := other.WriteClaims(nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if text := lastError(); text != "" {
			t.Errorf("claims that can be read again: the error is %q", text)
		}
		// A directory in place of the file keeps it from being written.
		path := o.dir.Agent("a").StatusPath()
		if err := errors.Join(os.Remove(path), os.MkdirAll(filepath.Join(path, "full"), 0o700)); err != nil {
			t.Fatal(err)
		}
		o.setNote("two")
		time.Sleep(time.Second)
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if text := lastError(); text != "" {
			t.Errorf("a file that can be written again: the error is %q", text)
		}
		if err := o.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestFilesThatHaveNotChanged are not written: only the time stamp of the status file moves.
func TestFilesThatHaveNotChanged(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &observed{dir: runtimedir.New(t.TempDir())}
		o.setNote("")
		o.start()
		inodes := func() (infos []os.FileInfo) {
			for _, name := range []string{"status.json", "claims.json", "pods.json", "memory.json"} {
				info, err := os.Stat(filepath.Join(filepath.Dir(o.dir.Agent("a").StatusPath()), name))
				if err != nil {
					t.Fatal(err)
				}
				infos = append(infos, info)
			}
			return infos
		}
		time.Sleep(time.Minute)
		before := inodes()
		time.Sleep(time.Minute)
		for i, info := range inodes() {
			if !os.SameFile(before[i], info) {
				t.Errorf("%s was written", info.Name())
			}
			if renewed := info.ModTime().After(before[i].ModTime()); renewed != (info.Name() == "status.json") {
				t.Errorf("%s: renewed %t", info.Name(), renewed)
			}
		}
		if err := o.stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestEqualStatus sees a change of any field of a magic IP.
func TestEqualStatus(t *testing.T) {
	t.Parallel()
	fields := reflect.TypeFor[runtimedir.MagicIP]()
	for i := range fields.NumField() {
		a := runtimedir.Status{MagicIPs: []runtimedir.MagicIP{{}}}
		b := runtimedir.Status{MagicIPs: []runtimedir.MagicIP{{}}}
		switch field := reflect.ValueOf(&b.MagicIPs[0]).Elem().Field(i); field.Kind() {
		case reflect.String:
			field.SetString("x")
		case reflect.Bool:
			field.SetBool(true)
		case reflect.Slice:
			field.Set(reflect.MakeSlice(field.Type(), 1, 1))
		case reflect.Pointer: // to a Count
			field.Set(reflect.ValueOf(&runtimedir.Count{Opened: 1}))
			a.MagicIPs[0].Count = &runtimedir.Count{Opened: 1}
			if !a.Equal(&b) {
				t.Error("equal counts are not equal")
			}
			a.MagicIPs[0].Count.Refused = 1
		case reflect.Struct:
			if _, is := field.Interface().(time.Time); is {
				field.Set(reflect.ValueOf(time.Unix(1, 0)))
			} else { // Frontend
				field.FieldByName("Port").SetUint(1)
			}
		default:
			t.Fatalf("%s is a %s", fields.Field(i).Name, field.Kind())
		}
		if a.Equal(&b) || !a.Equal(&a) || !b.Equal(&b) {
			t.Errorf("a change of %s is not seen", fields.Field(i).Name)
		}
	}
	for what, other := range map[string]runtimedir.Status{
		"a field": {LastError: "x"}, "the number of magic IPs": {MagicIPs: []runtimedir.MagicIP{{}}}, "a field of the data plane": {DataPlane: runtimedir.DataPlane{Name: "x"}},
		"the local routes": {DataPlane: runtimedir.DataPlane{LocalRoutes: []netip.Addr{{}}}},
	} {
		if (&runtimedir.Status{}).Equal(&other) {
			t.Errorf("a change of %s is not seen", what)
		}
	}
}

// TestMeter: a configuration that cannot be used is counted beside the hash of the one in force, rules that are restored are counted, and
// the kinds of problems are in the status.
func TestMeter(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &observed{dir: runtimedir.New(t.TempDir())}
		o.setNote("one")
		o.start()
		began := o.take()
		if began.hash != "3f9c0a71d2be" || began.configErr != nil || began.restored != 0 {
			t.Errorf("the hash is %q with %v, rules were restored %d times", began.hash, began.configErr, began.restored)
		}
		if kinds := began.statuses[len(began.statuses)-1][1].Problems; !slices.Equal(kinds, []string{"bypass"}) {
			t.Errorf("kinds %q", kinds)
		}
		if err := o.rules.Flush(); err != nil {
			t.Fatal(err)
		}
		wrong := "name: b\n"
		o.config.Store(&wrong)
		time.Sleep(time.Minute)
		seen := o.take()
		if seen.hash != began.hash || seen.configErr == nil || seen.restored != 1 {
			t.Errorf("the hash is %q with %v, rules were restored %d times", seen.hash, seen.configErr, seen.restored)
		}
		if kinds := seen.statuses[len(seen.statuses)-1][1].Problems; !slices.Equal(kinds, []string{"bypass", "configuration"}) {
			t.Errorf("kinds %q", kinds)
		}
		if err := o.stop(); err != nil {
			t.Fatal(err)
		}
	})
}
