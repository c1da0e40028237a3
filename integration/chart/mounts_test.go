package chart

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMounts: a container can write exactly the directories of the node that are its own to write. Directories of the node are named as
// on the node, with the way they are mounted.
func TestMounts(t *testing.T) {
	const (
		agent     = "/run/magic-ip-address/agents/kube-system.169-254-210-210"
		installer = "/run/magic-ip-address/install/kube-system.169-254-210-210"
	)
	withAPI := map[string][]string{
		"agent": {"rw " + agent, "ro /run/magic-ip-address", "ro api-access", "ro config"},
		"installer": {
			"rw /etc/cni/net.d", "rw /opt/cni/bin", "rw " + installer, "rw /run/magic-ip-address/plugin",
			"ro /run/magic-ip-address", "ro api-access", "ro config",
		},
	}
	for name, test := range map[string]struct {
		values string
		want   map[string][]string
	}{
		"by default":    {"", withAPI},
		"with nftables": {"backend=nftables", withAPI},
		"without the API": {"api.enabled=false", map[string][]string{
			"agent":     without(withAPI["agent"], "ro api-access"),
			"installer": without(withAPI["installer"], "ro api-access"),
		}},
		"without CNI":  {"cni.enabled=false", map[string][]string{"agent": withAPI["agent"]}},
		"on OpenShift": {"cni.preset=openshift", map[string][]string{"agent": withAPI["agent"]}},
		"with iptables-legacy": {"backend=iptables", map[string][]string{
			"agent":     append([]string{"rw /run/xtables.lock"}, withAPI["agent"]...),
			"installer": withAPI["installer"],
		}},
		"on Cilium": {"config.dataPlane=cilium", map[string][]string{
			"agent":     append([]string{"ro /run/cilium/state"}, withAPI["agent"]...),
			"installer": withAPI["installer"],
		}},
		"elsewhere": {"runtimeDir=/run/else,config.name=me,cni.preset=k3s", map[string][]string{
			"agent": {"rw /run/else/agents/me", "ro /run/else", "ro api-access", "ro config"},
			"installer": {
				"rw /run/else/install/me", "rw /run/else/plugin", "rw /var/lib/rancher/k3s/agent/etc/cni/net.d", "rw /var/lib/rancher/k3s/data/cni",
				"ro /run/else", "ro api-access", "ro config",
			},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got := mounts(t, render(t, set(t, test.values))["daemonset.yaml"])
			for _, list := range test.want {
				slices.Sort(list)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("mounts (-want +got):\n%s", diff)
			}
		})
	}
}

func without(list []string, entry string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(other string) bool { return other == entry })
}

// mounts are those of each container, sorted.
func mounts(t *testing.T, daemonSet string) map[string][]string {
	t.Helper()
	var object struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct {
						Name         string
						VolumeMounts []struct {
							Name, MountPath string
							ReadOnly        bool
						}
					}
					Volumes []struct {
						Name     string
						HostPath *struct{ Path, Type string }
					}
				}
			}
		}
	}
	unmarshal(t, daemonSet, &object)
	pod := object.Spec.Template.Spec
	mounted := map[string][]string{}
	used := map[string]bool{}
	for _, c := range pod.Containers {
		for _, m := range c.VolumeMounts {
			what := ""
			for _, v := range pod.Volumes {
				switch {
				case v.Name != m.Name:
				case v.HostPath == nil:
					what = v.Name
				default:
					what = v.HostPath.Path
					// The conflist and all containers name the runtime directory alike.
					if !strings.HasPrefix(m.Name, "cni-") && m.MountPath != v.HostPath.Path {
						t.Errorf("%s is mounted at %s in %s", v.HostPath.Path, m.MountPath, c.Name)
					}
				}
			}
			if what == "" {
				t.Errorf("%s mounts %s, which is no volume", c.Name, m.Name)
			}
			used[m.Name] = true
			mounted[c.Name] = append(mounted[c.Name], map[bool]string{false: "rw ", true: "ro "}[m.ReadOnly]+what)
		}
		slices.Sort(mounted[c.Name])
	}
	for _, v := range pod.Volumes {
		if !used[v.Name] {
			t.Errorf("no container of %q mounts the volume %s", slices.Sorted(maps.Keys(mounted)), v.Name)
		}
	}
	return mounted
}
