package doctor

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// podCgroup finds the UID of the pod in the cgroup of one of its processes, by both drivers of the kubelet: …/podUID/… and
// …-podUID.slice/…, where systemd has "_" for "-". The first is the kubelet's; below it a container may make others.
var podCgroup = regexp.MustCompile(`[/-]pod([0-9a-f_-]{32,36})(?:\.slice)?/`)

// netnsOf is the network namespace of a pod (namespace/name) that has no record, as a path; empty where no process of the pod is found.
// The kubelet names the directory of a pod's logs NAMESPACE_NAME_UID.
func netnsOf(root, pod string) string {
	logs, err := os.ReadDir(filepath.Join(root, "var/log/pods"))
	if err != nil {
		return ""
	}
	prefix := strings.Replace(pod, "/", "_", 1) + "_"
	uids := map[string]bool{} // several where pods of this name have followed each other
	for _, dir := range logs {
		if uid, found := strings.CutPrefix(dir.Name(), prefix); found {
			uids[uid] = true
		}
	}
	processes, err := filepath.Glob(filepath.Join(root, "proc/[0-9]*/cgroup"))
	if err != nil || len(uids) == 0 {
		return ""
	}
	for _, file := range processes {
		cgroup, err := os.ReadFile(file)
		if err != nil {
			continue // the process has ended
		}
		if match := podCgroup.FindSubmatch(cgroup); match != nil && uids[strings.ReplaceAll(string(match[1]), "_", "-")] {
			return filepath.Join(filepath.Dir(file), "ns/net")
		}
	}
	return ""
}
