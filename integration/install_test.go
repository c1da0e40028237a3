package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	directory "github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The node of these tests has its network configurations in /run/net.d and its CNI plugins in /run/bin: the upstream ones by
// links, ours when it is installed.
const (
	confDir    = "/run/net.d"
	binDir     = "/run/bin"
	pluginType = "magic-ip-address"
	// primary is what the primary CNI of the node has written, in its own manner.
	primary = "{\"cniVersion\":\"1.1.0\",  \"plugins\" : [\r\n\t{ \"type\": \"bridge\", \"bridge\": \"cni0\", \"isGateway\": true, \"mtu\": 1.4e3, \"x\": \"\\u0041\",\r\n" +
		"\t  \"ipam\": {\"type\": \"host-local\", \"ranges\": [[{\"subnet\": \"10.244.1.0/24\"}]], \"routes\": [{\"dst\": \"0.0.0.0/0\"}]} } ],\r\n\"name\":\"bridge\"}"
	installConfig = "name: " + agentName + "\npollInterval: 1s\nmagicIPs:\n- {ipAddress: 169.254.210.210, namespace: default, selector: app=echo, ports: [{port: 8080}]}\n"
)

// site is a node that things are installed on.
type site struct {
	*lab.Node
	t    *testing.T
	root string // of the module
	// before is what the kernel had for rules.
	before string
}

