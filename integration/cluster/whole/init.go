package whole

import (
	"fmt"
	"path/filepath"
	"strings"
)

// networkInit is the first process of the namespaces that nodes are connected by: a bridge that is their router too.
const networkInit = `set -e
mount --make-rprivate /
mount -t sysfs sysfs /sys
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip link set lo up
ip link add nodes type bridge
ip address add ` + networkAddress + `/24 dev nodes
ip address add ` + networkAddress6 + `/64 dev nodes nodad
ip link set nodes up
echo ready
cat >/dev/null
exit 0`

// kernelSettings are what kubelet wants of settings that are the machine's: it finds them as wanted and changes nothing.
const kernelSettings = `vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1
	kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000`

// initScripts are the shell scripts of a node's first process: one joins the cgroups, and then the other begins with
// these as the root of its cgroup namespace. It reaps what its descendants leave behind, as sh does while it waits.
//
// What is below disk outlives a reboot, what is in /run does not.
func initScripts(disk, hostname string, cgroups []hierarchy, cgroup string) (join, boot string) {
	var s strings.Builder
	s.WriteString("set -e\nmount --make-rprivate /\nhostname " + hostname + "\n")
	for _, h := range cgroups {
		fmt.Fprintf(&s, "echo 0 >%s/cgroup.procs\n", filepath.Join(h.dir, cgroup))
	}
	s.WriteString("exec unshare --cgroup sh " + filepath.Join(disk, "boot") + "\n")
	join = s.String()

	s.Reset()
	s.WriteString("set -e\nmount -t proc proc /proc\numount --recursive --lazy /sys\nmount -t sysfs sysfs /sys\n")
	processes := []string{cgroupRoot + "/processes"} // version 2 has processes in leaves alone
	if unified(cgroups) {
		s.WriteString("mount -t cgroup2 cgroup2 " + cgroupRoot + "\nmkdir -p " + processes[0] + "\necho 0 >" + processes[0] + "/cgroup.procs\n")
		s.WriteString("for c in $(cat " + cgroupRoot + "/cgroup.controllers); do echo +$c >" + cgroupRoot + "/cgroup.subtree_control; done\n")
	} else {
		processes = nil
		s.WriteString("mount -t tmpfs -o mode=755 tmpfs " + cgroupRoot + "\n")
		for _, h := range cgroups {
			fmt.Fprintf(&s, "mkdir %s\nmount -t %s -o %s cgroup %[1]s\n", h.dir, h.fstype, h.options)
			processes = append(processes, h.dir)
		}
	}
	s.WriteString("mount -t tmpfs -o mode=755 tmpfs /run\nmkdir -p /run/lock /run/netns /run/settings\n")
	for _, dir := range []string{"/etc", "/opt", "/var"} {
		upper, work := disk+"/changed"+dir, disk+"/overlay"+dir
		fmt.Fprintf(&s, "mkdir -p %s %s\nmount -t overlay -o lowerdir=%s,upperdir=%[1]s,workdir=%[2]s overlay %[3]s\n", upper, work, dir)
	}
	for _, dir := range []string{"/etc/cni", "/etc/kubernetes", "/opt/cni", "/var/lib/cni", "/var/lib/containerd", "/var/lib/etcd",
		"/var/lib/kubelet", "/var/log/containers", "/var/log/pods"} {
		fmt.Fprintf(&s, "mkdir -p %s %s\nmount --bind %[1]s %[2]s\n", disk+"/own"+dir, dir)
	}
	s.WriteString(`for setting in ` + strings.Join(strings.Fields(kernelSettings), " ") + `; do
	file=/run/settings/$(basename ${setting%=*})
	echo ${setting#*=} >$file
	mount --bind $file /proc/sys/${setting%=*}
done
cat /proc/sys/kernel/random/uuid >/run/settings/boot_id
mount --bind /run/settings/boot_id /proc/sys/kernel/random/boot_id
mount --make-rshared /
cat >/run/in-cgroup <<'END'
for cgroup in ` + strings.Join(processes, " ") + `; do echo 0 >$cgroup/cgroup.procs; done
exec "$@"
END
mkdir -p /etc/cni/net.d /opt/cni/bin /etc/kubernetes/manifests
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
for setting in /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/bridge/bridge-nf-call-ip6tables; do [ ! -e $setting ] || echo 1 >$setting; done
ip link set lo up
echo ready
cat >/dev/null
exit 0
`)
	return join, s.String()
}
