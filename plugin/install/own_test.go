package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist"
	"github.com/magic-ip-address/magic-ip-address/plugin/conflist/entry"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// ovn is a single-plugin configuration as OVN-Kubernetes writes it, and ovnList the list of it that is ours.
const (
	ovn     = `{"cniVersion":"0.4.0","name":"ovn-kubernetes","type":"ovn-k8s-cni-overlay","ipam":{},"dns":{}}`
	ovnFile = "10-ovn-kubernetes.conf"
	ovnList = "10-ovn-kubernetes-conf.magic-ip-address.conflist"
)

// owner writes a file as a careful program does, by rename.
func (n *node) owner(name, content string) {
	n.Helper()
	path := filepath.Join(n.options.ConfDir, name)
	n.put(path+".new", content)
	if err := os.Rename(path+".new", path); err != nil {
		n.Fatal(err)
	}
}

func (n *node) deletes(name string) {
	n.Helper()
	if err := os.Remove(filepath.Join(n.options.ConfDir, name)); err != nil {
		n.Fatal(err)
	}
}

// chain are the plugins of a list; nil where it is not there.
func (n *node) chain(name string) (types []string) {
	data, err := os.ReadFile(filepath.Join(n.options.ConfDir, name))
	if err != nil {
		return nil
	}
	for line := range strings.SplitSeq(strings.ReplaceAll(string(data), " ", ""), "\"type\":\"") {
		if kind, _, ok := strings.Cut(line, "\""); ok && !strings.HasPrefix(line, "{") && !strings.HasPrefix(line, "\n") {
			types = append(types, kind)
		}
	}
	return types
}

// TestOwnListFollows: a single-plugin configuration is never touched, and the list of it is rewritten with it, goes with it, and comes
// back with it, without a word about anybody who removed something.
func TestOwnListFollows(t *testing.T) {
	t.Parallel()
	for _, name := range []string{ovnFile, "10-ovn-kubernetes.json"} {
		t.Run(filepath.Ext(name), func(t *testing.T) {
			t.Parallel()
			list := strings.Replace(ovnList, "-conf.", "-"+filepath.Ext(name)[1:]+".", 1)
			n := newNode(t)
			n.conf(name, ovn)
			undo := n.undone()
			n.watch()
			loaded := func(what, contains string) {
				t.Helper()
				n.eventually(what, func() bool {
					got := n.confs()[list]
					return strings.Contains(got, contains) && strings.Contains(got, entry.Type+`"`)
				})
			}
			loaded("the list", "ovn-k8s-cni-overlay")
			n.owner(name, strings.Replace(ovn, `"dns":{}`, `"mtu":1400`, 1))
			loaded("the list to be rewritten", `"mtu": 1400`)
			n.put(filepath.Join(n.options.ConfDir, name), strings.Replace(ovn, `"dns":{}`, `"mtu":1500`, 1)) // in place
			loaded("the list to be rewritten", `"mtu": 1500`)
			for range 3 {
				n.deletes(name)
				n.eventually("the list to go", func() bool { return len(n.confs()) == 0 })
				n.owner(name, ovn)
				loaded("the list to come back", "ovn-k8s-cni-overlay")
			}
			if strings.Contains(n.log.String(), "removed by another program") {
				t.Error("it says that the entry was removed")
			}
			undo()
			n.eventually("the original alone", func() bool {
				got := n.confs()
				return len(got) == 1 && got[name] == ovn
			})
		})
	}
}

