package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/magic-ip-address/magic-ip-address/integration/lab"
	"github.com/magic-ip-address/magic-ip-address/plugin/runtimedir"
)

// The other of two releases on a node is hostile: its agent is root in a container without capabilities, and may write
// agents/<otherName>/ and nothing else of the runtime directory, which it sees read-only.
const (
	otherName = "default.hostile"
	hostile   = lab.RuntimeDir + "/agents/" + otherName
	bait      = "/run/bait"
)

// fileLimit is how long a pod may be kept at most.
const fileLimit = 2 * time.Second

// hostileNode is a node with the directories that the chart mounts, and files outside of them that must not be touched.
func hostileNode(t *testing.T) *lab.Node {
	t.Helper()
	node := newNode(t, "10-bridge.conflist")
	kubelet(t, node)
	return node
}

// kubelet makes the directories that the chart mounts, as kubelet does, and the baits.
func kubelet(t *testing.T, node *lab.Node) {
	t.Helper()
	runIn(t, node, fmt.Sprintf(`mkdir -p %[1]s/plugin %[1]s/agents/%[2]s %[1]s/agents/%[3]s %[1]s/install/%[2]s %[1]s/install/%[3]s
chmod -R 755 %[1]s
mkdir %[4]s
for name in text empty json; do echo "$name" >%[4]s/$name; done
echo '{"version": 1, "attachments": []}' >%[4]s/json
: >%[4]s/empty`, lab.RuntimeDir, agentName, otherName, bait))
}

