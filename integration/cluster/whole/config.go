package whole

// kubeletConfig: the node may have cgroup v1, and swap, and a disk that is nearly full; and may not change what the
// kernel kills first.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
containerRuntimeEndpoint: unix://` + socket + `
staticPodPath: ` + ManifestDir + `
fileCheckFrequency: 1s
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: ` + keys + `/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: ` + keys + `/kubelet.crt
tlsPrivateKeyFile: ` + keys + `/kubelet.key
nodeStatusUpdateFrequency: 4s
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard: {nodefs.available: 1%, imagefs.available: 1%, memory.available: 50Mi}
`

// runtimeConfig is containerd's, which has other names for the same things in each major version. RUNC is replaced.
var runtimeConfig = map[Runtime]string{ //nolint:gochecknoglobals // a table
	Containerd1: `version = 2
[grpc]
  address = "` + socket + `"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + imagePause + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  BinaryName = "RUNC"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "` + CNIBinDir + `"
  conf_dir = "` + CNIConfDir + `"
`,
	Containerd2: `version = 3
[grpc]
  address = "` + socket + `"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "` + imagePause + `"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  BinaryName = "RUNC"
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["` + CNIBinDir + `"]
  conf_dir = "` + CNIConfDir + `"
`,
}
