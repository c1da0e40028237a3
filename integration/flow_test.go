package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// stream is a connection that carries data both ways for as long as it lives.
type stream struct {
	conn net.Conn
	mu   sync.Mutex
	got  int
	err  error
	end  time.Time
}

// startStream connects and then writes and reads all the time.
func (w *world) startStream(from string, to netip.AddrPort) *stream {
	w.t.Helper()
	conn, err := w.Dial(from)(w.t.Context(), "tcp", to.String())
	if err != nil {
		w.t.Fatal(err)
	}
	s := &stream{conn: conn}
	w.t.Cleanup(func() { _ = conn.Close() })
	ended := func(err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err == nil {
			s.end = time.Now()
		}
		s.err = errors.Join(s.err, err)
	}
	go func() {
		ticker := time.NewTicker(5 * time.Millisecond)
		defer ticker.Stop()
		for {
			if _, err := conn.Write([]byte("more")); err != nil {
				ended(err)
				return
			}
			<-ticker.C
		}
	}()
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, err := conn.Read(buffer)
			if err != nil {
				ended(err)
				return
			}
			s.mu.Lock()
			s.got += n
			s.mu.Unlock()
		}
	}()
	return s
}

// flows waits for more data to come.
func (s *stream) flows(t *testing.T) error {
	s.mu.Lock()
	before := s.got
	s.mu.Unlock()
	return lab.Eventually(patience(t), func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.got > before {
			return nil
		}
		return fmt.Errorf("%d bytes, then nothing: %w", s.got, s.err)
	})
}

// resetWithin waits for the stream to be reset. limit is working time.
func (s *stream) resetWithin(t *testing.T, since time.Time, limit time.Duration) error {
	if err := s.isReset(t); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if took := lab.WorkingTime(since, s.end); took > limit {
		return fmt.Errorf("reset only after %v of working time", took)
	}
	return nil
}

// isReset waits for the stream to be reset. The kernel says it once, to the reader or to the writer: the other sees the end of the stream, or
// a broken pipe, and may be the first of the two to note it.
func (s *stream) isReset(t *testing.T) error {
	return lab.Eventually(patience(t), func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case s.err == nil:
			return errors.New("the stream goes on")
		case !errors.Is(s.err, syscall.ECONNRESET):
			return fmt.Errorf("ended with %w", s.err)
		}
		return nil
	})
}

// streams is the port of TCP streams.
const streams = 9000

// serveStreams sends back whatever comes.
func (w *world) serveStreams(namespace string) {
	w.t.Helper()
	listener, err := w.Listen(namespace, "tcp", fmt.Sprintf(":%d", streams))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			w.t.Cleanup(func() { _ = conn.Close() })
			go func() { _, _ = io.Copy(conn, conn) }()
		}
	}()
}

