//go:build dataplane

package dataplane_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/compat"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// policies are network policies: servers are reached by pods with role=client alone, and such pods reach a destination alone.
func policies(destination string) string {
	return `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers, namespace: default}
spec:
  podSelector: {matchLabels: {app: echo}}
  policyTypes: [Ingress]
  ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {role: client}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: clients, namespace: ` + clients + `}
spec:
  podSelector: {matchLabels: {role: client}}
  policyTypes: [Egress]
  egress: [{to: [` + destination + `]}]
`
}

// TestPolicies: an ingress policy of the servers sees which pod a packet is from, also where the source address is the node's. An
// egress policy of the clients sees the magic IP, in all settings: Cilium's program at a pod's link comes before any translation.
func TestPolicies(t *testing.T) {
	if testing.Short() {
		return // it is of `make e2e-cilium`
	}
	for _, s := range settings()[:6] {
		t.Run(s.name, func(t *testing.T) {
			w := newWorld(t, ciliumNode)
			w.must(s.set(w.ctx))
			w.follows(s)
			w.pod("default", "echo", echoLabels)
			w.awaitEndpoint("echo")
			from := map[string]string{
				"allowed": w.netns(w.pod(clients, "allowed", map[string]string{"role": "client"})),
				"other":   w.netns(w.pod(clients, "other", nil)),
			}
			w.served("without policies", "echo", from)
			w.Cleanup(func() {
				_, err := cluster.Kubectl(w.ctx, "delete", "networkpolicy", "--all", "--all-namespaces")
				if err != nil {
					w.Error(err)
				}
			})
			// fate waits until the policies are in force, which nothing but packets tells.
			fate := func(row, who string, served bool) {
				t.Helper()
				w.eventually(row, func() error {
					answer, err := node.Lab().Ask(w.ctx, lab.Client{Kind: lab.NewConnection, From: from[who], To: magic, Timeout: 500 * time.Millisecond, ByClock: true})
					switch {
					case served:
						return err
					case err == nil:
						return fmt.Errorf("%s is answered by %q", who, answer.Server)
					}
					return nil
				})
			}
			w.must(cluster.Apply(w.ctx, policies("{ipBlock: {cidr: "+magic.Addr().String()+"/32}}")))
			fate("another pod by the ingress policy", "other", false)
			fate("the magic IP in the egress policy", "allowed", true)
			got := compat.Observed{Ingress: "the client's pod", Egress: "the magic IP"} // seen, not the other way round
			w.must(cluster.Apply(w.ctx, policies("{namespaceSelector: {}, podSelector: {matchLabels: {app: echo}}}")))
			fate("the servers' pods in the egress policy", "allowed", false)
			compat.Record(t, s.row(), got)
		})
	}
}
