// Multus-shim is a CNI plugin that does what the thick Multus does with its default network: it reads the file that
// "clusterNetwork" names at each call, and calls the plugins in it.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add: func(args *skel.CmdArgs) error {
			list, err := delegate(args)
			if err != nil {
				return err
			}
			result, err := call(args).AddNetworkList(context.Background(), list, runtimeConf(args))
			if err != nil {
				return err
			}
			return types.PrintResult(result, list.CNIVersion)
		},
		Del: func(args *skel.CmdArgs) error {
			list, err := delegate(args)
			if err != nil {
				return err
			}
			return call(args).DelNetworkList(context.Background(), list, runtimeConf(args))
		},
		Check:  func(*skel.CmdArgs) error { return nil },
		GC:     func(*skel.CmdArgs) error { return nil },
		Status: func(args *skel.CmdArgs) error { _, err := delegate(args); return err },
	}, version.All, "multus-shim")
}

// delegate is the default network. Multus knows the node's files below /host.
func delegate(args *skel.CmdArgs) (*libcni.NetworkConfigList, error) {
	var conf struct{ ClusterNetwork string }
	if err := json.Unmarshal(args.StdinData, &conf); err != nil {
		return nil, err
	}
	path := strings.TrimPrefix(conf.ClusterNetwork, "/host")
	if filepath.Ext(path) == ".conflist" {
		return libcni.ConfListFromFile(path)
	}
	single, err := libcni.ConfFromFile(path) //nolint:staticcheck // what Multus calls
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return libcni.ConfListFromConf(single) //nolint:staticcheck // likewise
}

func call(args *skel.CmdArgs) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(filepath.SplitList(args.Path), "/run/multus-shim", nil)
}

func runtimeConf(args *skel.CmdArgs) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{ContainerID: args.ContainerID, NetNS: args.Netns, IfName: args.IfName}
	for pair := range strings.SplitSeq(os.Getenv("CNI_ARGS"), ";") {
		if key, value, ok := strings.Cut(pair, "="); ok {
			rt.Args = append(rt.Args, [2]string{key, value})
		}
	}
	return rt
}
