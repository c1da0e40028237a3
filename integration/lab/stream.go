package lab

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"
)

// DialUnconnected is a Dial for datagrams from a socket that is not connected: it sends each to the address, takes those of
// anybody, and is told of no refusal.
func DialUnconnected(ctx context.Context, _, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	network, local := "udp4", "0.0.0.0:0"
	if to.Addr().Is6() {
		network, local = "udp6", "[::]:0"
	}
	socket, err := new(net.ListenConfig).ListenPacket(ctx, network, local)
	if err != nil {
		return nil, err
	}
	return &unconnected{socket.(*net.UDPConn), to}, nil
}

type unconnected struct {
	*net.UDPConn
	to netip.AddrPort
}

func (u *unconnected) Write(data []byte) (int, error) { return u.WriteToUDPAddrPort(data, u.to) }

func (u *unconnected) Read(data []byte) (int, error) {
	size, _, err := u.ReadFromUDPAddrPort(data)
	return size, err
}

// StartStream is StartProbe for datagrams that do not wait for one another: a socket sends one at each
// interval, whatever became of the earlier ones, and each that is answered within the time-out counts. A refusal
// does not say which datagram it is for; the youngest without an answer is taken for it.
func StartStream(dial Dial, c Client, interval time.Duration) *Probe {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Probe{cancel: cancel, done: make(chan struct{}), news: make(chan struct{})}
	go func() {
		defer close(p.done)
		conn, err := dial(ctx, "udp", c.To.String())
		if err != nil { // a connected socket sends nothing yet: there is no route, and will be none
			p.note(Outcome{Sent: time.Now(), Err: err})
			return
		}
		s := &stream{probe: p, conn: conn, timeout: c.Timeout, sent: map[int]time.Time{}}
		var receiver sync.WaitGroup
		receiver.Go(s.receive)
		s.send(ctx, interval)
		_ = conn.Close()
		receiver.Wait()
	}()
	return p
}

type stream struct {
	probe   *Probe
	conn    net.Conn
	timeout time.Duration

	mu     sync.Mutex
	sent   map[int]time.Time // by number, those without an outcome
	oldest int               // all before it have one
	last   int
}

func (s *stream) send(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		s.expire()
		s.mu.Lock()
		s.last++
		number := s.last
		s.sent[number] = time.Now()
		s.mu.Unlock()
		if _, err := s.conn.Write([]byte(strconv.Itoa(number))); err != nil {
			s.end(number, Answer{}, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (s *stream) receive() {
	buffer := make([]byte, 2048)
	for {
		size, err := s.conn.Read(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.mu.Lock()
			youngest := s.last
			s.mu.Unlock()
			s.end(youngest, Answer{}, err)
			continue
		}
		i := strings.LastIndexByte(string(buffer[:size]), ' ')
		if i < 0 {
			continue
		}
		if number, err := strconv.Atoi(string(buffer[i+1 : size])); err == nil {
			answer, err := parseAnswer(string(buffer[:i]))
			s.end(number, answer, err)
		}
	}
}

// end notes what became of a datagram, unless that is known already.
func (s *stream) end(number int, answer Answer, err error) {
	s.mu.Lock()
	at, pending := s.sent[number]
	delete(s.sent, number)
	s.mu.Unlock()
	if pending {
		s.probe.note(Outcome{Sent: at, Took: time.Since(at), Answer: answer, Err: err})
	}
}

// expire ends those that have waited for too long.
func (s *stream) expire() {
	for {
		s.mu.Lock()
		number := s.oldest
		at, pending := s.sent[number]
		more := number <= s.last && (!pending || time.Since(at) >= s.timeout)
		if more {
			s.oldest++
		}
		s.mu.Unlock()
		if !more {
			return
		}
		if pending {
			s.end(number, Answer{}, context.DeadlineExceeded)
		}
	}
}