// TestOwnListIsNoMoreOpen than its original, also where that is closed later.
func TestOwnListIsNoMoreOpen(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf(ovnFile, ovn)
	n.install()
	if err := os.Chmod(filepath.Join(n.options.ConfDir, ovnFile), 0o600); err != nil {
		t.Fatal(err)
	}
	n.install()
	if info, err := os.Stat(filepath.Join(n.options.ConfDir, ovnList)); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestUnusableFileBetween: containerd starts no pod because of it, and a list of ours that sorts before it would change that.
func TestUnusableFileBetween(t *testing.T) {
	t.Parallel()
	for runtime, installed := range map[conflist.Runtime]bool{conflist.Containerd: false, conflist.CRIO: true} {
		n := newNode(t)
		n.options.Runtime = runtime
		n.conf("10-a.conf", ovn)
		n.conf("10-a-x.conf", "")
		if err := n.once(); (err == nil) != installed || err != nil && !strings.Contains(err.Error(), "10-a-x.conf cannot be used") {
			t.Errorf("%s: %v", runtime, err)
		}
		if _, there := n.confs()["10-a-conf.magic-ip-address.conflist"]; there != installed {
			t.Errorf("%s: installed %t", runtime, there)
		}
	}
}

// TestOriginalThatCannotBeUsed: for as long as its owner is writing it the list stays; then the runtime sees what there is.
func TestOriginalThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf(ovnFile, ovn)
	n.install()
	n.put(filepath.Join(n.options.ConfDir, ovnFile), "{")
	d, err := conflist.Read(n.options.ConfDir, conflist.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := conflist.Key{Agent: n.config.Name, RuntimeDir: n.options.RuntimeDir, Selectors: n.config.Selectors}
	if plan, err := d.Put(key, []string{"0.4.0"}); plan.Again == 0 || !plan.Empty() {
		t.Errorf("again %s, changes %v, %v", plan.Again, plan.Paths(), err)
	}
	n.conf(ovnFile, "{") // an hour ago
	if err := n.once(); err == nil || !strings.Contains(err.Error(), ovnFile+" cannot be used") {
		t.Errorf("install: %v", err)
	}
	n.want("the list has gone", map[string]string{ovnFile: "{"}, n.confs())
}

// TestThickMultus refers to the primary's file by its path, which leads to a list for as long as it does so, whatever
// the primary and we do.
func TestThickMultus(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf(ovnFile, ovn)
	n.install()
	multus := fmt.Sprintf(`{"cniVersion":"0.4.0","name":"multus-cni-network","clusterNetwork":"/host/etc/cni/net.d/%s","type":"multus-shim"}`, ovnList)
	n.conf("00-multus.conf", multus)
	const multusList = "00-multus-conf.magic-ip-address.conflist"
	want := func(when string, lists map[string]string) {
		t.Helper()
		got := n.confs()
		for name, chain := range lists {
			if is := strings.Join(n.chain(name), " "); is != chain {
				t.Errorf("%s: %s has the plugins %q, want %q", when, name, is, chain)
			}
			delete(got, name)
		}
		delete(got, "00-multus.conf")
		delete(got, ovnFile)
		if len(got) > 0 {
			t.Errorf("%s: %v", when, got)
		}
	}
	n.install()
	want("taken up by Multus", map[string]string{multusList: "multus-shim magic-ip-address", ovnList: "ovn-k8s-cni-overlay"})
	n.deletes(ovnFile)
	n.install()
	want("the primary stops", map[string]string{multusList: "multus-shim magic-ip-address"})
	n.conf(ovnFile, ovn)
	n.install()
	want("the primary starts", map[string]string{multusList: "multus-shim magic-ip-address", ovnList: "ovn-k8s-cni-overlay"})
	n.uninstall()
	want("uninstalled", map[string]string{ovnList: "ovn-k8s-cni-overlay"})
	n.install()
	n.conf("00-multus.conf", strings.Replace(multus, ovnList, ovnFile, 1))
	n.install()
	want("Multus refers to the primary's own file", map[string]string{multusList: "multus-shim magic-ip-address"})
	n.deletes("00-multus.conf")
	n.install()
	want("Multus has gone", map[string]string{ovnList: "ovn-k8s-cni-overlay magic-ip-address"})
	n.uninstall()
	n.want("uninstalled at the end", map[string]string{ovnFile: ovn}, n.confs())
}

// TestThinMultus copies the first list that is not its own, and would call itself if that were one that calls Multus.
func TestThinMultus(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	const flannel = `{"cniVersion":"0.3.1","name":"cbr0","plugins":[{"type":"flannel"}]}`
	n.conf("10-flannel.conflist", flannel)
	// As https://github.com/k8snetworkplumbingwg/multus-cni/blob/master/cmd/thin_entrypoint/main.go does.
	multus := func() {
		t.Helper()
		entries, err := os.ReadDir(n.options.ConfDir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); (ext == ".conf" || ext == ".conflist") && !strings.HasPrefix(e.Name(), "00-multus.conf") {
				if strings.Contains(n.confs()[e.Name()], "multus") {
					t.Fatalf("Multus would call itself by %s", e.Name())
				}
				n.conf("00-multus.conf", `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus","delegates":[`+n.confs()[e.Name()]+`]}`)
				return
			}
		}
	}
	for range 3 {
		multus()
		n.install()
	}
	if got := n.confs()["00-multus.conf"]; !strings.Contains(got, `"type":"magic-ip-address"`) {
		t.Errorf("the default network of Multus has no entry:\n%s", got)
	}
	n.uninstall()
	multus()
	n.want("uninstalled", map[string]string{
		"10-flannel.conflist": flannel,
		"00-multus.conf":      `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus","delegates":[` + flannel + `]}`,
	}, n.confs())
}