// TestFlows: what becomes of flows when a newer target takes over, and when the old one's sandbox goes; of ours,
// and of those that another service's rule has brought to the same pod.
func TestFlows(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", configOf(agentName, entry(plain, fmt.Sprintf("ports: [{port: 8080, protocol: udp}, {port: %d}]", streams))))
		w.addClient()
		old := w.addTarget("old")
		w.echo("old")
		w.serveStreams("old")
		service := func(six bool, port uint16) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr(map[bool]string{false: "10.96.0.1", true: "fd00:10:96::1"}[six]), port)
		}
		for _, six := range []bool{false, true} {
			ip := map[bool]string{false: "ip", true: "ip6"}[six]
			pod := family(old.IPs, six).String()
			if six {
				pod = "[" + pod + "]"
			}
			w.run(fmt.Sprintf(`nft -f - <<END
				table %[1]s theirs {
					chain services {
						type nat hook prerouting priority dstnat
						%[1]s daddr %[2]s udp dport 80 dnat to %[3]s:%[4]d
						%[1]s daddr %[2]s tcp dport 80 dnat to %[3]s:%[5]d
					}
				}
END`, ip, service(six, 80).Addr(), pod, port, streams))
		}
		type client struct {
			ours, theirs       *stream
			oursUDP, theirsUDP *lab.Probe
		}
		clients := map[bool]client{}
		udp := func(to netip.AddrPort) *lab.Probe {
			probe := w.StartProbe(lab.Client{Kind: lab.UDP, From: "client", To: to, Timeout: 100 * time.Millisecond}, 5*time.Millisecond)
			t.Cleanup(func() { probe.Stop() })
			if _, err := probe.Await(patience(t), lab.AnsweredBy("old")); err != nil {
				t.Fatal(err)
			}
			return probe
		}
		for _, six := range []bool{false, true} {
			c := client{
				ours:    w.startStream("client", netip.AddrPortFrom(magic(six).Addr(), streams)),
				theirs:  w.startStream("client", service(six, 80)),
				oursUDP: udp(magic(six)), theirsUDP: udp(service(six, 80)),
			}
			if err := errors.Join(c.ours.flows(t), c.theirs.flows(t)); err != nil {
				t.Fatal(err)
			}
			clients[six] = c
		}
		// The ID of a conntrack entry tells it from a later one with the same addresses.
		entries := func(six bool) string {
			var ids []string
			for _, line := range strings.Split(w.run(fmt.Sprintf("conntrack -L -f %s -o id -d %s 2>/dev/null", map[bool]string{false: "ipv4", true: "ipv6"}[six], service(six, 80).Addr())), "\n") {
				if _, id, found := strings.Cut(line, " id="); found {
					ids = append(ids, id)
				}
			}
			return strings.Join(ids, ",")
		}
		before := map[bool]string{false: entries(false), true: entries(true)}

		w.addPod("bridge", target("new"))
		w.echo("new")
		w.serveStreams("new")
		w.awaitEndpoint("new")
		switched := time.Now()
		for six, c := range clients {
			w.note(streamStays, six, c.ours.flows(t))
			outcome, err := c.oursUDP.Await(patience(t), lab.AnsweredBy("new"))
			if late := lab.WorkingTime(switched, outcome.Sent); err == nil && late > soon {
				err = fmt.Errorf("the client was answered by the new target %v after the change", late)
			}
			w.note(udpMoves, six, err)
			_, err = c.theirsUDP.Await(patience(t), lab.AnsweredBy("old"))
			w.note(othersFlows, six, errors.Join(err, c.theirs.flows(t)))
		}
		since := time.Now()
		w.delTarget("old")
		for six, c := range clients {
			w.note(streamReset, six, c.ours.resetWithin(t, since, time.Second))
			var err error
			if after := entries(six); after != before[six] || strings.Count(after, ",") != 1 {
				err = fmt.Errorf("conntrack entries of the other service: %q, before %q, want two", after, before[six])
			}
			w.note(othersFlows, six, err)
		}
	})
}

// TestPortsUsedAgain: a closed connection's entry outlives its target, for two minutes, and leads no new connection with
// the same ports astray: the kernel takes it for what it is. What the target has reset goes with it.
func TestPortsUsedAgain(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", config())
		w.addClient()
		w.addTarget("old")
		server := w.listen("old")
		dial := func(six, reset bool) (conn *net.TCPConn, err error) {
			from := 40000 // and another for each: the last one's may not be free yet
			if six {
				from += 2
			}
			if reset {
				from++
			}
			err = w.In("client", func() error {
				dialer := net.Dialer{LocalAddr: &net.TCPAddr{Port: from}, Timeout: time.Second}
				dialed, err := dialer.DialContext(t.Context(), "tcp", magic(six).String())
				if err == nil {
					conn = dialed.(*net.TCPConn)
				}
				return err
			})
			return conn, err
		}
		each := func(f func(six, reset bool) error) {
			t.Helper()
			for _, six := range []bool{false, true} {
				for _, reset := range []bool{false, true} {
					if err := f(six, reset); err != nil {
						t.Fatalf("IPv6 %v, reset %v: %v", six, reset, err)
					}
				}
			}
		}
		// The entries of the client's connections that are closed, by state.
		entries := func(state string) int {
			return strings.Count(w.run("conntrack -L -f ipv4 -p tcp; conntrack -L -f ipv6 -p tcp"), " "+state+" ")
		}
		each(func(six, reset bool) error {
			client, err := dial(six, reset)
			if err != nil {
				return err
			}
			conn, err := server.Accept()
			if err != nil {
				return err
			}
			if reset {
				err = conn.(*net.TCPConn).SetLinger(0)
			}
			_ = conn.Close()
			_, _ = client.Read(make([]byte, 1))
			return errors.Join(err, client.Close())
		})
		if err := lab.Eventually(patience(t), func() error {
			if closed, reset := entries("TIME_WAIT"), entries("CLOSE"); closed != 2 || reset != 2 {
				return fmt.Errorf("%d entries of closed connections and %d of reset ones, want two each", closed, reset)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		w.delTarget("old")
		_ = server.Close()
		w.awaitEndpoint("")
		w.addTarget("new")
		w.echo("new")
		if closed, reset := entries("TIME_WAIT"), entries("CLOSE"); closed != 2 || reset != 0 {
			t.Errorf("after the target has gone: %d entries of closed connections and %d of reset ones, want two and none", closed, reset)
		}
		each(func(six, reset bool) error {
			conn, err := dial(six, reset)
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			if _, err := conn.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
				return err
			}
			answer, err := io.ReadAll(conn)
			if err == nil && !strings.Contains(string(answer), "\r\n\r\nnew ") {
				err = fmt.Errorf("answered %q", answer)
			}
			return err
		})
	})
}

