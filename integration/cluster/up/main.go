// Command up keeps a cluster until it is interrupted: `make cluster`. It has the image of this project under the name that README.md
// pushes it by, the target that the chart's example of README.md selects, and a client on each node.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/agent/quote"
	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// registry stands for the user's own in README.md.
const registry = "registry.example/"

func main() { os.Exit(run()) }

func run() (code int) {
	nodes := flag.String("nodes", "containerd1,containerd2", "`RUNTIMES` of the nodes")
	proxy := flag.String("proxy", whole.NFTables, "`MODE` of kube-proxy: nftables or iptables")
	cilium := flag.Bool("cilium", false, "Cilium on the first node, with its kube-proxy replacement and BPF host routing")
	name := flag.String("name", "cluster", "`NAME` of the folder of the logs in bin/logs")
	flag.Parse()
	root, err := lab.ModuleRoot()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	options := whole.Options{Name: *name, Images: append([]string{filepath.Join(root, "bin/image.tar")}, flag.Args()...)}
	for runtime := range strings.SplitSeq(*nodes, ",") {
		options.Nodes = append(options.Nodes, whole.NodeOptions{Runtime: whole.Runtime(runtime), ProxyMode: *proxy})
	}
	if *cilium {
		options.Nodes[0].Cilium = &whole.Cilium{KubeProxyReplacement: true, BPFMasquerade: true}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cluster, err := whole.New(limited, options)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() {
		if err := cluster.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}()
	commands := filepath.Join(root, "bin/cluster")
	defer func() { _ = os.RemoveAll(commands) }()
	if err := furnish(limited, cluster, root, commands); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Printf("up after %v: two pods on each node, the target apm-server and a client. In another shell, in this directory:\n", cluster.Took.Round(time.Millisecond))
	fmt.Println("  export PATH=$PWD/bin/cluster:$PATH   # kubectl and helm of this cluster")
	fmt.Println("Then helm and kubectl as in README.md, whose image is on the nodes already, and a request:")
	fmt.Println("  kubectl exec ds/client -- /echo ask 169.254.210.210:9200")
	fmt.Println("A shell on each node:")
	for _, node := range cluster.Nodes {
		fmt.Printf("  %s   # %s, %s\n", quote.Shell(node.Lab().Command(ctx, "bash").Args...), node.Name, node.Runtime())
	}
	fmt.Println("Ctrl-C ends it.")
	<-ctx.Done()
	return 0
}

// furnish makes what README.md takes for granted: the image in the registry, targets and clients, and kubectl and helm.
func furnish(ctx context.Context, cluster *whole.Cluster, root, commands string) error {
	chart, err := os.ReadFile(filepath.Join(root, "charts/magic-ip-address/Chart.yaml"))
	if err != nil {
		return err
	}
	found := regexp.MustCompile(`(?m)^appVersion: (\S+)$`).FindSubmatch(chart)
	if found == nil {
		return errors.New("Chart.yaml has no appVersion")
	}
	version := string(found[1])
	for _, node := range cluster.Nodes {
		if err := node.TagImage(ctx, "docker.io/magic-ip-address/magic-ip-address:"+version, registry+"magic-ip-address:"+version); err != nil {
			return err
		}
	}
	if err := cluster.Apply(ctx, whole.DaemonSet("apm-server", "kube-system", `serve, --tcp, ":8200"`)+whole.DaemonSet("client", "default", "pause")); err != nil {
		return err
	}
	return cluster.WriteCommands(commands)
}