func newSite(t *testing.T) *site {
	t.Helper()
	root, err := lab.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	s := &site{Node: newNode(t), t: t, root: root}
	for name, content := range map[string]string{confDir + "/10-bridge.conflist": primary, "/run/agent.yaml": installConfig} {
		if err := s.WriteFile(name, []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	s.run("mkdir " + binDir + " && ln -s " + filepath.Join(root, "bin/cni") + "/* " + binDir)
	s.before = s.rules()
	return s
}

func (s *site) run(script string) string {
	s.t.Helper()
	out, err := s.Run(s.t.Context(), "sh", "-ec", script)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *site) rules() string { s.t.Helper(); return s.run("nft --stateless list ruleset") }

func (s *site) flags(command string, more ...string) []string {
	return append([]string{command, "--config", "/run/agent.yaml", "--runtime-dir", lab.RuntimeDir, "--cni-conf-dir", confDir, "--cni-bin-dir", binDir}, more...)
}

func (s *site) plugin() string { return filepath.Join(s.root, "bin", pluginType) }

// cni calls a runtime's command for a target, with the network configurations in a directory.
func (s *site) cni(command, dir, pod string) {
	s.t.Helper()
	cmd := s.Command(s.t.Context(), filepath.Join(s.root, "bin", "cnitool"), command, "bridge", "/run/netns/"+pod)
	cmd.Env = append(cmd.Env, "NETCONFPATH="+dir, "CNI_PATH="+binDir, `CAP_ARGS={"labels": {"app": "echo"}}`,
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=%s;K8S_POD_UID=uid-%[1]s", pod))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("%s of %s with the configurations in %s: %v: %s", command, pod, dir, err, out)
	}
}

func (s *site) add(pod string) {
	s.t.Helper()
	s.run("ip netns add " + pod)
	s.cni("add", confDir, pod)
}

func (s *site) conflist() string {
	s.t.Helper()
	data, err := os.ReadFile(s.Path(confDir + "/10-bridge.conflist"))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(data)
}

// gone says what is still there of what was installed.
func (s *site) gone() error {
	entries, err := os.ReadDir(s.Path(lab.RuntimeDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	if len(names) > 0 {
		return fmt.Errorf("in the runtime dir: %v", names)
	}
	if diff := cmp.Diff(primary, s.conflist()); diff != "" {
		return fmt.Errorf("conflist (-before +after):\n%s", diff)
	}
	if diff := cmp.Diff(s.before, s.rules()); diff != "" {
		return fmt.Errorf("rules (-before +after):\n%s", diff)
	}
	return nil
}

// afterwards checks that pods of before can go, new ones come and go, and that none of it leaves a trace.
func (s *site) afterwards(cached, pod string) {
	s.t.Helper()
	s.cni("del", cached, pod)
	s.cni("del", cached, pod) // runtimes repeat it
	s.add("later")
	s.cni("del", confDir, "later")
	if err := s.gone(); err != nil {
		s.t.Errorf("after pods have come and gone: %v", err)
	}
	if _, err := os.Stat(s.Path(binDir + "/" + pluginType)); err != nil {
		s.t.Errorf("the plugin, which cached configurations name: %v", err)
	}
}

// serves waits until the agent leads to the pod called echo.
func (s *site) serves() {
	s.t.Helper()
	err := lab.Eventually(patience(s.t), func() error {
		agent, err := runtimedir.New(s.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
		if err == nil && !hasEndpoint(agent, "echo") {
			err = fmt.Errorf("published is %+v", agent)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// confined starts the agent's binary as root with no capabilities but these, as the containers of the pod have them.
func (s *site) confined(capabilities string, args ...string) *lab.Process {
	s.t.Helper()
	binary, err := filepath.Abs(agentBinary())
	if err != nil {
		s.t.Fatal(err)
	}
	process, err := s.Start("setpriv", append([]string{"--bounding-set=" + capabilities, "--inh-caps=-all", "--no-new-privs", "--", binary}, args...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	return process
}

// TestInstallAndUninstall by hand: everything is as before, while a pod of before still runs.
func TestInstallAndUninstall(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if _, err := s.RunAgent(t.Context(), s.flags("install", "--plugin", s.plugin())...); err != nil {
		t.Fatal(err)
	}
	if got := s.conflist(); !strings.Contains(got, pluginType) || !strings.HasPrefix(primary, got[:100]) {
		t.Errorf("conflist:\n%s", got)
	}
	agent, err := s.StartAgent([]byte(installConfig))
	if err != nil {
		t.Fatal(err)
	}
	s.add("echo")
	s.serves()
	s.run("cp -r " + confDir + " /run/cached")
	if out, err := s.RunAgent(t.Context(), "status"); err != nil || !strings.Contains(out, "installed: "+confDir+"/10-bridge.conflist since ") {
		t.Errorf("status: %v\n%s", err, out)
	}

	_, err = s.RunAgent(t.Context(), s.flags("uninstall")...)
	if err == nil || !strings.Contains(err.Error(), "is running on this node: stop it first") {
		t.Errorf("uninstall beside a running agent: %v", err)
	}
	s.serves()
	if err := agent.Stop(patience(t)); err != nil {
		t.Fatal(err)
	}
	if s.rules() == s.before || !strings.Contains(s.conflist(), pluginType) {
		t.Error("to stop an agent is not to uninstall it")
	}
	out, err := s.RunAgent(t.Context(), s.flags("uninstall")...)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, "agent "+agentName+" is uninstalled") {
		t.Errorf("says %q", out)
	}
	if err := s.gone(); err != nil {
		t.Error(err)
	}
	s.afterwards("/run/cached", "echo")
	// Once more, and for an agent that was never there: there is nothing, and so a name that was mistyped is an error.
	for _, name := range []string{agentName, "never-there"} {
		out, err := s.RunAgent(t.Context(), "uninstall", "--name", name, "--runtime-dir", lab.RuntimeDir, "--cni-conf-dir", confDir)
		if err == nil || !strings.Contains(err.Error(), "nothing of an agent called "+name+" is on this node") || out != "" {
			t.Errorf("uninstall of %s: %q, %v", name, out, err)
		}
	}
	if err := s.gone(); err != nil {
		t.Error(err)
	}
}

// TestUninstallByForce goes on although somebody holds the locks, as a process that hangs does.
func TestUninstallByForce(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	installer := s.confined("-all", s.flags("install", "--watch", "--no-api", "--plugin", s.plugin())...)
	s.awaitEntry(installer)
	if err := installer.Freeze(); err != nil {
		t.Fatal(err)
	}
	unlock, err := directory.Lock(t.Context(), s.Path(confDir))
	switch {
	case err == nil:
		defer unlock()
	case !errors.Is(err, directory.ErrHeld): // by the installer
		t.Fatal(err)
	}
	if _, err := s.RunAgent(t.Context(), s.flags("uninstall")...); err == nil || !strings.Contains(err.Error(), "is running on this node") {
		t.Errorf("uninstall beside a running installer: %v", err)
	}
	if _, err := s.RunAgent(t.Context(), s.flags("uninstall", "--force")...); err != nil {
		t.Error(err)
	}
	if got := s.conflist(); got != primary {
		t.Errorf("conflist:\n%s", got)
	}
	installer.Kill()
}

func (s *site) awaitEntry(installer *lab.Process) {
	s.t.Helper()
	err := lab.Eventually(patience(s.t), func() error {
		if got := s.conflist(); !strings.Contains(got, agentName) {
			return fmt.Errorf("no key in\n%s", got)
		}
		return nil
	})
	if err != nil {
		s.t.Fatalf("%v; log:\n%s", err, installer.Log())
	}
}

// TestReadOnlyDirectories: what cannot be written is named, with the flag to change, and nothing is half done.
func TestReadOnlyDirectories(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.run("mount -t tmpfs tmpfs /run/bin -o ro")
	if _, err := s.RunAgent(t.Context(), s.flags("install", "--plugin", s.plugin())...); err == nil || !strings.Contains(err.Error(), "--cni-bin-dir (value cni.binDir of the chart)") {
		t.Errorf("install into a read-only directory of plugins: %v", err)
	}
	s.run("umount /run/bin && mount --bind " + confDir + " " + confDir + " && mount -o remount,bind,ro " + confDir)
	if _, err := s.RunAgent(t.Context(), s.flags("install", "--plugin", s.plugin())...); err == nil || !strings.Contains(err.Error(), "--cni-conf-dir (value cni.confDir of the chart)") {
		t.Errorf("install into a read-only directory of configurations: %v", err)
	}
	s.run("umount " + confDir)
	if err := s.gone(); err != nil {
		t.Error(err)
	}
}

// TestFileOfAnotherUser comes back with its owner, although the installer may not give files away.
func TestFileOfAnotherUser(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const file = confDir + "/10-bridge.conflist"
	stat := func() string {
		t.Helper()
		return s.run("stat -c '%n %u:%g %a %Y' " + confDir + "/*; ls -A " + confDir)
	}
	s.run("chown 1000:1001 " + file + "; chmod 664 " + file + "; touch -d '2 days ago' " + file)
	before := stat()
	installer := s.confined("-all", s.flags("install", "--watch", "--no-api", "--plugin", s.plugin())...)
	s.awaitEntry(installer)
	if got := s.run("stat -c %a " + file); got != "664\n" {
		t.Errorf("mode %s", got)
	}
	uninstall := func() {
		t.Helper()
		process := s.confined("-all", "uninstall", "--force", "--config", "/run/agent.yaml", "--runtime-dir", lab.RuntimeDir, "--cni-conf-dir", confDir, "--cni-bin-dir", binDir)
		select {
		case <-process.Exited():
		case <-patience(t).Done():
			t.Fatal("it does not end")
		}
	}
	if err := installer.Stop(patience(t)); err != nil {
		t.Fatal(err)
	}
	uninstall() // its rules, which it may not touch, are not there
	if diff := cmp.Diff(before, stat()); diff != "" {
		t.Errorf("uninstalled (-before +after):\n%s", diff)
	}
	// Its owner writes it anew meanwhile: that is what is to come back.
	installer = s.confined("-all", s.flags("install", "--watch", "--no-api", "--plugin", s.plugin())...)
	s.awaitEntry(installer)
	s.run("printf '%s' '" + strings.Replace(primary, "1.4e3", "1500", 1) + "' >/run/new; chown 1002:1003 /run/new; cp -p /run/new /run/new2; mv /run/new2 " + file)
	s.awaitEntry(installer)
	if err := installer.Stop(patience(t)); err != nil {
		t.Fatal(err)
	}
	uninstall()
	if got, want := s.run("stat -c '%u:%g' "+file+"; ls -A "+confDir+"; cmp "+file+" /run/new"), "1002:1003\n10-bridge.conflist\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestSingleConfigurationOfAnotherUser: the list of it is root's, and is written once.
func TestSingleConfigurationOfAnotherUser(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const list = confDir + "/05-a-conf.magic-ip-address.conflist"
	s.run(`echo '{"cniVersion":"1.0.0","name":"a","type":"bridge"}' >` + confDir + "/05-a.conf; chown 1000:1001 " + confDir + "/05-a.conf")
	installer := s.confined("-all", s.flags("install", "--watch", "--no-api", "--plugin", s.plugin())...)
	if err := lab.Eventually(patience(t), func() error { _, err := os.Stat(s.Path(list)); return err }); err != nil {
		t.Fatalf("%v; log:\n%s", err, installer.Log())
	}
	before := s.run("stat -c %i " + list)
	s.run("touch " + confDir + "/05-a.conf; sleep 1") // many looks, if each brought the next
	if after := s.run("stat -c %i " + list); after != before || strings.Count(installer.Log(), "entry put in place") != 1 {
		t.Errorf("the list was written again; log:\n%s", installer.Log())
	}
}

// TestFilesThatCannotBeWritten are named once, with what is wrong and what to do, and are not tried again and again. An uninstallation that
// cannot remove the entry fails and keeps the record.
func TestFilesThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	const file = confDir + "/10-bridge.conflist"
	for name, test := range map[string]struct{ lock, unlock, says string }{
		"a mount of its own":     {"cp " + file + " /run/copy; mount --bind " + file + " " + file, "umount " + file, "the file is a mount point of its own"},
		"immutable":              {"chattr +i " + file, "chattr -i " + file, "immutable"},
		"an immutable directory": {"chattr +i " + confDir, "chattr -i " + confDir, "immutable"},
		"read-only":              {"mount --bind " + confDir + " " + confDir + "; mount -o remount,bind,ro " + confDir, "umount " + confDir, "mounted read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			s.run(test.lock)
			installer := s.confined("-all", s.flags("install", "--watch", "--no-api", "--plugin", s.plugin())...)
			if err := lab.Eventually(patience(t), func() error {
				if !strings.Contains(installer.Log(), test.says) {
					return fmt.Errorf("it does not say %q:\n%s", test.says, installer.Log())
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			s.run("sleep 3") // its pauses are 1, 2, 4 … seconds: more attempts, and not one word more
			if said := strings.Count(installer.Log(), "cannot be written"); said != 1 {
				t.Errorf("said %d times:\n%s", said, installer.Log())
			}
			s.run(test.unlock)
			s.awaitEntry(installer)
			if err := installer.Stop(patience(t)); err != nil {
				t.Fatal(err)
			}
			s.run(test.lock)
			if out, err := s.RunAgent(t.Context(), s.flags("uninstall")...); err == nil || !strings.Contains(err.Error(), test.says) || strings.Contains(out, "is uninstalled") {
				t.Errorf("uninstall: %v: %s", err, out)
			}
			if out := s.run("find " + lab.RuntimeDir + " -name record.json"); out == "" {
				t.Error("the record is gone and the entry is there")
			}
			s.run(test.unlock)
			if _, err := s.RunAgent(t.Context(), s.flags("uninstall")...); err != nil {
				t.Fatal(err)
			}
			if err := s.gone(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDirectoryRemovedOnTheNode: a container whose mount leads nowhere ends, so that it is started again with what is there now.
func TestDirectoryRemovedOnTheNode(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.run("mkdir /run/mounted && mount --bind " + confDir + " /run/mounted")
	installer := s.confined("-all", append(s.flags("install", "--watch", "--no-api", "--plugin", s.plugin()), "--cni-conf-dir", "/run/mounted")...)
	s.awaitEntry(installer)
	s.run("rm -r " + confDir + " && mkdir " + confDir)
	select {
	case <-installer.Exited():
	case <-patience(t).Done():
		t.Fatal("it goes on")
	}
	if err := installer.Stop(t.Context()); err == nil || !strings.Contains(installer.Log(), "/run/mounted was removed on the node") {
		t.Errorf("ended with %v; log:\n%s", err, installer.Log())
	}
}

// TestDaemonSetDeleted: agent and installer of a DaemonSet that is deleted take out all that they have put on the node, each
// its own and without privileges, and wait then. That they are refused before, or told to stop, leaves everything in place.
func TestDaemonSetDeleted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	api := s.newAPI()
	start := func() (installer, agent *lab.Process) {
		t.Helper()
		own := []string{"--daemonset", "kube-system/magic", "--kubeconfig", "/run/kubeconfig"}
		before := time.Now()
		installer = s.confined("-all", s.flags("install", append(own, "--watch", "--plugin", s.plugin())...)...)
		agent = s.confined("-all,+net_admin", append(own, "run", "--config", "/run/agent.yaml", "--runtime-dir", lab.RuntimeDir, "--node-name", "node")...)
		s.awaitEntry(installer)
		if err := lab.Eventually(patience(t), func() error { // it runs once it knows its DaemonSet
			status, err := runtimedir.New(s.Path(lab.RuntimeDir)).Agent(agentName).ReadStatus()
			if err == nil && status.StartedAt.Before(before) {
				err = errors.New("the agent does not run yet")
			}
			return err
		}); err != nil {
			t.Fatalf("%v:\n%s", err, agent.Log())
		}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("installer:\n%s\nagent:\n%s", installer.Log(), agent.Log())
			}
		})
		return installer, agent
	}
	installer, agent := start()
	s.add("echo")
	s.serves()
	s.run("cp -r " + confDir + " /run/cached")

	// An upgrade, while the API server refuses.
	api.awaitWatchers(t, 2)
	api.set(http.StatusForbidden)
	for _, p := range []*lab.Process{installer, agent} {
		if err := p.Stop(patience(t)); err != nil {
			t.Error(err)
		}
	}
	if s.rules() == s.before || !strings.Contains(s.conflist(), agentName) {
		t.Fatal("uninstalled by SIGTERM and 403")
	}
	api.set(http.StatusOK)
	installer, agent = start()
	s.serves()

	api.awaitWatchers(t, 2)
	api.set(http.StatusNotFound)
	if err := lab.Eventually(patience(t), s.gone); err != nil {
		t.Fatal(err)
	}
	s.afterwards("/run/cached", "echo")
	for _, p := range []*lab.Process{installer, agent} {
		select {
		case <-p.Exited():
			t.Error("it has ended: kubelet starts it again, and it installs again")
		default:
		}
		if err := p.Stop(patience(t)); err != nil {
			t.Error(err)
		}
	}
	if err := s.gone(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// api is as much of an API server as knows one DaemonSet. It refuses all else.
type api struct {
	mu       sync.Mutex
	code     int
	watchers int           // who watch now
	unseen   int           // watches so far, less answers: who watches then looks
	changed  chan struct{} // closed when the code changes
}

const ownDaemonSet = `{"apiVersion":"apps/v1","kind":"DaemonSet","metadata":{"namespace":"kube-system","name":"magic","uid":"u1","resourceVersion":"7"}}`

// newAPI starts one in the node, and writes /run/kubeconfig.
func (s *site) newAPI() *api {
	s.t.Helper()
	a := &api{code: http.StatusOK, changed: make(chan struct{})}
	listener, err := s.Listen(lab.Host, "tcp", "127.0.0.1:6443")
	if err != nil {
		s.t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(a)
	_ = server.Listener.Close()
	server.Listener = listener
	server.Start()
	s.t.Cleanup(func() { a.set(http.StatusGone); server.CloseClientConnections(); server.Close() })
	kubeconfig := `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":"http://127.0.0.1:6443"}}],` +
		`"contexts":[{"name":"c","context":{"cluster":"c"}}],"current-context":"c"}`
	if err := s.WriteFile("/run/kubeconfig", []byte(kubeconfig)); err != nil {
		s.t.Fatal(err)
	}
	return a
}

// set changes what it says of the DaemonSet, and ends the watches: with its deletion where that is it.
func (a *api) set(code int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.code = code
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *api) awaitWatchers(t *testing.T, n int) {
	t.Helper()
	err := lab.Eventually(patience(t), func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.watchers != n || a.unseen > 0 {
			return fmt.Errorf("%d watch the DaemonSet, want %d; %d have yet to look at it", a.watchers, n, a.unseen)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const path = "/apis/apps/v1/namespaces/kube-system/daemonsets"
	a.mu.Lock()
	code, changed := a.code, a.changed
	a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case code == http.StatusOK && r.URL.Path == path+"/magic":
		_, _ = w.Write([]byte(ownDaemonSet))
		a.count(0, -1)
	case code == http.StatusOK && r.URL.Path == path && r.URL.Query().Get("watch") == "true":
		a.count(1, 1)
		defer a.count(-1, 0)
		if r.URL.Query().Get("sendInitialEvents") == "true" { // a watch that lists first
			_, _ = fmt.Fprintf(w, `{"type":"ADDED","object":%s}`+"\n"+`{"type":"BOOKMARK","object":{"apiVersion":"apps/v1","kind":"DaemonSet",`+
				`"metadata":{"resourceVersion":"7","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n", ownDaemonSet)
		}
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
			return
		case <-changed:
		}
		a.mu.Lock()
		code = a.code
		a.mu.Unlock()
		if code == http.StatusNotFound {
			_, _ = fmt.Fprintf(w, `{"type":"DELETED","object":%s}`+"\n", ownDaemonSet)
		}
	case code == http.StatusOK && r.URL.Path == path:
		_, _ = fmt.Fprintf(w, `{"apiVersion":"apps/v1","kind":"DaemonSetList","metadata":{"resourceVersion":"7"},"items":[%s]}`, ownDaemonSet)
	case code == http.StatusNotFound && r.URL.Path == path:
		_, _ = w.Write([]byte(`{"apiVersion":"apps/v1","kind":"DaemonSetList","metadata":{"resourceVersion":"8"},"items":[]}`))
	case code == http.StatusNotFound && r.URL.Path == path+"/magic":
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": "NotFound",
			"details": map[string]string{"group": "apps", "kind": "daemonsets", "name": "magic"}})
	default:
		w.WriteHeader(http.StatusForbidden)
		_, _ = w.Write([]byte(`{"apiVersion":"v1","kind":"Status","status":"Failure","code":403,"reason":"Forbidden","message":"no"}`))
	}
}

func (a *api) count(watchers, unseen int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.watchers += watchers
	a.unseen += unseen
}
