// Command magic-ip-address is the CNI plugin; see package plugin.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/magic-ip-address/magic-ip-address/plugin"
)

// version is set by the linker.
var version = "devel" //nolint:gochecknoglobals // -X needs a variable

func main() {
	p := plugin.Plugin{Stdout: os.Stdout, Stderr: os.Stderr}
	skel.PluginMainFuncs(p.Funcs(), plugin.Versions(), "CNI plugin magic-ip-address "+version)
}
