//go:build e2e

package release_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// TestMetricsOfTwoReleases: two releases with metrics share the nodes, and their pods are replaced by a surge. At the same port all
// pods run and serve traffic, helm warns and status gives the reason; at ports of their own both are scraped.
func TestMetricsOfTwoReleases(t *testing.T) {
	w := newWorld(t)
	w.targets(system)
	other := release{system, "other"}
	surge := []string{"metrics.enabled=true", "updateStrategy.rollingUpdate.maxSurge=1", "updateStrategy.rollingUpdate.maxUnavailable=0"}
	ours := apmValues(surge...)
	theirs := apmValues(append(surge, "config.ipAddress="+second.Addr().String())...)
	if notes := w.upgrade(apm, ours...); !strings.Contains(notes, "Metrics are at port 9641 of each node") || strings.Contains(notes, "WARNING") {
		t.Errorf("helm says of the first release:\n%s", notes)
	}
	w.scraped(9641, apm)

	if notes := w.upgrade(other, theirs...); !strings.Contains(notes, "WARNING: release "+name+" has metrics at port 9641 too") {
		t.Errorf("helm does not warn of the first release:\n%s", notes)
	}
	w.servedBy(magic, system)
	w.servedBy(second, system)
	w.scraped(9641, apm)
	for _, n := range w.cluster.Nodes {
		pod := w.podOn(n, other.namespace, other.daemonSet())
		if status := w.agent(pod, "status"); !strings.Contains(status, "metrics are not served") {
			t.Errorf("status on %s does not say that metrics are not served:\n%s", n.Name, status)
		}
	}

	if notes := w.upgrade(other, append(theirs, "metrics.port=9642")...); strings.Contains(notes, "WARNING") {
		t.Errorf("helm warns although the ports differ:\n%s", notes)
	}
	load := w.load(magic, lab.NewConnection)
	w.upgrade(apm, append(ours, "podAnnotations.upgraded=again")...)
	load.unbroken("helm upgrade of a release with metrics, by a surge")
	w.scraped(9641, apm)
	w.scraped(9642, other)
}

// scraped waits until the metrics at a port of each node are those of a release's agent, running in its present pod.
func (w *world) scraped(port int, r release) {
	w.Helper()
	for _, n := range w.cluster.Nodes {
		started := w.podOn(n, r.namespace, r.daemonSet()).Status.StartTime
		w.eventually(fmt.Sprintf("metrics of %s on %s", r.agent(), n.Name), func() error {
			body, err := w.scrape(n, fmt.Sprintf("%s:%d", n.Address, port))
			if err != nil {
				return err
			}
			if !strings.Contains(body, fmt.Sprintf("magic_ip_agent_info{backend=%q,name=%q", "nftables", r.agent())) {
				return fmt.Errorf("these are not the metrics of %s:\n%s", r.agent(), body)
			}
			var began float64
			for line := range strings.Lines(body) {
				_, _ = fmt.Sscanf(line, "process_start_time_seconds %g", &began)
			}
			if began+1 < float64(started.Unix()) {
				return fmt.Errorf("the process began at %v, its pod at %v", time.Unix(int64(began), 0), started)
			}
			return nil
		})
	}
}

// scrape asks for the metrics at an address, from the node itself.
func (w *world) scrape(n *whole.Node, address string) (string, error) {
	ctx, cancel := lab.Patience(w.ctx, 5*time.Second)
	defer cancel()
	client := http.Client{Transport: &http.Transport{DialContext: n.Lab().Dial(lab.Host), DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	body, err := io.ReadAll(response.Body)
	err = errors.Join(err, response.Body.Close())
	if err == nil && (response.StatusCode != http.StatusOK || !strings.Contains(string(body), "\nmagic_ip_")) {
		err = fmt.Errorf("%s from %s:\n%s", response.Status, address, body)
	}
	return string(body), err
}
