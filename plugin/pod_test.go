package plugin

import (
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

func TestParseArgs(t *testing.T) {
	want := pod{namespace: "kube-system", name: "apm-x", uid: "u1"}
	for name, test := range map[string]struct {
		args string
		want pod
	}{
		"containerd":     {"IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=apm-x;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1", want},
		"any order":      {"K8S_POD_UID=u1;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_NAME=apm-x;K8S_POD_NAMESPACE=kube-system;IgnoreUnknown=1", want},
		"odd ones":       {";;=;x;a=b=c;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=apm-x;=K8S_POD_UID=u2;K8S_POD_UID=u1;", want},
		"none":           {"", pod{}},
		"without values": {"K8S_POD_NAMESPACE;K8S_POD_NAME=", pod{}},
		"without UID":    {"K8S_POD_NAMESPACE=a", pod{namespace: "a"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := parseArgs(test.args); got != test.want {
				t.Errorf("parseArgs is %+v, want %+v", got, test.want)
			}
		})
	}
}

// FuzzArgs compares with the library's parser where that one understands.
func FuzzArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=apm-x;K8S_POD_UID=u1", "n")
	f.Add("K8S_POD_NAME=a;K8S_POD_NAME=b;;;=;K8S_POD_UID", "a=b")
	f.Fuzz(func(t *testing.T, args, namespace string) {
		got := parseArgs(args)
		var want struct {
			types.CommonArgs
			K8S_POD_NAMESPACE, K8S_POD_NAME, K8S_POD_UID types.UnmarshallableString //nolint:revive // The library takes the names from here.
		}
		want.IgnoreUnknown = true
		if err := types.LoadArgs(args, &want); err == nil {
			library := pod{string(want.K8S_POD_NAMESPACE), string(want.K8S_POD_NAME), string(want.K8S_POD_UID)}
			if got != library {
				t.Errorf("parseArgs(%q) is %+v, the library's is %+v", args, got, library)
			}
		}
		// Whatever stands before it, an argument counts.
		if !strings.Contains(namespace, ";") {
			if got := parseArgs(args + ";K8S_POD_NAMESPACE=" + namespace); got.namespace != namespace {
				t.Errorf("behind %q the namespace is %q, want %q", args, got.namespace, namespace)
			}
		}
	})
}
