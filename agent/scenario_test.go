package agent

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
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
	"golang.org/x/tools/txtar"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/dataplane"
	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

var update = flag.Bool("update", false, "write the rules of the scenarios anew")

// TestScenarios plays the files of testdata/scenarios: a comment, the configuration, events one per line,
// and the data in the rules at the end (or under the name table, all that is in the tables). After every event the agent
// is woken a second time, and must do nothing.
//
//	start                              the agent is started here; without it, before the first event
//	restart                            the agent is stopped and started
//	add NAME [ns=NS] [labels=K=V,K=V|?] ip=ADDR,ADDR [host=LINK] [uid=UID] [container=ID] [if=NAME] [clock=DURATION]
//	                                   the plugin records a pod; clock: the wall clock of its ADD is off by that
//	del NAME [if=NAME]                 its record leaves
//	pod NAME [ns=NS] [uid=UID] [ip=ADDR,ADDR] [labels=K=V,K=V] [static=UID] [port=NAME/PROTOCOL/NUMBER] [CONDITION …]
//	                                   the API reports a pod: ready, terminating, finished, pending
//	forget NAME                        the API reports it no more
//	api up|silent|unreachable          the API is synced, has not answered since the agent started, or answers no more
//	links NAME …                       the links that pods are behind, instead of the bridge cni0
//	link NAME [unseen], port NAME [unseen], unlink NAME
//	                                   a host interface comes, with or without an event, beside the bridge cni0 or as a port of it, or goes; another one of
//	                                   the same name has another index
//	nic NAME BRIDGE                    a network interface becomes a port of a bridge
//	rename NAME NAME                   a host interface gets another name
//	own ADDR …                         the node's own addresses
//	no-ipv6                            the node has no IPv6
//	netns NAME [unseen]                the node's network namespace is another one
//	bridge NAME                        a bridge whose frames do not pass netfilter
//	lose-state, corrupt-state          the state file goes, or turns into garbage
//	lose-memory, lose-files            memory.json goes, or all files of the agent
//	fail WHAT, heal WHAT               network (cannot be read), torn (it is incomplete), sync, verify, sweep, hairpin, leftovers (fail) from now on, or work
//	flush [seen]                       all rules are flushed; seen: with an event
//	modified                           an event of the rules comes, as that of the agent's own change does
//	wait DURATION [unseen]             time passes; unseen: and nothing wakes the agent then
//	reboot                             the node's uptime begins anew, and the agent with it
//	other NAME FRONTEND DURATION [local|unserved|passing]
//	                                   another agent claims a frontend since so long before now; local: with a local route; unserved: it may not serve
//	                                   it; passing: some packets to it are for somebody beyond the node
//	corrupt-claims NAME, leave NAME    the claims of another agent turn into garbage, or are that from the start; it leaves
//	config FILE [unseen]               the configuration becomes that section, with or without an event
//	want FRONTEND ACTION [ENDPOINT …]  what becomes of new packets: serve, reject, hold, pass
//	want FRONTEND unserved: REASON     part of the reason
//	kernel FRONTEND ACTION             what becomes of new packets, whatever the status says: "no rule" without one
//	swept FLOWS                        the frontends and gone addresses swept since the last time
//	cilium SETTING …                   Cilium is on the node, and has written its settings: bpf or legacy, and endpoint-routes, bpf-masquerade,
//	                                   no-masquerade; or unreadable
//	no-cilium                          its link is gone
//	alien-route ADDR [unseen], unroute ADDR
//	                                   another program has a local route for a magic IP from now on; that of an agent is removed
//	local ADDR@SOURCE …                the local routes of agents; none
//	plane TEXT                         part of what the status says of the data plane
//	hairpin NAME …                     the links whose hairpin mode is on; none
//	role NAME ROLE: REASON             what the status says of a link
//	default NAME [other], no-default NAME [other]
//	                                   a default route by a link in the main table or another comes or goes
//	error TEXT, note TEXT              part of the status' error, of a note in it; none
//	dead NAME …                        the records that the plugin may drop
//	files NAME …                       the files of the agent
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sections := map[string]string{}
			for _, section := range archive.Files {
				sections[section.Name] = string(section.Data)
			}
			got := map[string]string{}
			synctest.Test(t, func(t *testing.T) { got["table"] = play(t, sections) })
			for line := range strings.Lines(got["table"]) {
				if element, ok := strings.CutPrefix(line, "add element "); ok {
					got["rules"] += strings.Replace(element, "magic-ip-default.magic-ip ", "", 1)
				}
			}
			for i := range archive.Files {
				golden := &archive.Files[i]
				rules, isGolden := got[golden.Name]
				if !isGolden {
					continue
				}
				if *update {
					golden.Data = []byte(rules)
				} else if diff := cmp.Diff(string(golden.Data), rules); diff != "" {
					t.Errorf("%s (-want +got):\n%s", golden.Name, diff)
				}
			}
			if *update {
				if err := os.WriteFile(file, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// stage is where a scenario plays.
type stage struct {
	t       *testing.T
	dir     runtimedir.Dir
	config  string
	backend *failingBackend
	sweeps  fakeFlows
	network node.Snapshot
	links   int                     // how many there have been
	cilium  *dataplane.Settings     // nil: it cannot be read
	alien   netip.Addr              // another program has a local route for it
	records []runtimedir.Attachment // of the pods that are there
	api     *fakeAPI                // nil: the API is not asked
	failing sync.Map                // errors, by what fails
	booted  time.Time
	wake    func(Source)
	stop    func()
	log     bytes.Buffer
}

func play(t *testing.T, sections map[string]string) (rules string) {
	s := &stage{
		t: t, dir: runtimedir.New(t.TempDir()), config: sections["config"], booted: time.Now().Add(-time.Hour),
		network: node.Snapshot{IPv6: true},
	}
	s.addLink(node.LinkState{Name: "eth0"})
	s.network.Routes = []node.Route{{Link: s.links, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 254}}
	s.addBridge(node.LinkState{Name: "cni0"})
	s.network.Routes = append(s.network.Routes, node.Route{Link: s.links - 1, Destination: netip.MustParsePrefix("10.244.1.0/24"), Table: 254})
	s.backend = &failingBackend{Fake: nftables.NewFake("default.magic-ip"), stage: s}
	s.sweeps.stage = s
	events := strings.Split(sections["events"], "\n")
	if slices.ContainsFunc(events, func(line string) bool { return strings.HasPrefix(line, "pod ") || strings.HasPrefix(line, "api ") }) {
		s.api = &fakeAPI{pods: map[string]inventory.Pod{}, up: true, synced: true}
	}
	if !slices.Contains(events, "start") {
		s.start()
	}
	defer func() {
		s.stop()
		if t.Failed() {
			t.Logf("log:\n%s", s.log.String())
		}
	}()
	for i, line := range events {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if err := s.event(sections, fields[0], fields[1:]); err != nil {
			t.Fatalf("events, line %d: %s: %v", i+1, line, err)
		}
		synctest.Wait()
		if s.stop == nil || slices.Contains([]string{"fail", "heal"}, fields[0]) || strings.HasSuffix(line, " unseen") {
			continue // not started yet, or without an event
		}
		before := s.backend.Transactions()
		s.wake(allSources &^ (Poll | Rules))
		synctest.Wait()
		if after := s.backend.Transactions(); after != before {
			t.Errorf("events, line %d: %s: the second sync ran %d more transactions", i+1, line, after-before)
		}
	}
	return s.backend.Dump()
}

// start runs the production agent on fakes, woken by the stage.
func (s *stage) start() {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	ready := make(chan struct{})
	options := Options{
		Zones:      true,
		RuntimeDir: s.dir.Path(),
		Load:       func() (config.Config, error) { return config.Parse(strings.NewReader(s.config), s.api == nil) },
		Backend:    s.backend,
		Flows:      &s.sweeps,
		Node:       s,
		Cilium: func() (dataplane.Settings, error) {
			if s.cilium == nil {
				return dataplane.Settings{}, &fs.PathError{Op: "open", Path: "agent-runtime-config.json", Err: fs.ErrNotExist}
			}
			return *s.cilium, s.failure("cilium")
		},
		Uptime: func() time.Duration { return time.Since(s.booted) },
		Observers: []func(before, now *runtimedir.Status){func(_, now *runtimedir.Status) {
			for _, kind := range now.Problems {
				if runtimedir.ProblemKinds()[kind] == "" {
					s.t.Errorf("%q is no kind of problem: %s; %q", kind, now.LastError, now.Notes)
				}
			}
			if len(now.Problems) == 0 && (now.LastError != "" || len(now.Notes) > 0) {
				s.t.Errorf("no kind of %s; %q", now.LastError, now.Notes)
			}
		}},
		Tasks: []Task{func(ctx context.Context, wake func(Source)) error {
			s.wake = wake
			close(ready)
			<-ctx.Done()
			return nil
		}},
		Log: slog.New(slog.NewTextHandler(&s.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if s.api != nil {
		s.api.synced = s.api.synced && s.api.up
		options.API = s.api
	}
	go func() { ended <- Run(ctx, options) }()
	<-ready
	synctest.Wait()
	s.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Errorf("the agent ended with %v", err)
		}
	}
}

// failure is the error that is injected, if any.
func (s *stage) failure(what string) error {
	err, _ := s.failing.Load(what)
	if err == nil {
		return nil
	}
	return err.(error)
}

// Snapshot and SetHairpin make the stage the Node.
func (s *stage) Snapshot() (node.Snapshot, error) {
	if err := s.failure("network"); err != nil {
		return node.Snapshot{}, err
	}
	snapshot := s.network
	snapshot.Links, snapshot.LocalRoutes = slices.Clone(snapshot.Links), slices.Clone(snapshot.LocalRoutes)
	if s.failure("torn") != nil { // the last link is missing, and all else
		snapshot.Torn, snapshot.Links = []string{"links", "addresses", "routes"}, snapshot.Links[:len(snapshot.Links)-1]
		snapshot.Addresses, snapshot.Routes, snapshot.LocalRoutes = nil, nil, nil
	}
	return snapshot, nil
}

// SnapshotWithoutLocalRoutes is Snapshot without them.
func (s *stage) SnapshotWithoutLocalRoutes() (node.Snapshot, error) {
	snapshot, err := s.Snapshot()
	snapshot.LocalRoutes = nil
	return snapshot, err
}

func (s *stage) addLink(l node.LinkState) {
	s.links++
	l.Index = s.links
	s.network.Links = append(s.network.Links, l)
}

// addPodLink adds a link to a pod.
func (s *stage) addPodLink(name string, bridge int) {
	s.addLink(node.LinkState{Name: name, Kind: "veth", Elsewhere: true, Lower: 2, Master: bridge})
}

// addBridge adds a bridge with a pod.
func (s *stage) addBridge(l node.LinkState) {
	l.Kind = "bridge"
	s.addLink(l)
	s.addPodLink("port-of-"+l.Name, s.links)
}

func (s *stage) removeLink(name string) {
	s.network.Links = slices.DeleteFunc(slices.Clone(s.network.Links), func(l node.LinkState) bool { return l.Name == name })
}

func (s *stage) SetHairpin(port int, on bool) error {
	for i := range s.network.Links {
		if s.network.Links[i].Index == port && s.failure("hairpin") == nil {
			s.network.Links[i].Hairpin = on
		}
	}
	return s.failure("hairpin")
}

func (s *stage) AddLocalRoute(route node.LocalRoute) error {
	if s.alien == route.Address {
		return fmt.Errorf("another program has made one for %s", route.Address)
	}
	s.removeRoute(route.Address)
	s.network.LocalRoutes = append(s.network.LocalRoutes, route)
	return nil
}

func (s *stage) RemoveLocalRoute(route node.LocalRoute) error {
	s.removeRoute(route.Address)
	return nil
}

func (s *stage) removeRoute(address netip.Addr) {
	s.network.LocalRoutes = slices.DeleteFunc(slices.Clone(s.network.LocalRoutes), func(r node.LocalRoute) bool { return r.Address == address })
}

func (s *stage) event(sections map[string]string, verb string, args []string) error {
	switch verb {
	case "start":
		s.start()
	case "restart":
		s.stop()
		s.start()
	case "reboot":
		s.booted = time.Now()
		s.stop()
		s.start()
	case "add":
		record, err := parseRecord(args)
		if err != nil {
			return err
		}
		s.records = append(s.records, record)
		time.Sleep(time.Millisecond)
		return s.updateState([]runtimedir.Key{record.Key()}, record)
	case "del":
		ifName := "eth0"
		if len(args) > 1 {
			ifName = strings.TrimPrefix(args[1], "if=")
		}
		for i, r := range s.records {
			if r.Name == args[0] && r.IfName == ifName {
				s.records = append(s.records[:i], s.records[i+1:]...)
				return s.updateState([]runtimedir.Key{r.Key()})
			}
		}
		return fmt.Errorf("no record of %s", args[0])
	case "pod", "forget", "api", "owners":
		defer func() {
			if s.wake != nil {
				s.wake(Pods)
			}
		}()
		return s.api.event(verb, args)
	case "links":
		s.network.Links = s.network.Links[:1]
		for _, name := range args {
			s.addPodLink(name, 0)
		}
		s.wake(Network)
	case "link", "port":
		bridge := slices.IndexFunc(s.network.Links, func(l node.LinkState) bool { return l.Name == "cni0" })
		if verb == "link" {
			s.addPodLink(args[0], 0)
		} else {
			s.addPodLink(args[0], s.network.Links[bridge].Index)
		}
		if len(args) == 1 { // else a record comes before the event
			s.wake(Network)
		}
	case "nic":
		bridge := slices.IndexFunc(s.network.Links, func(l node.LinkState) bool { return l.Name == args[1] })
		s.addLink(node.LinkState{Name: args[0], Master: s.network.Links[bridge].Index})
		s.wake(Network)
	case "unlink":
		s.removeLink(args[0])
		s.wake(Network)
	case "rename":
		for i := range s.network.Links {
			if s.network.Links[i].Name == args[0] {
				s.network.Links[i].Name = args[1]
			}
		}
		s.wake(Network)
	case "own":
		for _, arg := range args {
			address := netip.MustParseAddr(arg)
			s.network.Addresses = append(s.network.Addresses, node.Address{Link: 1, Prefix: netip.PrefixFrom(address, address.BitLen())})
		}
		if s.wake != nil {
			s.wake(Network)
		}
	case "bridge":
		s.removeLink(args[0])
		s.removeLink("port-of-" + args[0])
		s.addBridge(node.LinkState{Name: args[0], Unfiltered4: true, Unfiltered6: true})
		s.wake(Network)
	case "cilium":
		if !slices.ContainsFunc(s.network.Links, func(l node.LinkState) bool { return l.Name == node.CiliumLink }) {
			s.addLink(node.LinkState{Name: node.CiliumLink, Kind: "veth", Lower: s.links + 2})
			s.addLink(node.LinkState{Name: "cilium_net", Kind: "veth", Lower: s.links})
		}
		is := func(setting string) bool { return slices.Contains(args, setting) }
		s.cilium = &dataplane.Settings{
			IPv4: true, IPv6: true,
			LegacyHostRouting: is("legacy"), EndpointRoutes: is("endpoint-routes"), BPFMasquerade: is("bpf-masquerade"),
			IPv4Masquerade: !is("no-masquerade"), IPv6Masquerade: !is("no-masquerade"),
		}
		if is("unreadable") {
			s.cilium = nil
		}
		if s.wake != nil {
			s.wake(DataPlane | Network)
		}
	case "no-cilium":
		s.removeLink(node.CiliumLink)
		s.wake(Network)
	case "alien-route":
		s.alien = netip.MustParseAddr(args[0])
		s.wake(Network) // what the agent's goroutine reads is written before
	case "unroute":
		s.removeRoute(netip.MustParseAddr(args[0]))
		s.wake(LocalRoutes)
	case "netns":
		s.network.Namespace = args[0]
		s.wake(Network)
	case "no-ipv6":
		s.network.IPv6 = false
		s.wake(Network)
	case "lose-state":
		s.wake(Records)
		return os.Remove(s.dir.StatePath())
	case "corrupt-state":
		s.wake(Records)
		return os.WriteFile(s.dir.StatePath(), []byte("{"), 0o644)
	case "lose-memory", "lose-files":
		own := filepath.Dir(s.dir.Agent("default.magic-ip").StatusPath())
		for _, file := range []string{"memory.json", "status.json", "claims.json", "pods.json"} {
			if err := os.Remove(filepath.Join(own, file)); err != nil || verb == "lose-memory" {
				return err
			}
		}
	case "fail":
		s.failing.Store(args[0], errors.New("broken "+args[0]))
	case "heal":
		s.failing.Delete(args[0])
	case "flush":
		if len(args) > 0 {
			defer s.wake(Rules)
		}
		return s.backend.Flush()
	case "modified":
		s.wake(Rules)
	case "wait":
		d, err := time.ParseDuration(args[0])
		time.Sleep(d)
		return err
	case "other":
		return s.other(args)
	case "corrupt-claims":
		if s.wake != nil {
			defer s.wake(Others)
		}
		other := s.dir.Agent(args[0])
		return errors.Join(other.WriteClaims(nil), other.WriteStatus(runtimedir.Status{}),
			os.WriteFile(filepath.Join(filepath.Dir(other.StatusPath()), "claims.json"), []byte("{"), 0o644))
	case "leave":
		defer s.wake(Others)
		return s.dir.Agent(args[0]).Leave()
	case "config":
		s.config = sections[args[0]]
		if len(args) == 1 {
			s.wake(Settings)
		}
	default:
		return s.expect(verb, args)
	}
	return nil
}

func (s *stage) expect(verb string, args []string) error {
	text := strings.Join(args, " ")
	switch verb {
	case "want":
		return s.want(args)
	case "kernel":
		if got := s.action(args[0]); got != strings.Join(args[1:], " ") {
			return fmt.Errorf("got %q", got)
		}
	case "swept":
		if got := s.sweeps.take(); got != text {
			return fmt.Errorf("swept %q", got)
		}
	case "error":
		status, err := s.dir.Agent("default.magic-ip").ReadStatus()
		if err != nil {
			return err
		}
		if text == "none" && status.LastError != "" || text != "none" && !strings.Contains(status.LastError, text) {
			return fmt.Errorf("the error is %q", status.LastError)
		}
	case "note":
		status, err := s.dir.Agent("default.magic-ip").ReadStatus()
		if err != nil {
			return err
		}
		if notes := strings.Join(status.Notes, "\n"); text == "none" && notes != "" || text != "none" && !strings.Contains(notes, text) {
			return fmt.Errorf("the notes are %q", notes)
		}
	case "why":
		status, err := s.dir.Agent("default.magic-ip").ReadStatus()
		if err != nil {
			return err
		}
		if why := strings.Join(status.MagicIPs[0].Why, "\n"); !strings.Contains(why, text) {
			return fmt.Errorf("it says %q", why)
		}
	case "local":
		var got []string
		for _, r := range s.network.LocalRoutes {
			got = append(got, fmt.Sprintf("%s@%s", r.Address, r.Source))
		}
		slices.Sort(got)
		if strings.Join(got, " ") != strings.Replace(text, "none", "", 1) {
			return fmt.Errorf("the local routes are %v", got)
		}
	case "plane":
		status, err := s.dir.Agent("default.magic-ip").ReadStatus()
		if err != nil {
			return err
		}
		if got := fmt.Sprintf("%s %s %v %v", status.DataPlane.Name, status.DataPlane.Reason, status.DataPlane.LocalRoutes, status.DataPlane.Masquerade); !strings.Contains(got, text) {
			return fmt.Errorf("the data plane is %q", got)
		}
	case "hairpin":
		var got []string
		for _, l := range s.network.Links {
			if l.Hairpin {
				got = append(got, l.Name)
			}
		}
		if strings.Join(got, " ") != strings.Replace(text, "none", "", 1) {
			return fmt.Errorf("hairpin mode is on at %v", got)
		}
	case "role":
		status, err := s.dir.Agent("default.magic-ip").ReadStatus()
		if err != nil {
			return err
		}
		for _, l := range status.Links {
			if slices.Contains(l.Names, args[0]) && text == fmt.Sprintf("%s %s: %s", args[0], l.Role, l.Reason) {
				return nil
			}
		}
		return fmt.Errorf("the links are %+v", status.Links)
	case "default", "no-default":
		i := slices.IndexFunc(s.network.Links, func(l node.LinkState) bool { return l.Name == args[0] })
		route := node.Route{Link: s.network.Links[i].Index, Destination: netip.MustParsePrefix("0.0.0.0/0"), Table: 254}
		if len(args) > 1 {
			route.Table = 100
		}
		s.network.Routes = append(slices.Clone(s.network.Routes), route)
		if verb == "no-default" {
			s.network.Routes = slices.DeleteFunc(s.network.Routes, func(r node.Route) bool { return r == route })
		}
		s.wake(Network)
	case "files":
		paths, err := filepath.Glob(filepath.Join(filepath.Dir(s.dir.Agent("default.magic-ip").StatusPath()), "*.json"))
		var got []string
		for _, path := range paths {
			got = append(got, filepath.Base(path))
		}
		if err != nil || strings.Join(got, " ") != text {
			return fmt.Errorf("there are %v, %w", got, err)
		}
	case "dead":
		pods, err := s.dir.Agent("default.magic-ip").ReadPods()
		if err != nil {
			return err
		}
		var got []string
		for _, key := range pods.Dead {
			got = append(got, strings.TrimPrefix(key.ContainerID, "c-"))
		}
		if strings.Join(got, " ") != text {
			return fmt.Errorf("dead are %v", got)
		}
	default:
		return fmt.Errorf("unknown event")
	}
	return nil
}

func parseRecord(args []string) (runtimedir.Attachment, error) {
	name := args[0]
	record := runtimedir.Attachment{
		ContainerID: "c-" + name, IfName: "eth0", Network: "net", Namespace: "default", Name: name, UID: "uid-" + name,
		Labels: map[string]string{"app": "echo"}, AddedAt: time.Now(),
	}
	for _, arg := range args[1:] {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "ns":
			record.Namespace = value
		case "uid":
			record.UID = value
		case "host":
			record.HostInterface = value
		case "container":
			record.ContainerID = value
		case "if":
			record.IfName = value
		case "clock":
			d, err := time.ParseDuration(value)
			if err != nil {
				return record, err
			}
			record.AddedAt = record.AddedAt.Add(d)
		case "labels":
			record.Labels = parseLabels(value)
		case "ip":
			record.IPs = parseIPs(value)
		default:
			return record, fmt.Errorf("unknown key %s", key)
		}
	}
	return record, nil
}

func parseLabels(text string) map[string]string {
	if text == "?" {
		return nil
	}
	labels := map[string]string{}
	for _, pair := range strings.Split(text, ",") {
		key, value, _ := strings.Cut(pair, "=")
		labels[key] = value
	}
	return labels
}

func parseIPs(text string) (ips []netip.Addr) {
	for _, ip := range strings.Split(text, ",") {
		ips = append(ips, netip.MustParseAddr(ip))
	}
	return ips
}

// updateState is what the plugin does.
func (s *stage) updateState(gone []runtimedir.Key, added ...runtimedir.Attachment) error {
	_, err := s.dir.Update(time.Second, gone, added...)
	if s.wake != nil {
		s.wake(Records)
	}
	return err
}

func (s *stage) other(args []string) error {
	frontend, err := parseFrontend(args[1])
	if err != nil {
		return err
	}
	age, err := time.ParseDuration(args[2])
	if err != nil {
		return err
	}
	defer func() {
		if s.wake != nil {
			s.wake(Others)
		}
	}()
	other := s.dir.Agent(args[0])
	return other.WriteClaims([]runtimedir.Claim{{ // what it writes first; the status is its last file
		Frontend: frontend, ClaimedAt: time.Now().Add(-age), Served: !slices.Contains(args, "unserved"), LocalRoute: slices.Contains(args, "local"),
		Confined: !slices.Contains(args, "passing"),
	}})
}

func parseFrontend(text string) (plan.Frontend, error) {
	address, protocol, _ := strings.Cut(text, "/")
	ap, err := netip.ParseAddrPort(address)
	return plan.Frontend{Address: ap.Addr(), Port: ap.Port(), Protocol: plan.Protocol(protocol)}, err
}

// want compares with the status, and with the rules.
func (s *stage) want(args []string) error {
	status, err := s.dir.Agent("default.magic-ip").ReadStatus()
	if err != nil {
		return err
	}
	want, got := strings.Join(args[1:], " "), "not there"
	for _, m := range status.MagicIPs {
		if m.Frontend.String() != args[0] {
			continue
		}
		switch {
		case m.Reason != "":
			got = "unserved: " + m.Reason
		default:
			got = s.action(args[0])
			if got != m.Action {
				return fmt.Errorf("the rules %s, and the status says %s", got, m.Action)
			}
			for _, e := range m.Endpoints {
				got += " " + e.Address.String()
			}
		}
		if strings.HasPrefix(got, "unserved: ") && strings.Contains(got, strings.TrimPrefix(want, "unserved: ")) {
			return nil
		}
	}
	if got != want {
		return fmt.Errorf("got %q", got)
	}
	return nil
}

// action is what the rules do with a pod's new packet.
func (s *stage) action(frontend string) string {
	f, err := parseFrontend(frontend)
	if err != nil {
		return err.Error()
	}
	for _, line := range strings.Split(s.backend.Dump(), "\n") {
		if strings.Contains(line, fmt.Sprintf(" actions { %s . %s . %d : goto ", f.Address, f.Protocol, f.Port)) {
			_, verdict, _ := strings.Cut(line, ": goto ")
			action, _, _ := strings.Cut(verdict, "-")
			return action
		}
	}
	return "no rule"
}

// failingBackend is the backend, which fails where the stage says so.
type failingBackend struct {
	*nftables.Fake
	stage *stage
}

func (b *failingBackend) Sync(ctx context.Context, p *plan.Plan) error {
	if err := b.stage.failure("sync"); err != nil {
		return err
	}
	if _, err := b.stage.dir.Agent("default.magic-ip").ReadClaims(); err != nil {
		b.stage.t.Errorf("rules come into the kernel before other agents can see the claims: %v", err)
	}
	return errors.Join(b.Fake.Sync(ctx, p), b.leftovers())
}

// leftovers is an error beside rules that are in place.
func (b *failingBackend) leftovers() error {
	if err := b.stage.failure("leftovers"); err != nil {
		return besideError{err}
	}
	return nil
}

type besideError struct{ error }

func (besideError) InPlace() bool { return true }

func (b *failingBackend) Verify(ctx context.Context) ([]string, error) {
	if err := b.stage.failure("verify"); err != nil {
		return nil, err
	}
	return b.Fake.Verify(ctx)
}

// fakeFlows notes what was swept.
type fakeFlows struct {
	stage *stage
	swept []string
}

func (f *fakeFlows) Sweep(_ context.Context, _ *plan.Plan, change plan.Change) (int, error) {
	if err := f.stage.failure("sweep"); err != nil {
		return 0, err
	}
	for _, frontend := range change.Frontends {
		f.swept = append(f.swept, frontend.String())
	}
	for _, frontend := range change.Removed {
		f.swept = append(f.swept, "removed", frontend.String())
	}
	for _, frontend := range change.Moved {
		f.swept = append(f.swept, "moved", frontend.String())
	}
	for _, address := range change.Gone {
		f.swept = append(f.swept, "gone", address.String())
	}
	return 0, nil
}

func (f *fakeFlows) take() string {
	defer func() { f.swept = nil }()
	return strings.Join(f.swept, " ")
}

// fakeAPI is the Kubernetes API: the pods of all namespaces.
type fakeAPI struct {
	pods map[string]inventory.Pod
	// up: it answers; synced: it has, since the agent started.
	up, synced bool
	// ownersSilent: it does not answer for the owners of pods.
	ownersSilent bool
	query        inventory.Query
}

func (f *fakeAPI) Select(query inventory.Query) { f.query = query }

func (f *fakeAPI) Poll(context.Context) {}

func (f *fakeAPI) View() inventory.View {
	var view inventory.View
	if f.synced {
		view.Synced = f.query.Namespaces
		for _, name := range slices.Sorted(maps.Keys(f.pods)) {
			if pod := f.pods[name]; inventory.Covers(f.query.Namespaces, pod.Namespace) {
				if f.ownersSilent {
					pod.Owners = nil
				}
				view.Pods = append(view.Pods, pod)
			}
		}
		if f.ownersSilent {
			view.Unresolved = f.query.Owners
		}
	}
	if f.up {
		view.Current = view.Synced
	} else {
		view.Problems = []string{"the API server does not answer"}
	}
	return view
}

func (f *fakeAPI) event(verb string, args []string) error {
	switch verb {
	case "forget":
		delete(f.pods, args[0])
		return nil
	case "api":
		f.up = args[0] == "up"
		f.synced = f.up || f.synced && args[0] == "unreachable"
		return nil
	}
	if verb == "owners" {
		f.ownersSilent = args[0] == "silent"
		return nil
	}
	name := args[0]
	created := time.Now()
	if before, known := f.pods[name]; known {
		created = before.CreatedAt
	}
	pod := inventory.Pod{
		PodID: inventory.PodID{Namespace: "default", Name: name, UID: "uid-" + name}, Labels: map[string]string{"app": "echo"},
		CreatedAt: created, Running: true,
	}
	for _, arg := range args[1:] {
		key, value, _ := strings.Cut(arg, "=")
		switch key {
		case "ns":
			pod.Namespace = value
		case "uid":
			pod.UID = value
		case "static":
			pod.StaticUID = value
		case "ip":
			pod.IPs = parseIPs(value)
		case "labels":
			pod.Labels = parseLabels(value)
		case "owner":
			pod.Owners = append(pod.Owners, value)
		case "port":
			var port runtimedir.NamedPort
			parts := strings.Split(value, "/")
			if _, err := fmt.Sscan(parts[2], &port.Port); err != nil {
				return err
			}
			port.Name, port.Protocol = parts[0], runtimedir.Protocol(parts[1])
			pod.Ports = append(pod.Ports, port)
		case "ready":
			pod.Ready = true
		case "terminating":
			pod.Terminating = true
		case "finished":
			pod.Finished, pod.Running = true, false
		case "pending":
			pod.Running = false
		default:
			return fmt.Errorf("unknown key %s", key)
		}
	}
	f.pods[name] = pod
	return nil
}