// TestNodeOfTheVersionBefore, which renamed the original: it comes back, with each agent's key in the new list, whoever is first.
func TestNodeOfTheVersionBefore(t *testing.T) {
	t.Parallel()
	oldList := func(n *node) string {
		return `{"cniVersion":"0.4.0","name":"ovn-kubernetes","plugins":[` + ovn + `,{"type":"magic-ip-address","runtimeDir":"` + n.options.RuntimeDir + `","selectors":{
"default.magic-ip":[{"namespace":"default","selector":"app=old"}],"other":[{"namespace":"default","selector":"app=other"}]}}]}`
	}
	t.Run("installed again", func(t *testing.T) {
		t.Parallel()
		n := newNode(t)
		n.conf("10-ovn-kubernetes.conflist", oldList(n))
		n.conf(ovnFile+".magic-ip-address", ovn)
		n.install()
		got := n.confs()
		if list := got[ovnList]; len(got) != 2 || got[ovnFile] != ovn || !strings.Contains(list, "app=echo") || !strings.Contains(list, "app=other") {
			t.Errorf("%v", got)
		}
		n.uninstall()
		n.config.Name = "other"
		n.uninstall()
		n.want("uninstalled", map[string]string{ovnFile: ovn}, n.confs())
	})
	t.Run("uninstalled", func(t *testing.T) {
		t.Parallel()
		n := newNode(t)
		n.conf("10-ovn-kubernetes.conflist", oldList(n))
		n.conf(ovnFile+".magic-ip-address", ovn)
		n.uninstall()
		if got := n.confs(); len(got) != 2 || got[ovnFile] != ovn || !strings.Contains(got[ovnList], "app=other") || strings.Contains(got[ovnList], "app=old") {
			t.Errorf("%v", got)
		}
		n.config.Name = "other"
		n.uninstall()
		n.want("uninstalled", map[string]string{ovnFile: ovn}, n.confs())
	})
	t.Run("its list is referred to", func(t *testing.T) {
		t.Parallel()
		n := newNode(t)
		n.conf("10-ovn-kubernetes.conflist", oldList(n))
		n.conf(ovnFile+".magic-ip-address", ovn)
		n.conf("00-multus.conf", `{"cniVersion":"0.4.0","name":"m","type":"multus-shim","clusterNetwork":"/host/etc/cni/net.d/10-ovn-kubernetes.conflist"}`)
		n.install()
		if chain := n.chain("10-ovn-kubernetes.conflist"); strings.Join(chain, " ") != "ovn-k8s-cni-overlay" || n.confs()[ovnFile] != ovn {
			t.Errorf("%v: %v", chain, n.confs())
		}
	})
}

