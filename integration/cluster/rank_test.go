//go:build e2e

package cluster

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestReadyBeatsNewer: a newer pod that is not ready takes no traffic (maxSurge), and all of it once it is.
func TestReadyBeatsNewer(t *testing.T) {
	w := serving(t)
	w.create("old").add().running(true)
	w.goesTo("old")
	fresh := w.create("new").add()
	w.staysWith("old")
	fresh.running(false)
	w.staysWith("old")
	fresh.running(true)
	w.goesTo("new")
}
