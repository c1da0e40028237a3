package whole

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// The names of what runs in a node; those before containerd on the first node alone.
const (
	Etcd              = "etcd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Containerd        = "containerd"
	Kubelet           = "kubelet"
	KubeProxy         = "kube-proxy"
)

// Where each node has its CNI configuration and plugins, and the manifests of static pods.
const (
	CNIConfDir   = "/etc/cni/net.d"
	CNIBinDir    = "/opt/cni/bin"
	ConflistFile = CNIConfDir + "/10-pods.conflist"
	ManifestDir  = keys + "/manifests"
)

const (
	keys        = "/etc/kubernetes"
	socket      = "/run/containerd/containerd.sock"
	runtimeFile = keys + "/containerd.toml"
)

// prepare writes what the node finds on its disk when it boots.
func (n *Node) prepare(serviceAccountKey []byte) error {
	n.disk = filepath.Join(n.cluster.work.path, n.Name)
	kubelet, err := n.cluster.ca.Node(n.Name, n.Address.String())
	if err != nil {
		return err
	}
	conflist, err := n.conflist()
	if err != nil {
		return err
	}
	files := map[string][]byte{
		keys + "/ca.crt": n.cluster.ca.Cert, keys + "/kubelet.crt": kubelet.Cert, keys + "/kubelet.key": kubelet.Key,
		keys + "/" + Kubelet + ".kubeconfig": n.cluster.ca.Kubeconfig(apiEndpoint, kubelet),
		keys + "/kubelet.yaml":               []byte(kubeletConfig),
		runtimeFile:                          []byte(strings.ReplaceAll(runtimeConfig[n.options.Runtime], "RUNC", n.program("runc"))),
	}
	users := map[string]string{KubeProxy: "system:kube-proxy"}
	if n.options.Cilium == nil {
		files[n.Conflist()] = conflist
	}
	if n.index == 0 {
		server, err := n.cluster.ca.Server(apiAddress, apiService, "127.0.0.1")
		if err != nil {
			return err
		}
		toKubelet, err := n.cluster.ca.Client(APIServer, "system:masters")
		if err != nil {
			return err
		}
		for name, data := range map[string][]byte{
			"ca.key": n.cluster.ca.Key, "server.crt": server.Cert, "server.key": server.Key, "sa.key": serviceAccountKey,
			"client.crt": toKubelet.Cert, "client.key": toKubelet.Key,
		} {
			files[keys+"/"+name] = data
		}
		users[ControllerManager], users[Scheduler] = "system:"+ControllerManager, "system:"+Scheduler
	}
	for user, has := range map[string]bool{"cilium": n.options.Cilium != nil, "flannel": n.options.Flannel != nil} {
		if !has {
			continue
		}
		pair, err := n.cluster.ca.Client(user, "system:masters")
		if err != nil {
			return err
		}
		files[keys+"/"+user+".kubeconfig"] = n.cluster.ca.Kubeconfig(apiEndpoint, pair)
	}
	for component, user := range users {
		pair, err := n.cluster.ca.Client(user)
		if err != nil {
			return err
		}
		files[keys+"/"+component+".kubeconfig"] = n.cluster.ca.Kubeconfig(apiEndpoint, pair)
	}
	plugins, err := os.ReadDir(n.program("cni"))
	if err != nil {
		return fmt.Errorf("%w: run `make e2e-binaries`", err)
	}
	for _, plugin := range plugins {
		data, err := os.ReadFile(filepath.Join(n.program("cni"), plugin.Name()))
		if err != nil {
			return err
		}
		files[filepath.Join(CNIBinDir, plugin.Name())] = data
	}
	for name, data := range files {
		name = filepath.Join(n.disk, "own", name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, data, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// command is how one of the node's components is started.
func (n *Node) command(component string) []string {
	kubeconfig := "--kubeconfig=" + keys + "/" + component + ".kubeconfig"
	authn := []string{
		kubeconfig, "--authentication-kubeconfig=" + keys + "/" + component + ".kubeconfig",
		"--authorization-kubeconfig=" + keys + "/" + component + ".kubeconfig", "--bind-address=127.0.0.1", "--leader-elect=false",
	}
	switch component {
	case Etcd:
		return []string{"--data-dir=/var/lib/etcd", "--unsafe-no-fsync", "--log-level=error"}
	case APIServer:
		return []string{
			"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--advertise-address=" + apiAddress, "--secure-port=6443",
			"--service-cluster-ip-range=" + serviceRange + "," + serviceRange6, "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--allow-privileged=true", "--client-ca-file=" + keys + "/ca.crt", "--tls-cert-file=" + keys + "/server.crt",
			"--tls-private-key-file=" + keys + "/server.key", "--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + keys + "/sa.key", "--service-account-signing-key-file=" + keys + "/sa.key",
			"--kubelet-client-certificate=" + keys + "/client.crt", "--kubelet-client-key=" + keys + "/client.key",
			"--kubelet-certificate-authority=" + keys + "/ca.crt", "--kubelet-preferred-address-types=InternalIP",
		}
	case ControllerManager:
		return append(authn, "--service-account-private-key-file="+keys+"/sa.key", "--root-ca-file="+keys+"/ca.crt",
			"--use-service-account-credentials", "--cluster-signing-cert-file="+keys+"/ca.crt", "--cluster-signing-key-file="+keys+"/ca.key")
	case Scheduler:
		return authn
	case Containerd:
		return []string{"--config=" + runtimeFile}
	case Kubelet:
		return []string{kubeconfig, "--config=" + keys + "/kubelet.yaml", "--hostname-override=" + n.Name, "--node-ip=" + n.Address.String() + "," + n.Address6.String(), "--v=2"}
	case KubeProxy:
		return []string{
			kubeconfig, "--hostname-override=" + n.Name, "--proxy-mode=" + cmp.Or(n.options.ProxyMode, NFTables), "--cluster-cidr=" + podRange + "," + podRange6,
			"--bind-address=" + n.Address.String(), "--nodeport-addresses=primary", "--conntrack-max-per-core=0", "--conntrack-min=0", "--oom-score-adj=0",
		}
	}
	return nil
}

// Start starts a component of the node, for the first time or again.
func (n *Node) Start(component string) error {
	program := filepath.Join(n.cluster.bin, "e2e", component)
	switch component {
	case Containerd:
		program = n.program(component)
	case CiliumAgent:
		program = n.cluster.ciliumFile(component)
	case Flanneld:
		program = n.cluster.flannelFile(component)
	}
	logs := filepath.Join(n.cluster.logs, n.Name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("%w: run `make e2e-binaries`", err)
	}
	command := append([]string{program}, n.command(component)...)
	switch component {
	case CiliumAgent:
		command = n.ciliumCommand()
	case Flanneld:
		command = n.flannelCommand()
	}
	process, err := n.StartProcess(component, command...)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.components[component] = process
	return nil
}

// StartProcess starts a program of the machine in the node, its cgroups included. It logs to bin/logs under this name.
func (n *Node) StartProcess(name string, command ...string) (*lab.Process, error) {
	logs := filepath.Join(n.cluster.logs, n.Name)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	path := "PATH=" + n.program("") + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
	return n.Lab().StartLogging(filepath.Join(logs, name+".log"), "env", append([]string{path, "sh", "/run/in-cgroup"}, command...)...)
}

// Component is a running component of the node, to be killed or frozen.
func (n *Node) Component(name string) *lab.Process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.components[name]
}

// ended is an error where a component has ended of its own accord.
func (n *Node) ended() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for name, process := range n.components {
		select {
		case <-process.Exited():
			return fmt.Errorf("%s: %s has ended", n.Name, name)
		default:
		}
	}
	return nil
}

// startAll starts the components in the order in which they need each other.
func (n *Node) startAll(ctx context.Context) error {
	if n.index == 0 {
		if err := errors.Join(n.Start(Etcd), n.Start(APIServer)); err != nil {
			return err
		}
	}
	if err := n.Start(Containerd); err != nil {
		return err
	}
	if err := n.loadImages(ctx); err != nil {
		return err
	}
	if err := n.cluster.AwaitAPI(ctx); err != nil {
		return err
	}
	if n.index == 0 {
		if err := errors.Join(n.Start(ControllerManager), n.Start(Scheduler)); err != nil {
			return err
		}
		if err := n.cluster.prepareCilium(ctx); err != nil {
			return err
		}
	}
	if err := n.Start(Kubelet); err != nil {
		return err
	}
	if n.options.Cilium != nil {
		if err := n.startCilium(ctx); err != nil {
			return err
		}
		if n.options.Cilium.KubeProxyReplacement {
			return nil
		}
	}
	if n.options.Flannel != nil {
		if err := n.startFlannel(ctx); err != nil {
			return err
		}
	}
	return n.Start(KubeProxy)
}

// loadImages waits for containerd, and gives it the images that it has not.
func (n *Node) loadImages(ctx context.Context) error {
	err := lab.Eventually(ctx, func() error {
		_, err := n.Exec(ctx, n.program("ctr"), "version")
		return err
	})
	if err != nil || n.boots > 1 {
		return err
	}
	echo := filepath.Join(n.cluster.bin, "pods", "echo")
	images := []Image{
		{Name: ImageEcho, Entrypoint: []string{"/echo"}, Files: map[string]string{"/echo": echo}},
		{Name: imagePause, Entrypoint: []string{"/echo", "pause"}, Files: map[string]string{"/echo": echo}},
	}
	for _, image := range images {
		archive, err := image.Archive()
		if err == nil {
			err = n.LoadImage(ctx, archive)
		}
		if err != nil {
			return err
		}
	}
	for _, file := range n.cluster.options.Images {
		archive, err := os.ReadFile(file)
		if err == nil {
			err = n.LoadImage(ctx, archive)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// AwaitAPI waits until the API server is ready.
func (c *Cluster) AwaitAPI(ctx context.Context) error {
	err := lab.Eventually(ctx, func() error {
		if c.Nodes[0].ended() != nil {
			return nil // said below
		}
		return c.Admin.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	return errors.Join(err, c.Nodes[0].ended())
}

// dialFromFirst is for clients of the API server in this process.
func (c *Cluster) dialFromFirst(ctx context.Context, network, address string) (net.Conn, error) {
	first := c.Nodes[0].Lab()
	if first == nil {
		return nil, errors.New("the first node is down")
	}
	return first.Dial(lab.Host)(ctx, network, address)
}

// KillAPIServer ends the API server as a crash would.
func (c *Cluster) KillAPIServer() { c.Nodes[0].Component(APIServer).Kill() }

// StartAPIServer starts it again and waits until it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	if err := c.Nodes[0].Start(APIServer); err != nil {
		return err
	}
	return c.AwaitAPI(ctx)
}

// FreezeAPIServer makes the API server hang: its port still takes connections, and nobody answers.
func (c *Cluster) FreezeAPIServer() error { return c.Nodes[0].Component(APIServer).Freeze() }

// ThawAPIServer lets it go on.
func (c *Cluster) ThawAPIServer() error { return c.Nodes[0].Component(APIServer).Thaw() }

// LogTails are the ends of all logs, for people to read after a failure.
func (c *Cluster) LogTails() string {
	const lines = 25
	var all strings.Builder
	files, _ := filepath.Glob(filepath.Join(c.logs, "*", "*.log"))
	slices.Sort(files)
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		tail := strings.Split(strings.TrimSpace(string(data)), "\n")
		fmt.Fprintf(&all, "== the end of %s\n%s\n", file, strings.Join(tail[max(0, len(tail)-lines):], "\n"))
	}
	return all.String()
}
