//go:build e2e

package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// proxy stands between the agent of a node and the API server, at the API server's address on the agent's node, and
// misbehaves as it is told. Who the agent is it passes on: agents that use one have a bearer token.
type proxy struct {
	node    *lab.Node
	config  *tls.Config
	forward *httputil.ReverseProxy

	// Of what passes, by `list`, `watch` or `get`; bytes are those on the wire, to the agent.
	mu       sync.Mutex
	requests map[string]int
	gone     int // watches that were answered 410 Gone, by the API server or by the proxy
	bytes    atomic.Int64

	server *http.Server // nil while the port is closed
	hung   chan struct{}
	fault  func(http.ResponseWriter, *http.Request) (answered bool)
	slow   slowness
	silent chan struct{} // of watches: closed when they are to end
}

// slowness is how much later an answer begins, and how many bytes of it come at a time.
type slowness struct {
	delay, pause time.Duration
	piece        int
}

// startProxy starts one on a node.
func startProxy(node *lab.Node) (*proxy, error) {
	cert, errCert := tls.LoadX509KeyPair(plane.node.Path(dir+"/server.crt"), plane.node.Path(dir+"/server.key"))
	authority, errCA := os.ReadFile(plane.node.Path(dir + "/ca.crt"))
	if err := errors.Join(errCert, errCA); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	p := &proxy{
		node: node, requests: map[string]int{},
		config: &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"}},
	}
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "https", Host: strings.TrimPrefix(endpoint, "https://")})
		},
		Transport: &http.Transport{
			DialContext: plane.node.Dial(lab.Host), ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		},
		FlushInterval:  -1,
		ModifyResponse: p.modify,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			if !errors.Is(err, context.Canceled) {
				w.WriteHeader(http.StatusBadGateway)
			}
		},
	}
	return p, p.open()
}

// open listens, where it does not.
func (p *proxy) open() error {
	listener, err := p.node.Listen(lab.Host, "tcp", strings.TrimPrefix(endpoint, "https://"))
	if err != nil {
		return err
	}
	server := &http.Server{Handler: p, ReadHeaderTimeout: time.Minute, TLSConfig: p.config.Clone()}
	p.mu.Lock()
	p.server = server
	p.mu.Unlock()
	go func() { _ = server.ServeTLS(tapped{listener, p}, "", "") }()
	return nil
}

// close ends all connections; new ones are refused until it is opened again.
func (p *proxy) close() error { return p.server.Close() }

// cut ends all connections.
func (p *proxy) cut() error { return errors.Join(p.close(), p.open()) }

// set changes what the proxy does from now on.
func (p *proxy) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// hang stops it from reading and writing on all connections, which stay, until resume.
func (p *proxy) hang() { p.set(func() { p.hung = make(chan struct{}) }) }

func (p *proxy) resume() {
	p.set(func() {
		close(p.hung)
		p.hung = nil
	})
}

// silence lets no more news of watches through; speak ends those watches.
func (p *proxy) silence() { p.set(func() { p.silent = make(chan struct{}) }) }

func (p *proxy) speak() {
	p.set(func() {
		close(p.silent)
		p.silent = nil
	})
}

// answer answers requests instead of the API server, where they are of this verb or it is empty.
func (p *proxy) answer(verb string, code int, status string, headers ...string) {
	p.set(func() {
		p.fault = func(w http.ResponseWriter, r *http.Request) bool {
			if verb != "" && verb != verbOf(r) {
				return false
			}
			for i := 0; i+1 < len(headers); i += 2 {
				w.Header().Set(headers[i], headers[i+1])
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_, _ = io.WriteString(w, status)
			return true
		}
	})
}

// count is how many requests of this verb have come.
func (p *proxy) count(verb string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests[verb]
}

// total is how many requests have come.
func (p *proxy) total() (sum int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, count := range p.requests {
		sum += count
	}
	return sum
}

func (p *proxy) wasGone() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gone
}

func verbOf(r *http.Request) string {
	query := r.URL.Query()
	switch {
	case r.Method != http.MethodGet:
		return strings.ToLower(r.Method)
	case query.Get("watch") != "":
		return "watch"
	case strings.HasSuffix(r.URL.Path, "/pods"):
		return "list"
	}
	return "get"
}

func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	p.requests[verbOf(r)]++
	fault, delay := p.fault, p.slow.delay
	p.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-r.Context().Done():
		return
	}
	if fault == nil || !fault(w, r) {
		p.forward.ServeHTTP(w, r)
	}
}

// modify puts the body of an answer into the proxy's hands.
func (p *proxy) modify(response *http.Response) error {
	body := &tappedBody{ReadCloser: response.Body, proxy: p, watch: verbOf(response.Request) == "watch", over: response.Request.Context().Done()}
	if response.StatusCode == http.StatusGone {
		p.set(func() { p.gone++ })
	}
	response.Body = body
	return nil
}

// tappedBody is the body of an answer.
type tappedBody struct {
	io.ReadCloser
	proxy *proxy
	watch bool
	over  <-chan struct{}
}

func (b *tappedBody) Read(data []byte) (int, error) {
	b.proxy.mu.Lock()
	slow := b.proxy.slow
	b.proxy.mu.Unlock()
	if slow.piece > 0 {
		select {
		case <-time.After(slow.pause):
		case <-b.over:
		}
		data = data[:min(slow.piece, len(data))]
	}
	n, err := b.ReadCloser.Read(data)
	if !b.watch {
		return n, err
	}
	b.proxy.mu.Lock()
	silent := b.proxy.silent
	// An error in a watch is an event of it.
	if strings.Contains(string(data[:n]), "Expired") || strings.Contains(string(data[:n]), "too old resource version") {
		b.proxy.gone++
	}
	b.proxy.mu.Unlock()
	if silent == nil {
		return n, err
	}
	select {
	case <-silent:
	case <-b.over:
	}
	return 0, errors.New("the watch ends")
}

// tapped is the listener: it counts, and hangs.
type tapped struct {
	net.Listener
	proxy *proxy
}

func (t tapped) Accept() (net.Conn, error) {
	conn, err := t.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &tappedConn{Conn: conn, proxy: t.proxy, closed: make(chan struct{})}, nil
}

type tappedConn struct {
	net.Conn
	proxy  *proxy
	once   sync.Once
	closed chan struct{}
}

func (c *tappedConn) wait() {
	c.proxy.mu.Lock()
	hung := c.proxy.hung
	c.proxy.mu.Unlock()
	if hung != nil {
		select {
		case <-hung:
		case <-c.closed:
		}
	}
}

func (c *tappedConn) Read(data []byte) (int, error) {
	n, err := c.Conn.Read(data)
	c.wait()
	return n, err
}

func (c *tappedConn) Write(data []byte) (int, error) {
	c.wait()
	n, err := c.Conn.Write(data)
	c.proxy.bytes.Add(int64(n))
	return n, err
}

func (c *tappedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
