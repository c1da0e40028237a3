// Command up keeps a cluster until it is interrupted: `make cluster`.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/cluster/whole"
)

func main() { os.Exit(run()) }

func run() (code int) {
	nodes := flag.String("nodes", "containerd1,containerd2", "`RUNTIMES` of the nodes")
	proxy := flag.String("proxy", whole.NFTables, "`MODE` of kube-proxy: nftables or iptables")
	cilium := flag.Bool("cilium", false, "Cilium on the first node, with its kube-proxy replacement and BPF host routing")
	name := flag.String("name", "cluster", "`NAME` of the folder of the logs in bin/logs")
	flag.Parse()
	options := whole.Options{Name: *name, ProxyMode: *proxy, Images: flag.Args()}
	for runtime := range strings.SplitSeq(*nodes, ",") {
		options.Nodes = append(options.Nodes, whole.NodeOptions{Runtime: whole.Runtime(runtime)})
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
	fmt.Printf("up after %v; kubectl and helm, and a shell in each node:\n", cluster.Took.Round(time.Millisecond))
	for _, program := range []string{"kubectl", "helm"} {
		fmt.Printf("  KUBECONFIG=%s %s\n", cluster.Kubeconfig, strings.Join(cluster.Command(ctx, program).Args, " "))
	}
	for _, node := range cluster.Nodes {
		fmt.Printf("  %s   # %s, %s\n", strings.Join(node.Lab().Command(ctx, "bash").Args, " "), node.Name, node.Runtime())
	}
	fmt.Println("Ctrl-C ends it.")
	<-ctx.Done()
	return 0
}
