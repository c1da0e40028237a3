// Package kube reads the pods of this node and the agent's own DaemonSet from the Kubernetes API, and sends Events. It is the only
// importer of client-go.
//
// One informer per namespace lists and watches the pods with spec.nodeName of this node, from the API server's watch cache, in
// protobuf; fields that nothing reads are dropped before they are kept. A poll lists while a watch is not healthy.
package kube

import (
	"errors"
	"fmt"
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"

	"github.com/magic-ip-address/magic-ip-address/agent/inventory"
)

// Connect makes the client for the pods of a node: with a kubeconfig file, or where that is empty with the pod's service account.
func Connect(kubeconfig, node string) (*Pods, error) {
	config, err := credentials(kubeconfig)
	if err != nil {
		return nil, err
	}
	if node == "" {
		return nil, errors.New("the name of this node is needed to read its pods from the Kubernetes API; set --node-name or NODE_NAME")
	}
	return New(config, node)
}

// New makes the client with a configuration, which it completes.
func New(config *rest.Config, node string) (*Pods, error) {
	client, err := newClient(config)
	if err != nil {
		return nil, err
	}
	objects, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client for the Kubernetes API: %w", err)
	}
	return newPods(client, objects, node), nil
}

func newPods(client kubernetes.Interface, objects metadata.Interface, node string) *Pods {
	return &Pods{client: client, owners: newOwners(objects), node: node, query: &inventory.Query{}, feeds: map[string]*feed{}}
}

func credentials(kubeconfig string) (config *rest.Config, err error) {
	if kubeconfig != "" {
		config, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	} else {
		config, err = rest.InClusterConfig()
	}
	if err != nil {
		return nil, fmt.Errorf("credentials for the Kubernetes API: %w", err)
	}
	return config, nil
}

func newClient(config *rest.Config) (kubernetes.Interface, error) {
	if config.BearerTokenFile != "" {
		// kubelet rotates the token. client-go reads the file once a minute, and would send an expired token until then; this
		// source reads it again when the API server answers 401.
		token := transport.NewCachedFileTokenSource(config.BearerTokenFile)
		config.BearerToken, config.BearerTokenFile = "", ""
		config.Wrap(transport.ResettableTokenSourceWrapTransport(token))
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return &throttle{next: next} })
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	config.UserAgent = "magic-ip-agent"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client for the Kubernetes API: %w", err)
	}
	return client, nil
}
