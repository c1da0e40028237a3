package probe

import (
	"runtime"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestWithinItsOwn: a thread that may not enter network namespaces probes from the one that it is in.
func TestWithinItsOwn(t *testing.T) {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		t.Fatal(err)
	}
	here, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = here.Close() }()
	ran := false
	if err := within(here, func() error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("ran %t: %v", ran, err)
	}
}
