package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/node"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
)

// beside is a backend that puts the rules in place and cannot do something else; and flows that are counted.
type beside struct {
	*nftables.Fake
	swept int
}

type besideError struct{}

func (besideError) Error() string { return "rules of another backend are still there" }
func (besideError) InPlace() bool { return true }

func (b *beside) Sync(ctx context.Context, p *plan.Plan) error {
	return errors.Join(b.Fake.Sync(ctx, p), besideError{})
}

func (b *beside) Sweep(context.Context, *plan.Plan, plan.Change) (int, error) {
	b.swept++
	return 0, nil
}

func (*beside) Read() (node.Network, error)        { return node.Network{}, nil }
func (*beside) EnableHairpin(string) (bool, error) { return false, nil }

// TestErrorBesideTheRules: where the rules are in place, what else has failed is published, and flows are swept.
func TestErrorBesideTheRules(t *testing.T) {
	t.Parallel()
	b := &beside{Fake: nftables.NewFake("a")}
	a := &Agent{
		Options: Options{
			RuntimeDir: t.TempDir(), Backend: b, Flows: b, Node: b, Log: slog.New(slog.DiscardHandler),
			Load:         func() (config.Config, error) { return config.Parse(strings.NewReader(besideConfig), true) },
			ForeignRules: func(context.Context, []netip.Addr) []string { return nil },
		},
		services: map[plan.Frontend]*service{}, errs: map[string]string{},
	}
	var err error
	if a.config, err = a.Load(); err != nil {
		t.Fatal(err)
	}
	lock, err := a.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	_, ok := a.sync(t.Context(), allSources)
	if ok || b.swept != 1 || a.applied == nil || !strings.Contains(a.published.LastError, "still there") {
		t.Errorf("ok %t, %d sweeps, applied %v, published error %q; want a retry, a sweep and the error", ok, b.swept, a.applied, a.published.LastError)
	}
}

const besideConfig = `
name: a
magicIPs:
- {ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}
`
