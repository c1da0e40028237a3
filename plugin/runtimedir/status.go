package runtimedir

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"reflect"
	"slices"
)

// Equal reports whether nothing differs. It is deepEqual for what may have thousands of magic IPs.
func (s *Status) Equal(t *Status) bool {
	if len(s.MagicIPs) != len(t.MagicIPs) || !slices.Equal(s.DataPlane.LocalRoutes, t.DataPlane.LocalRoutes) {
		return false
	}
	for i := range s.MagicIPs {
		if !s.MagicIPs[i].equal(&t.MagicIPs[i]) {
			return false
		}
	}
	return reflect.DeepEqual(s.rest(), t.rest())
}

// rest is a status without its long lists.
func (s *Status) rest() Status {
	rest := *s
	rest.MagicIPs, rest.DataPlane.LocalRoutes = nil, nil
	return rest
}

func (m *MagicIP) equal(n *MagicIP) bool {
	return m.Frontend == n.Frontend && m.Action == n.Action && m.Reason == n.Reason && m.UnservedBy == n.UnservedBy && m.Namespace == n.Namespace && m.Selector == n.Selector &&
		slices.Equal(m.Endpoints, n.Endpoints) && slices.Equal(m.Why, n.Why) && slices.Equal(m.HostInterface, n.HostInterface) && m.HostClients == n.HostClients && m.ExcludeTarget == n.ExcludeTarget &&
		m.Since.Equal(n.Since) && (m.Count == n.Count || m.Count != nil && n.Count != nil && *m.Count == *n.Count)
}

// StatusWriter writes the status of an agent again and again. Of magic IPs, of which there may be thousands, those that are as they were
// in the status before are not encoded again.
type StatusWriter struct {
	agent    Agent
	routes   list[netip.Addr]
	magicIPs list[MagicIP]
	// text is what was written last. spare is the memory for the next.
	text, spare []byte
}

// StatusWriter begins without a status before.
func (a Agent) StatusWriter() *StatusWriter { return &StatusWriter{agent: a} }

// Write replaces the status. The caller holds the lock, as with everything that writes.
func (w *StatusWriter) Write(status Status) error {
	status.Name = w.agent.name
	if err := w.encode(&status); err != nil {
		return err
	}
	f, err := w.agent.dir.make(w.agent.group, w.agent.name)
	if err != nil {
		return err
	}
	defer f.close()
	return f.replace(statusFile, w.text, statusLimit)
}

// The long lists of a status in its text, where encode leaves them empty: how each is opened, and what follows.
const (
	routesOpen, routesRest     = "\n  \"localRoutes\": [", "\n   \"\"\n  ]"
	magicIPsOpen, magicIPsRest = "\n \"magicIPs\": [", "]"
)

// encode makes text that of a status: what json.MarshalIndent makes of it.
func (w *StatusWriter) encode(status *Status) (err error) {
	defer func() {
		if err != nil {
			*w = StatusWriter{agent: w.agent}
		}
	}()
	head := *status
	head.Version, head.MagicIPs = Version, []MagicIP{}
	if len(status.DataPlane.LocalRoutes) > 0 {
		head.DataPlane.LocalRoutes = make([]netip.Addr, 1) // an empty one is left out
	}
	rest, err := json.MarshalIndent(head, "", " ")
	if err != nil {
		return err
	}
	// No string of JSON has a line break in it, so that each is there once at the most.
	text := w.spare[:0]
	if before, after, there := bytes.Cut(rest, []byte(routesOpen+routesRest)); there {
		text, rest = append(append(text, before...), routesOpen...), after
		if text, err = w.routes.append(text, w.text, status.DataPlane.LocalRoutes, "   ", func(a, b *netip.Addr) bool { return *a == *b }); err != nil {
			return err
		}
	} else {
		w.routes = list[netip.Addr]{}
	}
	before, after, _ := bytes.Cut(rest, []byte(magicIPsOpen+magicIPsRest))
	text = append(append(text, before...), magicIPsOpen...)
	if text, err = w.magicIPs.append(text, w.text, status.MagicIPs, "  ", (*MagicIP).equal); err != nil {
		return err
	}
	w.text, w.spare = append(append(text, after...), '\n'), w.text
	return nil
}

// list is a list in a text.
type list[T any] struct {
	values []T
	// ends are where its elements end in the text, behind where the first begins.
	ends []int
}

// append appends a list without the bracket that opens it, and takes what is equal from the text before.
func (l *list[T]) append(text, before []byte, values []T, indent string, equal func(a, b *T) bool) ([]byte, error) {
	ends := append(make([]int, 0, len(values)+1), len(text))
	for i := range values {
		if i < len(l.values) && equal(&l.values[i], &values[i]) {
			text = append(text, before[l.ends[i]:l.ends[i+1]]...)
		} else {
			element, err := json.MarshalIndent(&values[i], indent, " ")
			if err != nil {
				return nil, err
			}
			if i > 0 {
				text = append(text, ',')
			}
			text = append(append(append(text, '\n'), indent...), element...)
		}
		ends = append(ends, len(text))
	}
	if len(values) > 0 {
		text = append(append(text, '\n'), indent[1:]...)
	}
	l.values, l.ends = values, ends
	return append(text, ']'), nil
}