// TestVersionLowered by hand to one that the plugin does not speak: with the entry no pod would start.
func TestVersionLowered(t *testing.T) {
	t.Parallel()
	lowered := map[string][2]string{
		"10-a.conflist": {simple, strings.Replace(simple, "1.0.0", "0.2.0", 1)},
		ovnFile:         {ovn, strings.Replace(ovn, "0.4.0", "0.2.0", 1)},
		"10-b.conflist": {simple, strings.Replace(simple, "1.0.0", "9.9.9", 1)},
		"10-c.conflist": {simple, strings.Replace(simple, "  \"cniVersion\": \"1.0.0\",\n", "", 1)},
	}
	for name, versions := range lowered {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			n.conf(name, versions[0])
			n.watch()
			entries := func() (found int) {
				for name, content := range n.confs() {
					if !conflist.IsOurs(name) {
						found += strings.Count(content, `"magic-ip-address"`)
					}
				}
				return found
			}
			n.eventually("the entry", func() bool { return entries() == 1 })
			path := filepath.Join(n.options.ConfDir, name)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			after := versions[1]
			if filepath.Ext(name) == ".conflist" { // edited with the entry in it
				after = string(data)
				switch name {
				case "10-a.conflist":
					after = strings.Replace(after, "1.0.0", "0.2.0", 1)
				case "10-b.conflist":
					after = strings.Replace(after, "1.0.0", "9.9.9", 1)
				default:
					after = strings.Replace(after, "  \"cniVersion\": \"1.0.0\",\n", "", 1)
				}
			}
			n.owner(name, after)
			n.eventually("the entry to go", func() bool { return entries() == 0 })
			n.eventually("nothing else to be changed", func() bool {
				got := n.confs()
				return len(got) == 1 && got[name] == versions[1]
			})
			n.eventually("to say so", func() bool { return strings.Contains(n.log.String(), "pods would fail with the entry in it") })
			record, err := runtimedir.New(n.options.RuntimeDir).Installer(n.config.Name).ReadRecord()
			if err != nil || !strings.Contains(record.LastError, "cniVersion is") {
				t.Errorf("%+v, %v", record, err)
			}
			n.owner(name, versions[0])
			n.eventually("the entry to come back", func() bool { return entries() == 1 && len(n.confs()) <= 2 })
		})
	}
}

// TestAnotherFileSortsFirst: nobody has removed the entry then, and nothing is put off.
func TestAnotherFileSortsFirst(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("50-a.conflist", simple)
	n.watch()
	for i := 40; i > 30; i-- {
		name := fmt.Sprintf("%d-b.conflist", i)
		n.owner(name, simple)
		n.eventually("the entry in "+name, func() bool { return strings.Contains(n.confs()[name], entry.Type) })
	}
	if log := n.log.String(); strings.Contains(log, "removed by another program") {
		t.Error(log)
	}
}

// TestRuntimes: what containerd and CRI-O do with a list whose plugins are not installed.
func TestRuntimes(t *testing.T) {
	t.Parallel()
	for runtime, want := range map[conflist.Runtime]string{conflist.Containerd: "05-b.conflist", conflist.CRIO: "10-a.conflist", conflist.Auto: "05-b.conflist"} {
		n := newNode(t)
		n.options.Runtime = runtime
		n.put(filepath.Join(n.options.BinDir, "bridge"), "")
		n.conf("05-b.conflist", strings.Replace(simple, "bridge", "cilium-cni", 1))
		n.conf("10-a.conflist", simple)
		n.install()
		for name, content := range n.confs() {
			if strings.Contains(content, entry.Type) != (name == want) {
				t.Errorf("%s: the entry is in %s", runtime, name)
			}
		}
		record, err := runtimedir.New(n.options.RuntimeDir).Installer(n.config.Name).ReadRecord()
		if notes := strings.Join(record.Notes, "\n"); err != nil || strings.Contains(notes, "names plugins that are not in") != (runtime != conflist.Containerd) {
			t.Errorf("%s: %q, %v", runtime, notes, err)
		}
	}
}

// TestLockedByOthers: a process that can only read the directories has no lock that an installer waits for.
func TestLockedByOthers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.conf("10-a.conflist", simple)
	for _, dir := range []string{n.options.ConfDir, n.options.BinDir} {
		file, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = file.Close() }()
		if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
	}
	passed := lab.Stopwatch()
	n.install()
	if took := passed(); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	n.uninstall()
	for _, dir := range []string{n.options.ConfDir, n.options.BinDir} {
		for name := range n.read(dir) {
			if conflist.IsOurs(name) {
				t.Errorf("%s is left in %s", name, dir)
			}
		}
	}
}

