package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Kind is how a client talks to an Echo.
type Kind string

// The kinds of client.
const (
	NewConnection Kind = "new-connection" // HTTP, a connection for each request
	KeepAlive     Kind = "keep-alive"     // HTTP, all requests on one connection
	UDP           Kind = "udp"            // datagrams from one connected socket
	SendTo        Kind = "udp-sendto"     // datagrams from one socket that is not connected; for StartStream with DialUnconnected
)

// Load is how often a client of a kind asks, and how long it waits for an answer.
type Load struct{ Interval, Timeout time.Duration }

// Loads are those that outages are measured with.
var Loads = map[Kind]Load{ //nolint:gochecknoglobals // a table
	NewConnection: {5 * time.Millisecond, time.Second},
	KeepAlive:     {5 * time.Millisecond, 2 * time.Second},
	UDP:           {5 * time.Millisecond, 200 * time.Millisecond},
}

// Client is a client in a network namespace of a node.
type Client struct {
	Kind Kind
	From string // network namespace
	To   netip.AddrPort
	// Timeout of a request, in working time (see Patience) unless ByClock; 5 s where zero.
	Timeout time.Duration
	ByClock bool
}

// Ask sends one request from a client of its own.
func (n *Node) Ask(ctx context.Context, c Client) (Answer, error) {
	ask, closeClient := open(n.Dial(c.From), c)
	defer closeClient()
	return ask(ctx)
}

// asker sends a request and waits for the answer.
type asker func(context.Context) (Answer, error)

// open returns a client's way to ask, which is not for parallel use unless each request has its own
// connection.
func open(dial Dial, c Client) (asker, func()) {
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	var ask asker
	var closeClient func()
	if c.Kind == UDP {
		client := &udpClient{dial: dial, to: c.To.String()}
		ask, closeClient = client.ask, client.close
	} else {
		transport := &http.Transport{DialContext: dial, DisableKeepAlives: c.Kind == NewConnection}
		ask = func(ctx context.Context) (Answer, error) { return askHTTP(ctx, transport, "http://"+c.To.String()) }
		closeClient = transport.CloseIdleConnections
	}
	return func(ctx context.Context) (Answer, error) {
		limit := Patience
		if c.ByClock {
			limit = context.WithTimeout
		}
		ctx, cancel := limit(ctx, c.Timeout)
		defer cancel()
		return ask(ctx)
	}, closeClient
}

func askHTTP(ctx context.Context, transport *http.Transport, url string) (Answer, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Answer{}, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return Answer{}, err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return Answer{}, err
	}
	return parseAnswer(string(body))
}

// udpClient keeps its connected socket whatever happens: that is what makes flows stick.
type udpClient struct {
	dial Dial
	to   string
	conn net.Conn
	sent int
}

func (c *udpClient) ask(ctx context.Context) (Answer, error) {
	if c.conn == nil {
		conn, err := c.dial(ctx, "udp", c.to)
		if err != nil {
			return Answer{}, err
		}
		c.conn = conn
	}
	if err := c.conn.SetReadDeadline(time.Time{}); err != nil {
		return Answer{}, err
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetReadDeadline(time.Now())
		close(ended)
	})
	defer func() {
		if !stop() {
			<-ended // before the next request sets its own deadline
		}
	}()

	c.sent++
	payload := strconv.Itoa(c.sent)
	if _, err := c.conn.Write([]byte(payload)); err != nil {
		return Answer{}, err
	}
	buffer := make([]byte, 2048)
	for {
		size, err := c.conn.Read(buffer)
		if err != nil {
			return Answer{}, err
		}
		// An answer to an earlier request, which has timed out, is none to this one.
		if line, ok := strings.CutSuffix(string(buffer[:size]), " "+payload); ok {
			return parseAnswer(line)
		}
	}
}

func (c *udpClient) close() {
	if c.conn != nil {
		_ = c.conn.Close()
	}
}

// Outcome is what became of one request.
type Outcome struct {
	Sent time.Time
	Took time.Duration
	Answer
	Err error
}

// Probe is a client that asks again and again and notes every outcome.
type Probe struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex
	outcomes Outcomes      // in the order of their ends
	news     chan struct{} // closed and replaced at each outcome
}

// StartProbe asks once per interval. A client with a connection per request does so whatever became of
// the earlier ones; the others wait for an outcome before they ask again.
func (n *Node) StartProbe(c Client, interval time.Duration) *Probe {
	return StartProbe(n.Dial(c.From), c, interval)
}

// StartProbe is Node.StartProbe for a client that dials in its own way.
func StartProbe(dial Dial, c Client, interval time.Duration) *Probe {
	ask, closeClient := open(dial, c)
	return startProbe(ask, closeClient, c.Kind == NewConnection, interval)
}

