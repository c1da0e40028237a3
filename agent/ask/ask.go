// Package ask connects to magic IPs as a client does, and compares the outcome with the status of the agent.
//
// A connection that is accepted shows that packets of this client reach an endpoint; the client cannot see which. A
// datagram shows only that it was not rejected. Frontends of SCTP, and those without an endpoint that hold or pass, are not asked.
package ask

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

const (
	// connectTimeout is how long a connection may take.
	connectTimeout = 2 * time.Second
	// rejectTimeout is how long a rejection may take, which is to be immediate.
	rejectTimeout = time.Second
	// datagramTimeout is the wait for the ICMP error that rejects a datagram.
	datagramTimeout = 300 * time.Millisecond
	// atOnce bounds the connections that are open at the same time.
	atOnce = 32
)

// Outcome is what a client of one frontend saw.
type Outcome struct {
	Frontend runtimedir.Frontend
	// Text is the outcome, for people.
	Text string
	// Wrong: it is not what the status of the agent promises.
	Wrong bool
}

func (o Outcome) String() string {
	verdict := "ok  "
	if o.Wrong {
		verdict = "FAIL"
	}
	return fmt.Sprintf("%s  %s  %s", verdict, quote.Terminal(o.Frontend.String()), quote.Terminal(o.Text))
}

// All asks every frontend of an agent.
func All(ctx context.Context, magicIPs []runtimedir.MagicIP) []Outcome {
	outcomes := make([]Outcome, len(magicIPs))
	free := make(chan struct{}, atOnce)
	var group sync.WaitGroup
	for i, m := range magicIPs {
		free <- struct{}{}
		group.Go(func() {
			outcomes[i] = one(ctx, m)
			<-free
		})
	}
	group.Wait()
	return outcomes
}

func one(ctx context.Context, m runtimedir.MagicIP) Outcome {
	o := Outcome{Frontend: m.Frontend}
	switch {
	case m.Reason != "":
		o.Wrong, o.Text = true, "unserved: "+m.Reason
	case m.Action != "serve" && m.Action != "reject":
		o.Text = fmt.Sprintf("no endpoint, not asked: noEndpoint is %s", m.Action)
	case m.Protocol == runtimedir.TCP:
		o.Wrong, o.Text = connect(ctx, m)
	case m.Protocol == runtimedir.UDP:
		o.Wrong, o.Text = datagram(ctx, m)
	default:
		o.Text = fmt.Sprintf("not asked: %s", m.Protocol)
	}
	return o
}

// connect opens a connection, and closes it.
func connect(ctx context.Context, m runtimedir.MagicIP) (wrong bool, text string) {
	begun := time.Now()
	conn, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, "tcp", m.AddrPort().String())
	took := time.Since(begun)
	rejected := errors.Is(err, syscall.ECONNREFUSED)
	if err == nil {
		err = conn.Close()
	}
	outcome := fmt.Sprintf("accepted in %s", took.Round(10*time.Microsecond))
	if rejected {
		outcome = fmt.Sprintf("refused in %s", took.Round(10*time.Microsecond))
	} else if err != nil {
		outcome = fmt.Sprintf("%v after %s", err, took.Round(10*time.Millisecond))
	}
	if m.Action == "reject" {
		return !rejected || took > rejectTimeout, outcome + "; no endpoint on this node"
	}
	return err != nil, outcome + "; endpoint " + endpoints(m)
}

// datagram sends an empty one.
func datagram(ctx context.Context, m runtimedir.MagicIP) (wrong bool, text string) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "udp", m.AddrPort().String())
	if err != nil {
		return true, err.Error()
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(datagramTimeout))
	_, err = conn.Write(nil)
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
	}
	rejected := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPERM)
	silent := errors.Is(err, context.DeadlineExceeded) || isTimeout(err)
	switch {
	case m.Action == "reject" && rejected:
		return false, "refused; no endpoint on this node"
	case m.Action == "reject" && silent: // the kernel limits ICMP errors
		return false, "no answer; no endpoint on this node"
	case m.Action == "reject":
		return true, "answered; no endpoint on this node"
	case rejected:
		return true, "refused; endpoint " + endpoints(m)
	case silent:
		return false, "sent, not refused; endpoint " + endpoints(m)
	case err != nil:
		return true, err.Error() + "; endpoint " + endpoints(m)
	}
	return false, "answered; endpoint " + endpoints(m)
}

func isTimeout(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr) && netErr.Timeout()
}

// endpoints names the pods that the frontend leads to by the status.
func endpoints(m runtimedir.MagicIP) string {
	var names []string
	for _, e := range m.Endpoints {
		name := e.Address.String()
		if e.Pod != "" {
			name = e.Pod + " " + name
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
