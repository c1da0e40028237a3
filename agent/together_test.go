package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/config"
	"github.com/magic-ip-address/magic-ip-address/agent/nftables"
	"github.com/magic-ip-address/magic-ip-address/agent/plan"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// slowBackend brings rules into the kernel only once it is released.
type slowBackend struct {
	*nftables.Fake
	released chan struct{}
}

func (b slowBackend) Sync(ctx context.Context, p *plan.Plan) error {
	<-b.released
	return b.Fake.Sync(ctx, p)
}

// TestTwoAgentsAtOnce: of two agents that start with the same frontend on a node without files, only one serves it, also while the other is
// still loading its first rules and has no status.
func TestTwoAgentsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := runtimedir.New(t.TempDir())
		_, err := dir.Update(time.Second, nil, runtimedir.Attachment{
			ContainerID: "c1", IfName: "eth0", Namespace: "default", Name: "echo", Labels: map[string]string{"app": "echo"},
			IPs: []netip.Addr{netip.MustParseAddr("10.244.1.7")}, AddedAt: time.Now(),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		start := func(name string) slowBackend {
			backend := slowBackend{nftables.NewFake(name), make(chan struct{})}
			text := fmt.Sprintf("{name: %s, magicIPs: [{ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 80}]}]}", name)
			go func() {
				ended <- Run(ctx, Options{
					RuntimeDir: dir.Path(), Backend: backend, Flows: nullFlows{}, Node: ownedNode{},
					Load:   func() (config.Config, error) { return config.Parse(strings.NewReader(text), true) },
					Uptime: func() time.Duration { return time.Hour },
					Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
				})
			}()
			synctest.Wait()
			return backend
		}
		serves := func(b slowBackend) bool { return strings.Contains(b.Dump(), "10.244.1.7") }
		first := start("first")
		time.Sleep(time.Millisecond)
		second := start("second")
		for _, b := range []slowBackend{second, first} {
			close(b.released)
			synctest.Wait()
		}
		if !serves(first) || serves(second) {
			t.Errorf("the first serves: %t, the second: %t; want the first alone", serves(first), serves(second))
		}
		status, err := dir.Agent("second").ReadStatus()
		if err != nil || !strings.Contains(status.MagicIPs[0].Reason, "claimed by agent first") {
			t.Errorf("the status of the second: %+v, %v", status, err)
		}
		stop()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}