// TestReplacement replaces the target under load, as a rolling update does: the old one's sandbox goes,
// a new one comes, its process listens a moment later. Times are measured, so it has the machine to itself.
func TestReplacement(t *testing.T) {
	for _, backend := range backends() {
		for _, kind := range onBridgePtp {
			t.Run(backend+"/"+kind, func(t *testing.T) {
				testReplacement(t, serving(t, backend, kind, config()))
			})
		}
	}
}

// soon is long before a client would send its SYN again, which is after a second.
const soon = 300 * time.Millisecond

func testReplacement(t *testing.T, w *world) {
	w.addClient()
	w.addTarget("old")
	old := w.echo("old")
	type client struct {
		*lab.Probe
		kind lab.Kind
		six  bool
	}
	var clients []client
	for _, kind := range []lab.Kind{lab.NewConnection, lab.KeepAlive, lab.UDP} {
		timeout := soon
		if kind == lab.UDP {
			timeout /= 2 // a datagram that the old target did not live to answer is lost, whatever the rules
		}
		for _, six := range []bool{false, true} {
			probe := w.StartProbe(lab.Client{Kind: kind, From: "client", To: magic(six), Timeout: timeout}, 5*time.Millisecond)
			if _, err := probe.Await(patience(t), lab.AnsweredBy("old")); err != nil {
				t.Fatal(err)
			}
			clients = append(clients, client{probe, kind, six})
		}
	}
	// The sandbox goes without a word to the clients: nobody sends a FIN.
	w.delTarget("old")
	_ = old.Close()
	w.awaitEndpoint("")
	w.addTarget("new")
	w.echo("new")
	listening := time.Now()
	for _, c := range clients {
		if _, err := c.Await(patience(t), lab.AnsweredBy("new")); err != nil {
			w.note(replaced, c.six, fmt.Errorf("%s: never reached the new target: %w", c.kind, err))
		}
	}
	t.Logf("all clients on the new target %v after it listened", time.Since(listening))
	for _, c := range clients {
		var wrong error
		for _, o := range c.Stop() {
			took, ended := lab.WorkingTime(o.Sent, o.Sent.Add(o.Took)), lab.WorkingTime(listening, o.Sent.Add(o.Took))
			switch sentAfter := o.Sent.After(listening); {
			case sentAfter && o.Err != nil:
				wrong = fmt.Errorf("%s: sent %v after the new target listened: %w", c.kind, o.Sent.Sub(listening), o.Err)
			case sentAfter && took > soon:
				wrong = fmt.Errorf("%s: a request took %v after the new target listened", c.kind, took)
			case !sentAfter && ended > soon:
				wrong = fmt.Errorf("%s: a request from before ended %v after the new target listened", c.kind, ended)
			}
		}
		w.note(replaced, c.six, wrong)
	}
}

