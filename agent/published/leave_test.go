package published_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/agent/published"
	"github.com/magic-ip-address/magic-ip-address/plugin/state"
)

// TestComeAndGo: agents that come and go at once never take from one another what they rely on: whoever has its lock and
// has published finds its file, its lock and the records where they were.
func TestComeAndGo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			name := fmt.Sprintf("agent-%d", i)
			for range 100 {
				if err := comeAndGo(dir, name); err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		})
	}
	group.Wait()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func comeAndGo(dir, name string) error {
	lock, err := published.Lock(dir, name)
	if err != nil {
		return err
	}
	if err := published.Write(dir, &published.Agent{Name: name}); err != nil {
		return err
	}
	key := state.Key{ContainerID: name, IfName: "eth0"}
	if _, err := state.Update(dir, 5*time.Second, nil, state.Attachment{ContainerID: key.ContainerID, IfName: key.IfName}); err != nil {
		return err
	}
	recorded, err := state.Recorded(dir, key)
	_, readErr := published.Read(dir, name)
	if !recorded || !published.Live(dir, name) || err != nil || readErr != nil {
		return fmt.Errorf("recorded %t (%w), live %t, file %w", recorded, err, published.Live(dir, name), readErr)
	}
	return errors.Join(published.Leave(dir, name), published.Unlock(lock))
}

// TestOneAtATime: whoever comes waits until whoever leaves has gone, and the other way round.
func TestOneAtATime(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, f := range map[string]func() error{
		"come": func() error {
			lock, err := published.Lock(dir, "a")
			return errors.Join(err, published.Unlock(lock))
		},
		"go": func() error { return published.Leave(dir, "b") },
	} {
		other, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(other.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- f() }()
		select {
		case err := <-done:
			t.Errorf("%s does not wait: %v", name, err)
			done <- err
		case <-time.After(100 * time.Millisecond):
		}
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLeaveOfTheLast takes the remains of those who were killed along, and nothing that is not of this project.
func TestLeaveOfTheLast(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	lock, err := published.Lock(dir, "a")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	write(t, filepath.Join(published.Dir(dir), "killed.lock"), "")
	write(t, filepath.Join(published.Dir(dir), "killed.json.tmp"), "{")
	write(t, filepath.Join(dir, "not-ours"), "")
	starting, err := published.Lock(dir, "starting") // has not published anything yet
	if err != nil {
		t.Fatal(err)
	}
	if err := published.Leave(dir, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(published.Dir(dir), "killed.lock")); err != nil {
		t.Errorf("cleaned up although another agent is starting: %v", err)
	}
	if err := published.Unlock(starting); err != nil {
		t.Fatal(err)
	}
	if err := published.Leave(dir, "starting"); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "not-ours" {
		t.Errorf("left: %v, %v", entries, err)
	}
}
