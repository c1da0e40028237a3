// Command transcripts does what a stranger does, in a fresh clone of this repository, and writes docs/transcripts.md: README.md's first command, a
// cluster and the commands of README.md on it, and five breakages, each followed from "times out" to its cause and cure by
// docs/troubleshooting.md alone. It fails where a command does, or where the document does not lead to the cause.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "transcripts:", err)
		os.Exit(1)
	}
}

// stranger types commands in a clone, and what is seen becomes the document.
type stranger struct {
	ctx     context.Context
	clone   string
	node    string   // what runs a shell's command on node1
	session []string // the lines of the present session
	page    strings.Builder
}

func run(ctx context.Context) (err error) {
	root, err := lab.ModuleRoot()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "transcripts")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s := &stranger{ctx: ctx, clone: filepath.Join(dir, "magic-ip-address")}
	if out, err := exec.CommandContext(ctx, "git", "clone", "--quiet", root, s.clone).CombinedOutput(); err != nil {
		return fmt.Errorf("git clone: %w: %s", err, out)
	}
	s.page.WriteString(`# Transcripts

What a person sees who begins with a fresh clone. ` + "`make transcripts`" + ` types these commands, fails where one does, and writes this page. Times are of one
run on a machine with two cores, with Go's caches filled and Kubernetes built before; the first time Go builds everything, a minute for the demo and
8 minutes for the cluster.

## The first command

`)
	if err := s.demo(); err != nil {
		return err
	}
	if err := s.cluster(); err != nil {
		return err
	}
	text := s.page.String()
	if i := strings.Index(text, dir); i >= 0 {
		return fmt.Errorf("the page names a path of this machine: %q", text[i:min(i+80, len(text))])
	}
	return os.WriteFile(filepath.Join(root, "docs/transcripts.md"), []byte(text), 0o644)
}

// demo is README.md's first command.
func (s *stranger) demo() error {
	readme, err := os.ReadFile(filepath.Join(s.clone, "README.md"))
	if err != nil {
		return err
	}
	first := regexp.MustCompile("(?s)```sh\n(.*?)[ \n]").FindSubmatch(readme)
	block := regexp.MustCompile("(?m)^make demo").Find(readme)
	if first == nil || string(first[1]) != "make" || block == nil {
		return errors.New("README.md's first command is not make demo")
	}
	if _, err := s.types("make demo", 0); err != nil {
		return err
	}
	s.flush()
	return nil
}

// cluster is README.md's installation on the test cluster, and the breakages.
func (s *stranger) cluster() (err error) {
	s.page.WriteString("## A cluster, and the chart\n\nIn one shell:\n\n")
	began := time.Now()
	cluster := exec.CommandContext(s.ctx, "make", "cluster")
	cluster.Dir = s.clone
	cluster.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C reaches make and its child
	cluster.Stderr = os.Stderr
	out, err := cluster.StdoutPipe()
	if err != nil {
		return err
	}
	cluster.Cancel = func() error { return syscall.Kill(-cluster.Process.Pid, syscall.SIGINT) }
	if err := cluster.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cluster.Cancel()
		_ = cluster.Wait() // with an error, as make is interrupted
	}()
	s.session = append(s.session, "$ make cluster")
	lines := bufio.NewScanner(out)
	shown := false
	for lines.Scan() {
		line := lines.Text()
		shown = shown || strings.HasPrefix(line, "up after ")
		if shell := strings.TrimSpace(strings.Split(line, "#")[0]); shown && s.node == "" && strings.HasSuffix(shell, "-- bash") {
			s.node = strings.TrimSuffix(shell, "bash")
		}
		if shown {
			s.session = append(s.session, line)
		}
		if strings.HasPrefix(line, "Ctrl-C") {
			break
		}
	}
	if s.node == "" {
		return errors.New("make cluster has ended without a cluster")
	}
	go func() {
		for lines.Scan() { // until it ends
		}
	}()
	s.took(began)
	s.flush()
	s.page.WriteString("In another one, what the first has printed, the command of README.md, and a request:\n\n")
	if err := s.install(); err != nil {
		return err
	}
	s.page.WriteString(`## From "times out" to the cause

A client on node1 times out. Each time [Troubleshooting](troubleshooting.md) is followed from its beginning: ` + "`doctor`" + ` as root on that node, the row of the table
that has the check which ` + "`doctor`" + ` names, and what is to be done. What has broken the node is hidden from the reader of the document, and shown here.

`)
	for _, b := range breakages() {
		if err := s.breakage(b); err != nil {
			return fmt.Errorf("%s: %w", b.title, err)
		}
	}
	return nil
}

// helm is README.md's second step, as it stands there.
func (s *stranger) helm() (string, error) {
	readme, err := os.ReadFile(filepath.Join(s.clone, "README.md"))
	if err != nil {
		return "", err
	}
	found := regexp.MustCompile("(?s)```sh\n(helm upgrade .*?)\n```").FindSubmatch(readme)
	if found == nil {
		return "", errors.New("README.md does not install by helm")
	}
	return string(found[1]), nil
}

