package agent

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

var update = flag.Bool("update", false, "write the rules of the scenarios anew")

// TestScenarios plays the files of testdata/scenarios: a comment, the configuration, events one per line,
// and the data in the rules at the end (or under the name table, all that is in the tables). After every event the agent is woken a second time, and must do nothing.
//
//	add NAME [ns=NS] [labels=K=V,K=V|?] ip=ADDR,ADDR [host=LINK] [uid=UID]   the plugin records a pod
//	del NAME                           its record leaves
//	links NAME …                       the interfaces that pods are behind
//	link NAME, unlink NAME             a host interface comes or goes
//	own ADDR …                         the node's own addresses
//	no-ipv6                            the node has no IPv6
//	bridge NAME                        a bridge whose frames do not pass netfilter
//	restart                            the agent is stopped and started
//	lose-state, corrupt-state          the state file goes, or turns into garbage
//	flush                              somebody flushes all rules
//	wait DURATION                      time passes
//	other NAME FRONTEND DURATION       another agent claims a frontend since so long before the start
//	config FILE                        the configuration becomes that section
//	want FRONTEND ACTION [ENDPOINT …]  what becomes of new packets: serve, reject, hold, pass
//	want FRONTEND not served: REASON   part of the reason
//	swept FLOWS                        the frontends and gone addresses swept since the last time
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
	dir     string
	config  string
	backend *nftables.Fake
	sweeps  fakeFlows
	network node.Network
	records []state.Attachment // of the pods that are there
	wake    func(Source)
	stop    func()
	log     bytes.Buffer
}

