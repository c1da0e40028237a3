package published_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
)

func TestWriteAndRead(t *testing.T) {
	dir := t.TempDir()
	if _, err := published.Read(dir, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before anything is published: %v", err)
	}
	if names, err := published.Names(dir); err != nil || len(names) != 0 {
		t.Errorf("Names() = %v, %v", names, err)
	}
	lock, err := published.Lock(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	want := &published.Agent{Name: "a", PollInterval: "5s", Labels: map[string]map[string]string{"uid": {"app": "x"}}}
	if err := published.Write(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := published.Read(dir, "a")
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Read: %v (-want +got):\n%s", err, diff)
	}
	if names, err := published.Names(dir); err != nil || !cmp.Equal(names, []string{"a"}) {
		t.Errorf("Names() = %v, %v", names, err)
	}
	stamp := time.Now().Add(time.Hour).Truncate(time.Second)
	if err := published.Renew(dir, "a", stamp); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(published.Path(dir, "a")); err != nil || !info.ModTime().Equal(stamp) {
		t.Errorf("heartbeat %v, want %v (%v)", info.ModTime(), stamp, err)
	}
}

func TestReadRefuses(t *testing.T) {
	for name, data := range map[string]string{
		"garbage": "{", "no version": `{"name":"a"}`, "another agent's": `{"version":1,"name":"b"}`, "wrong type": `{"version":1,"name":"a","magicIPs":3}`,
	} {
		dir := t.TempDir()
		write(t, published.Path(dir, "a"), data)
		if _, err := published.Read(dir, "a"); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	dir := t.TempDir()
	write(t, published.Path(dir, "a"), `{"version":2,"magicIPs":"another shape"}`)
	if _, err := published.Read(dir, "a"); !errors.As(err, new(*published.NewerVersionError)) {
		t.Errorf("a newer version: %v", err)
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	if published.Live(dir, "a") {
		t.Error("an agent that never ran is live")
	}
	lock, err := published.Lock(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	if !published.Live(dir, "a") || published.Live(dir, "b") {
		t.Errorf("Live(a) = %v, Live(b) = %v, want true, false", published.Live(dir, "a"), published.Live(dir, "b"))
	}
	if _, err := published.Lock(dir, "a"); !errors.Is(err, published.ErrLocked) {
		t.Errorf("second Lock: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if published.Live(dir, "a") {
		t.Error("live after its end")
	}
	lock, err = published.Lock(dir, "a")
	if err != nil {
		t.Errorf("Lock after the first let go: %v", err)
	} else if err := lock.Close(); err != nil {
		t.Error(err)
	}
}

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}
