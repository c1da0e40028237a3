package runtimedir_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// TestLargestFile: a file of the greatest size is written and read, and one of a byte more neither.
func TestLargestFile(t *testing.T) {
	const limit = 256 << 10
	dir := t.TempDir()
	installer, path := runtimedir.New(dir).Installer("a"), filepath.Join(dir, "install", "a", "record.json")
	if err := installer.WriteRecord(runtimedir.Record{LastError: "x"}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	largest := strings.Repeat("x", limit-int(info.Size())+1)
	if err := installer.WriteRecord(runtimedir.Record{LastError: largest}); err != nil {
		t.Fatalf("the largest: %v", err)
	}
	if record, err := installer.ReadRecord(); err != nil || record.LastError != largest {
		t.Errorf("the largest: %v", err)
	}
	want := fmt.Sprintf("record.json is not written: it would have %d bytes, allowed are %d", limit+1, limit)
	if err := installer.WriteRecord(runtimedir.Record{LastError: largest + "x"}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a byte more is written: %v", err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	put(t, path, string(text)+"\n")
	var unsafe *runtimedir.UnsafeError
	if _, err := installer.ReadRecord(); !errors.As(err, &unsafe) || unsafe.Found != fmt.Sprintf("a file of %d bytes", limit+1) {
		t.Errorf("a byte more is read: %v", err)
	}
}

// TestMostLabels: as many labels of a pod as are allowed, and as many bytes of them, and one more.
func TestMostLabels(t *testing.T) {
	number := func(n int) map[string]string {
		labels := map[string]string{}
		for i := range n {
			labels[fmt.Sprint(i)] = ""
		}
		return labels
	}
	bytes := func(n int) map[string]string { return map[string]string{"key": strings.Repeat("x", n-len("key"))} }
	for _, tt := range []struct {
		name   string
		labels map[string]string
		kept   bool
	}{
		{"the most", number(runtimedir.MaxLabels), true}, {"one more", number(runtimedir.MaxLabels + 1), false},
		{"the most bytes", bytes(runtimedir.MaxLabelBytes), true}, {"one byte more", bytes(runtimedir.MaxLabelBytes + 1), false},
	} {
		keys := map[string]bool{}
		for key := range tt.labels {
			keys[key] = true
		}
		if kept := runtimedir.KeepLabels(tt.labels, keys); (kept != nil) != tt.kept {
			t.Errorf("%s: %d are kept", tt.name, len(kept))
		}
		agent := runtimedir.New(t.TempDir()).Agent("a")
		dropped, err := agent.WritePods(runtimedir.Pods{Labels: []runtimedir.PodLabels{podLabels("u", tt.labels), podLabels("other", number(1))}})
		if err != nil || (dropped == 0) != tt.kept {
			t.Errorf("%s: labels of %d pods are dropped, %v", tt.name, dropped, err)
		}
		pods, err := agent.ReadPods()
		if err != nil {
			t.Fatal(err)
		}
		if known := pods.LabelsOf(podLabels("u", nil).PodID); (known != nil) != tt.kept || pods.LabelsOf(podLabels("other", nil).PodID) == nil {
			t.Errorf("%s: %d are read", tt.name, len(known))
		}
	}
}

// TestLabelsOfAllPods: what they have together is bounded too, and a pod that would exceed it is dropped, and no other.
func TestLabelsOfAllPods(t *testing.T) {
	const most, pods = 512 << 10, 64
	for extra, wantDropped := range []int{0, 1} {
		var all runtimedir.Pods
		for i := range pods {
			pod := podLabels(fmt.Sprintf("u%02d", i), nil)
			// What JSON adds to a pod and to a label counts as so many bytes.
			length := most/pods - 64 - 16 - len(pod.Namespace) - len(pod.Name) - len(pod.UID) - len("key")
			if i == pods/2 {
				length += extra
			}
			pod.Labels = map[string]string{"key": strings.Repeat("x", length)}
			all.Labels = append(all.Labels, pod)
		}
		dropped, err := runtimedir.New(t.TempDir()).Agent("a").WritePods(all)
		if err != nil || dropped != wantDropped {
			t.Errorf("%d bytes too many: labels of %d pods are dropped, %v", extra, dropped, err)
		}
	}
}

// TestLog: the log of the plugin is appended to until it is full, and begins anew then; the one before is kept.
func TestLog(t *testing.T) {
	const full = 256 << 10
	dir := t.TempDir()
	d := runtimedir.New(dir)
	if err := d.Log([]byte("x\n")); err == nil {
		t.Error("a log is written where there is no directory")
	}
	if err := d.MakeState(); err != nil {
		t.Fatal(err)
	}
	line := func(length int) []byte { return append(bytes.Repeat([]byte("x"), length-1), '\n') }
	for i, step := range []struct{ line, log, before int }{
		{10, 10, -1}, {full - 11, full - 1, -1}, {1, full, -1}, {7, 7, full}, {full, full + 7, full}, {3, 3, full + 7},
	} {
		if err := d.Log(line(step.line)); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]int{"plugin.log": step.log, "plugin.log.1": step.before} {
			got := -1
			if info, err := os.Stat(filepath.Join(dir, "plugin", name)); err == nil {
				got = int(info.Size())
			}
			if got != want {
				t.Errorf("step %d: %s has %d bytes, want %d (-1: it is not there)", i, name, got, want)
			}
		}
	}
	if log, err := d.ReadLog(); err != nil || string(log) != "xx\n" || d.LogPath() != filepath.Join(dir, "plugin", "plugin.log") {
		t.Errorf("log %q at %s, %v", log, d.LogPath(), err)
	}
}