func play(t *testing.T, sections map[string]string) (rules string) {
	s := &stage{
		t: t, dir: t.TempDir(), config: sections["config"], backend: nftables.NewFake("default.magic-ip"),
		network: node.Network{PodInterfaces: []string{"cni0"}, Interfaces: map[string]bool{"cni0": true}, IPv6: true},
	}
	s.start()
	defer func() {
		s.stop()
		if t.Failed() {
			t.Logf("log:\n%s", s.log.String())
		}
	}()
	for i, line := range strings.Split(sections["events"], "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if err := s.event(sections, fields[0], fields[1:]); err != nil {
			t.Fatalf("events, line %d: %s: %v", i+1, line, err)
		}
		synctest.Wait()
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
	go func() {
		ended <- Run(ctx, Options{
			RuntimeDir:   s.dir,
			Load:         func() (config.Config, error) { return config.Parse(strings.NewReader(s.config), true) },
			Backend:      s.backend,
			Flows:        &s.sweeps,
			Node:         s,
			ForeignRules: func(context.Context, []netip.Addr) []string { return nil },
			Watchers: []Watcher{func(ctx context.Context, wake func(Source)) error {
				s.wake = wake
				close(ready)
				<-ctx.Done()
				return nil
			}},
			Log: slog.New(slog.NewTextHandler(&s.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
	}()
	<-ready
	synctest.Wait()
	s.stop = func() {
		cancel()
		if err := <-ended; err != nil {
			s.t.Errorf("the agent ended with %v", err)
		}
	}
}

// Read and EnableHairpin make the stage the Node.
func (s *stage) Read() (node.Network, error) { return s.network, nil }

func (s *stage) EnableHairpin(string) (bool, error) { return false, nil }

func (s *stage) event(sections map[string]string, verb string, args []string) error {
	switch verb {
	case "add":
		record, err := parseRecord(args)
		if err != nil {
			return err
		}
		record.AddedAt = time.Now()
		s.records = append(s.records, record)
		time.Sleep(time.Millisecond)
		return s.updateState([]state.Key{record.Key()}, record)
	case "del":
		for i, r := range s.records {
			if r.Name == args[0] {
				s.records = append(s.records[:i], s.records[i+1:]...)
				return s.updateState([]state.Key{r.Key()})
			}
		}
		return fmt.Errorf("no record of %s", args[0])
	case "links":
		s.network.PodInterfaces = args
		s.wake(Network)
	case "link":
		s.network.Interfaces = maps.Clone(s.network.Interfaces)
		s.network.Interfaces[args[0]] = true // without an event: a record may come before it
	case "unlink":
		s.network.Interfaces = maps.Clone(s.network.Interfaces)
		delete(s.network.Interfaces, args[0])
		s.wake(Network)
	case "own":
		for _, arg := range args {
			s.network.Addresses = append(s.network.Addresses, netip.MustParseAddr(arg))
		}
		s.wake(Network)
	case "bridge":
		s.network.Bridges = []plan.Bridge{{Name: args[0], Unfiltered4: true, Unfiltered6: true}}
		s.wake(Network)
	case "no-ipv6":
		s.network.IPv6 = false
		s.wake(Network)
	case "restart":
		s.stop()
		s.start()
	case "lose-state":
		s.wake(Records)
		return os.Remove(state.Path(s.dir))
	case "corrupt-state":
		s.wake(Records)
		return os.WriteFile(state.Path(s.dir), []byte("{"), 0o644)
	case "flush":
		return s.backend.Flush()
	case "wait":
		d, err := time.ParseDuration(args[0])
		time.Sleep(d)
		return err
	case "other":
		return s.other(args)
	case "config":
		s.config = sections[args[0]]
		s.wake(Settings)
	case "want":
		return s.want(args)
	case "swept":
		got := s.sweeps.take()
		if want := strings.Join(args, " "); got != want {
			return fmt.Errorf("swept %q", got)
		}
	default:
		return fmt.Errorf("unknown event")
	}
	return nil
}

func parseRecord(args []string) (state.Attachment, error) {
	name := args[0]
	record := state.Attachment{
		ContainerID: "c-" + name, IfName: "eth0", Network: "net", Namespace: "default", Name: name, UID: "uid-" + name,
		Labels: map[string]string{"app": "echo"},
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
		case "labels":
			record.Labels = nil
			if value != "?" {
				record.Labels = map[string]string{}
				for _, pair := range strings.Split(value, ",") {
					k, v, _ := strings.Cut(pair, "=")
					record.Labels[k] = v
				}
			}
		case "ip":
			for _, ip := range strings.Split(value, ",") {
				record.IPs = append(record.IPs, netip.MustParseAddr(ip))
			}
		default:
			return record, fmt.Errorf("unknown key %s", key)
		}
	}
	return record, nil
}

// updateState is what the plugin does.
func (s *stage) updateState(gone []state.Key, added ...state.Attachment) error {
	_, err := state.Update(s.dir, time.Second, gone, added...)
	s.wake(Records)
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
	defer s.wake(Others)
	return published.Write(s.dir, &published.Agent{Name: args[0], MagicIPs: []published.MagicIP{{
		Address: frontend.Address, Port: frontend.Port, Protocol: string(frontend.Protocol), ClaimedAt: time.Now().Add(-age),
	}}})
}

func parseFrontend(text string) (plan.Frontend, error) {
	address, protocol, _ := strings.Cut(text, "/")
	ap, err := netip.ParseAddrPort(address)
	return plan.Frontend{Address: ap.Addr(), Port: ap.Port(), Protocol: plan.Protocol(protocol)}, err
}

// want compares with what the agent has published, which is what `status` shows.
func (s *stage) want(args []string) error {
	agent, err := published.Read(s.dir, "default.magic-ip")
	if err != nil {
		return err
	}
	want, got := strings.Join(args[1:], " "), "not there"
	for _, m := range agent.MagicIPs {
		if frontendOf(m).String() != args[0] {
			continue
		}
		switch {
		case m.Refused != "":
			got = "not served: " + m.Refused
		default:
			got = s.action(args[0])
			for _, e := range m.Endpoints {
				got += " " + e.Address.String()
			}
		}
		if strings.HasPrefix(got, "not served: ") && strings.Contains(got, strings.TrimPrefix(want, "not served: ")) {
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
		if strings.Contains(line, fmt.Sprintf(" services { %s . %s . %d : goto ", f.Address, f.Protocol, f.Port)) {
			_, verdict, _ := strings.Cut(line, ": goto ")
			action, _, _ := strings.Cut(verdict, "-")
			return action
		}
	}
	return "no rule"
}

// fakeFlows notes what was swept.
type fakeFlows struct{ swept []string }

func (f *fakeFlows) Sweep(_ context.Context, _ *plan.Plan, change plan.Change) (int, error) {
	for _, frontend := range change.Frontends {
		f.swept = append(f.swept, frontend.String())
	}
	for _, frontend := range change.Removed {
		f.swept = append(f.swept, "removed", frontend.String())
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
