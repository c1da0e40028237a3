package plugin

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// FuzzConf feeds standard input to the commands. RUNTIMEDIR stands for a directory of the test's.
func FuzzConf(f *testing.F) {
	const selectors = `"selectors": {"a": [{"namespace": "*", "selector": "app=x"}]}`
	for _, seed := range []string{
		`{"cniVersion": "1.0.0", "name": "n", "runtimeDir": "RUNTIMEDIR", ` + selectors + `, "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.1/8"}]}}`,
		`{"cniVersion": "0.4.0", "name": "n", "runtimeDir": "RUNTIMEDIR", ` + selectors + `, "prevResult": {"cniVersion": "1.0.0", "interfaces": [null, {"name": "eth0", "sandbox": "x"}], "ips": [null, {"interface": 1, "address": "::1/0"}]}}`,
		`{"cniVersion": "1.1.0", "runtimeDir": "RUNTIMEDIR", ` + selectors + `, "runtimeConfig": {"labels": {"app": "x"}}, "args": {"cni": {"labels": [{"key": "a"}]}}, "prevResult": {}}`,
		`{"runtimeDir": "RUNTIMEDIR", "selectors": {"a": [{"namespace": "*", "selector": "a in ("}, null], "b": null}, "args": 5, "prevResult": {"ips": [{"interface": 9, "address": "x"}]}}`,
		`{"runtimeDir": 5, "selectors": {"a": [{"namespace": ""}]}, "prevResult": null, "cni.dev/valid-attachments": [{}]}`,
	} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, stdin []byte) {
		stdin = bytes.ReplaceAll(stdin, []byte("RUNTIMEDIR"), []byte(dir))
		conf, err := parseConf(stdin)
		if !filepath.IsAbs(conf.dir.Path()) {
			t.Fatalf("runtimeDir is %q", conf.dir.Path())
		}
		if err == nil && conf.dir.Path() != dir {
			return // not to write all over the machine
		}
		args := &skel.CmdArgs{ContainerID: "c1", IfName: "eth0", Args: "K8S_POD_NAMESPACE=a;K8S_POD_UID=u", StdinData: stdin}
		var stdout, stderr bytes.Buffer
		p := Plugin{Stdout: &stdout, Stderr: &stderr}

		if statusErr := status(args); (statusErr == nil) != (err == nil) {
			t.Errorf("STATUS is %v, the configuration %v", statusErr, err)
		}
		err = p.add(args)
		var failure *types.Error
		switch {
		case err == nil:
			want, err := conf.result()
			if err != nil || !bytes.Equal(want, stdout.Bytes()) {
				t.Errorf("ADD prints %q, want %q (%v)", &stdout, want, err)
			}
			if !json.Valid(stdout.Bytes()) {
				t.Errorf("ADD prints %q", &stdout)
			}
			_ = check(args) // does not panic; addresses may be odd enough to contradict nothing
		case !errors.As(err, &failure):
			t.Errorf("ADD: %v, want a types.Error", err)
		case failure.Code != types.ErrDecodingFailure && failure.Code != types.ErrInvalidNetworkConfig && failure.Code != types.ErrIncompatibleCNIVersion:
			t.Errorf("ADD: code %d: %v", failure.Code, err)
		case stdout.Len() > 0:
			t.Errorf("ADD fails and prints %q", &stdout)
		}
		if conf.dir.Path() != dir {
			return
		}
		if err := p.del(args); err != nil {
			t.Errorf("DEL: %v", err)
		}
		file, err := runtimedir.New(dir).ReadState()
		if err != nil && !errors.Is(err, fs.ErrNotExist) || len(file.Attachments) > 0 {
			t.Errorf("after DEL there is %v (%v)", file.Attachments, err)
		}
		if stderr.Len() > 0 {
			t.Errorf("not in the log: %s", &stderr)
		}
		_ = os.Remove(filepath.Join(dir, "plugin", "plugin.log"))
	})
}

// A disk that hangs keeps a pod for a bounded time.
func TestFileWorkIsBounded(t *testing.T) {
	hangs := make(chan struct{})
	defer close(hangs)
	var stderr bytes.Buffer
	p := Plugin{Stderr: &stderr}
	p.within(time.Millisecond, &skel.CmdArgs{ContainerID: "c1", Args: "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b"}, "ADD", func() { <-hangs })
	if want := `level=ERROR msg="the runtime directory does not respond; the record of the pod is left as it is" command=ADD waited=1ms containerID=c1 pod=a/b`; !strings.Contains(stderr.String(), want) {
		t.Errorf("standard error is %q, want %q", &stderr, want)
	}
	if lockWait >= fileWait || fileWait >= 2*time.Second {
		t.Errorf("lockWait %s, fileWait %s", lockWait, fileWait)
	}
}
