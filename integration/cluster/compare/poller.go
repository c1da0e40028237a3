package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

// pollEvery is how often kube-magic-ip-address 0.1 asks the API.
const pollEvery = 5 * time.Second

// polling imitates kube-magic-ip-address 0.1 on a node: it lists the pods of the selector every 5 s, and keeps one DNAT rule to the
// first of them that runs. It deletes no flows.
type polling struct {
	paused atomic.Bool
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func startPolling(w *world, n *whole.Node) *polling {
	ctx, cancel := context.WithCancel(context.Background())
	p := &polling{cancel: cancel}
	p.done.Go(func() {
		ruled := ""
		for ctx.Err() == nil {
			if !p.paused.Load() {
				if err := poll(ctx, w, n, &ruled); err != nil && ctx.Err() == nil {
					w.log("the poller of %s: %v", n.Name, err) // as the tool does, it tries again later
				}
			}
			sleep(ctx, pollEvery)
		}
	})
	return p
}

// poll lists and edits; ruled is the address that the rule leads to, empty while there is none.
func poll(ctx context.Context, w *world, n *whole.Node, ruled *string) error {
	limited, cancel := context.WithTimeout(ctx, pollEvery)
	defer cancel()
	pods, err := w.podsOf(limited, n)
	if err != nil {
		return err
	}
	address := ""
	for _, pod := range pods {
		if pod.Status.Phase == corev1.PodRunning && pod.DeletionTimestamp == nil {
			address = pod.Status.PodIP
			break
		}
	}
	if address == *ruled {
		return nil
	}
	if *ruled != "" {
		if err := rule(ctx, n, "--delete", *ruled); err != nil {
			return err
		}
		*ruled = ""
	}
	if address != "" {
		if err := rule(ctx, n, "--insert", address); err != nil {
			return err
		}
		*ruled = address
	}
	return nil
}

func rule(ctx context.Context, n *whole.Node, command, address string) error {
	_, err := n.Exec(ctx, "iptables", "--wait", "--table", "nat", command, "PREROUTING", "--destination", pollerAddress, "--jump", "DNAT", "--to-destination", address)
	return err
}

func (p *polling) stop() {
	p.cancel()
	p.done.Wait()
}
