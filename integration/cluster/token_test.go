//go:build e2e

package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

// podReader are the rights that docs/operations.md names.
var podReader = []rbacv1.PolicyRule{{APIGroups: []string{corev1.GroupName}, Resources: []string{"pods"}, Verbs: []string{"get", "list", "watch"}}}

// allowAccount makes a namespace and a service account in it, which has these rights there.
func allowAccount(ctx context.Context, namespace string) (*corev1.ServiceAccount, error) {
	core, rbac := plane.Admin.CoreV1(), plane.Admin.RbacV1()
	made := func(err error) error {
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	}
	_, errNamespace := core.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	_, errAccount := core.ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: AgentUser}}, metav1.CreateOptions{})
	role := &rbacv1.Role{
		ObjectMeta: metav1.ObjectMeta{Name: AgentUser},
		Rules:      podReader,
	}
	_, errRole := rbac.Roles(namespace).Create(ctx, role, metav1.CreateOptions{})
	binding := &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: AgentUser + "-account"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: AgentUser, Namespace: namespace}},
	}
	_, errBinding := rbac.RoleBindings(namespace).Create(ctx, binding, metav1.CreateOptions{})
	if err := errors.Join(made(errNamespace), made(errAccount), made(errRole), made(errBinding)); err != nil {
		return nil, err
	}
	return core.ServiceAccounts(namespace).Get(ctx, AgentUser, metav1.GetOptions{})
}

// newToken is a token of the account, which the API server issues.
func newToken(ctx context.Context, account *corev1.ServiceAccount) ([]byte, error) {
	request, err := plane.Admin.CoreV1().ServiceAccounts(account.Namespace).CreateToken(ctx, account.Name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return []byte(request.Status.Token), nil
}

// shortToken is one that expires sooner than the API server would issue it: signed with its key.
func shortToken(account *corev1.ServiceAccount, expires time.Time) ([]byte, error) {
	data, err := os.ReadFile(plane.node.Path(dir + "/server.key"))
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	const issuer = "https://kubernetes.default.svc"
	claims, err := json.Marshal(map[string]any{
		"iss": issuer, "aud": []string{issuer}, "sub": "system:serviceaccount:" + account.Namespace + ":" + account.Name,
		"iat": expires.Add(-time.Hour).Unix(), "nbf": expires.Add(-time.Hour).Unix(), "exp": expires.Unix(),
		"kubernetes.io": map[string]any{
			"namespace": account.Namespace, "serviceaccount": map[string]any{"name": account.Name, "uid": account.UID},
		},
	})
	if err != nil {
		return nil, err
	}
	encode := base64.RawURLEncoding.EncodeToString
	token := encode([]byte(`{"alg":"ES256"}`)) + "." + encode(claims)
	sum := sha256.Sum256([]byte(token))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return nil, err
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return []byte(token + "." + encode(signature)), nil
}

// tokenLeeway is how long after its end the API server still takes a token.
const tokenLeeway = time.Minute

const (
	accountDir   = "/run/secrets/kubernetes.io/serviceaccount" // /var/run is /run
	tokenFile    = accountDir + "/token"
	tokenKubecfg = dir + "/token.kubeconfig"
)

// giveToken puts a token, by rename as kubelet does, and the authority's certificate where pods have them, and a
// kubeconfig that names both.
func giveToken(node *lab.Node, token []byte) error {
	authority, err := os.ReadFile(plane.node.Path(dir + "/ca.crt"))
	if err != nil {
		return err
	}
	config := fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %s/ca.crt}}]
users: [{name: u, user: {tokenFile: %s}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, endpoint, accountDir, tokenFile)
	return errors.Join(
		node.WriteFile(accountDir+"/ca.crt", authority), node.WriteFile(tokenKubecfg, config),
		node.WriteFile(tokenFile+".new", token), os.Rename(node.Path(tokenFile+".new"), node.Path(tokenFile)))
}

// TestToken: an agent that has a service account's token, as a pod has it or by a kubeconfig, goes on with the one that
// replaces it. One that has expired before is named, and nothing else changes until there is another.
func TestToken(t *testing.T) {
	host, apiPort, err := net.SplitHostPort(filepath.Base(endpoint))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", host)
	t.Setenv("KUBERNETES_SERVICE_PORT", apiPort)
	for name, kubeconfig := range map[string]string{"in cluster": "", "kubeconfig": tokenKubecfg} {
		t.Run(name, func(t *testing.T) {
			account, err := allowAccount(t.Context(), metav1.NamespaceDefault)
			if err != nil {
				t.Fatal(err)
			}
			const valid = 3 * time.Second
			short, err := shortToken(account, time.Now().Add(valid-tokenLeeway))
			if err == nil {
				err = giveToken(plane.node, short)
			}
			if err != nil {
				t.Fatal(err)
			}
			expired := time.After(valid)
			w := servingBy(t, kubeconfig)
			pod := w.create("echo").add().running(true)
			w.goesTo("echo")
			w.settle()

			// Whoever watches already is not stopped. Nor is the token looked at again for some seconds.
			<-expired
			plane.KillAPIServer()
			w.must(plane.StartAPIServer(w.patience()))
			w.problem("Unauthorized")
			w.answers("echo")
			fresh := w.create("new").add()
			w.answers("echo")
			fresh.running(true)
			w.answers("echo")

			rotated := time.Now()
			long, err := newToken(t.Context(), account)
			if err == nil {
				err = giveToken(plane.node, long)
			}
			w.must(err)
			w.goesTo("new")
			t.Logf("with the new token after %v", time.Since(rotated).Round(time.Millisecond))
			w.mended()
			pod.forceDelete()
		})
	}
}