// TestRemoveFails: what cannot be removed is an error, whatever keeps it there.
func TestRemoveFails(t *testing.T) {
	t.Parallel()
	remove := func(n *node, dir, recorded string) error {
		return Remove(t.Context(), dir, conflist.Options{}, n.options.RuntimeDir, n.config.Name, recorded, n.options.Log)
	}
	t.Run("a file that is no JSON", func(t *testing.T) {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.install()
		n.conf("10-a.conflist", n.confs()["10-a.conflist"]+"}")
		if err := remove(n, n.options.ConfDir, ""); err == nil || !strings.Contains(err.Error(), "10-a.conflist") || !strings.Contains(err.Error(), "correct it or remove it") {
			t.Error(err)
		}
	})
	t.Run("nothing but the entry", func(t *testing.T) {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.install()
		n.conf("10-a.conflist", strings.NewReplacer(`{"type": "bridge"},`, "", "/run/magic-ip-address", n.options.RuntimeDir).Replace(n.confs()["10-a.conflist"]))
		if err := remove(n, n.options.ConfDir, ""); err == nil || !strings.Contains(err.Error(), "its only plugin is ours") {
			t.Error(err)
		}
	})
	t.Run("a link that leads out", func(t *testing.T) {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.install()
		path := filepath.Join(n.options.ConfDir, "10-a.conflist")
		if err := errors.Join(os.Rename(path, filepath.Join(n.options.RuntimeDir, "moved")), os.Symlink(filepath.Join(n.options.RuntimeDir, "moved"), path)); err != nil {
			t.Fatal(err)
		}
		if err := remove(n, n.options.ConfDir, path); err == nil || !strings.Contains(err.Error(), "leads out of the directory") {
			t.Error(err)
		}
	})
	t.Run("another directory", func(t *testing.T) {
		n := newNode(t)
		n.conf("10-a.conflist", simple)
		n.install()
		recorded := filepath.Join(n.options.ConfDir, "10-a.conflist")
		for _, dir := range []string{filepath.Join(t.TempDir(), "nowhere"), t.TempDir()} {
			if err := remove(n, dir, recorded); err == nil || !strings.Contains(err.Error(), "--cni-conf-dir") {
				t.Errorf("%s: %v", dir, err)
			}
		}
		if err := remove(n, n.options.ConfDir, recorded); err != nil {
			t.Error(err)
		}
	})
	t.Run("nothing there", func(t *testing.T) {
		n := newNode(t)
		if err := errors.Join(remove(n, n.options.ConfDir, ""), os.Remove(n.options.ConfDir)); err != nil {
			t.Fatal(err)
		}
		if err := remove(n, n.options.ConfDir, filepath.Join(n.options.ConfDir, "10-a.conflist")); err != nil {
			t.Error(err)
		}
	})
}

// TestLinks: a link is followed for as long as it stays in the directory, in whatever words.
func TestLinks(t *testing.T) {
	t.Parallel()
	for name, target := range map[string]string{
		"beside": "real", "with a dot": "./real", "down and up": "sub/../real", "up and down": "../net.d/real", "absolute": "DIR/real", "in a folder": "sub/real", "twice": "first",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			dir := n.options.ConfDir
			file := filepath.Join(dir, "real")
			if name == "in a folder" {
				file = filepath.Join(dir, "sub", "real")
			}
			link := filepath.Join(dir, "10-a.conflist")
			if err := errors.Join(os.Mkdir(filepath.Join(dir, "sub"), 0o755), os.WriteFile(file, []byte(simple), 0o640), os.Symlink("./real", filepath.Join(dir, "first")),
				os.Symlink(strings.Replace(target, "DIR", dir, 1), link)); err != nil {
				t.Fatal(err)
			}
			n.install()
			if data, err := os.ReadFile(file); err != nil || !strings.Contains(string(data), entry.Type) {
				t.Errorf("%v:\n%s", err, data)
			}
			if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
				t.Errorf("it is no link any more: %v, %v", info, err)
			}
			n.uninstall()
			if data, err := os.ReadFile(file); err != nil || string(data) != simple {
				t.Errorf("%v:\n%s", err, data)
			}
			if info, err := os.Stat(file); err != nil || info.Mode() != 0o640 {
				t.Errorf("%v, %v", info, err)
			}
		})
	}
}
