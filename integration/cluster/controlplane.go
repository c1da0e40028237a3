// Package cluster runs a Kubernetes API server and its etcd inside a node of package lab, and tests the agent
// against it: `make e2e`.
//
// There is no kubelet, scheduler or controller: the tests say what these would. Pods are network namespaces
// that cnitool attaches, and objects in the API whose status the tests write.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

const (
	dir      = "/run/kubernetes"
	auditLog = dir + "/audit.log"
	endpoint = "https://127.0.0.1:6443"

	// AgentUser is who the agent is to the API server.
	AgentUser = "magic-ip-agent"
	// AgentKubeconfig is the file that it has them by.
	AgentKubeconfig = dir + "/agent.kubeconfig"
)

// auditPolicy logs one line for each request of the agent.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, ResponseComplete, Panic]
rules:
- {level: Metadata, users: [` + AgentUser + `]}
- {level: None}
`

// ControlPlane is an API server and its etcd.
type ControlPlane struct {
	// Admin may do everything.
	Admin kubernetes.Interface

	node      *lab.Node
	bin       string
	etcd      *lab.Process
	apiserver *lab.Process
}

// Start starts a control plane in the network namespace of a node and waits until it is ready. It ends with the node.
func Start(ctx context.Context, node *lab.Node) (*ControlPlane, error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return nil, err
	}
	c := &ControlPlane{node: node, bin: filepath.Join(root, "bin", "e2e")}
	if err := c.writeFiles(); err != nil {
		return nil, err
	}
	return c, c.start(ctx)
}

// start starts etcd, the API server, and what the tests expect in it.
func (c *ControlPlane) start(ctx context.Context) (err error) {
	c.etcd, err = c.node.Start(filepath.Join(c.bin, "etcd"), "--data-dir", dir+"/etcd", "--unsafe-no-fsync", "--log-level", "warn")
	if err != nil {
		return fmt.Errorf("cluster: %w: run `make e2e-binaries`", err)
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	return c.Allow(ctx)
}

// Wipe replaces etcd by one without any data, and starts the API server again.
func (c *ControlPlane) Wipe(ctx context.Context) error {
	c.KillAPIServer()
	c.etcd.Kill()
	if err := os.RemoveAll(c.node.Path(dir + "/etcd")); err != nil {
		return err
	}
	return c.start(ctx)
}

// writeFiles makes keys, certificates, kubeconfig and policy, and the client of the tests.
func (c *ControlPlane) writeFiles() error {
	ca, err := NewAuthority()
	if err != nil {
		return err
	}
	server, errServer := ca.Server("127.0.0.1", lab.NodeIPv4)
	agent, errAgent := ca.Client(AgentUser)
	admin, errAdmin := ca.Client("admin", "system:masters")
	if err := errors.Join(errServer, errAgent, errAdmin); err != nil {
		return err
	}
	for name, data := range map[string][]byte{
		dir + "/ca.crt": ca.Cert, dir + "/server.crt": server.Cert, dir + "/server.key": server.Key,
		AgentKubeconfig: ca.Kubeconfig(endpoint, agent), dir + "/audit.yaml": []byte(auditPolicy),
	} {
		if err := c.node.WriteFile(name, data); err != nil {
			return err
		}
	}
	c.Admin, err = kubernetes.NewForConfig(&rest.Config{
		Host: endpoint, Dial: c.node.Dial(lab.Host), QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: ca.Cert, CertData: admin.Cert, KeyData: admin.Key},
	})
	return err
}

// StartAPIServer starts the API server, on the data that is there, and waits until it is ready.
func (c *ControlPlane) StartAPIServer(ctx context.Context) (err error) {
	c.apiserver, err = c.node.Start(filepath.Join(c.bin, "kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--advertise-address="+lab.NodeIPv4, "--secure-port=6443",
		"--service-cluster-ip-range=10.96.0.0/16", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
		"--client-ca-file="+dir+"/ca.crt", "--tls-cert-file="+dir+"/server.crt", "--tls-private-key-file="+dir+"/server.key",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+dir+"/server.key",
		"--service-account-signing-key-file="+dir+"/server.key",
		"--audit-policy-file="+dir+"/audit.yaml", "--audit-log-path="+auditLog)
	if err != nil {
		return fmt.Errorf("cluster: %w: run `make e2e-binaries`", err)
	}
	err = lab.Eventually(ctx, func() error {
		select {
		case <-c.apiserver.Exited():
			return nil // said below
		default:
		}
		if err := c.Admin.CoreV1().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error(); err != nil {
			return err
		}
		_, err := c.Admin.CoreV1().Namespaces().Get(ctx, metav1.NamespaceDefault, metav1.GetOptions{})
		return err
	})
	select {
	case <-c.apiserver.Exited():
		err = errors.New("it has ended")
	default:
	}
	if err != nil {
		return fmt.Errorf("cluster: the API server did not get ready: %w\n%s\n%s", err, tail(c.etcd.Log()), tail(c.apiserver.Log()))
	}
	return nil
}

// KillAPIServer ends the API server as a crash would.
func (c *ControlPlane) KillAPIServer() { c.apiserver.Kill() }

// FreezeAPIServer makes the API server hang: its port still takes connections, and nobody answers.
func (c *ControlPlane) FreezeAPIServer() error { return c.apiserver.Freeze() }

// ThawAPIServer lets it go on.
func (c *ControlPlane) ThawAPIServer() error { return c.apiserver.Thaw() }

// Allow gives the agent the rights that docs/operations.md names, and no other.
func (c *ControlPlane) Allow(ctx context.Context) error {
	role := &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: AgentUser},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{corev1.GroupName}, Resources: []string{"pods"}, Verbs: []string{"get", "list", "watch"}},
			{APIGroups: []string{corev1.GroupName}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
			{APIGroups: []string{appsv1.GroupName}, Resources: []string{"daemonsets", "deployments"}, ResourceNames: []string{"echo"}, Verbs: []string{"get"}},
			{APIGroups: []string{appsv1.GroupName}, Resources: []string{"replicasets"}, Verbs: []string{"get"}}, // of a Deployment
		},
	}
	binding := &rbacv1.RoleBinding{
		ObjectMeta: role.ObjectMeta,
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: AgentUser}},
	}
	rbac := c.Admin.RbacV1()
	_, errRole := rbac.Roles(metav1.NamespaceDefault).Create(ctx, role, metav1.CreateOptions{})
	_, errBinding := rbac.RoleBindings(metav1.NamespaceDefault).Create(ctx, binding, metav1.CreateOptions{})
	return errors.Join(errRole, errBinding)
}

// Forbid takes the agent's rights.
func (c *ControlPlane) Forbid(ctx context.Context) error {
	rbac := c.Admin.RbacV1()
	return errors.Join(
		rbac.RoleBindings(metav1.NamespaceDefault).Delete(ctx, AgentUser, metav1.DeleteOptions{}),
		rbac.Roles(metav1.NamespaceDefault).Delete(ctx, AgentUser, metav1.DeleteOptions{}))
}

// Requests is how many requests of the agent with this verb the API server has logged so far.
func (c *ControlPlane) Requests(verb string) (int, error) {
	data, err := os.ReadFile(c.node.Path(auditLog))
	return strings.Count(string(data), `"verb":"`+verb+`"`), err
}

func tail(log string) string {
	lines := strings.Split(log, "\n")
	slices.Reverse(lines)
	lines = lines[:min(len(lines), 20)]
	slices.Reverse(lines)
	return strings.Join(lines, "\n")
}
