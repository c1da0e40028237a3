// Command echo is what runs in the pods of the end-to-end tests: a server that says who answered and whom, and a
// client that counts. `echo pause` is the first process of their sandboxes.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
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
       echo serve [--tcp ADDRESS] [--udp ADDRESS] [--unix PATH] [--control ADDRESS] [--ready-after D] [--delay D] [--drain D] [--journal FILE] [--instance]
       echo load [--for D] [--every D] [--datagram-timeout D] [--lines] KIND=ADDRESS:PORT|PATH...   (KIND: new-connection, keep-alive, udp, udp-sendto)
       echo ask [--timeout D] ADDRESS:PORT
       echo path [--rounds N] ADDRESS:PORT|PATH...`

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
	case "ask":
		err = ask(ctx, args[1:])
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
// (listens no more). An instance's name tells it from others of the same pod.
func serve(ctx context.Context, started time.Time, args []string) error {
	fmt.Println("started", started.UTC().Format(time.RFC3339Nano))
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	tcp := flags.String("tcp", ":8080", "`ADDRESS` for HTTP")
	udp := flags.String("udp", ":8080", "`ADDRESSES` for datagrams, separated by commas")
	unix := flags.String("unix", "", "`PATH` of a socket for HTTP; it is taken over from a server that has it")
	control := flags.String("control", ":8081", "`ADDRESS` that kubelet and the tests ask")
	readyAfter := flags.Duration("ready-after", 0, "be ready after this time")
	delay := flags.Duration("delay", 0, "how long each answer takes")
	drain := flags.Duration("drain", 0, "go on for this time after SIGTERM")
	name := flags.String("name", os.Getenv("POD_NAME"), "what to answer with; else the hostname")
	instance := flags.Bool("instance", false, "answer with the name and when the process was started")
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
	if *instance {
		*name = lab.Instance(*name, started)
	}
	var ready atomic.Bool
	ready.Store(*readyAfter == 0)
	time.AfterFunc(*readyAfter, func() { ready.Store(true) })

	listener, errTCP := net.Listen("tcp", *tcp)
	var packets []net.PacketConn
	var errUDP error
	for address := range strings.SplitSeq(*udp, ",") {
		conn, err := net.ListenPacket("udp", address)
		if socket, ok := conn.(*net.UDPConn); ok {
			// A server that waits for a processor has then what came meanwhile: the way to it is what tests look at.
			err = socket.SetReadBuffer(1 << 20)
		}
		packets, errUDP = append(packets, conn), errors.Join(errUDP, err)
	}
	asked, errControl := net.Listen("tcp", *control)
	if err := errors.Join(errTCP, errUDP, errControl); err != nil {
		return err
	}
	echoes := []*lab.Echo{lab.NewSlowEcho(*name, *delay, listener, packets...)}
	if *unix != "" {
		local, err := lab.ListenUnix(*unix)
		if err != nil {
			return err
		}
		echoes = append(echoes, lab.NewSlowEcho(*name, *delay, local))
	}
	write("listening", time.Now())
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
	for _, echo := range echoes {
		err = errors.Join(err, echo.Shutdown(limited))
	}
	return errors.Join(err, server.Close(), journal.Close())
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

// loadOf is how often clients of a kind ask; datagrams are all the same.
func loadOf(kind lab.Kind) lab.Load {
	if kind == lab.SendTo {
		kind = lab.UDP
	}
	return lab.Loads[kind]
}

// parseTarget reads KIND=ADDRESS:PORT or KIND=PATH; clients of a Unix socket have no address to connect to.
func parseTarget(target string) (lab.Client, lab.Dial, error) {
	kind, address, _ := strings.Cut(target, "=")
	client := lab.Client{Kind: lab.Kind(kind), Timeout: loadOf(lab.Kind(kind)).Timeout, ByClock: true}
	dial := lab.Dial(new(net.Dialer).DialContext)
	var err error
	switch {
	case client.Timeout == 0:
		err = errors.New("there is no such kind")
	case strings.HasPrefix(address, "/"):
		client.To = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", address)
		}
	default:
		client.To, err = netip.ParseAddrPort(address)
	}
	if client.Kind == lab.SendTo {
		dial = lab.DialUnconnected
	}
	if err != nil {
		return client, nil, fmt.Errorf("%q is no target: %w\n%s", target, err, usage)
	}
	return client, dial, nil
}

// ask makes one request by HTTP, and prints who has answered.
func ask(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("ask", flag.ContinueOnError)
	timeout := flags.Duration("timeout", 3*time.Second, "how long it may take")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+flags.Arg(0)+"/", http.NoBody)
	if err != nil {
		return err
	}
	began := time.Now()
	response, err := http.DefaultClient.Do(request)
	took := time.Since(began).Round(100 * time.Microsecond)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: the request timed out after %s", flags.Arg(0), *timeout)
	case err != nil:
		return fmt.Errorf("%w, after %s", err, took)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	server, _, _ := strings.Cut(string(body), " ")
	fmt.Printf("answered by %s after %s\n", server, took)
	return err
}

// load asks all targets at once, and then prints what became of that.
func load(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	during := flags.Duration("for", 10*time.Second, "how long")
	every := flags.Duration("every", 0, "ask once per this time; else as often as outages are measured with")
	datagrams := flags.Duration("datagram-timeout", loadOf(lab.UDP).Timeout, "how long the answer to a datagram may take")
	lines := flags.Bool("lines", false, "print a line for each request instead of one for each target")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var clients []lab.Client
	var probes []*lab.Probe
	for _, target := range flags.Args() {
		client, dial, err := parseTarget(target)
		if err != nil {
			return err
		}
		start, interval := lab.StartProbe, *every
		if client.Kind == lab.UDP || client.Kind == lab.SendTo {
			start, client.Timeout = lab.StartStream, *datagrams
		}
		if interval == 0 {
			interval = loadOf(client.Kind).Interval
		}
		clients = append(clients, client)
		probes = append(probes, start(dial, client, interval))
	}
	select {
	case <-ctx.Done():
	case <-time.After(*during):
	}
	all := make([]lab.Outcomes, len(probes)) // none goes on while another prints
	for i, probe := range probes {
		all[i] = probe.Stop()
	}
	out := json.NewEncoder(os.Stdout)
	for i, outcomes := range all {
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
