package conflist

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Runtime is the container runtime that reads the directory. They differ in what they do with a file that they cannot use.
type Runtime string

const (
	// Auto looks for the runtime of the node.
	Auto Runtime = "auto"
	// Containerd loads the first file, and starts no pod where that cannot be used (go-cni, loadFromConfDir).
	Containerd Runtime = "containerd"
	// CRIO takes the first file that it can use and whose plugins are installed (ocicni, loadNetworks). cri-dockerd does the same.
	CRIO Runtime = "crio"
)

// ParseRuntime returns the runtime of this name; for Auto the one that Detect finds.
func ParseRuntime(name string) (Runtime, error) {
	switch r := Runtime(name); r {
	case Auto:
		return Detect("/"), nil
	case Containerd, CRIO:
		return r, nil
	}
	return "", fmt.Errorf("runtime %q: must be %s, %s or %s", name, Auto, Containerd, CRIO)
}

// Detect returns the runtime whose socket is below root, the root of the file system. In a container, where none is
// visible, it is the one that made the container's own root file system. Auto where neither tells.
func Detect(root string) Runtime {
	visible := func(sockets ...string) bool {
		for _, socket := range sockets {
			if _, err := os.Stat(filepath.Join(root, socket)); err == nil {
				return true
			}
		}
		return false
	}
	crio := visible("/run/crio/crio.sock", "/run/cri-dockerd.sock")
	containerd := visible("/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock", "/run/k0s/containerd.sock",
		"/var/snap/microk8s/common/run/containerd.sock")
	switch {
	case crio && !containerd:
		return CRIO
	case containerd && !crio:
		return Containerd
	case crio: // Docker brings a containerd of its own
		return Auto
	}
	mounts, err := os.ReadFile(filepath.Join(root, "/proc/self/mountinfo"))
	if err != nil {
		return Auto
	}
	for line := range strings.Lines(string(mounts)) { // proc_pid_mountinfo(5)
		fields := strings.Fields(line)
		switch {
		case len(fields) < 5 || fields[4] != "/":
		case strings.Contains(line, "io.containerd."):
			return Containerd
		case strings.Contains(line, "/containers/storage/"):
			return CRIO
		}
	}
	return Auto
}