// TestSlowAnswers: a flow of datagrams moves while the old server still owes answers, and back; none is lost, and no flow is deleted
// for it. What servers sent and clients received is counted.
func TestSlowAnswers(t *testing.T) {
	onEach(t, func(t *testing.T, backend string) {
		w := serving(t, backend, "bridge", configOf(agentName, entry(plain, fmt.Sprintf("ports: [{port: %d, protocol: udp}]", port))))
		note := w.await("to say which backend it uses", func(a *runtimedir.Status) bool { return a.Backend != "" }).BackendNote
		if strings.Contains(note, "a datagram that the old server has not answered") {
			t.Fatalf("no zones: status says %q", note)
		}
		w.addClient()
		w.addTarget("old")
		traffic := &slowTraffic{world: w, asked: map[string]int{}, sent: map[string]int{}, received: map[slowAnswer]int{}}
		traffic.serve("old")
		w.awaitEndpoint("old")
		var clients []slowAnswer
		for _, from := range []string{"client", lab.Host, "old"} {
			for _, six := range []bool{false, true} {
				clients = append(clients, slowAnswer{from: from, six: six})
				traffic.ask(from, six)
			}
		}
		answered := func(by string) {
			t.Helper()
			for _, c := range clients {
				c.by = by
				before := traffic.count(c)
				if err := lab.Eventually(patience(t), func() error {
					if traffic.count(c) <= before {
						return fmt.Errorf("no answer for %+v", c)
					}
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
		}
		answered("old")
		w.addPod("bridge", target("new"))
		traffic.serve("new")
		w.awaitEndpoint("new")
		answered("new")
		traffic.pause(true)
		if err := lab.Eventually(patience(t), traffic.lost); err != nil {
			t.Error(err)
		}
		if log := w.agent.Log(); strings.Contains(log, "flows ended") {
			t.Errorf("flows were deleted:\n%s", log)
		}
		// Back: the flows of before lead to the old one.
		traffic.end("new")
		traffic.pause(false)
		w.delTarget("new")
		w.awaitEndpoint("old")
		answered("old")
	})
}

// slowTraffic is of servers that answer each datagram with their name, 30 ms later, and of clients that do not wait for it. There are
// never so many datagrams on their way that the buffer of a socket is full.
type slowTraffic struct {
	*world
	mu          sync.Mutex
	paused      bool
	asked, sent map[string]int // by server
	received    map[slowAnswer]int
	ended       string // a server that is not waited for
}

type slowAnswer struct {
	from string
	six  bool
	by   string
}

func (s *slowTraffic) pause(paused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paused = paused
}

// end stops waiting for the answers of a server.
func (s *slowTraffic) end(server string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = server
}

// owed is how many answers servers have yet to send, or clients to receive.
func (s *slowTraffic) owed() (answers int) {
	for server, asked := range s.asked {
		if server != s.ended {
			answers += asked
		}
	}
	for answer, received := range s.received {
		if answer.by != s.ended {
			answers -= received
		}
	}
	return answers
}

func (s *slowTraffic) count(answer slowAnswer) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received[answer]
}

// lost is an error while servers owe answers, or have sent some that nobody has received.
func (s *slowTraffic) lost() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for server, asked := range s.asked {
		received := 0
		for answer, count := range s.received {
			if answer.by == server {
				received += count
			}
		}
		if sent := s.sent[server]; sent != asked || received != sent {
			return fmt.Errorf("%s was asked %d times, has sent %d answers, and clients have received %d", server, asked, sent, received)
		}
	}
	return nil
}

func (s *slowTraffic) serve(name string) {
	s.t.Helper()
	conn, err := s.ListenPacket(name, "udp", fmt.Sprintf(":%d", port))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buffer := make([]byte, 64)
		for {
			_, client, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			s.mu.Lock()
			s.asked[name]++
			s.mu.Unlock()
			time.AfterFunc(30*time.Millisecond, func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				if _, err := conn.WriteTo([]byte(name), client); err == nil {
					s.sent[name]++
				}
			})
		}
	}()
}

func (s *slowTraffic) ask(from string, six bool) {
	s.t.Helper()
	conn, err := s.Dial(from)(s.t.Context(), "udp", magic(six).String())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buffer := make([]byte, 64)
		for {
			n, err := conn.Read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				s.mu.Lock()
				s.received[slowAnswer{from, six, string(buffer[:n])}]++
				s.mu.Unlock()
			}
		}
	}()
	go func() {
		for s.t.Context().Err() == nil {
			time.Sleep(2 * time.Millisecond)
			s.mu.Lock()
			if !s.paused && s.owed() < 50 {
				_, _ = conn.Write([]byte("?")) // refused while the new server does not listen yet
			}
			s.mu.Unlock()
		}
	}()
}
