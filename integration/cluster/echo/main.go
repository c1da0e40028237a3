// Command echo is what runs in the pods of the end-to-end tests: a server that says who answered and whom, and a
// client that counts. `echo pause` is the first process of their sandboxes.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const usage = `usage: echo pause
       echo serve [--tcp ADDRESS] [--udp ADDRESS] [--control ADDRESS] [--ready-after D] [--drain D] [--journal FILE]
       echo load [--for D] [--every D] [--lines] KIND=ADDRESS:PORT...   (KIND: new-connection, keep-alive, udp)
       echo path [--rounds N] ADDRESS:PORT...`

func main() { os.Exit(run(time.Now(), os.Args[1:])) }

func run(started time.Time, args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, usage)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var err error
	switch args[0] {
	case "pause":
		pause(ctx)
	case "serve":
		err = serve(ctx, started, args[1:])
	case "load":
		err = load(ctx, args[1:])
	case "path":
		err = path(ctx, args[1:])
	default:
		err = errors.New(usage)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		return 1
	}
	return 0
}

// pause waits for the end, and reaps what is left to it where the containers of a pod share their processes.
func pause(ctx context.Context) {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-ctx.Done():
			return
		case <-children:
			for pid := 1; pid > 0; {
				pid, _ = syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			}
		}
	}
}

// serve answers with the pod's name and the client's address until SIGTERM, and then what it has been asked. Its first
// line of output is when it was started. The control address says so too (/started), is what kubelet asks whether the
// pod is ready (/ready), and is told whether it is (PUT /ready or DELETE /ready). The journal, a file that outlives the
// pod, has a line for each thing that happens and when: started, listening, terminated (was told to stop), closed
// (listens no more).
func serve(ctx context.Context, started time.Time, args []string) error {
	fmt.Println("started", started.UTC().Format(time.RFC3339Nano))
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	tcp := flags.String("tcp", ":8080", "`ADDRESS` for HTTP")
	udp := flags.String("udp", ":8080", "`ADDRESS` for datagrams")
	control := flags.String("control", ":8081", "`ADDRESS` that kubelet and the tests ask")
	readyAfter := flags.Duration("ready-after", 0, "be ready after this time")
	drain := flags.Duration("drain", 0, "go on for this time after SIGTERM")
	name := flags.String("name", os.Getenv("POD_NAME"), "what to answer with; else the hostname")
	journalFile := flags.String("journal", os.DevNull, "`FILE` to append to")
	if err := flags.Parse(args); err != nil {
		return err
	}
	journal, err := os.OpenFile(*journalFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	write := func(what string, at time.Time) { fmt.Fprintln(journal, what, at.UTC().Format(time.RFC3339Nano)) }
	write("started", started)
	if *name == "" {
		*name, _ = os.Hostname()
	}
	var ready atomic.Bool
	ready.Store(*readyAfter == 0)
	time.AfterFunc(*readyAfter, func() { ready.Store(true) })

	listener, errTCP := net.Listen("tcp", *tcp)
	packets, errUDP := net.ListenPacket("udp", *udp)
	asked, errControl := net.Listen("tcp", *control)
	if err := errors.Join(errTCP, errUDP, errControl); err != nil {
		return err
	}
	write("listening", time.Now())
	echo := lab.NewEcho(*name, listener, packets)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /started", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, started.UTC().Format(time.RFC3339Nano))
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if !ready.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("PUT /ready", func(http.ResponseWriter, *http.Request) { ready.Store(true) })
	mux.HandleFunc("DELETE /ready", func(http.ResponseWriter, *http.Request) { ready.Store(false) })
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(asked) }()

	<-ctx.Done()
	terminated := time.Now()
	fmt.Println("terminated", terminated.UTC().Format(time.RFC3339Nano))
	write("terminated", terminated)
	time.Sleep(*drain)
	write("closed", time.Now())
	limited, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return errors.Join(echo.Shutdown(limited), server.Close(), journal.Close())
}

// summary is the line of output for a target where requests have none.
type summary struct {
	Kind       lab.Kind       `json:"kind"`
	To         netip.AddrPort `json:"to"`
	Sent       int            `json:"sent"`
	Failed     int            `json:"failed"`
	LongestGap time.Duration  `json:"longestGap"` // ns
	Servers    map[string]int `json:"servers"`
}

// load asks all targets at once, and then prints what became of that.
func load(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	during := flags.Duration("for", 10*time.Second, "how long")
	every := flags.Duration("every", 0, "ask once per this time; else as often as outages are measured with")
	lines := flags.Bool("lines", false, "print a line for each request instead of one for each target")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var clients []lab.Client
	for _, target := range flags.Args() {
		kind, address, _ := strings.Cut(target, "=")
		load, known := lab.Loads[lab.Kind(kind)]
		to, err := netip.ParseAddrPort(address)
		if err != nil || !known {
			return fmt.Errorf("%q is no target\n%s", target, usage)
		}
		clients = append(clients, lab.Client{Kind: lab.Kind(kind), To: to, Timeout: load.Timeout, ByClock: true})
	}
	var probes []*lab.Probe
	for _, client := range clients {
		start, interval := lab.StartProbe, lab.Loads[client.Kind].Interval
		if client.Kind == lab.UDP {
			start = lab.StartStream
		}
		if *every > 0 {
			interval = *every
		}
		probes = append(probes, start(new(net.Dialer).DialContext, client, interval))
	}
	select {
	case <-ctx.Done():
	case <-time.After(*during):
	}
	out := json.NewEncoder(os.Stdout)
	for i, probe := range probes {
		outcomes := probe.Stop()
		if *lines {
			if err := lab.WriteRequests(out, clients[i], outcomes); err != nil {
				return err
			}
			continue
		}
		if err := out.Encode(summary{
			Kind: clients[i].Kind, To: clients[i].To, Sent: len(outcomes), Failed: len(outcomes.Failed()),
			LongestGap: outcomes.LongestGap(), Servers: outcomes.Servers(),
		}); err != nil {
			return err
		}
	}
	return nil
}
