// It says which flannel integration/cluster/binaries builds; flannel's own go.mod and go.sum say what of. plugin.mod is for its CNI plugin.
module github.com/magic-ip-address/magic-ip-address/integration/cluster/flannel

go 1.26.8

require github.com/flannel-io/flannel v0.28.10