const request = "kubectl exec ds/client -- /echo ask 169.254.210.210:9200"

func (s *stranger) install() error {
	helm, err := s.helm()
	if err != nil {
		return err
	}
	began := time.Now()
	if _, err := s.types(helm, 5); err != nil {
		return err
	}
	for {
		session := s.session
		_, err := s.types(request, 0)
		if err == nil {
			break
		}
		s.session = session // the agents are starting
		if time.Since(began) > 2*time.Minute {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
	s.session = append(s.session, "", fmt.Sprintf("(a served request %s after the helm command)", time.Since(began).Round(100*time.Millisecond)), "")
	for _, command := range []string{"helm test 169-254-210-210 --namespace kube-system", "kubectl magic-ip status"} {
		if _, err := s.types(command, 5); err != nil {
			return err
		}
	}
	s.flush()
	return nil
}

// breakage is a fault of a node that makes clients time out.
type breakage struct {
	title string
	// breaks is typed on node1, or in the clone where it begins with kubectl or helm; one command a line.
	breaks []string
	// check is the one that leads to the row of the table.
	check string
	// cures is what that row and doctor say, as commands.
	cures []string
	// after is typed on node1 at the end, and not shown.
	after string
}

func breakages() []breakage {
	const gone = `kubectl -n kube-system patch ds apm-server -p '{"spec": {"template": {"spec": {"nodeSelector": {"targets": "elsewhere"}}}}}'`
	return []breakage{
		{title: "Forwarding is off", breaks: []string{"sysctl -w net.ipv4.ip_forward=0"}, check: "forwarding", cures: []string{"sysctl net.ipv4.ip_forward=1"}},
		{title: "A firewall drops what is forwarded", breaks: []string{
			"nft add table ip hardening",
			"nft 'add chain ip hardening forward { type filter hook forward priority 0; policy drop; }'",
		}, check: "filters", cures: []string{"nft list chain ip hardening forward", "nft add rule ip hardening forward iifname cni0 oifname cni0 accept"}, after: "nft delete table ip hardening"},
		{title: "The agent is gone, and then the target", breaks: []string{
			`kubectl -n kube-system patch ds 169-254-210-210-magic-ip-address -p '{"spec": {"template": {"spec": {"nodeSelector": {"disk": "ssd"}}}}}'`,
			"kubectl -n kube-system wait --for=delete pod -l app.kubernetes.io/name=magic-ip-address --timeout=60s",
			"kubectl -n kube-system rollout restart ds/apm-server",
			"kubectl -n kube-system rollout status ds/apm-server",
		}, check: "agent", cures: []string{
			"kubectl -n kube-system get ds 169-254-210-210-magic-ip-address",
			`kubectl -n kube-system patch ds 169-254-210-210-magic-ip-address --type=json -p '[{"op": "remove", "path": "/spec/template/spec/nodeSelector/disk"}]'`,
			"kubectl -n kube-system rollout status ds/169-254-210-210-magic-ip-address",
		}},
		{title: "The target hangs", breaks: []string{`pkill --signal STOP --full "[e]cho serve --tcp :8200"`}, cures: []string{"kubectl -n kube-system delete pod -l app=apm-server", "kubectl -n kube-system rollout status ds/apm-server"}},
		{title: "Packets are held while there is no target", breaks: []string{
			"helm upgrade 169-254-210-210 charts/magic-ip-address --namespace kube-system --reuse-values --set config.noEndpoint=hold --set config.holdFor=1h",
			gone,
			"kubectl -n kube-system wait --for=delete pod -l app=apm-server --timeout=60s",
		}, check: "magic IP", cures: []string{
			`kubectl -n kube-system patch ds apm-server --type=json -p '[{"op": "remove", "path": "/spec/template/spec/nodeSelector/targets"}]'`,
			"kubectl -n kube-system rollout status ds/apm-server",
		}},
	}
}

func (s *stranger) breakage(b breakage) error {
	fmt.Fprintf(&s.page, "### %s\n\n", b.title)
	client, err := s.types(`kubectl get pods -l app=client -o jsonpath='{.items[?(@.spec.nodeName=="node1")].metadata.name}'`, 0)
	if err != nil {
		return err
	}
	request := "kubectl exec " + client + " -- /echo ask 169.254.210.210:9200"
	s.session = nil
	for _, command := range b.breaks {
		if _, err := s.does(command); err != nil {
			return err
		}
	}
	began := time.Now()
	for { // kubelet takes up to a minute to give pods a changed configuration
		session := s.session
		out, err := s.types(request, 0)
		if err != nil && strings.Contains(out, "timed out") {
			break
		}
		s.session = session
		if time.Since(began) > 3*time.Minute {
			return fmt.Errorf("the request does not time out: %w, %s", err, out)
		}
		time.Sleep(time.Second)
	}
	s.flush()

	began = time.Now()
	doctor, _ := s.onNode("magic-ip-agent doctor", filepath.Join(s.clone, "bin/magic-ip-agent")+" doctor", 6)
	row, err := s.row(b.check, doctor)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, doctor)
	}
	s.flush()
	fmt.Fprintf(&s.page, "The row of *The connection times out*:\n\n| cause | how to tell | check of `doctor` | what to do |\n|---|---|---|---|\n%s\n\n", row)
	for _, command := range b.cures {
		if _, err := s.does(command); err != nil {
			return err
		}
	}
	for {
		session := s.session
		_, err := s.types(request, 0)
		if err == nil {
			break
		}
		s.session = session // it is starting
		if time.Since(began) > 2*time.Minute {
			return fmt.Errorf("not cured: %w", err)
		}
		time.Sleep(200 * time.Millisecond)
	}
	s.session = append(s.session, "", fmt.Sprintf("(%s after doctor was started)", time.Since(began).Round(100*time.Millisecond)))
	s.flush()
	if b.after == "" {
		return nil
	}
	_, err = s.onNode(b.after, b.after, 0)
	s.session = nil
	return err
}

