package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The plan: pods have addresses of 10.244.1.0/24, as cni-conf/10-bridge.conflist says, and the pods of
// namespace "default" with app=echo are behind the magic IP.
const (
	agentName  = "default.magic-ip" // as in the conflist
	magicIP    = "169.254.210.210"
	serverPort = 9200

	// otherRecords are in the state file besides those that a measurement is about: a full node, of which
	// all pods are in selected namespaces.
	otherRecords = 100

	agentConfig = `
name: ` + agentName + `
magicIPs:
  - ipAddress: ` + magicIP + `
    namespace: default
    selector: app=echo
    ports:
      - {port: 9200, protocol: tcp} # serverPort
      - {port: 9200, protocol: udp}
`
)

// newNode makes a node with the network "bridge". The binaries are those that `make build tools` has made,
// never the ones with the race detector that tests use.
func newNode(ctx context.Context) (*lab.Node, error) {
	agent, err := binary("magic-ip-agent")
	if err != nil {
		return nil, err
	}
	node, err := lab.NewNode(ctx, lab.NodeOptions{Binaries: lab.Binaries{Agent: agent}})
	if err != nil {
		return nil, err
	}
	conflist, err := lab.Conflist("10-bridge.conflist")
	if err == nil {
		err = node.AddConf("10-bridge.conflist", conflist)
	}
	if err != nil {
		_ = node.Close()
		return nil, err
	}
	return node, nil
}

// binary is the path of a program below bin/.
func binary(name string) (string, error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return "", err
	}
	path := filepath.Join(root, "bin", name)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: run `make bench`", err)
	}
	return path, nil
}

// hostInterface is the node's end of a pod's link, as the result of ADD names it.
func hostInterface(attached lab.Attached) (string, error) {
	var result struct {
		Interfaces []struct{ Name, Sandbox string }
	}
	if err := json.Unmarshal(attached.Result, &result); err != nil {
		return "", err
	}
	// The bridge itself comes first.
	for _, link := range result.Interfaces {
		if link.Sandbox == "" && link.Name != "cni0" {
			return link.Name, nil
		}
	}
	return "", fmt.Errorf("the result of ADD for %s names no link of the node", attached.NetNS)
}

// neighbours are records of pods that no magic IP of the bench is for.
func neighbours(count int) []runtimedir.Attachment {
	records := make([]runtimedir.Attachment, count)
	for i := range records {
		name := fmt.Sprintf("neighbour-%d", i)
		records[i] = runtimedir.Attachment{
			ContainerID: fmt.Sprintf("%064x", i), IfName: "eth0", Network: "bridge", Namespace: "default", Name: name, UID: uid(i),
			Labels:        map[string]string{"app": "other", "pod-template-hash": "6d4cf56db6"},
			IPs:           []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 250, byte(i)})},
			HostInterface: fmt.Sprintf("veth%08x", i), Netns: "/run/netns/" + name, AddedAt: time.Unix(1700000000, 0).UTC(),
		}
	}
	return records
}

func uid(i int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", i) }

// setRecords makes the state file in dir say this.
func setRecords(dir string, records []runtimedir.Attachment) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	gone, err := recorded(dir)
	if err != nil {
		return err
	}
	warning, err := runtimedir.New(dir).Update(time.Second, gone, records...)
	return errors.Join(warning, err)
}

// recorded is what the state file in dir has.
func recorded(dir string) ([]runtimedir.Key, error) {
	file, err := runtimedir.New(dir).ReadState()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var keys []runtimedir.Key
	for _, attachment := range file.Attachments {
		keys = append(keys, attachment.Key())
	}
	return keys, err
}