// StartAsking is StartProbe for a client that asks in its own way, once after the other.
func StartAsking(ask func(context.Context) (Answer, error), interval time.Duration) *Probe {
	return startProbe(ask, func() {}, false, interval)
}

func startProbe(ask asker, closeClient func(), parallel bool, interval time.Duration) *Probe {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Probe{cancel: cancel, done: make(chan struct{}), news: make(chan struct{})}
	go func() {
		defer close(p.done)
		defer closeClient()
		var requests sync.WaitGroup
		defer requests.Wait()
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			if parallel {
				requests.Go(func() { p.ask(ctx, ask) })
			} else {
				p.ask(ctx, ask)
			}
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	}()
	return p
}

func (p *Probe) ask(ctx context.Context, ask asker) {
	sent := time.Now()
	answer, err := ask(ctx)
	if ctx.Err() != nil {
		return // the probe was stopped in the middle of this request, which says nothing
	}
	p.note(Outcome{Sent: sent, Took: time.Since(sent), Answer: answer, Err: err})
}

func (p *Probe) note(outcome Outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outcomes = append(p.outcomes, outcome)
	close(p.news)
	p.news = make(chan struct{})
}

// Stop ends the probe and returns all outcomes; requests under way are not among them.
func (p *Probe) Stop() Outcomes {
	p.cancel()
	<-p.done
	return p.Outcomes()
}

// Outcomes returns the outcomes so far, in the order of their ends.
func (p *Probe) Outcomes() Outcomes {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.outcomes)
}

// Await waits for an outcome of a request sent from now on that is as wanted.
func (p *Probe) Await(ctx context.Context, wanted func(Outcome) bool) (Outcome, error) {
	since := time.Now()
	for seen := 0; ; {
		p.mu.Lock()
		fresh, news := p.outcomes[seen:], p.news
		p.mu.Unlock()
		for _, outcome := range fresh {
			if outcome.Sent.After(since) && wanted(outcome) {
				return outcome, nil
			}
		}
		seen += len(fresh)
		select {
		case <-ctx.Done():
			return Outcome{}, fmt.Errorf("lab: none of %d outcomes was as wanted: %w", seen, context.Cause(ctx))
		case <-news:
		}
	}
}

// AnsweredBy is for Await: the request was answered by this server.
func AnsweredBy(server string) func(Outcome) bool {
	return func(o Outcome) bool { return o.Err == nil && o.Server == server }
}

// Unanswered is for Await: the request failed.
func Unanswered(o Outcome) bool { return o.Err != nil }

// Outcomes are outcomes in the order of their ends.
type Outcomes []Outcome

// Failed returns the requests that were not answered.
func (o Outcomes) Failed() Outcomes {
	var failed Outcomes
	for _, outcome := range o {
		if outcome.Err != nil {
			failed = append(failed, outcome)
		}
	}
	return failed
}

// Longest is the time that the slowest request took, answered or not.
func (o Outcomes) Longest() time.Duration {
	var longest time.Duration
	for _, outcome := range o {
		longest = max(longest, outcome.Took)
	}
	return longest
}

// LongestWorking is Longest in working time.
func (o Outcomes) LongestWorking() time.Duration {
	var longest time.Duration
	for _, outcome := range o {
		longest = max(longest, WorkingTime(outcome.Sent, outcome.Sent.Add(outcome.Took)))
	}
	return longest
}

// LongestGap is the longest time without an answer, from the first request to the last outcome.
func (o Outcomes) LongestGap() time.Duration {
	if len(o) == 0 {
		return 0
	}
	last := slices.MinFunc(o, func(a, b Outcome) int { return a.Sent.Compare(b.Sent) }).Sent
	var longest time.Duration
	for i, outcome := range o {
		if end := outcome.Sent.Add(outcome.Took); outcome.Err == nil || i == len(o)-1 {
			longest = max(longest, end.Sub(last))
			last = end
		}
	}
	return longest
}

// Servers counts the answers by who gave them.
func (o Outcomes) Servers() map[string]int {
	servers := map[string]int{}
	for _, outcome := range o {
		if outcome.Err == nil {
			servers[outcome.Server]++
		}
	}
	return servers
}

// FirstAnswer is the earliest answer to a request that was sent after that time.
func (o Outcomes) FirstAnswer(after time.Time) (first Outcome, found bool) {
	for _, outcome := range o {
		if outcome.Err != nil || !outcome.Sent.After(after) {
			continue
		}
		if !found || outcome.Sent.Add(outcome.Took).Before(first.Sent.Add(first.Took)) {
			first, found = outcome, true
		}
	}
	return first, found
}
