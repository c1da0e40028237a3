package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// request is a line of JSON that tells an outcome to another process.
type request struct {
	Kind   Kind           `json:"kind"`
	To     netip.AddrPort `json:"to"`
	Sent   time.Time      `json:"sent"`
	Took   time.Duration  `json:"took"` // ns
	Server string         `json:"server,omitempty"`
	Client string         `json:"client,omitempty"`
	Error  string         `json:"error,omitempty"`
}

// WriteRequests writes a line for each outcome of a client.
func WriteRequests(out *json.Encoder, c Client, outcomes Outcomes) error {
	for _, o := range outcomes {
		line := request{Kind: c.Kind, To: c.To, Sent: o.Sent, Took: o.Took, Server: o.Server}
		if o.Err != nil {
			line.Error = o.Err.Error()
		} else {
			line.Client = o.Client.String()
		}
		if err := out.Encode(line); err != nil {
			return err
		}
	}
	return nil
}

// Target is what a client asks: one that WriteRequests has written of.
type Target struct {
	Kind Kind
	To   netip.AddrPort
}

// ReadRequests reads what WriteRequests has written, of any number of clients.
func ReadRequests(r io.Reader) (map[Target]Outcomes, error) {
	all := map[Target]Outcomes{}
	for in := json.NewDecoder(r); ; {
		var line request
		if err := in.Decode(&line); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("lab: requests: %w", err)
		}
		o := Outcome{Sent: line.Sent, Took: line.Took, Answer: Answer{Server: line.Server}}
		if line.Error != "" {
			o.Err = errors.New(line.Error)
		} else if client, err := netip.ParseAddrPort(line.Client); err != nil {
			return nil, fmt.Errorf("lab: requests: %w", err)
		} else {
			o.Answer.Client = client
		}
		target := Target{line.Kind, line.To}
		all[target] = append(all[target], o)
	}
}

// Path is how long exchanges by an address took, one after the other, beside another address of the same server.
type Path struct {
	To         string   `json:"to"`
	Connection Exchange `json:"connection"`
	Request    Exchange `json:"request"`
	Datagram   Exchange `json:"datagram"`
}

// Exchange is the median of one exchange; of a way that has no such exchange, zero.
type Exchange struct {
	Took  time.Duration `json:"took"` // ns
	Ratio float64       `json:"ratio"`
}
