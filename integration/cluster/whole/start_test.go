//go:build e2e

package whole_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const runs = 20

// start is when things happened in the start of a target.
type start struct {
	created, added, rule, process, podIP, ready time.Time
	labels                                      bool // were in the record
}

// TestRuleBeforeProcess: the address of a new target is in the kernel before the first instruction of its program is
// run; and when the other things are known.
func TestRuleBeforeProcess(t *testing.T) {
	onEachNode(t, "start", func(w *world) {
		kernel, api := watchKernel(w), watchPods(w)
		var starts []start
		for i := range runs {
			s := w.startOnce(fmt.Sprintf("run-%d-%s", i, w.node.Name), kernel, api)
			if !s.rule.Before(s.process) {
				w.Errorf("run %d: the rule was there %v after the program had started", i, s.rule.Sub(s.process))
			}
			starts = append(starts, s)
		}
		w.Log(report(starts))
	})
}

func (w *world) startOnce(name string, kernel *kernelLog, api *podLog) (s start) {
	w.Helper()
	s.created = time.Now()
	pod, err := createPod(w.patience(), echoPod(w.node, w.namespace, name))
	w.must(err)
	pod = w.ready(pod)
	record := recordOf(w.node, pod)
	if record == nil {
		w.Fatalf("pod %s has no record", name)
	}
	s.added, s.labels = record.AddedAt, record.Labels != nil
	s.process = w.started(pod)
	if len(record.IPs) != 2 {
		w.Fatalf("pod %s has %v, want an address of each family", name, record.IPs)
	}
	for _, address := range record.IPs {
		w.must(lab.Eventually(w.patience(), func() error {
			first, err := kernel.firstOf(address)
			if first.After(s.rule) {
				s.rule = first
			}
			return err
		}))
	}
	w.must(lab.Eventually(w.patience(), func() (err error) {
		s.podIP, s.ready, err = api.of(pod.UID)
		return err
	}))
	w.must(removePod(w.patience(), pod))
	return s
}

// started is when the program in a pod has begun.
func (w *world) started(pod *corev1.Pod) (at time.Time) {
	w.Helper()
	client := http.Client{Transport: &http.Transport{DialContext: w.node.Lab().Dial(lab.Host), DisableKeepAlives: true}, Timeout: 5 * time.Second}
	w.must(lab.Eventually(w.patience(), func() error {
		response, err := client.Get(fmt.Sprintf("http://%s:%d/started", pod.Status.PodIP, control))
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			return err
		}
		at, err = time.Parse(time.RFC3339Nano, strings.TrimSpace(string(body)))
		return err
	}))
	return at
}

// report is a table of when things happened after ADD, and of how many ADDs knew the labels.
func report(starts []start) string {
	var text strings.Builder
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(table, "\nafter ADD, %d starts\tmedian\tp99\t\n", len(starts))
	for _, column := range []struct {
		name string
		at   func(start) time.Time
	}{
		{"pod created", func(s start) time.Time { return s.created }},
		{"address in the kernel", func(s start) time.Time { return s.rule }},
		{"program started", func(s start) time.Time { return s.process }},
		{"podIP in the API", func(s start) time.Time { return s.podIP }},
		{"Ready in the API", func(s start) time.Time { return s.ready }},
	} {
		var took []time.Duration
		for _, s := range starts {
			took = append(took, column.at(s).Sub(s.added))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t\n", column.name, milliseconds(percentile(took, 50)), milliseconds(percentile(took, 99)))
	}
	_ = table.Flush()
	labels := 0
	for _, s := range starts {
		if s.labels {
			labels++
		}
	}
	fmt.Fprintf(&text, "ADD knew the pod's labels in %d of %d starts\n", labels, len(starts))
	return text.String()
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}

// percentile is the nearest-rank percentile: that of 20 and 99 is the greatest.
func percentile(took []time.Duration, p int) time.Duration {
	sorted := slices.Sorted(slices.Values(took))
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

// kernelLog is what the kernel has told of new elements in the agent's sets and maps.
type kernelLog struct {
	mu       sync.Mutex
	elements []kernelElements
}

type kernelElements struct {
	at   time.Time
	data []byte
}

// watchKernel hears the kernel's own events in a node until the test ends.
func watchKernel(w *world) *kernelLog {
	w.Helper()
	var socket *nl.NetlinkSocket
	w.must(w.node.Lab().In(lab.Host, func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		return err
	}))
	log, ended := &kernelLog{}, make(chan struct{})
	w.must(socket.SetReceiveTimeout(&unix.Timeval{Usec: 200_000}))
	ctx, cancel := context.WithCancel(context.Background())
	w.Cleanup(func() {
		cancel()
		<-ended
		socket.Close()
	})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			messages, _, err := socket.Receive()
			at := time.Now()
			if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
				w.Errorf("nftables events: %v", err)
				return
			}
			for _, message := range messages {
				if message.Header.Type == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSETELEM && bytes.Contains(message.Data, []byte("magic-ip-"+agentName)) {
					log.mu.Lock()
					log.elements = append(log.elements, kernelElements{at, message.Data})
					log.mu.Unlock()
				}
			}
		}
	}()
	return log
}

// firstOf is when an address was first in an element.
func (l *kernelLog) firstOf(addr netip.Addr) (time.Time, error) {
	return l.firstAfter(time.Time{}, addr)
}

func (l *kernelLog) firstAfter(after time.Time, addr netip.Addr) (time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.elements {
		if e.at.After(after) && bytes.Contains(e.data, addr.AsSlice()) {
			return e.at, nil
		}
	}
	return time.Time{}, fmt.Errorf("%v has not been in the kernel since %v", addr, after)
}

// podLog is what the API server has told of the pods of a namespace on a node.
type podLog struct {
	mu     sync.Mutex
	events []podEvent
}

type podEvent struct {
	at  time.Time
	pod *corev1.Pod
}

// watchPods watches until the test ends.
func watchPods(w *world) *podLog {
	w.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	watch, err := cluster.Admin.CoreV1().Pods(w.namespace).Watch(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + w.node.Name})
	w.must(err)
	log, ended := &podLog{}, make(chan struct{})
	w.Cleanup(func() {
		cancel()
		watch.Stop()
		<-ended
	})
	go func() {
		defer close(ended)
		for event := range watch.ResultChan() {
			if pod, ok := event.Object.(*corev1.Pod); ok {
				log.mu.Lock()
				log.events = append(log.events, podEvent{time.Now(), pod})
				log.mu.Unlock()
			}
		}
	}()
	return log
}

// of is when a pod's address, and when its readiness were first seen.
func (l *podLog) of(uid types.UID) (podIP, ready time.Time, err error) {
	podIP, errIP := l.first(time.Time{}, uid, func(p *corev1.Pod) bool { return p.Status.PodIP != "" })
	ready, errReady := l.first(time.Time{}, uid, isReady)
	return podIP, ready, errors.Join(errIP, errReady)
}

func (l *podLog) first(after time.Time, uid types.UID, is func(*corev1.Pod) bool) (time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.at.After(after) && e.pod.UID == uid && is(e.pod) {
			return e.at, nil
		}
	}
	return time.Time{}, errors.New("the API server has not told of it")
}