// does types a command: of kubectl and helm in the clone, another one on node1.
func (s *stranger) does(command string) (string, error) {
	switch word, _, _ := strings.Cut(command, " "); word {
	case "kubectl", "helm":
		return s.types(command, 1)
	}
	return s.onNode(command, command, 0)
}

// row is the row of docs/troubleshooting.md, The connection times out, that a verdict of doctor leads to: the one with the check that the
// verdict names; without a failure the one with the check endpoints that says "hangs".
func (s *stranger) row(check, doctor string) (string, error) {
	data, err := os.ReadFile(filepath.Join(s.clone, "docs/troubleshooting.md"))
	if err != nil {
		return "", err
	}
	_, verdict, _ := strings.Cut(doctor, "Verdict: ")
	wanted := "`" + check
	if check == "" {
		if !strings.HasPrefix(verdict, "ok: ") {
			return "", fmt.Errorf("the verdict is %s", verdict)
		}
		wanted = "hangs"
	} else if !strings.Contains(verdict, check) {
		return "", fmt.Errorf("the verdict does not name %s: %s", check, verdict)
	}
	_, table, _ := strings.Cut(string(data), "## The connection times out\n")
	table, _, _ = strings.Cut(table, "\n## ")
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, "|") && strings.Contains(line, wanted) {
			return strings.TrimSpace(line), nil
		}
	}
	return "", fmt.Errorf("the table has no row with %q", wanted)
}

// types runs a command in the clone, and shows it with the first lines of what it prints (all where most is 0), and how long it took.
func (s *stranger) types(command string, most int) (string, error) {
	return s.runs("$ "+command, most, "sh", "-c", command)
}

// onNode runs a command on node1.
func (s *stranger) onNode(shown, command string, last int) (string, error) {
	return s.runs("node1# "+shown, -last, "sh", "-c", s.node+"sh -c "+"'"+strings.ReplaceAll(command, "'", `'\''`)+"'")
}

// runs runs a program and shows its output: all of it, or so many of the first lines (most > 0) or of the last ones (most < 0).
func (s *stranger) runs(prompt string, most int, program string, args ...string) (string, error) {
	began := time.Now()
	cmd := exec.CommandContext(s.ctx, program, args...)
	cmd.Dir = s.clone
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(s.clone, "bin/cluster")+string(os.PathListSeparator)+os.Getenv("PATH"))
	data, err := cmd.CombinedOutput()
	out := strings.TrimRight(string(data), "\n")
	fmt.Fprintf(os.Stderr, "%s\n%s\n", prompt, out)
	s.session = append(s.session, strings.ReplaceAll(prompt, "\n", "\n  "))
	lines := strings.Split(strings.ReplaceAll(out, s.clone+"/", ""), "\n")
	switch {
	case out == "":
		lines = nil
	case most > 0 && len(lines) > most:
		lines = append(lines[:most], "…")
	case most < 0 && len(lines) > -most:
		lines = append([]string{"…"}, lines[len(lines)+most:]...)
	}
	s.session = append(s.session, lines...)
	s.took(began)
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", prompt, err, out)
	}
	return out, err
}

// took says how long a command took, where that is more than nothing.
func (s *stranger) took(began time.Time) {
	if took := time.Since(began); took > time.Second {
		s.session = append(s.session, fmt.Sprintf("(%s)", took.Round(100*time.Millisecond)))
	}
}

// flush ends the present session.
func (s *stranger) flush() {
	fmt.Fprintf(&s.page, "```console\n%s\n```\n\n", strings.Join(s.session, "\n"))
	s.session = nil
}
