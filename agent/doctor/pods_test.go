package doctor

import (
	"os"
	"path/filepath"
	"testing"
)

// TestNetNSOf: a pod without a record is found by the kubelet's directory of its logs and by the cgroup of its processes; a container can
// write in neither.
func TestNetNSOf(t *testing.T) {
	const uid, mine, static = "11111111-2222-3333-4444-555555555555", "aaaaaaaa-2222-3333-4444-555555555555", "0123456789abcdef0123456789abcdef"
	root := t.TempDir()
	for _, dir := range []string{"default_client_" + uid, "default_client-2_" + mine, "kube-system_static_" + static, "default_gone_bbbbbbbb-2222-3333-4444-555555555555"} {
		if err := os.MkdirAll(filepath.Join(root, "var/log/pods", dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	const systemd = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod11111111_2222_3333_4444_555555555555.slice/cri-containerd-0a.scope\n"
	for pid, cgroup := range map[string]string{
		"1": "0::/init.scope\n",
		// It has made a cgroup below its own that is called like the client's.
		"20": "0::/kubepods/besteffort/pod" + mine + "/0b/kubepods/pod" + uid + "/0a\n",
		"30": systemd,
		"40": "12:memory:/user.slice\n4:cpu:/kubepods/pod" + static + "/0c\n",
	} {
		if err := os.MkdirAll(filepath.Join(root, "proc", pid), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "proc", pid, "cgroup"), []byte(cgroup), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for pod, want := range map[string]string{
		"default/client": "proc/30/ns/net", "default/client-2": "proc/20/ns/net", "kube-system/static": "proc/40/ns/net",
		"default/gone": "", "default/clien": "", "other/client": "", "default": "", "../..": "",
	} {
		if want != "" {
			want = filepath.Join(root, want)
		}
		if got := netnsOf(root, pod); got != want {
			t.Errorf("%s: %q, want %q", pod, got, want)
		}
	}
	if got := netnsOf(t.TempDir(), "default/client"); got != "" {
		t.Errorf("without the directories: %s", got)
	}
}
