//go:build clients

package clients_test

import (
	"errors"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestExamples: TestMain has run the commands of all examples as they are written. Here a client of each, with the settings as
// they stand there and nothing besides, reaches the target.
func TestExamples(t *testing.T) {
	clients := append(loads(), load{name: "AWS SDK", example: "metadata-mock", send: "metadata"})
	for name := range all {
		t.Run(name, func(t *testing.T) {
			w := world{t}
			w.place(serverOf(t, name), rolling)
			reached := map[string]bool{}
			for _, l := range clients {
				if l.example != name || reached[l.send] {
					continue
				}
				reached[l.send] = true
				l.settings = nil
				a := application{l, byMagicIP, "example-" + l.send}
				w.start(a)
				w.arrives(a)
				w.stop(a)
				w.sent(a)
			}
			if len(reached) == 0 {
				t.Error("the example has no client here")
			}
		})
	}
}

func serverOf(t *testing.T, example string) server {
	t.Helper()
	for _, s := range servers() {
		if s.example == example {
			return s
		}
	}
	t.Fatalf("examples/%s has no server here", example)
	return server{}
}

// TestExamplePod: the client of the DNS cache is a pod, which runs as it is written, with an image of that name. It asks the first
// of its name servers alone, and then the C library of its image asks.
func TestExamplePod(t *testing.T) {
	w := world{t}
	w.place(serverOf(t, "dns-cache"), rolling)
	w.eventually("an answer for the pod", func() error {
		pod, err := cluster.Admin.CoreV1().Pods(applicationsNamespace).Get(t.Context(), "dns-cache-client", metav1.GetOptions{})
		if err != nil {
			return err
		}
		namespace, err := node.PodNetNS(t.Context(), pod)
		if err != nil {
			return err
		}
		answered, err := node.Exec(t.Context(), "cat", strings.TrimSuffix(namespace, "/ns/net")+"/root/example")
		if err == nil && !strings.Contains(answered, "load.example.") {
			err = errors.New("none yet")
		}
		return err
	})
	printed, err := cluster.Kubectl(t.Context(), "exec", "dns-cache-client", "--", "/usr/bin/getent", "ahostsv4", "name.e2e.test")
	w.must(err)
	if !strings.Contains(printed, "192.0.2.80") {
		t.Errorf("the answer is %q", printed)
	}
}