func runIn(t *testing.T, node *lab.Node, script string) string {
	t.Helper()
	out, err := node.Run(t.Context(), "sh", "-ec", script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// inContainer runs a script as the hostile agent.
func inContainer(t *testing.T, node *lab.Node, script string) string {
	t.Helper()
	out, err := node.Run(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-ec",
		fmt.Sprintf(`mount --bind -o ro %[1]s %[1]s
mount --bind %[2]s %[2]s
mount -o remount,bind,rw %[2]s
cd %[2]s
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs sh -ec "$0"`, lab.RuntimeDir, hostile), script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// baits is all that must not change of what is outside.
func baits(t *testing.T, node *lab.Node) string {
	t.Helper()
	return runIn(t, node, "stat --format '%n %s %Y %a %u' "+bait+" "+bait+"/*; cat "+bait+"/*; stat --format '%n %t %T %a' /dev/zero /dev/null")
}

// obstacles are what the hostile agent puts in place of a file, named $file. Links are made by root where the container
// has no other way: between its mounts there is none for a hard link, and devices take a capability.
var obstacles = map[string]struct {
	script string
	asRoot bool
}{
	"symbolic link to a file":      {script: "ln -s " + bait + "/json $file"},
	"symbolic link to nothing":     {script: "ln -s " + bait + "/new $file"},
	"symbolic link to a directory": {script: "ln -s " + bait + " $file"},
	"symbolic link to a device":    {script: "ln -s /dev/zero $file"},
	"symbolic link to a FIFO":      {script: "mkfifo fifo.$file; ln -s fifo.$file $file"},
	"hard link":                    {script: "ln " + bait + "/json $file", asRoot: true},
	"hard link in the directory":   {script: "echo '{\"version\": 1}' >json.$file; ln json.$file $file"},
	"FIFO":                         {script: "mkfifo $file"},
	"directory":                    {script: "mkdir $file; : >$file/full"},
	"device":                       {script: "mknod $file c 1 5", asRoot: true},
	"sparse file":                  {script: "truncate -s 1T $file"},
	"another user's file":          {script: "echo '{}' >$file; chown 65534 $file", asRoot: true},
	"file nobody can read":         {script: "echo '{}' >$file; chmod 0 $file"},
	"garbage":                      {script: "head -c 1000000 /dev/urandom >$file"},
	"deep JSON":                    {script: "head -c 1000000 /dev/zero | tr '\\0' '[' >$file"},
	"nothing":                      {script: ":"},
}

func obstruct(t *testing.T, node *lab.Node, dir, obstacle string, files ...string) {
	t.Helper()
	o := obstacles[obstacle]
	script := fmt.Sprintf("for file in %s; do rm -rf $file fifo.$file json.$file; %s; done", strings.Join(files, " "), o.script)
	if o.asRoot || dir != hostile {
		runIn(t, node, "mkdir -p "+dir+"; cd "+dir+"; "+script)
	} else {
		inContainer(t, node, script)
	}
}

// agentFiles are all names that an agent has, temporary ones included.
var agentFiles = []string{"status.json", "claims.json", "pods.json", "memory.json", "status.json.tmp", "claims.json.tmp", "pods.json.tmp", "memory.json.tmp"}

// hostileAgent: whatever an agent leaves in its directory, pods start and stop in time, are recorded, and nothing outside
// is touched.
func hostileAgent(t *testing.T) {
	t.Parallel()
	node := hostileNode(t)
	before := baits(t, node)
	// It lives, so that what it says is asked for; and it does not.
	lock, err := runtimedir.New(node.Path(lab.RuntimeDir)).Agent(otherName).Lock()
	if err != nil {
		t.Fatal(err)
	}
	for _, live := range []bool{true, false} {
		files := agentFiles
		if !live {
			if err := lock.Close(); err != nil {
				t.Fatal(err)
			}
			files = append(files, "lock", "live")
		}
		for obstacle := range obstacles {
			obstruct(t, node, hostile, obstacle, files...)
			if live && obstacle == "nothing" {
				continue
			}
			runIn(t, node, fmt.Sprintf("test -L %[1]s/status.json || test -e %[1]s/status.json || echo '{}' >%[1]s/status.json", hostile)) // it is an agent all the same
			startsAndStops(t, node, fmt.Sprintf("%s, live %v", obstacle, live))
			if after := baits(t, node); after != before {
				t.Fatalf("%s: outside has changed, before:\n%s\nafter:\n%s", obstacle, before, after)
			}
		}
	}
}

// swappedFiles: what a name leads to changes all the time, between what is asked of it and what is done with it.
func swappedFiles(t *testing.T) {
	t.Parallel()
	node := hostileNode(t)
	before := baits(t, node)
	lock, err := runtimedir.New(node.Path(lab.RuntimeDir)).Agent(otherName).Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	inBackground(t, node, "cd "+hostile+`
echo '{"version": 1}' >regular
mkfifo fifo
while :; do for file in `+strings.Join(agentFiles, " ")+`; do
  ln regular new.$file; mv new.$file $file
  ln -s `+bait+`/json new.$file; mv new.$file $file
  ln fifo new.$file; mv new.$file $file
  cp regular new.$file; mv new.$file $file
done; done`)
	for i := range 10 {
		startsAndStops(t, node, fmt.Sprint("pod ", i))
	}
	if after := baits(t, node); after != before {
		t.Fatalf("outside has changed, before:\n%s\nafter:\n%s", before, after)
	}
}

// startsAndStops adds and deletes a pod.
func startsAndStops(t *testing.T, node *lab.Node, when string) {
	t.Helper()
	pod := lab.Pod{Name: "a", Labels: echo}
	command := func(name string, call func(ctx *testing.T) error) {
		t.Helper()
		began := time.Now()
		if err := call(t); err != nil {
			t.Errorf("%s: %s: %v", when, name, err)
		}
		if took := lab.WorkingTime(began, time.Now()); took > fileLimit {
			t.Errorf("%s: %s took %s", when, name, took)
		}
	}
	command("ADD", func(t *testing.T) error { _, err := node.Add(t.Context(), "bridge", pod); return err })
	wantPods(t, node, "a")
	command("DEL", func(t *testing.T) error { return node.Del(t.Context(), "bridge", pod) })
	wantPods(t, node)
}

// hostileReports: what a live agent reports within the format. It may not keep other agents' pods from being recorded, nor
// drop records of pods that are there.
func hostileReports(t *testing.T) {
	t.Parallel()
	node := hostileNode(t)
	dir := runtimedir.New(node.Path(lab.RuntimeDir))
	agent := dir.Agent(otherName)
	lock, err := agent.Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	standing := lab.Pod{Name: "standing", Labels: echo}
	add(t, node, "bridge", standing)
	pods := runtimedir.Pods{
		Dead:   []runtimedir.Key{{ContainerID: standing.ContainerID(), IfName: "eth0"}},
		Labels: []runtimedir.PodLabels{{PodID: runtimedir.PodID{UID: "uid-default-new"}, Labels: map[string]string{"app": "other"}}},
	}
	for i := range 5000 {
		pods.Dead = append(pods.Dead, runtimedir.Key{ContainerID: fmt.Sprint(i), IfName: "eth0"})
	}
	_, err = agent.WritePods(pods)
	if err = errors.Join(err, agent.WriteStatus(runtimedir.Status{})); err != nil {
		t.Fatal(err)
	}
	add(t, node, "bridge", lab.Pod{Name: "new"})
	wantPods(t, node, "new", "standing")
	startsAndStopsBeside(t, node, "new", "standing")
}

func startsAndStopsBeside(t *testing.T, node *lab.Node, others ...string) {
	t.Helper()
	pod := lab.Pod{Name: "z", Labels: echo}
	add(t, node, "bridge", pod)
	wantPods(t, node, append(others, "z")...)
	del(t, node, "bridge", pod)
	wantPods(t, node, others...)
}

// lockAll is this test binary as an unprivileged process that locks everything that it can open below the directories
// given, again and again. It says when it has gone round.
const lockAll = "lock-all"

func lockEverything(dirs []string) error {
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
		return err
	}
	held := map[[2]uint64]*os.File{}
	for round := 0; ; round++ {
		for _, dir := range dirs {
			_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				for _, flags := range []int{os.O_RDWR, os.O_RDONLY} {
					file, err := os.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
					if err != nil {
						continue
					}
					var stat unix.Stat_t
					if err := unix.Fstat(int(file.Fd()), &stat); err != nil || held[[2]uint64{stat.Dev, stat.Ino}] != nil {
						_ = file.Close()
						break
					}
					if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
						held[[2]uint64{stat.Dev, stat.Ino}] = file
					}
					for _, kind := range []int16{unix.F_WRLCK, unix.F_RDLCK} {
						if unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind}) == nil {
							held[[2]uint64{stat.Dev, stat.Ino}] = file
							break
						}
					}
					_, _ = unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
					break
				}
				return err
			})
		}
		if round == 0 {
			fmt.Println("locked", len(held))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// lockedByAll starts that process and returns when it has what it can have.
func lockedByAll(t *testing.T, node *lab.Node, dirs ...string) {
	t.Helper()
	process, err := node.Start(os.Args[0], append([]string{lockAll}, dirs...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(process.Kill)
	err = lab.Eventually(patience(t), func() error {
		if !strings.Contains(process.Log(), "locked ") {
			return fmt.Errorf("it says %q", process.Log())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	wantLocked(t, node.Path(dirs[0]))
}

// wantLocked waits until another process has locked a directory.
func wantLocked(t *testing.T, path string) {
	t.Helper()
	err := lab.Eventually(patience(t), func() error {
		dir, err := os.Open(path)
		if err != nil {
			return err
		}
		defer func() { _ = dir.Close() }()
		if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return nil
		}
		return fmt.Errorf("%s is not locked", path)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// hostileNeighbour: nor are agents of other releases, nor those who ask for their state. hostileNode's baits are on its node.
func hostileNeighbour(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "nftables", "bridge")
	kubelet(t, w.Node)
	w.start(config())
	before := baits(t, w.Node)
	lock, err := runtimedir.New(w.Path(lab.RuntimeDir)).Agent(otherName).Lock()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	for obstacle := range obstacles {
		obstruct(t, w.Node, hostile, obstacle, agentFiles...)
		w.addPod("bridge", target("a"))
		w.awaitEndpoint("a")
		for _, command := range []string{"status", "doctor"} {
			ctx, cancel := lab.Patience(t.Context(), 10*time.Second)
			out, err := w.RunAgent(ctx, command, "--runtime-dir", lab.RuntimeDir)
			if ctx.Err() != nil {
				t.Errorf("%s: %s hangs", obstacle, command)
			}
			if !strings.Contains(out, agentName) {
				t.Errorf("%s: %s prints %q (%v)", obstacle, command, out, err)
			}
			cancel()
		}
		del(t, w.Node, networkOf("bridge").name, target("a"))
		w.awaitEndpoint("")
		if after := baits(t, w.Node); after != before {
			t.Fatalf("%s: outside has changed, before:\n%s\nafter:\n%s", obstacle, before, after)
		}
	}
}

// hostileFilesOfAnInstaller: whatever is in place of an installer's files, or of the files in its temporary names, it touches
// nothing outside, and it ends.
func hostileFilesOfAnInstaller(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	kubelet(t, s.Node)
	before := baits(t, s.Node)
	for obstacle := range obstacles {
		obstruct(t, s.Node, lab.RuntimeDir+"/install/"+agentName, obstacle, "record.json", "record.json.tmp", "live")
		obstruct(t, s.Node, hostile, obstacle, agentFiles...)
		for _, command := range [][]string{s.flags("install", "--plugin", s.plugin()), s.flags("uninstall")} {
			ctx, cancel := lab.Patience(t.Context(), 10*time.Second)
			out, err := s.RunAgent(ctx, command...)
			if ctx.Err() != nil {
				t.Errorf("%s: %s hangs", obstacle, command[0])
			}
			// A directory that is not empty is the only thing that a writer does not replace.
			if err != nil && obstacle != "directory" {
				t.Errorf("%s: %s: %v: %s", obstacle, command[0], err, out)
			}
			cancel()
		}
		if after := baits(t, s.Node); after != before {
			t.Fatalf("%s: outside has changed, before:\n%s\nafter:\n%s", obstacle, before, after)
		}
	}
}

// unprivilegedLocks: a process that sees the files of the node and may read what everybody may delays no pod, no installer
// and no agent.
func unprivilegedLocks(t *testing.T) {
	t.Parallel()
	t.Run("pods", func(t *testing.T) {
		t.Parallel()
		node := hostileNode(t)
		lockedByAll(t, node, lab.RuntimeDir)
		for i := range 5 {
			startsAndStops(t, node, fmt.Sprint("pod ", i))
		}
		if data, err := os.ReadFile(node.Path(runtimedir.New(lab.RuntimeDir).LogPath())); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("plugin.log: %s, %v", data, err)
		}
	})
	t.Run("installer", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		kubelet(t, s.Node)
		lockedByAll(t, s.Node, lab.RuntimeDir, confDir, binDir)
		for range 3 {
			for _, command := range [][]string{s.flags("install", "--plugin", s.plugin()), s.flags("uninstall")} {
				began := time.Now()
				if _, err := s.RunAgent(t.Context(), command...); err != nil {
					t.Error(err)
				}
				if took := lab.WorkingTime(began, time.Now()); took > fileLimit {
					t.Errorf("%s took %s", command[0], took)
				}
			}
		}
	})
	t.Run("agent", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, "nftables", "bridge")
		kubelet(t, w.Node)
		lockedByAll(t, w.Node, lab.RuntimeDir)
		for range 3 {
			began := time.Now()
			w.start(config())
			if took := lab.WorkingTime(began, time.Now()); took > fileLimit {
				t.Errorf("the agent took %s to start", took)
			}
			if err := w.agent.Stop(patience(t)); err != nil {
				t.Error(err)
			}
		}
	})
}

// locksOfTheOtherAgent: nor does the hostile agent, which sees all of the runtime directory, read-only.
func locksOfTheOtherAgent(t *testing.T) {
	t.Parallel()
	node := hostileNode(t)
	startsAndStops(t, node, "before")
	inBackground(t, node, `for file in plugin plugin/* install install/* agents agents/*; do
  (flock --exclusive --nonblock `+lab.RuntimeDir+`/$file sleep 1000 || :) 2>/dev/null &
done
wait`)
	for _, locked := range []string{"plugin", "install", "agents", "agents/" + agentName} {
		wantLocked(t, node.Path(lab.RuntimeDir+"/"+locked))
	}
	startsAndStops(t, node, "beside it")
	if data, err := os.ReadFile(node.Path(runtimedir.New(lab.RuntimeDir).LogPath())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("plugin.log: %s, %v", data, err)
	}
}

// inBackground is inContainer for a script that does not end.
func inBackground(t *testing.T, node *lab.Node, script string) *lab.Process {
	t.Helper()
	process, err := node.Start("unshare", "--mount", "--propagation", "private", "sh", "-ec",
		fmt.Sprintf(`mount --bind -o ro %[1]s %[1]s
mount --bind %[2]s %[2]s
mount -o remount,bind,rw %[2]s
cd %[1]s
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs sh -c "$0"`, lab.RuntimeDir, hostile), script)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(process.Kill)
	return process
}
